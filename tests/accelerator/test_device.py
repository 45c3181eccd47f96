"""The emulated accelerator refuses what CUDA refuses, so that what runs on it keeps its tensors in one place."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

pytestmark = [pytest.mark.accelerator, pytest.mark.xdist_group("accelerator")]


def test_refuses_tensors_and_generators_of_another_device(device: torch.device) -> None:
    here, there = torch.ones(3, device=device), torch.ones(3)
    for mixed in (lambda: here + there, lambda: torch.where(here > 0, here, there), lambda: torch.stack([here, there])):
        with pytest.raises(RuntimeError, match=r"same device|all tensors to be on"):
            mixed()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=device, generator=Generator())
    with pytest.raises(TypeError, match=r"convert .*device type tensor to numpy"):
        here.numpy()
    assert (here + torch.tensor(1.0)).tolist() == [2, 2, 2] and here[torch.tensor([0, 2])].tolist() == [1, 1]


def test_draws_and_computes_what_the_cpu_does(device: torch.device) -> None:
    ours, theirs = (torch.rand(4, 4, device=d, generator=Generator(d).manual_seed(7)) for d in (device, "cpu"))
    assert ours.device.type == device.type and torch.equal(ours.cpu(), theirs)
    assert torch.equal(torch.linalg.svdvals(ours).cpu(), torch.linalg.svdvals(theirs))
