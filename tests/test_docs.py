"""The documentation's commands and code, executed."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from robustlens.cli import app
from robustlens.core.discovery import discover
from robustlens.results.verdict import Entry
from robustlens.studies.config import make_study
from robustlens.studies.plan import make_plan
from robustlens.studies.run import run_study

ROOT = Path(__file__).parents[1]


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


def test_the_study_in_the_readme_is_the_file() -> None:
    (text,) = blocks("README.md", "toml")
    assert tomllib.loads(text) == tomllib.loads((ROOT / "docs/study.toml").read_text())


@pytest.mark.parametrize("file", ["README.md", "docs/write-a-plugin.md", "docs/evaluation.md"])
def test_python_examples_run(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    study = (tmp_path / "docs/study.toml").read_text().replace("epochs = 5", "epochs = 1").replace("[0, 1]", "[0]")
    (tmp_path / "docs/study.toml").write_text(f"{study}\n[[lenses]]\nname = 'logit-margins'\n")
    names: dict[str, object] = {"__name__": "example"}
    found = blocks(file, "python")
    assert found
    for code in found:
        exec(compile(code, file, "exec", dont_inherit=True), names)


def test_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    commands = [
        shlex.split(line) for block in blocks("README.md", "sh") for line in block.splitlines() if "docs/study" in line
    ]
    commands += [["robustlens", "report", "runs/lipschitz", "--figures", "figures", "--format", "svg"]]
    commands += [["robustlens", "list", "lens"]]
    for command in commands:
        quick = ("seeds=[0]", "training.epochs=1", 'lenses=["logit-margins"]') if command[1] == "study" else ()
        extra = [word for setting in quick for word in ("--set", setting)]
        result = CliRunner().invoke(app, command[1:] + extra)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "runs/lipschitz/report.html").is_file()
    assert list((tmp_path / "figures").glob("*.svg"))


def test_how_to_choose_names_every_method_and_its_studies_can_be_planned() -> None:
    text = (ROOT / "docs/how-to-choose.md").read_text()
    for kind in ("objective", "regularizer", "update", "constraint"):
        missing = [name for name in discover(kind) if f"| `{name}` " not in text]
        assert not missing, kind
    together, papers = (tomllib.loads(block)["methods"] for block in blocks("docs/how-to-choose.md", "toml"))
    base = {"data": {"source": "mnist5k"}, "model": "lenet", "threat": "l2:1.5"}
    (run,) = make_plan(make_study({**base, "methods": together})).runs
    assert [r.name for r in run.recipe.regularizers] == ["average-margin"]
    assert [c.name for c in run.recipe.constraints] == ["spectral-clip"]
    first, second = make_plan(make_study({**base, "methods": papers})).runs
    assert second.start is first


def test_lenses_names_every_lens_and_its_examples_work(tmp_path: Path) -> None:
    text = (ROOT / "docs/lenses.md").read_text()
    assert not [name for name in discover("lens") if f"| `{name}` " not in text]
    (block,) = blocks("docs/lenses.md", "toml")
    base = {"data": {"source": "digits", "train": 60, "valid": 20, "test": 20}, "model": "mlp", "threat": "l2:0.5"}
    plan = make_plan(
        make_study({**base, "methods": [{"label": "standard"}], "training": {"epochs": 20}} | tomllib.loads(block))
    )
    assert plan.kept_epochs == {1, 5, 10, 20} and len(plan.lenses) == 4
    study = {
        **base,
        "methods": [{"label": "standard"}],
        "training": {"epochs": 1},
        "seeds": [0, 1],
        "lenses": ["layer-spectra"],
    }
    names: dict[str, object] = {"runs": run_study(make_study(study), tmp_path)}
    (code,) = blocks("docs/lenses.md", "python")
    exec(compile(code, "docs/lenses.md", "exec", dont_inherit=True), names)


def test_the_claim_in_the_docs_is_judged(tmp_path: Path) -> None:
    attack = {"threat": "l2:0.5", "steps": 2}
    study = {
        "data": {"source": "digits", "train": 60, "valid": 20, "test": 20},
        "model": "mlp",
        "threat": "l2:0.5",
        "training": {"epochs": 1},
        "methods": [
            {"label": "FGSM", "objective": {"name": "adversarial", "attack": {"name": "fgsm", "threat": "l2:0.5"}}},
            {"label": "PGD", "objective": {"name": "adversarial", "attack": {"name": "pgd", **attack}}},
        ],
        "lenses": [{"name": "accuracy", "pictures": 0}],
    }
    names: dict[str, object] = {"directories": run_study(make_study(study), tmp_path)}
    for code in blocks("docs/write-a-claim.md", "python"):
        exec(compile(code, "docs/write-a-claim.md", "exec", dont_inherit=True), names)
    entry = names["entry"]
    assert isinstance(entry, Entry) and entry.judgement != "not run" and len(entry.verdicts) == 1


def test_every_link_in_the_docs_leads_somewhere() -> None:
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", file.read_text()):
            if not target.startswith("http"):
                assert (file.parent / target).exists(), f"{file.name}: {target}"
