"""Networks that come as a program or from another library: TorchScript, ExportedProgram, timm, RobustBench.

A program file is code of somebody else's: what it computes runs on this machine, as an imported module does. Pickles
that would run code when they are opened are refused inside it too.
"""

from __future__ import annotations

import copy
import importlib
import logging
import os
import pickle
import types
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from robustlens.models.adapter import WithNormalizer, require_modest
from robustlens.models.normalize import ChannelStandardize
from robustlens.results.errors import InputError

#: How files of programs usually end.
SUFFIXES = (".pt", ".pth", ".pt2", ".ts", ".torchscript", ".jit")
#: Library → what installs it.
LIBRARIES = {"timm": "timm", "robustbench": "robustbench"}
#: RobustBench's names of data sets and of norms.
BENCHMARKS = ("cifar100", "cifar10", "imagenet")
NORMS = {"linf": "Linf", "l2": "L2"}


class Program(nn.Module):
    """An exported program as a module. It stays in the mode in which it was exported, whatever mode is asked for.

    Its layers have been dissolved into a graph of operations: what looks at layers sees none.
    """

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.program(x)
        return logits

    def train(self, mode: bool = True) -> Self:
        self.training = mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of its own graphs
            other = Program(copy.deepcopy(self.program, memo))
        other.training = self.training
        return other


