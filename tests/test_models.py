"""Networks against counts made by hand, transcriptions of their papers, and the accuracies of published weights."""

from __future__ import annotations

import io
from math import sqrt

import numpy as np
import pytest
import torch
from conftest import DATA, NETWORKS, needs
from test_model_forwards import images, randomized
from torch import nn
from torch.nn import functional as F

from robustlens.core.discovery import build, describe, discover
from robustlens.models.adapter import load_weights
from robustlens.results.errors import InputError

MNIST, CIFAR, TINY = (1, 28, 28), (3, 32, 32), (3, 56, 56)

# Weights of a 3×3 convolution are inputs·outputs·9; BatchNorm with scale and shift adds 2 a channel.
RESNET18 = (
    (3 * 64 * 9 + 128)
    + 4 * (64 * 64 * 9 + 128)
    + (64 * 128 * 9 + 256) + 3 * (128 * 128 * 9 + 256) + (64 * 128 + 256)
    + (128 * 256 * 9 + 512) + 3 * (256 * 256 * 9 + 512) + (128 * 256 + 512)
    + (256 * 512 * 9 + 1024) + 3 * (512 * 512 * 9 + 1024) + (256 * 512 + 1024)
    + (512 * 10 + 10)
)  # fmt: skip
# Pre-activation: BatchNorm counts the inputs of its convolution, shortcuts have none, one more stands at the end.
PREACT18 = (
    3 * 64 * 9
    + 4 * (128 + 64 * 64 * 9)
    + (128 + 64 * 128 * 9) + 3 * (256 + 128 * 128 * 9) + 64 * 128
    + (256 + 128 * 256 * 9) + 3 * (512 + 256 * 256 * 9) + 128 * 256
    + (512 + 256 * 512 * 9) + 3 * (1024 + 512 * 512 * 9) + 256 * 512
    + 1024
    + (512 * 10 + 10)
)  # fmt: skip


def resnet_convolutions(n: int) -> int:
    """Weights of the stem and of 2n convolutions in each of three stages."""
    stem = 3 * 16 * 9
    return (
        stem
        + 2 * n * 16 * 16 * 9
        + (16 * 32 + (2 * n - 1) * 32 * 32) * 9
        + (32 * 64 + (2 * n - 1) * 64 * 64) * 9
    )  # fmt: skip


def resnet_batch(n: int) -> int:
    return resnet_convolutions(n) + 2 * (16 + 2 * n * (16 + 32 + 64)) + (64 * 10 + 10)


def resnet_fixup(n: int) -> int:
    return resnet_convolutions(n) + (1 + 4 * 3 * n + 1) + (64 * 10 + 10)


def bottleneck(inputs: int, inner: int, outputs: int) -> int:
    """A block without projection: 1×1, 3×3, 1×1, each with BatchNorm."""
    return inputs * inner + inner * inner * 9 + inner * outputs + 2 * (inner + inner + outputs)


WRN50 = (
    (3 * 64 * 9 + 128)
    + bottleneck(64, 128, 256) + (64 * 256 + 512) + 2 * bottleneck(256, 128, 256)
    + bottleneck(256, 256, 512) + (256 * 512 + 1024) + 3 * bottleneck(512, 256, 512)
    + bottleneck(512, 512, 1024) + (512 * 1024 + 2048) + 5 * bottleneck(1024, 512, 1024)
    + bottleneck(1024, 1024, 2048) + (1024 * 2048 + 4096) + 2 * bottleneck(2048, 1024, 2048)
    + (2048 * 200 + 200)
)  # fmt: skip

