"""Certified Lipschitz constants of whole networks, from the graph of their layers.

The forward pass is traced once with symbols (torch.fx). Every step then gets a constant L in the ℓp norm, p ∈ {1, 2,
∞}: layers multiply it by their operator norm, sums of branches add theirs, and concatenated branches take the p-norm
of theirs. The last linear layer is not multiplied: for two of its rows w_a and w_b, Hölder's inequality gives

    |(f_a − f_b)(x) − (f_a − f_b)(z)| ≤ ‖w_a − w_b‖_q · L · ‖x − z‖_p,        1/p + 1/q = 1,

with L the constant of what comes before (Tsuzuku, Sato and Sugiyama 2018, arXiv 1802.04034, §4.1, for p = 2). Bounds
hold everywhere and for every input, and are loose for deep networks. Constants are exact up to rounding in float64.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from robustlens.core.modes import untouched
from robustlens.linalg.layers import Skipped, operators

#: Modules that bring no two inputs farther apart.
CONTRACTIONS = (
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout2d,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
)
#: The same for functions and methods, by name. ``getitem`` stands for slices, ``mean`` for any set of dimensions.
CONTRACTING = {"relu", "relu_", "tanh", "sigmoid", "flatten", "reshape", "view", "contiguous", "mean", "neg"}

#: Keywords of functions and methods that say nothing of scale; others, ``alpha`` and ``out`` among them, are not known.
KEYWORDS = {"dim", "keepdim", "start_dim", "end_dim", "mode", "value", "inplace"}


@dataclass(frozen=True)
class Uncertified:
    """There is no constant, and why."""

    why: str


class _NotKnown(Exception):
    """A step of the network whose constant is not known."""


class _Reach(NamedTuple):
    """A step's constant; where it is W h + b in an earlier step h, also W (K, F), h and the constant of h."""

    constant: float
    rows: Tensor | None = None
    source: fx.Node | None = None
    before: float = 0.0


def pairwise_constants(model: nn.Module, x: Tensor, p: float) -> Tensor | Uncertified:
    """Constants of f_a − f_b in ℓp for all pairs of logits: (K, K) float64 on the CPU, zero on the diagonal.

    Args:
        model: in any mode; the constants are those of eval mode, with BatchNorm as the fixed scale that it is there.
        x: (1, C, H, W), from which the layers' sizes are learnt.
        p: 1, 2 or ∞.

    Known are Linear, Conv2d, BatchNorm, max and average pooling and usual activations as modules; sums, differences,
    constant factors, concatenation, padding with constants, slices, means and reshapes as functions.
    """
    try:
        twin = copy.deepcopy(model).eval()  # tracing may leave constants in it
        graph = fx.Tracer().trace(twin)
        with untouched(twin), torch.no_grad():
            followed = ShapeProp(fx.GraphModule(twin, graph)).propagate(x.clone())
            alike = torch.allclose(followed, twin(x), rtol=1e-4, atol=1e-6)
    except Exception as error:  # symbols run through the model's own code
        return Uncertified(f"its forward pass cannot be followed symbolically ({type(error).__name__})")
    if not alike:
        return Uncertified("its forward pass, followed symbolically, gives another answer")
    try:
        reach, classes = _Walk(twin, graph, x, p).output()
    except _NotKnown as unknown:
        return Uncertified(str(unknown))
    q = math.inf if p == 1 else p / (p - 1) if p < math.inf else 1.0
    if reach.rows is not None:
        return torch.cdist(reach.rows, reach.rows, p=q, compute_mode="donot_use_mm_for_euclid_dist") * reach.before
    return (1 - torch.eye(classes, dtype=torch.float64)) * reach.constant * 2 ** (1 / q)


