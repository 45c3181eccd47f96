"""The table of dependencies against pyproject.toml and against what the installed packages say of themselves."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Words of older metadata, which does not tell the BSD licences apart, and what they stand for.
WORDS = {
    "Apache Software License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "BSD 3-Clause": "BSD-3-Clause",
    "BSD": "BSD-2-Clause",
    "MIT License": "MIT",
}


def table() -> list[list[str]]:
    rows = re.findall(
        r"^\| ([\w-]+) \| (>=[^|]*) \| ([^|]+) \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE
    )
    return [[cell.strip() for cell in row] for row in rows]


def licences(package: str) -> set[str]:
    facts = importlib.metadata.metadata(package)
    named = re.split(r" AND | OR ", facts.get("License-Expression") or facts.get("License") or "")
    named += [line.split(" :: ")[-1] for line in facts.get_all("Classifier") or () if line.startswith("License ::")]
    return {WORDS.get(name.strip(), name.strip()) for name in named}


def asked(*extras: str) -> set[str]:
    """What pyproject.toml asks for, with ``extras``, as "name>=version"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    return {re.sub(r"\[.*\]", "", each) for each in found if not each.startswith("robustlens[")}


def test_the_table_is_what_is_asked_for() -> None:
    rows = [name + version for name, version, _ in table()]
    assert sorted(rows) == sorted(asked("cluster", "tensorboard", "test-cluster", "test-accelerator", "test"))


def test_licences_are_those_of_the_installed_packages() -> None:
    """Of what every machine that runs the tests has."""
    here = [(package, licence) for package, version, licence in table() if package + version in asked("test")]
    assert len(here) > 20
    for package, licence in here:
        assert licence in licences(package), package


def test_the_promise_about_the_network_stands_in_the_docs() -> None:
    assert "No telemetry. No network is used unless a Hub id is named." in (ROOT / "docs/dependencies.md").read_text()