COUNTS = [
    ("logistic", MNIST, 2, 784),
    ({"name": "logistic", "bias": True}, MNIST, 2, 785),
    ("softmax-regression", MNIST, 10, 784 * 10 + 10),
    ("softmax-regression", CIFAR, 10, 3072 * 10 + 10),
    ({"name": "softmax-regression", "bias": False}, MNIST, 10, 784 * 10),
    ("mlp", MNIST, 10, (784 * 1024 + 1024) + (1024 * 10 + 10)),
    (
        "mnist-cnn", MNIST, 10,
        (32 * 1 * 9 + 32) + (32 * 32 * 9 + 32) + (64 * 32 * 9 + 64) + (64 * 64 * 9 + 64)
        + (1024 * 200 + 200) + (200 * 200 + 200) + (200 * 10 + 10),
    ),
    (
        "cifar-cnn", CIFAR, 10,
        (64 * 3 * 9 + 64) + (64 * 64 * 9 + 64) + (128 * 64 * 9 + 128) + (128 * 128 * 9 + 128)
        + (3200 * 256 + 256) + (256 * 256 + 256) + (256 * 10 + 10),
    ),
    ("lenet", MNIST, 10, (20 * 25 + 20) + (50 * 20 * 25 + 50) + (800 * 500 + 500) + (500 * 10 + 10)),
    ("lenet-small", MNIST, 10, (16 * 16 + 16) + (32 * 16 * 16 + 32) + (1568 * 100 + 100) + (100 * 10 + 10)),
    ("lenet-small", CIFAR, 10, (16 * 3 * 16 + 16) + (32 * 16 * 16 + 32) + (2048 * 100 + 100) + (100 * 10 + 10)),
    (
        "convnet", CIFAR, 10,
        (32 * 3 * 25 + 32) + (32 * 32 * 25 + 32) + (64 * 32 * 25 + 64) + (64 * 64 * 16 + 64) + (64 * 10 + 10),
    ),
    (
        "cnn7", CIFAR, 10,
        (128 * 3 * 9 + 128) + (128 * 128 * 9 + 128) + (256 * 128 * 9 + 256) + (256 * 256 * 9 + 256)
        + (512 * 256 * 9 + 512) + (512 * 512 * 9 + 512) + (1024 * 512 * 9 + 1024) + (1024 * 10 + 10),
    ),
    ("resnet18", CIFAR, 10, RESNET18),
    ("preact-resnet18", CIFAR, 10, PREACT18),
    ("resnet56", CIFAR, 10, resnet_batch(9)),
    ("resnet110", CIFAR, 10, resnet_batch(18)),
    ({"name": "resnet56", "norm": "fixup"}, CIFAR, 10, resnet_fixup(9)),
    ({"name": "resnet110", "norm": "fixup"}, CIFAR, 10, resnet_fixup(18)),
    ("wrn50-2", TINY, 200, WRN50),
]  # fmt: skip


def test_the_arithmetic_agrees_with_published_counts():
    """kuangliu's table, akamaster's table, and torchvision's 68,883,240 with the stem and classifier exchanged."""
    assert RESNET18 == 11_173_962
    assert (resnet_batch(9), resnet_batch(18)) == (853_018, 1_727_962)
    assert WRN50 == 68_883_240 - 3 * 64 * 49 + 3 * 64 * 9 - (2048 * 1000 + 1000) + (2048 * 200 + 200)


@pytest.mark.parametrize(("settings", "shape", "classes", "count"), COUNTS)
def test_parameter_count(settings, shape, classes, count):
    with torch.device("meta"):
        model = build("model", settings).build(shape, classes)
        assert sum(p.numel() for p in model.parameters()) == count
        assert model.eval()(torch.empty(2, *shape)).shape == (2, classes)


def test_every_architecture_is_counted():
    counted = {settings if isinstance(settings, str) else settings["name"] for settings, *_ in COUNTS}
    assert counted == set(discover("model")) - {"external"}


