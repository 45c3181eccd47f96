"""A piecewise linear network along a line segment: where it bends, and the sum of its linear pieces.

With the bends 0 = s_1 < s_2 < … < 1 on x + t v and J_j the Jacobian of the network between s_j and s_{j+1} (Wen, Li
and Jia 2020, arXiv 2011.07478, Lemma 4.1),

    f(x + v) − f(x) = Σ_j (s_{j+1} − s_j) J_j v.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robustlens.core.modes import untouched
from robustlens.linalg.regions import slopes_along

RELUS = ("relu", "relu_", "leaky_relu", "leaky_relu_")
#: How far beyond a bend the next piece is looked at, in t.
BEYOND = 1e-11


class Walk(NamedTuple):
    """What was found on the way from x to x + ``reached`` · v.

    ``bends`` are the t where a piece ends; ``summed`` (K,) is the sum over the pieces and ``direct`` (K,) the
    difference of the logits at both ends.
    """

    bends: tuple[float, ...]
    reached: float
    summed: Tensor
    direct: Tensor

    @property
    def residual(self) -> float:
        """‖summed − direct‖ / ‖direct‖."""
        return float((self.summed - self.direct).norm() / self.direct.norm())


def walk(model: nn.Module, x: Tensor, v: Tensor, *, pieces: int) -> Walk:
    """Follow a network of ReLU, leaky ReLU and max pooling from image ``x`` (1, C, H, W) to x + ``v``.

    Stops after ``pieces`` pieces. Run it in float64. Each piece costs a forward pass and two backward passes of one
    image. A network that bends anywhere else shows a residual that is not rounding.
    """
    t, bends = 0.0, []
    with untouched(model):
        start = model(x)[0].detach()
        summed = torch.zeros_like(start)
        for _ in range(pieces):
            probe = t + BEYOND
            seen = _Bends()
            values, slopes = slopes_along(partial(seen.run, model), x + probe * v, v)
            ahead = min((_next(a, b, how) for a, b, how in zip(values, slopes, seen.kinds, strict=False)), default=2.0)
            end = min(1.0, probe + ahead)
            summed = summed + (end - t) * slopes[-1].view_as(start)
            t = end
            if t == 1.0:
                break
            bends.append(t)
        with torch.no_grad():
            direct = model(x + t * v)[0] - start
    return Walk(tuple(bends), t, summed, direct)


class _Bends(TorchFunctionMode):
    """Collects the inputs of everything that bends; ``kinds`` says how: None for a ReLU, the window of a max pool."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.kinds: list[Mapping[str, Any] | None] = []

    def run(self, model: nn.Module, x: Tensor) -> list[Tensor]:
        """The inputs, and the logits last."""
        with self:
            logits = model(x)
        return [*self.inputs, logits]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in RELUS:
            self.inputs.append(args[0].clone())  # it may be overwritten
            self.kinds.append(None)
        elif name == "max_pool2d":
            names = ("kernel_size", "stride", "padding", "dilation")
            given = dict(zip(names, args[1:], strict=False)) | {k: kwargs[k] for k in names if k in kwargs}
            self.inputs.append(args[0])
            self.kinds.append(given)
        return func(*args, **kwargs)


def _next(a: Tensor, b: Tensor, window: Mapping[str, Any] | None) -> float:
    """The smallest s > 0 at which a + s b bends: crosses 0, or another entry of a window becomes its largest."""
    if window is not None:
        a, b = _windows(a, window, -torch.inf), _windows(b, window, 0.0)
        top = a.argmax(1, keepdim=True)
        a, b = a - a.gather(1, top), b - b.gather(1, top)
        coming = (b > 0) & (a < 0) & torch.isfinite(a)
    else:
        coming = a * b < 0
    return float((-a[coming] / b[coming]).amin()) if bool(coming.any()) else 2.0


def _windows(a: Tensor, window: Mapping[str, Any], fill: float) -> Tensor:
    """(C, window, positions) of a (1, C, H, W)."""
    padding = window.get("padding", 0)
    ph, pw = (padding, padding) if isinstance(padding, int) else padding
    padded = F.pad(a, (pw, pw, ph, ph), value=fill)
    size = window["kernel_size"]
    parts = F.unfold(padded, size, dilation=window.get("dilation", 1), stride=window.get("stride") or size)
    return parts.view(a.shape[1], -1, parts.shape[-1])