class _Walk:
    """Constants of the steps of ``graph``, in order; what does not depend on the image has none."""

    def __init__(self, model: nn.Module, graph: fx.Graph, x: Tensor, p: float) -> None:
        self.model, self.graph, self.x, self.p = model, graph, x, p
        self.known: dict[fx.Node, Any] = {}
        self.calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self.norms: dict[str, float | None] | None = None

    def output(self) -> tuple[_Reach, int]:
        """The constant of the logits, and how many there are."""
        for node in self.graph.nodes:
            args = fx.node.map_arg(node.args, lambda n: self.known[n])
            if node.op == "output":
                if not isinstance(args[0], _Reach):
                    raise _NotKnown("its answer is not one tensor of logits")
                return args[0], _shape(node.all_input_nodes[0])[1]
            self.known[node] = self._step(node, args)
        raise AssertionError("a graph ends with its output")

    def _step(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        if node.op == "placeholder":
            return _Reach(1.0)
        if node.op == "get_attr":
            return _attribute(self.model, str(node.target))
        if not any(isinstance(self.known[n], _Reach) for n in node.all_input_nodes):
            return None
        written = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if any(key not in KEYWORDS or isinstance(value, fx.Node) for key, value in node.kwargs.items()):
            raise _NotKnown(f"no constant is known for the keywords {', '.join(node.kwargs)} of {written!r}")
        if node.op == "call_module":
            return self._module(node, args[0])
        name = str(written).strip("_")
        if str(written) == f"{name}_" and name not in CONTRACTING:  # what came before is another tensor afterwards
            raise _NotKnown(f"no constant is known for the step {written!r}, which changes its input")
        return self._function(node, name, args, [part for part in _flat(args) if isinstance(part, _Reach)])

    def _module(self, node: fx.Node, reach: _Reach) -> _Reach:
        name = str(node.target)
        module = self.model.get_submodule(name)
        if isinstance(module, nn.Linear):
            norm = self._norm(name, module, lambda: _matrix_norm(module.weight, self.p))
            rows = module.weight.detach().cpu().double()
            return _Reach(norm * reach.constant, rows, node.all_input_nodes[0], reach.constant)
        if isinstance(module, nn.Conv2d):
            return _Reach(self._norm(name, module, lambda: _conv_norm(module, self.p)) * reach.constant)
        return _Reach(_module_constant(module, self.p) * reach.constant)

    def _norm(self, name: str, module: nn.Module, absolute: Callable[[], float | None]) -> float:
        """The layer's operator norm: sums of absolute weights for p = 1 and ∞, singular values for p = 2."""
        if self.p != 2:
            norm = absolute()
        elif self.calls[name] > 1 and isinstance(module, nn.Conv2d):
            raise _NotKnown(f"layer {name} runs several times")
        else:
            if self.norms is None:
                found = [layer for layer in operators(self.model, self.x) if not isinstance(layer, Skipped)]
                self.norms = {layer.name: layer.norm_bound() for layer in found}
            norm = self.norms.get(name)
        if norm is None:
            raise _NotKnown(f"no bound is known for the norm of layer {name}")
        return norm

    def _function(self, node: fx.Node, name: str, args: tuple[Any, ...], inside: list[_Reach]) -> Any:
        first = args[0]
        constants = [reach.constant for reach in inside]
        if name in ("size", "getattr"):
            return None
        if name in CONTRACTING:
            return _Reach(constants[0])
        if name == "getitem" and all(_is_slice(part) for part in _flat((node.args[1],))):
            return _Reach(constants[0])
        if name == "pad" and len(args) == 2 and node.kwargs.get("mode", "constant") == "constant":
            return _Reach(constants[0])
        alike = all(_shape(n) == _shape(node) for n in node.all_input_nodes if isinstance(self.known[n], _Reach))
        if name in ("add", "iadd", "sub", "isub") and alike and len(args) == 2:
            return _Reach(sum(constants))
        if name in ("mul", "imul", "truediv", "div", "itruediv") and alike and len(inside) == 1:
            other = args[1] if isinstance(first, _Reach) else first
            upside_down = name not in ("mul", "imul")
            if isinstance(other, (int, float, Tensor)) and not (upside_down and other is first):
                factor = torch.as_tensor(other).detach().double().abs()
                return _Reach(constants[0] * float((1 / factor if upside_down else factor).max()))
        if name == "zeros_like":
            rows = None if first.rows is None else torch.zeros_like(first.rows)
            return _Reach(0.0, rows, first.source, 0.0)
        if name == "cat" and len(inside) == len(first):
            return self._joined(inside, args[1] if len(args) > 1 else node.kwargs.get("dim", 0))
        raise _NotKnown(f"no constant is known for the step {name!r}")

    def _joined(self, parts: list[_Reach], dim: Any) -> _Reach:
        constant = float(torch.linalg.vector_norm(torch.tensor([r.constant for r in parts]).double(), ord=self.p))
        moving = {r.source for r in parts if r.constant > 0}
        rows = [r.rows for r in parts if r.rows is not None]
        if dim in (1, -1) and len(rows) == len(parts) and len(moving) == 1:
            return _Reach(constant, torch.cat(rows), moving.pop(), max(r.before for r in parts))
        return _Reach(constant)


def _module_constant(module: nn.Module, p: float) -> float:
    if isinstance(module, CONTRACTIONS):
        return 1.0
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, nn.ELU):
        return max(1.0, abs(module.alpha))
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_var is not None:
        scale = (module.running_var.double() + module.eps).rsqrt()
        gain = scale if module.weight is None else scale * module.weight.detach().double().abs()
        return float(gain.max())
    if isinstance(module, nn.MaxPool2d):
        return math.pow(_overlap(module.kernel_size, module.stride, module.dilation), 1 / p)
    if isinstance(module, nn.AvgPool2d):
        plain = not module.ceil_mode and module.divisor_override is None
        if plain and (module.count_include_pad or module.padding in (0, (0, 0))):
            share = _overlap(module.kernel_size, module.stride, 1) / math.prod(_pair(module.kernel_size))
            return math.pow(share, 1 / p)
    if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        return 1.0
    raise _NotKnown(f"no constant is known for a layer {type(module).__name__}")


