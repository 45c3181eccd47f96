"""Checkpoints without pickles: tensors and plain numbers in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from robustlens.results.errors import DamageWarning, InputError, TrainingStopped
from robustlens.results.seal import UNSEALED, is_damaged, sealed
from robustlens.results.store import write_atomically


def require_finite(model: nn.Module, when: str) -> None:
    """Raise TrainingStopped, before any checkpoint is replaced, if a weight or buffer is not finite."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise TrainingStopped(
                f"Training stopped: the weights {name} are not finite after {when}. The last good checkpoint is "
                "kept. Try a smaller learning rate, or training.grad_clip = 1.0."
            )


def save_weights(model: nn.Module, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write the model's weights and buffers, with ``facts`` as JSON in the header."""
    _write(path, model.state_dict(), facts or {})


def save_state(
    path: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None,
    memory: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Write everything that a resumed run needs; ``memory`` is what plug-ins carry between steps.

    The state that was there is kept as ``previous_of(path)``.
    """
    tensors: dict[str, Tensor] = {f"model/{k}": v for k, v in model.state_dict().items()}
    numbers: dict[str, float] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            elif value is not None:
                numbers[f"{index}/{name}"] = value
    if average is not None:
        tensors |= {f"average/{k}": v for k, v in average.state_dict().items()}
    tensors |= {f"memory/{k}": v for k, v in memory.items()}
    _write(path, tensors, {"progress": dict(facts), "optimizer_numbers": numbers}, previous=previous_of(path))


def previous_of(path: Path) -> Path:
    """Where the state before the one at ``path`` is kept."""
    return path.with_suffix(f".previous{path.suffix}")


def resume(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Restore the newest undamaged state and return its facts and memory; None where there is none at all.

    Where ``path`` is damaged, the state before it takes its place, with a DamageWarning: steps are repeated, and lead
    to the same bits.

    Raises:
        InputError: what is there is damaged, or belongs to another architecture.
    """
    previous = previous_of(path)
    if not path.is_file():  # a crash between two renames leaves the previous one alone
        if not previous.is_file():
            return None
        return load_state(previous, model=model, optimizer=optimizer, average=average)
    try:
        return load_state(path, model=model, optimizer=optimizer, average=average)
    except InputError as error:
        if not previous.is_file():
            raise
        found = load_state(previous, model=model, optimizer=optimizer, average=average)
        warnings.warn(f"{error.what}: {error.got}. Training goes on from the one before.", DamageWarning, stacklevel=2)
    path.unlink(missing_ok=True)  # else the next state would push the good one out; every process does it
    return found


def load_state(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore what ``save_state`` wrote and return its facts and memory.

    Raises:
        InputError: the file is damaged or belongs to another architecture.
    """
    try:
        if is_damaged(path.read_bytes()):
            raise ValueError("other content than was written")
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
            # Copies: what the file is mapped to would go with it, if somebody cut it short.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        numbers = facts.pop("optimizer_numbers")
        facts = facts.get("progress", facts)  # older files have both side by side
        model.load_state_dict(_under("model/", tensors))
        if average is not None:
            average.load_state_dict(_under("average/", tensors))
        state: dict[int, dict[str, Any]] = {}
        for key, tensor in _under("optimizer/", tensors).items():
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = tensor
        for key, number in numbers.items():
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = number
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (OSError, SafetensorError, LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"checkpoint {path}",
            expected="the state of a run of this configuration",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="Delete the run directory to train again from the start.",
        ) from error
    device = next(model.parameters()).device
    return facts, {name: tensor.to(device) for name, tensor in _under("memory/", tensors).items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _write(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, previous: Path | None = None
) -> None:
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = safetensors.torch.save(plain, {"facts": json.dumps({**UNSEALED, **facts})})
    write_atomically(path, sealed(content), previous=previous)