SMALL = [
    ("softmax-regression", MNIST, 784),
    ({"name": "mlp", "hidden": 7}, MNIST, 7),
    ("mnist-cnn", (1, 16, 19), 200),
    ("cifar-cnn", (2, 16, 16), 256),
    ("lenet", (1, 16, 16), 500),
    ("lenet-small", (1, 4, 6), 100),
    ("convnet", (3, 39, 32), 64),
    ({"name": "cnn7", "width": 2}, (3, 32, 33), 16),
    ({"name": "resnet18", "width": 2}, MNIST, 16),
    ({"name": "preact-resnet18", "width": 2}, (1, 9, 5), 16),
    ({"name": "resnet56", "width": 2}, MNIST, 8),
    ({"name": "resnet110", "width": 2, "norm": "fixup"}, (1, 7, 7), 8),
    ({"name": "wrn50-2", "width": 2}, (3, 8, 8), 64),
]


@pytest.mark.parametrize(("settings", "shape", "width"), SMALL)
def test_logits_are_the_head_of_the_features(settings, shape, width):
    model = randomized(build("model", settings).build(shape, 4))
    x = images(3, shape)
    features = model.features(x)
    assert features.shape == (3, width)
    assert isinstance(model.head, nn.Linear)
    torch.testing.assert_close(features @ model.head.weight.T + (model.head.bias), model(x), rtol=1e-12, atol=1e-12)
    assert float(model(x).detach().std(0).min()) > 0


@pytest.mark.parametrize(("settings", "shape", "width"), SMALL)
def test_settings_come_back(settings, shape, width):
    plugin = build("model", settings)
    assert build("model", describe(plugin)) == plugin
    assert plugin.reference


def test_resnet_with_one_pixel_less():
    """Odd maps: the strided convolution and the subsampled shortcut have the same size."""
    for norm in ("batch", "fixup"):
        model = build("model", {"name": "resnet56", "width": 2, "norm": norm}).build((1, 29, 31), 3)
        assert model.eval()(torch.rand(2, 1, 29, 31)).shape == (2, 3)


# Initialisation


@pytest.mark.parametrize(("name", "n"), [("resnet56", 9), ("resnet110", 18)])
def test_fixup_starts_as_the_identity(name, n):
    torch.manual_seed(0)
    model = build("model", {"name": name, "norm": "fixup"}).build(CIFAR, 10)
    state = model.state_dict()
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        first = torch.cat([state[f"layer{stage}.{i}.conv1.weight"].flatten() for i in range(n)])
        wanted = sqrt(2 / (9 * channels)) * (3 * n) ** -0.5
        # The deviation of N normal numbers has a relative error of 1/√(2N): five of them.
        assert float(first.std()) == pytest.approx(wanted, rel=5 / sqrt(2 * len(first)))
        assert all(not state[f"layer{stage}.{i}.conv2.weight"].any() for i in range(n))
    x = torch.rand(2, *CIFAR) - 0.5
    assert torch.equal(model(x), torch.zeros(2, 10))
    stem = F.conv2d(x, state["conv1.weight"], padding=1).relu()
    features = model.features(x)
    torch.testing.assert_close(features[:, :16], stem[:, :, ::4, ::4].mean((2, 3)))
    assert not features[:, 16:].any()


def test_other_initialisations():
    torch.manual_seed(0)
    convnet = build("model", "convnet").build(CIFAR, 10).state_dict()
    assert not any(convnet[f"{layer}.bias"].any() for layer in ("conv1", "conv2", "conv3", "conv4", "fc"))
    for layer, inputs in (("conv1", 75), ("conv2", 800), ("conv3", 800), ("conv4", 1024), ("fc", 64)):
        weight = convnet[f"{layer}.weight"]
        assert float(weight.std()) == pytest.approx(sqrt(2 / inputs), rel=5 / sqrt(2 * weight.numel()))
    wrn = build("model", {"name": "wrn50-2", "width": 8}).build(CIFAR, 10).state_dict()
    weight = wrn["layer2.1.conv2.weight"]  # 3×3, 32 → 32: uniform within ±√(6 / (288 + 288))
    assert 0.999 < float(weight.abs().max()) / sqrt(6 / 576) <= 1


