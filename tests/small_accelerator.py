"""Two accelerators for machines without one, ``emulated``: compiled once, and then devices like any other."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

NAME = "emulated"


class Module:
    """What torch asks of a device beyond its kernels."""

    def __init__(self, kernels: ModuleType) -> None:
        self.device_count, self.current_device = kernels.device_count, kernels.current_device
        self.set_device = kernels.set_device

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def get_rng_state(device: object) -> torch.Tensor:
        """What has no generator of its own is drawn by the CPU's."""
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: object) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        torch.default_generator.manual_seed(seed)


class Exchange(distributed.ProcessGroup):
    """What NCCL is to CUDA: takes dense tensors of the process's own device alone. Gloo exchanges copies of them."""

    def __init__(self, store: distributed.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = distributed.ProcessGroupGloo(store, rank, size, timeout)

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        return self._on_copies(tensors, lambda copies: self.gloo.allreduce(copies, opts))

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        return self._on_copies(tensors, lambda copies: self.gloo.broadcast(copies, opts))

    def allgather(self, found: list[list[Tensor]], tensors: list[Tensor], opts: Any) -> Any:
        (rows,) = found
        self._look(tensors)
        return self._on_copies(rows, lambda copies: self.gloo.allgather([copies], [tensors[0].cpu()], opts))

    def barrier(self, opts: Any) -> Any:
        return self.gloo.barrier()

    def _on_copies(self, tensors: list[Tensor], exchange: Callable[[list[Tensor]], Any]) -> Any:
        self._look(tensors)
        copies = [t.cpu().contiguous() for t in tensors]
        work = exchange(copies)
        work.wait()
        for t, copy in zip(tensors, copies, strict=True):
            t.copy_(copy)
        return work

    def _look(self, tensors: list[Tensor]) -> None:
        here = torch.device(NAME, torch.get_device_module(NAME).current_device())
        for t in tensors:
            if t.device != here:
                raise RuntimeError(f"No backend type associated with {t.device}: this process exchanges {here}")
            if not torch.ops.aten.is_non_overlapping_and_dense(t) or t.dtype.is_complex:
                raise RuntimeError("Tensors must be contiguous and real")


def missing() -> str | None:
    """What this machine lacks to build the device."""
    if shutil.which("c++") is None:
        return "a C++ compiler (apt install g++)"
    return None if importlib.util.find_spec("ninja") else "ninja (pip install ninja)"


def plug_in(build: Path) -> torch.device:
    """The first of its two devices, compiled in ``build`` where that has not been done."""
    from torch.utils.cpp_extension import load

    source = str(Path(__file__).with_suffix(".cpp"))
    kernels = load(NAME, [source], build_directory=str(build), extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, Module(kernels))
    distributed.Backend.register_backend("exchange", Exchange, devices=[NAME])
    return torch.device(NAME, 0)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (lack := missing()) is not None:
        pytest.skip(f"the emulated accelerator is compiled, which needs {lack}")
    return tmp_path_factory.mktemp("build")


@pytest.fixture(scope="session")
def device(compiled: Path) -> torch.device:
    return plug_in(compiled)
