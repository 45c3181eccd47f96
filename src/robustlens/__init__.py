"""robustlens: train robust classifiers, look inside them, and test what the papers say about them.

>>> import robustlens as rl
>>> runs = rl.run_study(rl.read_study("study.toml"))          # train, examine
>>> rl.write_page(runs, "report.html", title="My study")      # look
>>> run = rl.audit(model, (images, labels), threat="linf:8/255")   # a network of your own
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from robustlens.data.arrays import from_arrays as from_arrays
    from robustlens.data.config import DataConfig as DataConfig
    from robustlens.data.sources import load as load
    from robustlens.report.figures import write_figures as write_figures
    from robustlens.report.page import write_page as write_page
    from robustlens.studies.audit import audit as audit
    from robustlens.studies.config import make_study as make_study
    from robustlens.studies.config import read_study as read_study
    from robustlens.studies.run import run_study as run_study
    from robustlens.threats.lp import Lp as Lp

#: What is public, and where it lives; a name is imported when it is first used, so that ``--help`` needs no torch.
_HOMES = {
    "DataConfig": "data.config",
    "Lp": "threats.lp",
    "audit": "studies.audit",
    "from_arrays": "data.arrays",
    "load": "data.sources",
    "make_study": "studies.config",
    "read_study": "studies.config",
    "run_study": "studies.run",
    "write_figures": "report.figures",
    "write_page": "report.page",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robustlens' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(f"robustlens.{_HOMES[name]}"), name)
