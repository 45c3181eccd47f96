"""Layers whose weights are frozen take a quicker way for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def passing(model: nn.Module, layers: Sequence[nn.Module], forward: Callable[[Any, Tensor], Tensor]) -> Iterator[None]:
    """Inside, ``layers`` of ``model`` have ``forward`` for their pass, but for those that were given another before.

    Networks that torch compiles are left as they are: it would do so again for layers that were replaced.
    """
    compiled = any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules())
    chosen = [layer for layer in layers if not compiled and "forward" not in vars(layer)]
    for layer in chosen:
        layer.forward = partial(forward, layer)
    try:
        yield
    finally:
        for layer in chosen:
            del layer.forward


def transformed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is in the hands of ``torch.func``, or of autograd with ``is_grads_batched``."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
