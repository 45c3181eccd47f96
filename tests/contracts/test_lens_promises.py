"""What a lens promises: what its numbers do not depend on, and how much memory it asks for."""

from __future__ import annotations

import dataclasses
import re
import weakref
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import gen
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustlens.core.discovery import build, discover
from robustlens.core.types import Invariance, Lens, Subject
from robustlens.data.arrays import from_arrays
from robustlens.threats.lp import Lp

LENSES = [lens for cls in discover("lens").values() for lens in cls.examples()]
IDS = [f"{lens.name}-{number}" for number, lens in enumerate(LENSES)]
IMAGE = 4 * 64  # bytes


class Small(nn.Sequential):
    """Two layers with a ReLU between them, so that scale can be moved from one to the other."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 4))
        self.eval()

    @torch.no_grad()
    def scaled(self, first: float, last: float) -> Small:
        conv, fc = self[0], self[-1]
        for t in (conv.weight, conv.bias):
            t *= first
        fc.weight *= last / first
        fc.bias *= last
        return self


def subject(model: nn.Module, n: int = 20) -> Subject:
    """``n`` training and ``n`` test images."""
    x, y = torch.rand(2 * n, 1, 8, 8, generator=gen(1)), torch.arange(2 * n) % 4
    return Subject(model, from_arrays(train=(x[:n], y[:n]), test=(x[n:], y[n:])), Lp("l2", 0.5))


def declared(lens: Lens) -> frozenset[Invariance]:
    return getattr(lens, "invariances", frozenset())


@pytest.mark.parametrize("invariance", get_args(Invariance))
@pytest.mark.parametrize("lens", LENSES, ids=IDS)
def test_headlines_change_with_what_is_not_declared_alone(lens: Lens, invariance: Invariance) -> None:
    """Scales are powers of two, so that nothing else changes."""
    other = Small().scaled(1, 4) if invariance == "logit scale" else Small().scaled(4, 1)
    before, after = (lens.look(subject(model), gen=gen()) for model in (Small(), other))
    same = [after[name].value == pytest.approx(before[name].value, rel=1e-4, abs=1e-6) for name in before.headline]
    assert all(same) if invariance in declared(lens) else not all(same)


def test_the_page_about_lenses_names_them() -> None:
    text = (Path(__file__).parents[2] / "docs" / "lenses.md").read_text()
    told = dict(re.findall(r"^\| (the scale of the logits|scale moved between layers)[^|]*\| ([^|]*) \|$", text, re.M))
    for words, invariance in zip(told, get_args(Invariance), strict=True):
        names = {name for name in discover("lens") if invariance in declared(build("lens", name))}
        assert set(re.findall("`([^`]+)`", told[words])) == names


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are alive, and the most of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, Tensor) and (key := (storage := t.untyped_storage())._cdata) not in self._known:
                self._known.add(key)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self._known.discard(key)


def most_memory(lens: Lens, n: int) -> int:
    looked_at = subject(Small(), n)
    with Live() as live:
        reading = lens.look(looked_at, gen=gen())
    assert reading.outcome.status != "failed", reading.outcome.why
    return live.most


@pytest.mark.parametrize("lens", LENSES, ids=IDS)
def test_memory_grows_by_a_few_images_an_example(lens: Lens) -> None:
    """An example leaves its image, two or three adversarial ones and numbers; passes take ``batch_size`` of them.

    The bound says that it holds all distances between its images.
    """
    fields = {field.name for field in dataclasses.fields(lens)}  # type: ignore[arg-type]
    asked = {"n_examples": 10_000, "batch_size": 8, "imitated": 20}
    small = dataclasses.replace(lens, **{k: v for k, v in asked.items() if k in fields})  # type: ignore[type-var]
    few, many = most_memory(small, 64), most_memory(small, 192)
    distances = 4 * 8 * 192 if lens.name == "generalization-bound" else 0
    assert (many - few) / 128 <= 4 * IMAGE + 128 + distances