class Frozen(nn.Module):
    """What ``torch.jit.freeze`` made: without weights, and without a mode, which every submodule must have."""

    def __init__(self, program: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.hidden = (program,)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.hidden[0](x)
        return logits


def is_script(model: nn.Module) -> bool:
    """Whether TorchScript is in ``model``: PyTorch can differentiate it once, and no weight of it can be replaced."""
    return any(isinstance(module, torch.jit.ScriptModule | Frozen) for module in model.modules())


def as_module(thing: Any) -> nn.Module:
    """``thing`` as a module that can be asked for eval mode: a module, or a ``torch.export.ExportedProgram``.

    Raises:
        InputError: anything else, or a program that takes batches of one size alone.
    """
    if isinstance(thing, torch.export.ExportedProgram):
        thing = thing.module()
    if isinstance(thing, torch.fx.GraphModule) and isinstance(vars(thing).get("train"), types.MethodType):
        _check_batch(thing)  # it comes from an exported program: such a module refuses train() and eval()
        return Program(thing)
    if isinstance(thing, torch.jit.ScriptModule) and not hasattr(thing, "training"):
        return Frozen(thing)
    if isinstance(thing, nn.Module):
        return thing
    raise InputError(
        "model",
        expected="a torch.nn.Module or a torch.export.ExportedProgram",
        got=type(thing).__name__,
        fix="Wrap it in a torch.nn.Module whose forward maps images to logits.",
    )


def _check_batch(program: torch.fx.GraphModule) -> None:
    """Refuse a program that takes batches of one size alone."""
    images = next(node for node in program.graph.nodes if node.op == "placeholder")
    size = images.meta["val"].shape[0]
    if isinstance(size, int):
        raise InputError(
            "model",
            expected="an exported program for batches of any size",
            got=f"one for {size} images",
            fix='Export it with dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},).',
        )


def is_foreign(name: str) -> bool:
    """Whether ``name`` is one of "timm:…", "robustbench:…", or a file."""
    library = any(name.startswith(f"{known}:") for known in LIBRARIES)
    return library or Path(name).suffix in SUFFIXES or os.path.isfile(name)


def open_foreign(name: str, *, data: str, threat: str) -> nn.Module:
    """The network called ``name``; ``data`` and ``threat`` (a norm and a radius) choose RobustBench's variant.

    Raises:
        InputError: a library that is not installed, a name that it does not know, a file that is no program.
    """
    library, _, identifier = name.partition(":")
    if library == "timm":
        return _timm(identifier)
    if library == "robustbench":
        return _robustbench(identifier, data, threat)
    return open_program(Path(name))


def open_program(path: Path) -> nn.Module:
    """The network in a TorchScript file (``torch.jit.save``) or an ExportedProgram file (``torch.export.save``).

    Raises:
        InputError: no such file, a file of another kind, a damaged one, or one with a pickle that would run code.
    """
    if not os.path.isfile(path):
        raise InputError(f"model {path}", expected="a file", got="no such file", fix="Check the path.")
    require_modest(path, f"model {path}")
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    tops = {"/".join(name.split("/")[1:]) or name for name in names}
    exported = "models/model.json" in tops or "serialized_exported_program.json" in names
    if exported and any(part.split("/")[-1].startswith(("opaque_obj_", "custom_obj_")) for part in tops):
        raise _no_program(
            path, "one with an object that would run code when opened", "Export it without such constants."
        )
    if not exported and not any(top.startswith("code/") for top in tops):
        got = "a state dict or another pickle" if "data.pkl" in tops else "a file of another kind"
        raise _no_program(path, got, f"Where it holds weights, name the network and add --weights {path.name}.")
    try:
        with _quietly():
            script: Any = torch.jit.load  # PyTorch's own annotations leave it untyped
            return as_module(torch.export.load(path) if exported else script(str(path), map_location="cpu"))
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        got, fix = "one with a pickle that would run code when opened", "Export the network again."
        raise _no_program(path, got, fix) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise _no_program(path, f"one that cannot be read ({_line(error)})", "Save the network again.") from error


def _no_program(path: Path, got: str, fix: str) -> InputError:
    return InputError(f"model {path}", expected="a TorchScript or ExportedProgram file", got=got, fix=fix)


@contextmanager
def _quietly() -> Iterator[None]:
    """No warnings of PyTorch's readers, and none of their pickles is opened unless it holds plain data alone.

    torch.export.load falls back on a full unpickler without this variable.
    """
    variable, disabled = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", logging.root.manager.disable
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _timm(name: str) -> nn.Module:
    """A pretrained network of timm behind the normalisation that its own configuration names."""
    timm = _library("timm", name)
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # names, downloads and checkpoints each fail in their own way
        raise InputError(
            f"model timm:{name}",
            expected="a pretrained network of timm",
            got=_line(error),
            fix="See timm.list_models(pretrained=True).",
        ) from error
    config: Any = model.pretrained_cfg
    settings: Mapping[str, Any] = config if isinstance(config, Mapping) else vars(config)
    return WithNormalizer(ChannelStandardize(tuple(settings["mean"]), tuple(settings["std"])), model)


def _robustbench(name: str, data: str, threat: str) -> nn.Module:
    """A network of RobustBench's zoo, which takes images in [0, 1]."""
    norm, plain = threat.partition(":")[0].strip().lower(), data.lower().replace("-", "")
    benchmark = next((known for known in BENCHMARKS if known in plain), None)
    if benchmark is None or norm not in NORMS:
        raise InputError(
            f"model robustbench:{name}",
            expected=f"data called {', '.join(sorted(BENCHMARKS))} and a threat in {' or '.join(NORMS)}",
            got=f"{data} and {threat}",
            fix="RobustBench has networks for these alone.",
        )
    utils = _library("robustbench", name, "robustbench.utils")
    try:
        model: nn.Module = utils.load_model(model_name=name, dataset=benchmark, threat_model=NORMS[norm])
    except Exception as error:
        raise InputError(
            f"model robustbench:{name}",
            expected=f"a network of RobustBench for {benchmark} and {NORMS[norm]}",
            got=_line(error),
            fix="See https://robustbench.github.io for the identifiers.",
        ) from error
    return model


def _library(package: str, name: str, module: str | None = None) -> Any:
    try:
        return importlib.import_module(module or package)
    except Exception as error:  # importing runs the library's own code
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        raise InputError(
            f"model {package}:{name}",
            expected=f"the package {package}",
            got="none" if missing else _line(error),
            fix=f"Install it: pip install {LIBRARIES[package]}.",
        ) from error


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
