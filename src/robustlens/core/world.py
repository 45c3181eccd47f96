"""One training run on several processes: who takes which examples, and what they find together.

Of a batch of n examples each of S processes takes every S-th, the process of rank r the examples r, r + S, r + 2S, …,
and gradients are averaged after the backward pass, on the bare network. Shares are equal, so that plain averages are
right: of a batch that S does not divide (the last of an epoch) up to S − 1 examples wait for another epoch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
from torch import Generator, Tensor, distributed, nn

from robustlens.core.rng import SharedGenerator, generator, layout
from robustlens.results.errors import InputError

#: How long the processes wait for the slowest of them: lenses are shared out, and some take hours.
PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class World:
    """The processes that work on a run: this one is ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def divisible(self, index: Tensor) -> Tensor:
        """As many of the positions (B,) as can be shared equally."""
        return index[: len(index) - len(index) % self.size]

    def share(self, index: Tensor) -> Tensor:
        """Those of the positions (B,) that this process takes."""
        return index[self.rank :: self.size]

    def generator(self, device: torch.device | str, seed: int, *purpose: str | int, examples: int) -> Generator:
        """Draws for a batch of ``examples``: those for an example do not depend on the process that has it."""
        gen = generator(device, seed, *purpose)
        rows = self.share(torch.arange(examples))
        return gen if self.size == 1 else SharedGenerator.of(gen, rows=rows, examples=examples)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes: one exchange for each of their dtypes."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            some = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.detach().flatten() for t in some])
            distributed.all_reduce(flat)
            flat /= self.size
            with torch.no_grad():
                for t, mean in zip(some, torch.split(flat, [t.numel() for t in some]), strict=True):
                    t.copy_(mean.view(t.shape))

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (B, …) of the whole batch, in its order, from everyone's (B / size, …)."""
        if self.size == 1:
            return rows
        everyone = [torch.empty_like(rows) for _ in range(self.size)]
        distributed.all_gather(everyone, rows.contiguous())
        return torch.stack(everyone, 1).flatten(0, 1)

    def same(self, model: nn.Module) -> None:
        """Give every process the leader's weights and buffers."""
        if self.size > 1:
            for t in model.state_dict().values():
                distributed.broadcast(t, 0)

    def wait(self) -> None:
        """Until everyone is here; what the leader wrote before can be read afterwards."""
        if self.size > 1:
            distributed.barrier()


def joined() -> World:
    """The processes that this one belongs to: those that torchrun started, or itself alone."""
    return World(distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else World()


@contextmanager
def together(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, and part from them at the end; the device for this one.

    Does nothing for a process that was started alone. On accelerators each process takes the one of its number, and
    they exchange what torch has for them (NCCL on CUDA); on CPUs by gloo.

    Raises:
        InputError: fewer GPUs on this machine than processes that want one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    local, backend = int(os.environ["LOCAL_RANK"]), "gloo"
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if here is not None and here.type == ("cuda" if device == "auto" else device.split(":")[0]):
        count = torch.accelerator.device_count()
        if local >= count:
            raise InputError(
                "torchrun --nproc-per-node",
                expected=f"at most {count} processes, one a GPU",
                got=f"one that wants GPU {local + 1}",
                fix="Start fewer, or use --device cpu.",
            )
        device = f"{here.type}:{local}"
        torch.get_device_module(here).set_device(local)
        backend = distributed.get_default_backend_for_device(device)
    # torch.distributed.nn keeps the group that it finds when it is first imported, as its functions' default, and the
    # group's threads with it: one that frees a tensor while Python shuts down aborts the process.
    import_module("torch.distributed.nn.functional")
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield "cpu" if device == "auto" else device
    finally:
        distributed.destroy_process_group()


class _Mean(torch.autograd.Function):
    """Mean over the processes. Their losses are averaged too, so the gradient is the mean of everyone's."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        total = t.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total / distributed.get_world_size()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _mean(grads[0])


def _mean(t: Tensor) -> Tensor:
    mean: Tensor = _Mean.apply(t)  # type: ignore[no-untyped-call]
    return mean


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """BatchNorm by the statistics of the whole batch, differentiable as often as one likes.

    ``torch.nn.SyncBatchNorm`` knows neither CPUs nor second derivatives.
    """

    world: World

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean = _mean(x.mean((0, 2, 3)))
        centred = x - mean[:, None, None]
        variance = _mean(centred.square().mean((0, 2, 3)))
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            n = self.world.size * x[:, 0].numel()
            with torch.no_grad():
                self.num_batches_tracked += 1
                rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(variance * (n / (n - 1)), rate)
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            return centred * (self.weight * scale)[:, None, None] + self.bias[:, None, None]
        return centred * scale[:, None, None]


def _shared(layer: type[nn.Module]) -> type[nn.Module]:
    """The kind of dropout with the mask of the whole batch, of which this process takes its rows."""

    class Shared(layer):  # type: ignore[misc, valid-type]
        world: World

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                rows: Tensor = super().forward(x)
                return rows
            size = (self.world.size * len(x), *x.shape[1:])
            whole = torch.ones(size, dtype=x.dtype, device=x.device).contiguous(memory_format=layout(x))
            mask: Tensor = super().forward(whole)
            return x * mask[self.world.rank :: self.world.size]

    return Shared


SHARED: dict[type[nn.Module], type[nn.Module]] = {
    layer: _shared(layer) for layer in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
}


def require_synchronisable(model: nn.Module) -> None:
    """Raise InputError for a BatchNorm of ``model`` that cannot be synchronised."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) is not nn.BatchNorm2d:
            raise InputError(
                f'training.batch_norm = "synchronised" with the layer {name!r}',
                expected="torch.nn.BatchNorm2d itself",
                got=f"{type(module).__module__}.{type(module).__qualname__}",
                fix='Set it to "local", give the network BatchNorm2d there, or train in one process.',
            )


@contextmanager
def one_batch(model: nn.Module, world: World, *, synchronised: bool) -> Iterator[None]:
    """Inside, layers that look across a batch or draw for it see the whole of it.

    Dropout always (the layers in ``SHARED``); BatchNorm where it is ``synchronised``, else each process normalises by
    its own examples.

    Raises:
        InputError: a BatchNorm that cannot be ``synchronised``.
    """
    if world.size > 1 and synchronised:
        require_synchronisable(model)
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    for module in model.modules() if world.size > 1 else ():
        if type(module) in SHARED:
            new = SHARED[type(module)]
        elif type(module) is nn.BatchNorm2d and synchronised:
            new = SynchronisedBatchNorm
        else:
            continue
        changed.append((module, type(module)))
        module.__class__ = new
        object.__setattr__(module, "world", world)
    try:
        yield
    finally:
        for module, old in changed:
            module.__class__ = old
            object.__delattr__(module, "world")