def test_dropout_twice():
    model = build("model", "cifar-cnn").build(CIFAR, 10)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.5, 0.5]
    x = torch.rand(1, *CIFAR)
    torch.manual_seed(0)
    model.train()
    assert not torch.equal(model(x), model(x))
    assert float((model.features(x) == 0).float().mean()) > 0.5  # dropped, or not active
    model.eval()
    assert torch.equal(model(x), model(x))


def test_batch_norm_of_cnn7_has_no_scale():
    model = build("model", {"name": "cnn7", "width": 2}).build(CIFAR, 10)
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(layers) == 7 and not any(m.affine for m in layers)


def test_lenet_is_odd_up_to_its_linear_layers():
    """Without biases and on images of one grey, maps are flat, pooling does nothing, and f(−x) = −f(x): no ReLU."""
    model = randomized(build("model", "lenet").build(MNIST, 10))
    for layer in ("conv1", "conv2"):
        nn.init.zeros_(getattr(model, layer).bias)
    seen = []
    model.fc1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    x = torch.full((1, *MNIST), 0.7, dtype=torch.float64)
    model(x), model(-x)
    torch.testing.assert_close(seen[0], -seen[1], rtol=1e-12, atol=1e-12)
    assert float(seen[0].min()) < -1e-3 and float(seen[0].max()) > 1e-3


# Logistic regression


@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy_of_logistic_is_softplus(bias):
    model = build("model", {"name": "logistic", "bias": bias}).build((1, 3, 3), 2).double()
    nn.init.normal_(model.fc.weight, std=5, generator=torch.Generator().manual_seed(0))
    x, labels = images(50, (1, 3, 3)), torch.arange(50) % 2
    z = x.flatten(1) @ model.fc.weight[0] + (model.fc.bias[0] if bias else 0)
    signs = 2.0 * labels - 1
    got = F.cross_entropy(model(x), labels, reduction="none").detach()
    torch.testing.assert_close(got, torch.log1p(torch.exp(-signs * z)).detach(), rtol=1e-12, atol=1e-12)
    assert float(got.max()) > 1 > 0.1 > float(got.min())


# Normalisation


def normalized(x, channels, **settings):
    return build("model", {"name": "softmax-regression", **settings}).normalizer(channels)(x)


