"""Networks against their papers: forward passes written out by tensor name."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustlens.core.discovery import build

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def randomized(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, every parameter and BatchNorm statistic random, none zero."""
    gen = torch.Generator().manual_seed(3)
    model = model.double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=gen, dtype=torch.float64)
            if tensor.dim() > 1:  # about He-normal, so that images are told apart behind fifty layers
                tensor.copy_((noise - 0.5) * 4 / sqrt(tensor[0].numel()))
            else:
                tensor.copy_(noise + 0.5 if name.endswith(("weight", "var")) else (noise - 0.5) / 5)
    return model


def images(n: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# The forward passes, written out by tensor name.


def batch_norm(s, name, x):
    mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
    out = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    if f"{name}.weight" in s:
        out = out * s[f"{name}.weight"][:, None, None] + s[f"{name}.bias"][:, None, None]
    return out


def conv(s, name, x, stride=1, padding=1):
    return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), stride, padding)


def linear(s, name, x):
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def blocks(*counts):
    """Name and stride of every block; the first of each stage but the first halves the map."""
    for stage, count in enumerate(counts, start=1):
        for i in range(count):
            yield f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1


def by_hand_resnet18(s, x):
    x = batch_norm(s, "bn1", conv(s, "conv1", x)).relu()
    for b, stride in blocks(2, 2, 2, 2):
        out = batch_norm(s, f"{b}.bn1", conv(s, f"{b}.conv1", x, stride)).relu()
        out = batch_norm(s, f"{b}.bn2", conv(s, f"{b}.conv2", out))
        if stride == 2:
            x = batch_norm(s, f"{b}.shortcut.1", conv(s, f"{b}.shortcut.0", x, 2, 0))
        x = (out + x).relu()
    return linear(s, "linear", F.avg_pool2d(x, 4).flatten(1))


def by_hand_preact(s, x):
    x = conv(s, "conv1", x)
    for b, stride in blocks(2, 2, 2, 2):
        active = batch_norm(s, f"{b}.bn1", x).relu()
        out = conv(s, f"{b}.conv1", active, stride)
        out = conv(s, f"{b}.conv2", batch_norm(s, f"{b}.bn2", out).relu())
        x = out + (conv(s, f"{b}.shortcut.0", active, 2, 0) if stride == 2 else x)
    return linear(s, "linear", F.avg_pool2d(batch_norm(s, "bn", x).relu(), 4).flatten(1))


