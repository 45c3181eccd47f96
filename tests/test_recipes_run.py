"""Every recipe at smoke scale, from the command line to the page: on digits, and on files in the others' schemas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_files import write
from typer.testing import CliRunner

from robustlens.cli import app
from robustlens.recipes.recipe import Recipe, recipes
from robustlens.results.runs import read_runs
from robustlens.results.store import find_runs

pytestmark = pytest.mark.slow

#: Name → columns, classes, side; as they lie on the Hub.
SCHEMAS = {
    "cifar10": (("img", "label"), 10, 32),
    "cifar100": (("img", "fine_label"), 100, 32),
    "svhn": (("image", "label"), 10, 32),
    "tiny-imagenet": (("image", "label"), 200, 64),
    "tiny-imagenet-20": (("image", "label"), 20, 64),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise whose brightness tells the class, 300 images to learn from and 60 to test on."""
    found = tmp_path_factory.mktemp("data")
    draws = np.random.default_rng(0)
    for name, (columns, classes, side) in SCHEMAS.items():
        second = "valid" if name.startswith("tiny") else "test"
        for split, n in (("train", 300), (second, 60)):
            labels = np.arange(n) % classes
            light = 40 + 160 * labels / classes
            images = (light[:, None, None, None] + draws.uniform(-40, 40, (n, side, side, 3))).astype(np.uint8)
            extra = {"coarse_label": (labels // 5).tolist()} if name == "cifar100" else None
            file = found / name / f"{split}-00000-of-00001.parquet"
            names = [f"class {k}" for k in range(classes)]
            write(file, images, labels.tolist(), columns=columns, names=names, extra=extra)
    return found


@pytest.fixture
def data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTLENS_DATA", str(root))


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("recipe", [each for each in recipes().values() if each.networks is None], ids=lambda r: r.name)
def test_every_recipe_runs(recipe: Recipe, tmp_path: Path) -> None:
    out, kept = tmp_path / "runs", tmp_path / "kept"
    command = ["reproduce", recipe.name, "--scale", "smoke", "--out", str(out), "--keep", str(kept), "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    record = json.loads((kept / f"{recipe.name}-smoke.json").read_text())
    readings = [reading for run in read_runs(find_runs([kept])) for reading in run.readings]
    whys = [f"{reading.lens}: {reading.outcome.why}" for reading in readings if reading.outcome.status == "failed"]
    said = ("is the model constant?", "gives one answer to all images")
    constant = [why for why in whys if any(words in why for words in said)]  # an epoch on noise may leave one answer
    assert readings and whys == constant, whys
    empty = {row["column"] for row in record["rows"] if row["ours"] is None}
    assert len(record["rows"]) == len(recipe.printed)
    assert empty <= {"PGD", *(["average margin"] if constant else [])}, "of no image that is right there is no share"
