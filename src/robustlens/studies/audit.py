"""Looking at a network that somebody trained elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlens.core import discovery
from robustlens.core.rng import generator
from robustlens.core.types import Lens, Splits, Subject
from robustlens.core.world import joined
from robustlens.data.arrays import from_arrays
from robustlens.data.config import DataConfig
from robustlens.data.embedded import EMBEDDED
from robustlens.data.sources import open_source
from robustlens.data.splitting import assemble, stratified_order
from robustlens.lenses.standard import StandardAccuracy
from robustlens.models.adapter import OneLogit, WithNormalizer, check_model, load_weights
from robustlens.models.foreign import Program, as_module, is_foreign, open_foreign
from robustlens.models.normalize import Normalized
from robustlens.results.errors import InputError, unknown_name
from robustlens.results.store import RunDirectory, digest, write_atomically
from robustlens.studies.config import Plugin, validated
from robustlens.studies.depth import Depth, expected_seconds, lenses_at
from robustlens.studies.epochs import schedule
from robustlens.studies.examine import examine, held, require_radii, takes_part
from robustlens.studies.plan import run_directory
from robustlens.studies.robustbench import robustbench_record
from robustlens.studies.run import answers, pick_device, provenance
from robustlens.studies.watch import SilentStudy, StudyWatch
from robustlens.threats.lp import Lp

Arrays = tuple[Any, Any]


def audit(
    model: Any,
    data: Splits | Arrays,
    *,
    threat: str | Lp,
    lenses: Sequence[Plugin] | None = None,
    depth: Depth = "quick",
    standard: bool = False,
    label: str = "model",
    out: str | Path = "runs/audit",
    seed: int = 0,
    device: str = "auto",
    watch: StudyWatch | None = None,
) -> RunDirectory:
    """Look at ``model`` through ``lenses`` and return the run directory with the readings.

    Processes that torchrun started (``core.world.together``) share the lenses, and look at the leader's weights.

    Args:
        model: maps images in [0, 1] (B, C, H, W) to logits (B, K); its normalization lives inside it. A
            ``torch.nn.Module`` (scripted ones too) or a ``torch.export.ExportedProgram``.
        data: splits from ``load``, or (images, labels) to test on, as numpy arrays or tensors.
        threat: what robustness is measured against, such as "linf:8/255".
        lenses: names or settings of lenses; None takes all of them.
        depth: where all are taken: "quick" is minutes on a laptop, "full" has more examples, steps and directions
            (``estimate`` says how long it takes).
        standard: also run AutoAttack-standard, which can be interrupted and resumed.
        label: names the model in tables and charts.
        out: where the run directory is made; it is addressed by the network (its layers, weights and answers to some
            test images), data, threat and seed.

    Raises:
        InputError: images outside [0, 1], a model of other shape than the data, an unknown lens, …
    """
    watch = watch or SilentStudy()
    chosen = lenses_at(depth) if lenses is None else tuple(schedule(lens).lens for lens in lenses)
    chosen = (*chosen, *([StandardAccuracy()] if standard else []))
    model = as_module(model)
    subject = _subject(model, data, threat, device)
    for lens in chosen:
        require_radii(lens, subject.threat, subject.splits.shape)
    with _modes_kept(model):
        return _looked(subject, chosen, label, Path(out), seed, watch)


def estimate(
    model: Any,
    data: Splits | Arrays,
    *,
    threat: str | Lp,
    depth: Depth = "full",
    standard: bool = False,
    device: str = "auto",
) -> dict[str, float]:
    """Seconds that each lens will take in an ``audit`` on this machine, by the passes that it counts."""
    model = as_module(model)
    chosen = (*lenses_at(depth), *([StandardAccuracy()] if standard else []))
    with _modes_kept(model):
        return expected_seconds(chosen, _subject(model, data, threat, device))


def _subject(model: nn.Module, data: Splits | Arrays, threat: str | Lp, device: str) -> Subject:
    place = pick_device(device)
    if not isinstance(data, Splits) and not (isinstance(data, tuple | list) and len(data) == 2):
        raise InputError("data", expected="splits, or (images, labels)", got=type(data).__name__, fix="Give a pair.")
    splits = (data if isinstance(data, Splits) else from_arrays(test=data)).to(place).as_tested()
    threat = Lp.parse(threat) if isinstance(threat, str) else threat
    if not isinstance(threat, Lp):
        raise InputError(
            "threat", expected='a norm and a radius, such as "linf:8/255"', got=repr(threat), fix="Write it so."
        )
    threat.require_fits(splits.shape)
    return Subject(check_model(model.to(place), splits.shape, len(splits.classes)), splits, threat, place)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, was in modes:
            module.training = was


def _looked(
    subject: Subject, chosen: Sequence[Lens], label: str, out: Path, seed: int, watch: StudyWatch
) -> RunDirectory:
    model, splits, world = subject.model.eval(), subject.splits, joined()
    world.same(model)
    settings = {
        "model": f"{type(model).__module__}:{type(model).__qualname__}",
        "weights": fingerprint(model),
        "behaviour": digest({"layers": str(model), "answers": _hash(answers(model, splits))}),
        "data": [getattr(splits, part).fingerprint() for part in ("train", "test")],
        "threat": str(subject.threat),
        "seed": seed,
    }
    address = digest(settings)
    directory = run_directory(out, label, seed, address)
    with held(directory):
        if world.leads:
            record = {"label": label, "study": "audit", "hash": address, "seed": seed, "config": settings}
            now = provenance(splits, subject.device)
            directory.write_json("run.json", {**record, "provenance": now, "finished": True})
        for piece, lens in enumerate(chosen):
            if takes_part(lens, piece):
                watch.begin(piece, len(chosen), label, lens.name)
                _, already = examine(lens, subject, directory, seed=seed, facts={}, watch=watch)
                watch.done(label, lens.name, already=already)
        world.wait()
        if isinstance(subject.threat, Lp) and world.leads:
            found = robustbench_record(
                directory.readings(), dataset=splits.name, architecture=_architecture(model), threat=subject.threat
            )
            write_atomically(directory.path / "robustbench.json", json.dumps(found, indent=2).encode())
    return directory


def _architecture(model: nn.Module) -> str:
    """The name of the network's class, without what the library put around it."""
    while isinstance(model, WithNormalizer | OneLogit | Program):
        model = model.program if isinstance(model, Program) else model.model
    return str(getattr(model, "original_name", type(model).__name__))


