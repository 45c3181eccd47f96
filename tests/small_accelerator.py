"""An accelerator for machines without one, ``emulated``: compiled once, and then a device like any other."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

NAME = "emulated"


class Module:
    """What torch asks of a device beyond its kernels."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

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


def missing() -> str | None:
    """What this machine lacks to build the device."""
    if shutil.which("c++") is None:
        return "a C++ compiler (apt install g++)"
    return None if importlib.util.find_spec("ninja") else "ninja (pip install ninja)"


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> torch.device:
    if (lack := missing()) is not None:
        pytest.skip(f"the emulated accelerator is compiled, which needs {lack}")
    from torch.utils.cpp_extension import load

    load(
        NAME,
        [str(Path(__file__).with_suffix(".cpp"))],
        build_directory=str(tmp_path_factory.mktemp("build")),
        extra_cflags=["-O1"],
    )
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, Module)
    return torch.device(NAME)
