"""Small real subjects for the tests: trained in a blink, in float32 or float64, on the CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

import robustlens.cli
from robustlens.core.rng import forked
from robustlens.core.types import Batch, Crafted, Terms

pytest_plugins = ["small_cluster", "small_accelerator"]

torch.set_num_threads(1)

#: Where the full data sets lie, as the product looks for them; the published networks lie beside them.
DATA = Path(os.environ.get("ROBUSTLENS_DATA", "unset"))
NETWORKS = DATA.parent / "checkpoints" / "003"


def needs(*places: Path) -> pytest.MarkDecorator:
    """Skip, naming what is not there: full data sets and the papers' networks are too large to come with the tests."""
    missing = [str(place) for place in places if not place.is_dir()]
    return pytest.mark.skipif(bool(missing), reason=f"not there (set ROBUSTLENS_DATA): {', '.join(missing)}")


needs_data = needs(DATA / "mnist")


def gen(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture
def images() -> Tensor:
    """Images (12, 1, 8, 8) in [0, 1], with pixels on the border of the box as digits have them."""
    return torch.rand(12, 1, 8, 8, generator=gen(1)).mul(1.6).sub(0.3).clamp(0, 1)


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(12) % 4


class SmallNet(nn.Module):
    """A network with everything that can be disturbed: BatchNorm statistics, dropout, two kinds of layers."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(6 * 8 * 8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(self.conv(x)).relu().flatten(1)))


@pytest.fixture
def net() -> nn.Module:
    with forked():
        torch.manual_seed(3)
        return SmallNet()


def double_net() -> nn.Module:
    with forked():
        torch.manual_seed(3)
        return SmallNet().double()


@pytest.fixture
def network() -> nn.Module:
    """One hidden layer of ReLUs, in float64."""
    with forked():
        torch.manual_seed(5)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 4)).double()


@pytest.fixture
def smooth() -> nn.Module:
    """A curved network with second derivatives everywhere, in float64."""
    with forked():
        torch.manual_seed(5)
        layers = nn.Conv2d(1, 3, 3), nn.Softplus(beta=8), nn.Flatten(), nn.Linear(108, 4)
        return nn.Sequential(*layers).double()


@pytest.fixture
def linear() -> nn.Module:
    """Softmax regression on 8 × 8 images with 4 classes, weights of unit scale."""
    with forked():
        torch.manual_seed(4)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        nn.init.normal_(model[1].weight)
        return model


@pytest.fixture
def batch(images: Tensor, labels: Tensor) -> Batch:
    return Batch(images.double(), labels, torch.arange(len(labels)))


@pytest.fixture
def crafted(batch: Batch) -> Crafted:
    """Clean images, as a regularizer sees them that differentiates its inputs."""
    x = batch.x.requires_grad_()
    return Crafted(batch, x)


#: What a regularizer gets that does not look at the objective's results.
NOTHING = Terms(torch.zeros(()), torch.zeros(1, 4))


def example_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of one image (C, H, W)."""
    return -model(x[None]).log_softmax(1)[0, y]


def weight_gradient(value: Tensor, model: nn.Module) -> Tensor:
    """The gradient of ``value`` with respect to all weights, flat."""
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def close(a: list[Tensor], b: list[Tensor], tol: float = 1e-10) -> bool:
    return len(a) == len(b) > 0 and all(torch.allclose(p, q, rtol=tol, atol=tol) for p, q in zip(a, b, strict=True))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The entry point with arguments: exit code, output, errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["robustlens", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            robustlens.cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run
