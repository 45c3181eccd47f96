"""Parquet files and image folders made by hand, and every error a user can make."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from small_files import pixels, png, small, write

from robustlens.core.types import Splits
from robustlens.data.config import DataConfig
from robustlens.data.sources import load, open_source
from robustlens.results.errors import InputError


def settings(directory: Path, **more: Any) -> DataConfig:
    return DataConfig(source=str(directory), **more)


def _three(splits: Splits) -> tuple[Any, Any, Any]:
    return splits.train, splits.valid, splits.test


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ---- parquet files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("no_network")
def test_parquet_files_are_read_as_they_are(tmp_path: Path, channels: int) -> None:
    x, y = small(tmp_path, channels=channels, names=["cat", "dog"])
    source = open_source(settings(tmp_path))
    images = source.splits["train"].images()
    expected = x[:, None] if channels == 1 else x.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(images.numpy(), expected)
    np.testing.assert_array_equal(source.splits["train"].labels.numpy(), y)
    splits = load(settings(tmp_path, valid_fraction=0.25))
    assert splits.classes == ("cat", "dog") and splits.name == tmp_path.name
    assert [len(s) for s in (splits.train, splits.valid, splits.test)] == [30, 10, 10]
    # Pixels stay with their labels, and no training image is a validation image.
    label_of = {png(image): int(label) for image, label in zip(x, y, strict=True)}
    seen = []
    for split in (splits.train, splits.valid):
        for image, label in zip(split.images.numpy(), split.labels.tolist(), strict=True):
            encoded = png(image[0] if channels == 1 else image.transpose(1, 2, 0))
            assert label_of[encoded] == label
            seen.append(encoded)
    assert len(set(seen)) == 40


def test_shards_and_split_directories(tmp_path: Path) -> None:
    x = pixels(20)
    for shard in range(2):
        rows = slice(10 * shard, 10 * shard + 10)
        write(tmp_path / f"data/train-0000{shard}-of-00002.parquet", x[rows], [0, 1] * 5)
    write(tmp_path / "data/extra-00000-of-00001.parquet", pixels(4, 9, 9), [7] * 4)
    np.testing.assert_array_equal(
        open_source(settings(tmp_path)).splits["train"].images().numpy(), x.transpose(0, 3, 1, 2)
    )
    write(tmp_path / "other/default/train/0000.parquet", x, [0, 1] * 10)
    write(tmp_path / "other/default/test/0000.parquet", x[:4], [0, 1] * 2)
    assert set(open_source(settings(tmp_path / "other")).splits) == {"train", "test"}


def test_cifar100_and_svhn_schemas(tmp_path: Path) -> None:
    fine = tmp_path / "cifar100"
    small(fine, columns=("img", "fine_label"), names=["apple", "bear"], extra=None)
    table = pq.read_table(fine / "train-00000-of-00001.parquet")
    table = table.append_column("coarse_label", pa.array([5] * 40))
    pq.write_table(table, fine / "train-00000-of-00001.parquet")
    assert load(settings(fine)).classes == ("apple", "bear")
    with pytest.raises(InputError, match="coarse_label"):  # the test file lacks it, and says so
        load(settings(fine, label_column="coarse_label"))
    svhn = tmp_path / "svhn"
    small(svhn / "cropped_digits", names=["0", "1"])
    write(svhn / "full_numbers/train-00000-of-00001.parquet", pixels(3), [0, 1, 0])
    with pytest.raises(InputError, match=r"one configuration, got several directories: cropped_digits, full_numbers"):
        load(settings(svhn))
    assert load(settings(svhn / "cropped_digits")).classes == ("0", "1")


def test_bare_names_are_looked_up_under_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(tmp_path / "mnist", channels=1)
    monkeypatch.setenv("ROBUSTLENS_DATA", str(tmp_path))
    assert load(DataConfig(source="mnist")).shape == (1, 6, 6)
    with pytest.raises(InputError, match="Did you mean 'mnist'"):
        load(DataConfig(source="mnits"))
    with pytest.raises(InputError, match="There is no such directory"):
        load(DataConfig(source="./nothing/here"))


def test_labels_without_names_are_the_sorted_values(tmp_path: Path) -> None:
    write(tmp_path / "words.parquet", pixels(12), ["dog", "cat", "cat"] * 4)
    source = open_source(settings(tmp_path))
    assert source.classes == ("cat", "dog") and source.splits["train"].labels[:3].tolist() == [1, 0, 0]
    write(tmp_path / "words.parquet", pixels(12), [3, 7, 3] * 4)
    assert load(settings(tmp_path)).classes == ("3", "7")
    write(tmp_path / "words.parquet", pixels(12), [0, -1, 1] * 4)
    with pytest.raises(InputError, match=r"class numbers from 0 on, got the label -1\. It often means"):
        load(settings(tmp_path))


def test_splits_of_grey_and_of_colour_images(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", pixels(20, channels=1), [0, 1] * 10)
    write(tmp_path / "test-0.parquet", pixels(4, channels=3), [0, 1] * 2)
    with pytest.raises(InputError, match="grey images in the test split, as the training images are, got colour"):
        load(settings(tmp_path))
    write(tmp_path / "train-0.parquet", pixels(20, channels=3), [0, 1] * 10)
    write(tmp_path / "test-0.parquet", pixels(4, channels=1), [0, 1] * 2)
    assert load(settings(tmp_path)).shape == (3, 6, 6), "grey ones are repeated over the channels"


def test_own_validation_split_is_kept(tmp_path: Path) -> None:
    small(tmp_path)
    write(tmp_path / "validation-00000-of-00001.parquet", pixels(6, seed=5), [0, 1] * 3)
    assert [len(s) for s in _three(load(settings(tmp_path)))] == [40, 6, 10]


def test_the_majority_decides_about_colour(tmp_path: Path) -> None:
    x = pixels(20)
    cells = [png(image, "L" if i % 5 == 0 else None) for i, image in enumerate(x)]
    write(tmp_path / "train-0.parquet", cells, [0, 1] * 10)
    images = open_source(settings(tmp_path)).splits["train"].images()
    assert images.shape == (20, 3, 6, 6)
    assert torch.equal(images[5, 0], images[5, 1]) and torch.equal(images[5, 0], images[5, 2])
    np.testing.assert_array_equal(images[1].numpy(), x[1].transpose(2, 0, 1))
    cells = [png(image, None if i % 5 == 0 else "L") for i, image in enumerate(x)]
    write(tmp_path / "train-0.parquet", cells, [0, 1] * 10)
    assert open_source(settings(tmp_path)).splits["train"].images().shape == (20, 1, 6, 6)


# ---- image folders -------------------------------------------------------------------------------------------------


def folder(root: Path, names: tuple[str, ...] = ("cat", "dog"), n: int = 6, seed: int = 0) -> np.ndarray:
    x = pixels(n * len(names), seed=seed)
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (root / name / f"{i}.png").write_bytes(png(x[k * n + i]))
    return x


@pytest.mark.usefixtures("no_network")
def test_image_folder(tmp_path: Path) -> None:
    x = folder(tmp_path / "flat", n=10)
    (tmp_path / "flat/cat/.DS_Store").write_text("")
    (tmp_path / "flat/cat/notes.txt").write_text("")
    source = open_source(settings(tmp_path / "flat"))
    np.testing.assert_array_equal(source.splits["train"].images().numpy(), x.transpose(0, 3, 1, 2))
    assert source.splits["train"].labels.tolist() == [0] * 10 + [1] * 10 and source.classes == ("cat", "dog")
    assert [len(s) for s in _three(load(settings(tmp_path / "flat")))] == [14, 2, 4]
    folder(tmp_path / "parts/train")
    folder(tmp_path / "parts/test", n=2, seed=1)
    assert [len(s) for s in _three(load(settings(tmp_path / "parts")))] == [11, 1, 4]


def test_photographs_are_turned_upright_and_brought_to_one_size(tmp_path: Path) -> None:
    for k, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for i in range(4):
            picture = Image.fromarray(np.full((20 + 4 * i, 30, 3), 100 * k + 50, np.uint8))
            exif = picture.getexif()
            exif[0x0112] = 6  # a quarter turn
            picture.save(tmp_path / name / f"{i}.jpg", exif=exif)
    with pytest.raises(InputError, match=r"1.jpg: expected 30×20 pixels.*0.jpg has, got 30×24. Set size"):
        open_source(settings(tmp_path)).splits["train"].images()
    splits = load(settings(tmp_path, resize=16, size=16))
    assert splits.shape == (3, 16, 16)
    assert ((splits.train.images.float().mean((1, 2, 3)) - 100 * splits.train.labels - 50).abs() < 3).all()


# ---- errors --------------------------------------------------------------------------------------------------------


def damaged_parquet(root: Path) -> DataConfig:
    small(root)
    path = root / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    return settings(root)


def damaged_image(root: Path) -> DataConfig:
    cells = [png(image) for image in pixels(10)]
    cells[3] = cells[3][:40]
    write(root / "train-0.parquet", cells, [0, 1] * 5)
    return settings(root)


def deep_image(root: Path) -> DataConfig:
    cells = [png(np.full((6, 6), 40000, np.uint16))] * 10
    write(root / "train-0.parquet", cells, [0, 1] * 5)
    return settings(root)


def label_outside(root: Path) -> DataConfig:
    write(root / "train-0.parquet", pixels(4), [0, 1, 2, 0], names=["a", "b"])
    return settings(root)


def label_missing(root: Path) -> DataConfig:
    write(root / "train-0.parquet", pixels(4), [0, 1, None, 0])
    return settings(root)


def other_columns(root: Path) -> DataConfig:
    small(root, columns=("image", "digit"))
    return settings(root)


def only_a_test_split(root: Path) -> DataConfig:
    write(root / "test-0.parquet", pixels(4), [0, 1, 1, 0])
    return settings(root)


def class_without_test_images(root: Path) -> DataConfig:
    write(root / "train-0.parquet", pixels(12), [0, 1, 2] * 4)
    write(root / "test-0.parquet", pixels(4), [0] * 4)
    return settings(root, classes=[1, 2])


def unknown_class(root: Path) -> DataConfig:
    small(root, names=["cat", "dog"])
    return settings(root, classes=["cat", "dg"])


def class_number(root: Path) -> DataConfig:
    small(root)
    return settings(root, classes=[0, 5])


def class_twice(root: Path) -> DataConfig:
    small(root, names=["cat", "dog"])
    return settings(root, classes=[0, "cat"])


def empty_directory(root: Path) -> DataConfig:
    return settings(root)


def unknown_folder(root: Path) -> DataConfig:
    folder(root / "train")
    folder(root / "test", ("cat", "dgo"))
    return settings(root)


def other_test_size(root: Path) -> DataConfig:
    small(root)
    write(root / "test-00000-of-00001.parquet", pixels(4, 9, 9), [0, 1] * 2)
    return settings(root)


def numbers_as_images(root: Path) -> DataConfig:
    pq.write_table(pa.table({"image": [[1.0, 2.0]] * 4, "label": [0, 1] * 2}), root / "train-0.parquet")
    return settings(root)


def fractional_labels(root: Path) -> DataConfig:
    write(root / "train-0.parquet", pixels(4), [0.5, 1.0, 1.0, 0.0])
    return settings(root)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (damaged_parquet, r"train-00000-of-00001.parquet: expected a readable parquet file, got .* download it again"),
        (damaged_image, r"split train, image 3: expected an image that Pillow can read, got .* Replace or remove it"),
        (deep_image, r"expected 8 bits a channel, got mode I;16"),
        (label_outside, r"column 'label': expected one of 2 classes \(from 0 to 1\), got 2 in row 2"),
        (label_missing, r"got None in row 2"),
        (other_columns, r"expected a label column 'label' or 'fine_label', got the columns 'image', 'digit'"),
        (only_a_test_split, r"expected a training split with examples, got the splits test"),
        (class_without_test_images, r"expected examples of the chosen classes in the test split, got none"),
        (unknown_class, r"class: expected one of cat, dog, got 'dg'. Did you mean 'dog'\?"),
        (class_number, r"expected numbers from 0 to 1, or names, got 5. The classes are 0, 1"),
        (class_twice, r"expected two or more different classes, got \[0, 'cat'\]"),
        (empty_directory, r"expected a subdirectory of images for each class \(or parquet files\), got none"),
        (unknown_folder, r"expected one of cat, dog, got 'dgo'. Did you mean 'dog'\?"),
        (other_test_size, r"valid images: expected channels × height × width \(3, 9, 9\) as in the test split"),
        (numbers_as_images, r"expected an image column of encoded images .* from_arrays"),
        (fractional_labels, r"expected class numbers or names as labels, got labels of type double"),
    ],
)
def test_one_line_that_says_what_to_do(tmp_path: Path, make: Callable[[Path], DataConfig], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load(make(tmp_path))
    assert "\n" not in str(error.value)


def test_settings_are_checked() -> None:
    for wrong in ({"train": 0}, {"valid_fraction": 1.0}, {"sorce": "x"}, {"classes": [1.5]}, {"source": ""}):
        with pytest.raises(ValidationError):
            DataConfig(**{"source": "mnist5k", **wrong})
    config = DataConfig(source="mnist5k", classes=[1, "7"])
    assert DataConfig.model_validate_json(config.model_dump_json()) == config
