"""Augmentation against per-example transcriptions, its exact limits, and its frequencies."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robustlens.core import discovery
from robustlens.core.rng import generator
from robustlens.core.types import Augmentation
from robustlens.data.augment import Flip, PadCrop, RandomResizedCrop
from robustlens.results.errors import InputError


def images(b: int = 12, c: int = 3, h: int = 8, w: int = 8) -> Tensor:
    return torch.rand((b, c, h, w), generator=generator("cpu", 1, "images"))


def gen(seed: int = 0) -> torch.Generator:
    return generator("cpu", seed, "augmentation")


ALL = [PadCrop(), PadCrop(padding=2), Flip(), RandomResizedCrop(), RandomResizedCrop(size=5)]


def test_discovered_and_built_from_settings() -> None:
    assert {"pad-crop", "flip", "random-resized-crop"} <= set(discovery.discover("augmentation"))
    built = discovery.build("augmentation", {"name": "random-resized-crop", "size": 56, "scale": [0.5, 1]})
    assert built == RandomResizedCrop(size=56, scale=(0.5, 1.0))
    assert discovery.build("augmentation", discovery.describe(built)) == built


@pytest.mark.parametrize("augmentation", ALL, ids=repr)
def test_same_seed_same_images_and_only_the_given_generator_moves(augmentation: Augmentation) -> None:
    x = images()
    before, state = x.clone(), torch.get_rng_state()
    one, two, other = (augmentation.augment(x, gen=gen(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.dtype == torch.float32 and one.min() >= 0 and one.max() <= 1 + 1e-6


@pytest.mark.parametrize(("h", "w", "padding"), [(8, 8, 4), (5, 9, 2), (7, 3, 1)])
def test_pad_crop_is_the_per_example_crop(h: int, w: int, padding: int) -> None:
    x = images(h=h, w=w)
    out = PadCrop(padding=padding).augment(x, gen=gen())
    offset = torch.randint(2 * padding + 1, (2, len(x)), generator=gen())
    for i, example in enumerate(x):
        canvas = torch.zeros(3, h + 2 * padding, w + 2 * padding)
        canvas[:, padding : padding + h, padding : padding + w] = example
        top, left = offset[:, i].tolist()
        assert torch.equal(out[i], canvas[:, top : top + h, left : left + w])


def test_pad_crop_positions_are_uniform() -> None:
    # One bright pixel tells the position. Chi-square over 25 cells, 24 degrees of freedom: the 1 - 1e-6 quantile is
    # 70.0 (the seed is fixed; another seed would fail with probability 1e-6).
    x = torch.zeros(5000, 1, 5, 5)
    x[:, :, 2, 2] = 1
    where = PadCrop(padding=2).augment(x, gen=gen()).flatten(1).argmax(1)
    counts = torch.bincount(where, minlength=25).double()
    assert ((counts - 200) ** 2 / 200).sum() < 70.0


def test_flip_mirrors_whole_examples_half_of_the_time() -> None:
    x = images(b=4000, c=1, h=2, w=3)
    out = Flip().augment(x, gen=gen())
    mirrored = (out == x.flip(3)).flatten(1).all(1)
    assert ((out == x).flatten(1).all(1) ^ mirrored).all()
    # Binomial(4000, ½): five standard deviations are 158; a fair coin leaves that band with probability 6e-7.
    assert abs(int(mirrored.sum()) - 2000) < 158


def test_limits_that_change_nothing() -> None:
    x = images()
    assert torch.equal(PadCrop(padding=0).augment(x, gen=gen()), x)
    assert torch.equal(Flip(p=0).augment(x, gen=gen()), x)
    assert torch.equal(Flip(p=1).augment(x, gen=gen()), x.flip(3))
    for size in (None, 8):
        assert torch.equal(RandomResizedCrop(size=size, scale=(1, 1), ratio=(1, 1)).augment(x, gen=gen()), x)


@pytest.mark.parametrize("size", [4, 8, 13])
@pytest.mark.parametrize(("h", "w"), [(16, 16), (12, 20)])
def test_random_resized_crop_is_crop_then_antialiased_resize(size: int, h: int, w: int) -> None:
    x, crop = images(b=40, h=h, w=w), RandomResizedCrop(size=size)
    out = crop.augment(x, gen=gen())
    for i, (top, left, bh, bw) in enumerate(crop.boxes(len(x), h, w, gen=gen()).tolist()):
        box = x[i : i + 1, :, top : top + bh, left : left + bw]
        naive = F.interpolate(box, (size, size), mode="bilinear", antialias=True)
        torch.testing.assert_close(out[i], naive[0], atol=1e-5, rtol=0)


def test_boxes_lie_in_the_image_with_area_and_ratio_in_range() -> None:
    crop = RandomResizedCrop(scale=(0.2, 0.9))
    boxes = crop.boxes(3000, 64, 48, gen=gen()).double()
    top, left, h, w = boxes.unbind(1)
    assert (boxes >= 0).all() and (top + h <= 64).all() and (left + w <= 48).all()
    # Rounding moves a side by half a pixel at most.
    assert ((h + 0.5) * (w + 0.5) >= 0.2 * 64 * 48).all() and ((h - 0.5) * (w - 0.5) <= 0.9 * 64 * 48).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all() and ((w - 0.5) / (h + 0.5) <= 4 / 3).all()


def test_areas_follow_their_distribution() -> None:
    # scale (0.1, 0.4), ratio 1 on 100×100: every draw fits, so the mean area is uniform's 0.25 with standard deviation
    # 0.3/√12/√4000 = 0.00137 (rounding the side adds 0.1/12 of a pixel²); five of them: error probability 6e-7.
    boxes = RandomResizedCrop(scale=(0.1, 0.4), ratio=(1, 1)).boxes(4000, 100, 100, gen=gen()).double()
    area = boxes[:, 2] * boxes[:, 3] / 1e4
    assert abs(area.mean() - 0.25) < 5 * 0.3 / math.sqrt(12 * 4000) + 1e-4
    # Places are uniform: each corner pixel of the free range is reached.
    same = RandomResizedCrop(scale=(0.81, 0.81), ratio=(1, 1)).boxes(4000, 10, 10, gen=gen())
    seen = Counter((top, left) for top, left, _, _ in same.tolist())
    assert set(seen) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    # Binomial(4000, ¼), standard deviation 27.4, five of them, four cells: error probability 3e-6.
    assert all(abs(n - 1000) < 137 for n in seen.values())


def test_a_box_that_never_fits_becomes_the_largest_centred_one() -> None:
    # The whole area at ratio 2 of a square does not fit: the fallback is the full width and half the height.
    boxes = RandomResizedCrop(scale=(1, 1), ratio=(2, 2)).boxes(3, 8, 8, gen=gen())
    assert boxes.tolist() == [[2, 0, 4, 8]] * 3
    boxes = RandomResizedCrop(scale=(1, 1), ratio=(0.5, 0.5)).boxes(3, 8, 8, gen=gen())
    assert boxes.tolist() == [[0, 2, 8, 4]] * 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: PadCrop(padding=-1),
        lambda: Flip(p=1.5),
        lambda: RandomResizedCrop(size=0),
        lambda: RandomResizedCrop(scale=(0.5, 1.5)),
        lambda: RandomResizedCrop(scale=(0, 1)),
        lambda: RandomResizedCrop(ratio=(2, 1)),
    ],
)
def test_settings_that_cannot_be_meant(make: object) -> None:
    with pytest.raises(InputError, match=r"expected .* got "):
        make()  # type: ignore[operator]
