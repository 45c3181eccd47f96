"""The package as it is installed from a wheel, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src/robustlens"


@pytest.mark.slow
def test_a_wheel_holds_everything_and_works_elsewhere(tmp_path: Path) -> None:
    """Built by pip, which fetches the build backend; the dependencies are those of this environment."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("robustlens-*.whl")
    files = {
        path.relative_to(SOURCES) for path in SOURCES.rglob("*") if path.is_file() and path.parent.name != "__pycache__"
    }
    inside = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {Path("robustlens") / file for file in files} <= inside
    home, work = tmp_path / "installed", tmp_path / "work"
    subprocess.run([*pip, "install", "--no-deps", "--target", home, wheel], check=True)
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(home), "OMP_NUM_THREADS": "1"}

    def call(*arguments: str) -> str:
        command = [sys.executable, "-m", "robustlens", *arguments]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "Usage: python -m robustlens" in call("--help")
    call("demo", "--set", "training.epochs=1", "--set", "data.train=60", "--set", "data.test=40", "--device", "cpu")
    (page,) = work.rglob("report.html")
    assert page.stat().st_size > 500_000
    where = subprocess.run(
        [sys.executable, "-c", "import robustlens; print(robustlens.__file__)"],
        cwd=work, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(home))
