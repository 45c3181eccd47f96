"""Lenses that run out of memory look again at half as many images, and say so. The allocator refuses for real."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small_runs import fresh, small_splits
from torch import Tensor, nn

from robustlens.core.discovery import build
from robustlens.core.rng import generator
from robustlens.core.types import Subject
from robustlens.core.world import World
from robustlens.results.reading import Reading
from robustlens.results.store import RunDirectory
from robustlens.studies.examine import examine
from robustlens.threats.lp import Lp


class Hungry(nn.Module):
    """A linear network that asks for a petabyte where it gets more than 8 images."""

    limit: ClassVar[int] = 8

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.limit:
            torch.empty(2**50, dtype=torch.uint8)
        return self.fc(x.flatten(1))


@pytest.fixture
def hungry() -> Subject:
    return Subject(fresh(Hungry).eval(), small_splits(), Lp("linf", 0.05), torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Means:
    """The mean of the logits; it can be resumed."""

    name: ClassVar[str] = "means"
    batch_size: int = 16

    def look(self, subject: Subject, *, gen: torch.Generator) -> Reading:
        return self.look_resumably(subject, gen=gen)

    def look_resumably(
        self, subject: Subject, *, gen: torch.Generator, state: Path | None = None, told: Any = None
    ) -> Reading:
        with torch.no_grad():
            found = [subject.model(batch.x) for batch in subject.splits.test.batches(self.batch_size)]
        draw = torch.rand(1, generator=gen).item()
        return Reading("means", f"{state and state.name} {draw} {torch.cat(found).mean().item():.4f}.")


@pytest.mark.parametrize(("name", "settings"), [("logit-margins", {}), ("accuracy", {"n_examples": 16})])
def test_memory_that_runs_out_is_halved(name: str, settings: dict[str, Any], hungry: Subject, tmp_path: Path) -> None:
    lens = build("lens", {"name": name, "batch_size": 250, **settings})
    directory = RunDirectory(tmp_path)
    reading, already = examine(lens, hungry, directory, seed=0, facts={})
    assert not already and reading.outcome.status != "failed"
    assert reading.says.endswith("Memory ran out with 250 images at a time; measured with 7.")
    assert reading.settings["batch_size"] == 250
    again, already = examine(lens, hungry, directory, seed=0, facts={})
    assert already and again.says == reading.says, "its place is that of the lens asked for"
    direct = build("lens", {"name": name, "batch_size": 7, **settings}).look(
        hungry, gen=generator(hungry.device, 0, "lens", name)
    )
    assert reading.quantities == direct.quantities


def test_a_resumable_lens_keeps_a_state_for_each_size(hungry: Subject, tmp_path: Path) -> None:
    reading, _ = examine(Means(), hungry, RunDirectory(tmp_path), seed=0, facts={})
    small, _ = examine(Means(batch_size=8), hungry, RunDirectory(tmp_path), seed=0, facts={})
    assert reading.says == f"{small.says} Memory ran out with 16 images at a time; measured with 8."


def test_memory_that_cannot_be_enough(hungry: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hungry, "limit", 0)
    reading, _ = examine(Means(), hungry, RunDirectory(tmp_path), seed=0, facts={})
    assert reading.outcome.status == "failed" and "with a single image" in reading.outcome.why


def test_other_errors_are_not_taken_for_it(hungry: Subject, tmp_path: Path) -> None:
    class Wrong(Hungry):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(3, -1, 7)

    hungry.model.forward = Wrong().forward  # type: ignore[method-assign]
    reading, _ = examine(Means(), hungry, RunDirectory(tmp_path), seed=0, facts={})
    assert reading.outcome.status == "failed" and reading.outcome.why.startswith("RuntimeError: shape '[3, -1, 7]'")
    (kept,) = (tmp_path / "errors").iterdir()
    assert kept.name in reading.outcome.why and "Traceback" in kept.read_text() and "in forward" in kept.read_text()


def test_processes_that_share_a_lens_end_with_its_error(
    hungry: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shared(Means):
        def look_resumably(self, subject: Subject, *, gen: Any, state: Any, told: Any) -> Reading:
            raise ValueError("an odd one")

    reading, _ = examine(Shared(), hungry, RunDirectory(tmp_path), seed=0, facts={})
    assert reading.outcome.status == "failed" and reading.outcome.why.startswith("ValueError: an odd one")
    monkeypatch.setattr("robustlens.studies.examine.joined", lambda: World(0, 2))
    with pytest.raises(ValueError, match="an odd one"):
        examine(Shared(), hungry, RunDirectory(tmp_path), seed=0, facts={})
