"""What the lenses compute, beside the public ways to it, in one process.

* ``layer spectra``: all singular values of ResNet-18's convolutions of stride 1, against NumPy's ``fft2`` and ``svd``
  over all frequencies (the recipe of Sedghi, Gupta and Long 2019, appendix), of kernels in double precision, as here,
  and in single precision.
* ``Jacobian spectra``: the Jacobians of 200 images, against the faster of ``is_grads_batched``, copies of the images
  and ``vmap(jacrev)``.
* ``boundary estimate``: seconds an image, against ART's CLEVER with as many samples, if it is installed.
* ``Hessian``: products with the Hessian until the three leading eigenvalues have a residual of 1e-3, against
  PyHessian's power iteration and ARPACK on curvlinops' operator, if they are installed; and the seconds of a product.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import jacrev, vmap

from benchmarks.harness import Case, Row, compare, interleave
from benchmarks.methods import learnt
from benchmarks.peers import installed
from benchmarks.workload import WORKLOADS, Bench, Plan
from robustlens.attacks.ddn import DDN
from robustlens.attacks.verify import craft
from robustlens.core.modes import untouched
from robustlens.core.rng import generator
from robustlens.lenses.distances import SHARES, estimate
from robustlens.linalg.hessian import LossHessian, flat, weights
from robustlens.linalg.jacobian import at_once, decompose, jacobian_rows
from robustlens.linalg.lanczos import eigenpairs
from robustlens.linalg.layers import ConvOperator, operators
from robustlens.threats.lp import Lp

Values = NDArray[Any]

#: Residual that the eigenvalues have to reach.
RESIDUAL = 1e-3


def run(plan: Plan) -> list[Row]:
    """One row per measurement and network."""
    bench = learnt("lenet-small", plan)
    return [*spectra(plan), *jacobians(plan), *boundary(bench), *hessian(bench), *products(bench)]


def spectra(plan: Plan) -> Iterator[Row]:
    """NumPy 2 transforms float32 kernels in single precision, where NumPy 1 did it in double."""
    bench = Bench(plan.workload("resnet18"), plan)
    found = [layer for layer in operators(bench.model, bench.batch.x[:1]) if isinstance(layer, ConvOperator)]
    layers = [layer for layer in found if layer.stride == (1, 1)]

    def recipe(dtype: str) -> list[Values]:
        kernels = [layer.weight.detach().numpy().transpose(2, 3, 0, 1).astype(dtype) for layer in layers]
        symbols = (
            np.fft.fft2(kernel, layer.circle, axes=(0, 1)) for layer, kernel in zip(layers, kernels, strict=True)
        )
        return [np.linalg.svd(symbol, compute_uv=False) for symbol in symbols]

    def ours() -> list[Values]:
        return [layer.spectrum().numpy() for layer in layers]

    ways = {"float64": lambda: recipe("float64"), "float32": lambda: recipe("float32"), "ours": ours}
    seconds = interleave([Case(*way) for way in ways.items()], rounds=plan.rounds, device=plan.device)
    exact = recipe("float64")
    errors = {way: worst_error(find(), exact) for way, find in ways.items() if way != "float64"}
    for dtype in ("float64", "float32"):
        fields = compare(seconds["ours"], seconds[dtype])
        fields["measured"] |= {"relative error": errors["ours"], "relative error of float32": errors["float32"]}
        note = f"{len(layers)} layers; a singular value is off by at most {errors['ours']:.0e} of itself"
        note += f", the recipe's by {errors['float32']:.0e}" if dtype == "float32" else " from the recipe's"
        case = f"layer spectra, to the NumPy recipe in {dtype}"
        yield Row(benchmark="lenses", model="resnet18", case=case, bar=0.2, note=note, **fields)


def worst_error(found: list[Values], exact: list[Values]) -> float:
    """Largest |σ − σ*| / σ* over all singular values of all layers."""
    pairs = ((np.sort(mine, axis=None), np.sort(true, axis=None)) for mine, true in zip(found, exact, strict=True))
    return max(float(np.max(np.abs(mine - true) / true)) for mine, true in pairs)


def jacobians(plan: Plan) -> Iterator[Row]:
    for name in ("lenet-small", "mnist-cnn"):
        bench = learnt(name, plan)
        x = bench.batch.x.repeat(2, 1, 1, 1)[: 8 if plan.tiny else 200]
        cases = [Case(way, ready(run_, bench.model, x), before=bench.freeze) for way, run_ in WAYS.items()]
        seconds = interleave(cases, rounds=plan.rounds, device=plan.device)
        rival = min((way for way in WAYS if way != "ours"), key=lambda way: float(np.median(seconds[way])))
        found = compare(seconds["ours"], seconds[rival])
        found["measured"] |= {way: float(np.median(each)) for way, each in seconds.items()}
        case = "Jacobian spectra, to the fastest other way"
        note = f"{len(x)} images, {rival}"
        yield Row(benchmark="lenses", model=name, case=case, bar=1.0, note=note, **found)


def ready(way: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, x: Tensor) -> Callable[[], None]:
    """All singular values, from as many Jacobians at a time as the lens takes."""

    def run_() -> None:
        for part in x.split(at_once(10, x[0].numel())):
            decompose(way(model, part))

    return run_


def batched(model: nn.Module, x: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    logits = model(point)
    axes = torch.eye(logits.shape[1])[:, None].expand(-1, *logits.shape)
    (rows,) = torch.autograd.grad(logits, point, axes, is_grads_batched=True)
    return rows.flatten(2).transpose(0, 1)


def replicated(model: nn.Module, x: Tensor) -> Tensor:
    classes = model(x[:1]).shape[1]
    point = x.repeat_interleave(classes, 0).requires_grad_()
    total = (model(point) * torch.eye(classes).repeat(len(x), 1)).sum()
    return torch.autograd.grad(total, point)[0].view(len(x), classes, -1)


def functional(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = vmap(jacrev(lambda image: model(image[None])[0]))(x)
    return found.flatten(2)


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "ours": jacobian_rows,
    "is_grads_batched": batched,
    "copies": replicated,
    "vmap(jacrev)": functional,
}


def boundary(bench: Bench) -> Iterator[Row]:
    """ART attacks one image at a time, and samples anew for every class; the estimate takes a batch and all classes."""
    case = "boundary estimate, to ART's CLEVER"
    if not installed("art"):
        note = "not installed: pip install adversarial-robustness-toolbox"
        yield Row(benchmark="lenses", model=bench.work.model, case=case, note=note)
        return
    from art.estimators.classification import PyTorchClassifier
    from art.metrics import clever_u

    plan, samples, n = bench.plan, 16 if bench.plan.tiny else 128, min(4 if bench.plan.tiny else 16, len(bench.batch))
    x, radius, threat = bench.batch.x[:n], 1.5, Lp("l2", 1.5)
    with torch.no_grad():
        top = bench.model(x).argmax(1)
    classifier = PyTorchClassifier(bench.model, nn.CrossEntropyLoss(), WORKLOADS["lenet-small"].shape, 10)

    def clever(image: Tensor) -> float:
        return float(clever_u(classifier, image.numpy(), samples // 16, 16, radius, norm=2, verbose=False))

    def ours() -> Tensor:
        with untouched(bench.model):
            return estimate(bench.model, x, top, threat, torch.full((n,), radius), 9, samples, bench.gen)

    cases = [Case("art", lambda: clever(x[0]), before=bench.freeze), Case("ours", ours, before=bench.freeze)]
    seconds = interleave(cases, rounds=plan.rounds, device=plan.device)
    found = compare([each / n for each in seconds["ours"]], seconds["art"])
    attack = DDN(threat=threat.with_eps(10 * radius), steps=20 if bench.plan.tiny else 500)
    nearest = threat.distance(craft(attack, bench.model, x, top, gen=bench.gen), x)
    theirs = torch.tensor([clever(image) for image in x])
    shares = {"ours, of the nearest found": (ours() / nearest).tolist()} | {
        "theirs, of the nearest found": (theirs / nearest).tolist()
    }
    middle = [statistics.median(share) for share in shares.values()]
    note = f"{samples} samples an image, {len(SHARES)} balls; median share of the distance of the nearest adversarial "
    note += f"image: {middle[0]:.2f}, CLEVER {middle[1]:.2f}"
    found["measured"] |= shares
    yield Row(benchmark="lenses", model=bench.work.model, case=case, bar=0.1, note=note, **found)


def hessian(bench: Bench) -> Iterator[Row]:
    """Products, not seconds: the count does not depend on the machine."""
    case, k = "Hessian, products to PyHessian's", 3
    if not installed("pyhessian"):
        yield Row(benchmark="lenses", model=bench.work.model, case=case, note="not installed: pip install pyhessian")
        return
    from pyhessian.hessian import hessian as Peer

    bench.model.eval().requires_grad_(True)
    at, (x, y) = weights(bench.model), (bench.batch.x, bench.batch.y)
    product = LossHessian(bench.model, at, x, y, chunk=len(x))
    ours = eigenpairs(product, flat(at.values()), k, gen=generator("cpu", 0, "hessian"), tolerance=RESIDUAL)
    found = ours.products - ours.verifying
    peer = Peer(bench.model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    steps, worst, most = 8, math.inf, 16 if bench.plan.tiny else 2000
    while worst > RESIDUAL and steps < most:
        steps = math.ceil(1.1 * steps)
        torch.manual_seed(0)
        values, vectors = peer.eigenvalues(maxIter=steps, tol=0.0, top_n=k)
        apart = []
        for value, vector in zip(values, vectors, strict=True):
            v = flat(vector)
            apart.append(float((product(v) - value * v).norm() / (abs(value) * v.norm())))
        worst = max(apart)
    theirs = k * steps
    measured = {
        "ours": found,
        "verifying": ours.verifying,
        "theirs": theirs,
        "residuals": ours.residuals.tolist(),
        "theirs_worst": worst,
    }
    reached = "" if worst <= RESIDUAL else f"; it ended at {worst:.1e}"
    note = f"{found} products, and {ours.verifying} to look for missed ones, against {theirs} of PyHessian{reached}"
    ratio = found / theirs
    yield Row(
        benchmark="lenses", model=bench.work.model, case=case, ratio=ratio, low=ratio, high=ratio, n=1, bar=1 / 3,
        measured=measured, note=note,
    )  # fmt: skip


def products(bench: Bench) -> Iterator[Row]:
    """ARPACK (SciPy's ``eigsh``) needs as many products as it takes for the same residual; no other check is made."""
    case = "Hessian, {} curvlinops"
    if not installed("curvlinops"):
        note = "not installed: pip install curvlinops-for-pytorch"
        yield Row(benchmark="lenses", model=bench.work.model, case=case.format("beside"), note=note)
        return
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    bench.model.eval().requires_grad_(True)
    at, (x, y), k = weights(bench.model), (bench.batch.x, bench.batch.y), 3
    product = LossHessian(bench.model, at, x, y, chunk=len(x))
    ours = eigenpairs(product, flat(at.values()), k, gen=generator("cpu", 0, "hessian"), tolerance=RESIDUAL)
    peer = HessianLinearOperator(
        bench.model, nn.CrossEntropyLoss(), list(bench.model.parameters()), [(x, y)], check_deterministic=False
    ).to_scipy()
    asked = [0]

    def counted(v: np.ndarray) -> np.ndarray:
        asked[0] += 1
        return peer @ v.astype(np.float32)

    start = np.random.default_rng(0).standard_normal(peer.shape[0])
    worst, tolerance, spent = math.inf, 0.1, 0
    while worst > RESIDUAL and tolerance > 1e-6:
        tolerance, asked[0] = tolerance / 3, 0
        operator = LinearOperator(peer.shape, matvec=counted, dtype=np.float64)
        values, vectors = eigsh(operator, k, which="LA", tol=tolerance, v0=start)
        spent = asked[0]
        found = zip(values, torch.from_numpy(vectors.T).float(), strict=True)
        worst = max(float((product(v) - value * v).norm() / abs(value)) for value, v in found)
    mine, note = ours.products - ours.verifying, f"against {spent} of ARPACK at residual {worst:.1e}"
    ratio = mine / spent
    yield Row(
        benchmark="lenses", model=bench.work.model, case=case.format("products to"), ratio=ratio, low=ratio, high=ratio,
        n=1, bar=1.0, measured={"ours": mine, "theirs": spent}, note=f"{mine} products {note}",
    )  # fmt: skip
    v = torch.randn(peer.shape[0], generator=bench.gen)
    cases = [Case("curvlinops", lambda: peer @ v.numpy()), Case("ours", lambda: product(v))]
    seconds = interleave(cases, rounds=bench.plan.rounds, device=bench.plan.device)
    yield Row(
        benchmark="lenses", model=bench.work.model, case=case.format("seconds a product to"), bar=1.0,
        note=f"{len(x)} images", **compare(seconds["ours"], seconds["curvlinops"]),
    )  # fmt: skip