def open_splits(source: str, *, examples: int | None = None) -> Splits:
    """The images that the command line names, at most ``examples`` of each split.

    A directory without a test split is all test images: nothing of it is needed for training.
    """
    config = validated(DataConfig, {"source": source, "train": examples, "valid": examples, "test": examples}, "data")
    raw = open_source(config)
    if source in EMBEDDED or set(raw.splits) != {"train"}:
        return assemble(config, raw)
    split = raw.splits["train"]
    order = stratified_order(split.labels, generator("cpu", 0, "data", "audit"))[:examples]
    return from_arrays(test=(split.images()[order], split.labels[order]), classes=raw.classes, name=raw.name)


def open_model(
    name: str,
    splits: Splits,
    *,
    threat: str = "",
    weights: Path | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> nn.Module:
    """The network that the command line names.

    Args:
        name: ``pkg.module:callable``, an architecture of the library, a TorchScript or ExportedProgram file,
            ``timm:NAME`` or ``robustbench:ID``.
        threat: chooses RobustBench's variant, together with the name of the data.
        weights: a safetensors file or a state dict; needed for an architecture of the library.
        mean, std: channel statistics as "0.49,0.48,0.45", to be put inside the model.

    Raises:
        InputError: it cannot be imported, opened or built, or the weights belong to another architecture.
    """
    constants: dict[str, Any] = {
        key: _numbers(key, text) for key, text in (("mean", mean), ("std", std)) if text is not None
    }
    if is_foreign(name):
        given = {"weights": weights, **({"mean": mean, "std": std} if ":" in name else {})}
        for option, value in given.items():
            if value is not None:
                raise InputError(f"--{option}", expected=f"none beside {name}", got=str(value), fix="It has its own.")
        foreign = open_foreign(name, data=splits.name, threat=threat)
        normalize = Normalized(**constants).normalizer(splits.shape[0])
        return WithNormalizer(normalize, foreign) if constants else foreign
    settings: dict[str, Any] = {"name": name, **constants}
    if ":" in name:
        settings |= {"name": "external", "source": name, "weights": None if weights is None else str(weights)}
    elif name not in (known := discovery.discover("model")):
        unknown = unknown_name("model", name, known.keys() - {"external"})
        fix = f"{unknown.fix} A network of your own is pkg.module:callable."
        raise InputError(unknown.what, expected=unknown.expected, got=unknown.got, fix=fix)
    model: nn.Module = discovery.build("model", settings).build(splits.shape, len(splits.classes))
    if ":" not in name:
        if weights is None:
            raise InputError(f"model {name}", expected="its weights", got="none", fix="Add --weights FILE.safetensors.")
        load_weights(model, weights)
    return model


def _numbers(what: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"--{what}", expected="numbers with commas between", got=repr(text), fix="For example 0.49,0.48,0.45."
        ) from error


def fingerprint(model: nn.Module) -> str:
    """Hash of the weights and buffers."""
    tensors: dict[str, Tensor] = model.state_dict()
    return digest({name: _hash(tensor) for name, tensor in tensors.items()})


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
