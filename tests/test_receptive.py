"""Receptive fields against kernels and strides, and colours against what units see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustlens.linalg.receptive import LARGEST, cheapest_sweep, receptive_fields


def seen(field: Tensor, unit: int) -> set[int]:
    return set(field[:, unit].nonzero()[:, 0].tolist())


def layers(*parts: nn.Module) -> object:
    def run(x: Tensor) -> list[Tensor]:
        found = []
        for part in parts:
            x = part(x)
            found.append(x.flatten(1))
        return found

    return run


@pytest.mark.parametrize("chunk", [3, 7, 1000])
def test_fields_are_those_of_the_kernels_whatever_is_switched_off(chunk: int) -> None:
    """A 1-D network by hand: unit i of 2 + 2 stride sees 2i … 2i + 2, the next layer's unit i sees 2i … 2i + 4."""
    first, second = nn.Conv2d(1, 2, (1, 3), stride=(1, 2)), nn.Conv2d(2, 1, (1, 2))
    nn.init.zeros_(first.weight)
    one, two, last = receptive_fields(
        layers(nn.Sequential(first, nn.ReLU()), second, nn.Sequential(nn.Flatten(), nn.Linear(3, 2))),
        -torch.ones(3, 1, 1, 9),
        chunk=chunk,
    )
    assert [seen(one, unit) for unit in range(8)] == 2 * [set(range(2 * i, 2 * i + 3)) for i in range(4)]
    assert [seen(two, unit) for unit in range(3)] == [set(range(2 * i, 2 * i + 5)) for i in range(3)]
    assert bool(last.all()) and last.shape == (9, 2)


def random_fields(seed: int, pixels: int, units: list[int], share: float) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.rand(pixels, n, generator=gen) < share for n in units]


@pytest.mark.parametrize("seed", range(20))
def test_no_unit_sees_two_pixels_of_a_colour(seed: int) -> None:
    fields = random_fields(seed, 30, [40, 25], 0.05)
    fields = [torch.cat([field, field[:, :7]], 1) for field in fields]  # channels
    fields = [torch.cat([field, field[:11]]) for field in fields]
    sweep = cheapest_sweep(fields)
    assert sweep.layers > 0 and sorted(set(sweep.colour.tolist())) == list(range(sweep.colours))
    for field in fields[: sweep.layers]:
        for unit in range(field.shape[1]):
            colours = sweep.colour[field[:, unit]].tolist()
            assert len(colours) == len(set(colours))


def test_the_cheapest_sweep_is_taken() -> None:
    def window(size: int, stride: int) -> Tensor:
        starts = torch.arange(0, 60 - size + 1, stride)
        return ((torch.arange(60)[:, None] - starts) >= 0) & ((torch.arange(60)[:, None] - starts) < size)

    few, many = torch.ones(60, 10, dtype=torch.bool), torch.ones(60, 300, dtype=torch.bool)
    narrow, wide = window(3, 1), window(10, 2)
    assert cheapest_sweep([narrow])[1:] == (1,) and cheapest_sweep([narrow]).colours == 3
    assert (cheapest_sweep([narrow, wide, few]).layers, cheapest_sweep([narrow, wide, few]).colours) == (2, 10)
    assert (cheapest_sweep([narrow, few, few]).layers, cheapest_sweep([narrow, few, few]).colours) == (1, 3)
    assert (cheapest_sweep([narrow, many]).layers, cheapest_sweep([narrow, many]).colours) == (2, 60)
    assert cheapest_sweep([few, few]).layers == 0, "rows alone"


def test_a_field_too_large_to_look_at_takes_a_pass_for_each_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    field = torch.eye(50, 200) > 0
    assert LARGEST >= 2**28 and cheapest_sweep([field]).colours == 1
    monkeypatch.setattr("robustlens.linalg.receptive.LARGEST", 9_999)
    assert cheapest_sweep([field]).colours == 50
