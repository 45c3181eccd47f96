"""What the command line says beside its results, on standard error: one line each."""

from __future__ import annotations

import sys
import warnings
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from robustlens.results.errors import DamageWarning


def say_error(text: str) -> None:
    Console(stderr=True).print(f"[red]error:[/red] {escape(text)}", soft_wrap=True, highlight=False, emoji=False)


def say_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings as a line for the user, the others as Python shows them."""
    if issubclass(category, DamageWarning):
        Console(stderr=True).print(f"[yellow]warning:[/yellow] {escape(str(message))}", soft_wrap=True, highlight=False)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