def by_hand_resnet56(s, x):
    x = batch_norm(s, "bn1", conv(s, "conv1", x)).relu()
    for b, stride in blocks(9, 9, 9):
        out = batch_norm(s, f"{b}.bn1", conv(s, f"{b}.conv1", x, stride)).relu()
        out = batch_norm(s, f"{b}.bn2", conv(s, f"{b}.conv2", out))
        if stride == 2:
            x = F.avg_pool2d(x, 1, stride=2)
            none = torch.zeros_like(x)[:, : x.shape[1] // 2]
            x = torch.cat([none, x, none], dim=1)
        x = (out + x).relu()
    return linear(s, "linear", F.avg_pool2d(x, 8).flatten(1))


def by_hand_fixup(s, x):
    x = (conv(s, "conv1", x) + s["bias1"]).relu()
    for b, stride in blocks(9, 9, 9):
        out = (conv(s, f"{b}.conv1", x + s[f"{b}.bias1a"], stride) + s[f"{b}.bias1b"]).relu()
        out = conv(s, f"{b}.conv2", out + s[f"{b}.bias2a"]) + s[f"{b}.bias2b"]
        if stride == 2:
            x = F.avg_pool2d(x + s[f"{b}.bias1a"], 1, stride=2)
            x = torch.cat([x, 0 * x], dim=1)
        x = (out + x).relu()
    return linear(s, "fc", F.avg_pool2d(x, 8).flatten(1) + s["bias2"])


def by_hand_wrn(s, x):
    x = batch_norm(s, "bn1", conv(s, "conv1", x)).relu()
    for b, stride in blocks(3, 4, 6, 3):
        out = batch_norm(s, f"{b}.bn1", conv(s, f"{b}.conv1", x, 1, 0)).relu()
        out = batch_norm(s, f"{b}.bn2", conv(s, f"{b}.conv2", out, stride, 1)).relu()
        out = batch_norm(s, f"{b}.bn3", conv(s, f"{b}.conv3", out, 1, 0))
        if b.endswith(".0"):
            x = batch_norm(s, f"{b}.downsample.1", conv(s, f"{b}.downsample.0", x, stride, 0))
        x = (out + x).relu()
    return linear(s, "fc", F.avg_pool2d(x, 4).flatten(1))


def by_hand_cnn7(s, x):
    x = 2 * x - 1
    for i in range(1, 8):
        x = batch_norm(s, f"bn{i}", conv(s, f"conv{i}", x, 1, 0 if i == 7 else 1)).relu()
        x = F.max_pool2d(x, 2) if i in (2, 4, 6, 7) else x
    return linear(s, "fc", x.flatten(1))


def by_hand_convnet(s, x):
    x = F.max_pool2d(conv(s, "conv1", x, 1, 2), 2).relu()
    x = F.avg_pool2d(conv(s, "conv2", x, 1, 2).relu(), 2)
    x = F.avg_pool2d(conv(s, "conv3", x, 1, 2).relu(), 2)
    x = conv(s, "conv4", x, 1, 0).relu()
    return F.conv2d(x, s["fc.weight"][:, :, None, None], s["fc.bias"]).flatten(1)


def by_hand_lenet(s, x):
    x = F.max_pool2d(conv(s, "conv1", x, 1, 0), 2)
    x = F.max_pool2d(conv(s, "conv2", x, 1, 0), 2)
    return linear(s, "fc2", linear(s, "fc1", x.flatten(1)).relu())


def by_hand_lenet_small(s, x):
    x = conv(s, "conv1", x, 2, 1).relu()
    x = conv(s, "conv2", x, 2, 1).relu()
    return linear(s, "fc2", linear(s, "fc1", x.flatten(1)).relu())


def by_hand_cifar_cnn(s, x):
    x = F.max_pool2d(conv(s, "conv2", conv(s, "conv1", x, 1, 0).relu(), 1, 0).relu(), 2)
    x = F.max_pool2d(conv(s, "conv4", conv(s, "conv3", x, 1, 0).relu(), 1, 0).relu(), 2)
    return linear(s, "fc3", linear(s, "fc2", linear(s, "fc1", x.flatten(1)).relu()).relu())


BY_HAND = [
    ({"name": "resnet18", "width": 3}, CIFAR, by_hand_resnet18),
    ({"name": "preact-resnet18", "width": 3}, CIFAR, by_hand_preact),
    ({"name": "resnet56", "width": 4}, CIFAR, by_hand_resnet56),
    ({"name": "resnet56", "width": 4, "norm": "fixup"}, CIFAR, by_hand_fixup),
    ({"name": "wrn50-2", "width": 2}, CIFAR, by_hand_wrn),
    ({"name": "cnn7", "width": 3}, CIFAR, by_hand_cnn7),
    ("convnet", CIFAR, by_hand_convnet),
    ("lenet", MNIST, by_hand_lenet),
    ("lenet-small", MNIST, by_hand_lenet_small),
    ("cifar-cnn", CIFAR, by_hand_cifar_cnn),
]


@pytest.mark.parametrize(("settings", "shape", "by_hand"), BY_HAND)
def test_forward_pass_is_the_papers(settings, shape, by_hand):
    model = randomized(build("model", settings).build(shape, 5))
    x = images(2, shape)
    with torch.no_grad():
        got, wanted = model(x), by_hand(model.state_dict(), x)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
    assert float((got[0] - got[1]).abs().max()) > 1e-6 * float(wanted.abs().max())