def _matrix_norm(weight: Tensor, p: float) -> float:
    """‖W‖_{p→p} of (out, in) for p = 1 (largest column sum) or ∞ (largest row sum)."""
    return float(weight.detach().double().abs().sum(0 if p == 1 else 1).max())


def _conv_norm(module: nn.Conv2d, p: float) -> float | None:
    """A bound of ‖K∗‖_{p→p} for p = 1 or ∞; None where padding repeats pixels, which a column sum does not see."""
    size = module.weight.detach().double().abs()
    if p == math.inf:
        return float(size.sum((1, 2, 3)).max())
    if module.padding_mode != "zeros":
        return None
    return float(size.view(module.groups, -1, *size.shape[1:]).sum((1, 3, 4)).max())


def _overlap(kernel: Any, stride: Any, dilation: Any) -> int:
    """How many windows a pixel can be in."""
    sides = zip(_pair(kernel), _pair(stride), _pair(dilation), strict=True)
    return math.prod(-(-k * math.gcd(s, d) // s) for k, s, d in sides)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a step's result; one that an operand does not have is the work of broadcasting, which repeats it."""
    return tuple(node.meta["tensor_meta"].shape)


def _is_slice(part: Any) -> bool:
    return isinstance(part, (slice, int)) or part is None or part is Ellipsis


def _attribute(model: nn.Module, path: str) -> Any:
    """A parameter or buffer of the model; None for a constant that tracing made."""
    try:
        return operator.attrgetter(path)(model)
    except AttributeError:
        return None


def _flat(args: Any) -> list[Any]:
    """The leaves of nested tuples and lists; a named tuple of ours is a leaf."""
    if isinstance(args, (tuple, list)) and not isinstance(args, _Reach):
        return [leaf for part in args for leaf in _flat(part)]
    return [args]