def test_channel_constants_against_numpy():
    x = images(4, CIFAR)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    wanted = (x.numpy() - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    np.testing.assert_allclose(normalized(x, 3, mean=mean, std=std), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(normalized(x, 3, mean=[0.5]), x.numpy() - 0.5, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(normalized(x, 3, std=[0.25]), x.numpy() * 4, rtol=1e-6)
    assert torch.equal(normalized(x, 3), x)
    assert torch.equal(normalized(x, 3, mean=[], std=[]), x)


def test_image_standardization_against_numpy():
    x = images(4, CIFAR)
    x[0] = 0.3  # one grey
    x[1] = 0.5 + 1e-3 * x[1]  # deviation below 1/√n
    floor = 1 / np.sqrt(3 * 32 * 32)
    for got, image in zip(normalized(x, 3, per_image=True), x.numpy(), strict=True):
        np.testing.assert_allclose(got, (image - image.mean()) / max(image.std(), floor), rtol=1e-9, atol=1e-9)


def test_image_standardization_has_gradients():
    x = images(2, (1, 3, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalized(x, 1, per_image=True), x)
    grey = torch.full((1, 1, 3, 3), 0.4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(normalized(grey, 1, per_image=True)[0, 0, 0, 0], grey)
    # At one grey the divisor is constant, 1/√9: the slope of 3·(x − mean).
    wanted = torch.full((3, 3), -3 / 9, dtype=torch.float64)
    wanted[0, 0] += 3
    torch.testing.assert_close(grad[0, 0], wanted)


def test_normalisation_adds_no_names():
    plain = build("model", "mnist-cnn").build(MNIST, 10).state_dict()
    constants = build("model", {"name": "mnist-cnn", "mean": [0.1], "std": [0.3]}).build(MNIST, 10)
    assert list(constants.state_dict()) == list(plain)
    layers = ("conv1", "conv2", "conv3", "conv4", "fc1", "fc2", "fc3")
    assert set(plain) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    other = build("model", "mnist-cnn").build(MNIST, 10)
    other.load_state_dict(constants.state_dict())
    x = torch.rand(2, *MNIST)
    torch.testing.assert_close(constants(x), other((x - 0.1) / 0.3), rtol=1e-4, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("settings", "shape", "classes", "words"),
    [
        ("logistic", MNIST, 3, "expected 2 classes, got 3"),
        ("softmax-regression", MNIST, 1, "expected 2 classes or more, got 1"),
        ("mlp", (28, 28), 10, r"expected \(channels, height, width\), got \(28, 28\)"),
        ("resnet18", (0, 32, 32), 10, "channels, height, width"),
        ("mnist-cnn", (1, 15, 28), 10, "at least 16×16 pixels, got 15×28"),
        ("cifar-cnn", (3, 15, 15), 10, "at least 16×16 pixels, got 15×15"),
        ("lenet", (1, 15, 16), 10, "at least 16×16"),
        ("lenet-small", (1, 3, 4), 10, "at least 4×4"),
        ("convnet", MNIST, 10, "at least 32×32 pixels, got 28×28"),
        ("convnet", (3, 40, 32), 10, "at most 39×39 pixels, got 40×32"),
        ("cnn7", MNIST, 10, "at least 32×32 pixels, got 28×28"),
        ({"name": "mlp", "mean": [0.5, 0.5], "std": [0.5]}, CIFAR, 10, r"mean: expected 1 value or 3 .*, got 2"),
        ({"name": "mlp", "std": [0.5, 0.0, 0.5]}, CIFAR, 10, "std: expected positive values"),
        ({"name": "mlp", "std": [0.5], "per_image": True}, CIFAR, 10, "per_image: expected no mean or std"),
    ],
)
def test_requests_that_cannot_be_met(settings, shape, classes, words):
    with pytest.raises(InputError, match=words) as caught:
        build("model", settings).build(shape, classes)
    assert "\n" not in str(caught.value)


def test_unknown_norm():
    with pytest.raises(InputError, match="batch"):
        build("model", {"name": "resnet56", "norm": "layer"})


# Published weights


def mnist_test() -> tuple[torch.Tensor, torch.Tensor]:
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(DATA / "mnist" / "test-00000-of-00001.parquet").to_pydict()
    pixels = np.stack([np.array(Image.open(io.BytesIO(image["bytes"]))) for image in table["image"]])
    return torch.from_numpy(pixels)[:, None].float() / 255, torch.tensor(table["label"])


@needs(DATA / "mnist", NETWORKS)
def test_published_networks_have_their_published_accuracy():
    """The networks behind table 1 of Wu and Yu, over all 10,000 test images."""
    x, y = mnist_test()
    x = x.contiguous(memory_format=torch.channels_last)
    assert len(y) == 10_000
    published = [
        ("mnist-cnn", "mnist-cnn-std", 9914),
        ("mnist-cnn", "mnist-cnn-lcr", 9929),
        ("mnist-cnn", "mnist-cnn-amr", 9925),
        ("softmax-regression", "mnist-lr-std", 9255),
    ]
    for name, file, wanted in published:
        model = build("model", name).build(MNIST, 10).eval()
        load_weights(model, NETWORKS / f"{file}.safetensors")
        model = model.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            correct = sum(
                int((model(xs).argmax(1) == ys).sum()) for xs, ys in zip(x.split(50), y.split(50), strict=True)
            )
        assert correct == wanted, file
