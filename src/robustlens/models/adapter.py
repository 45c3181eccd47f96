"""The adapter for anybody's network: import it, load its weights, and check that it is what every method expects.

Expected is a module from images (B, C, H, W) in [0, 1] to logits (B, K). What is a trap without an error elsewhere is
an error here: probabilities instead of logits, pixels from 0 to 255, normalised data, weights of another architecture.
"""

from __future__ import annotations

import copy
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from robustlens.core.discovery import load_attribute, raised_at
from robustlens.core.modes import untouched
from robustlens.models.classifier import check_request
from robustlens.models.normalize import Normalized
from robustlens.results.errors import InputError
from robustlens.results.seal import is_damaged

#: An archive whose members would become this many times its size is refused: weights hardly compress.
EXPANSION = 100
#: How far a row of probabilities may be from summing to one.
SUM_TOLERANCE = 1e-3
#: Images of a check are scaled by this to tell a sigmoid, which stays in [0, 1], from a logit, which does not.
FAR = 1e3


class OneLogit(nn.Module):
    """A network with one output z (B,) or (B, 1) as one with the two logits (0, z): class 1 where z > 0.

    Softmax cross-entropy of them is the logistic loss softplus(∓z).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.model(x).reshape(-1, 1)
        return torch.cat([torch.zeros_like(z), z], dim=1)


class WithNormalizer(nn.Module):
    """``model`` behind a normaliser; it has ``features`` and ``head`` where the model has them."""

    def __init__(self, normalize: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(self.normalize(x))
        return logits

    @property
    def head(self) -> Any:
        return self.model.head

    @property
    def features(self) -> Callable[[Tensor], Tensor]:
        inner: Any = self.model.features
        return lambda x: inner(self.normalize(x))


@dataclass(frozen=True, kw_only=True)
class External(Normalized):
    """A network of your own: any module from images (B, C, H, W) to logits (B, K), or to one logit for two classes.

    Attributes:
        source: ``pkg.module:name`` of a function (or class) that makes it without arguments, or of the module itself.
        weights: its weights, a file that ``load_weights`` reads; None keeps what ``source`` gives.
        mean, std, per_image: the normalisation it was trained with, put in front of it, so that its input is [0, 1].
    """

    name: ClassVar[str] = "external"
    reference: ClassVar[str] = "none: your own network"

    source: str
    weights: str | None = None

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """The network, checked on images of ``shape``; a module named by ``source`` is copied.

        Raises:
            InputError: it cannot be imported, made or loaded, or it fails ``check_model``.
        """
        check_request(self.name, shape, classes)
        model = _made(self.source)
        if self.weights is not None:
            load_weights(model, self.weights)
        normalize = self.normalizer(shape[0])
        if not isinstance(normalize, nn.Identity):
            model = WithNormalizer(normalize, model)
        return check_model(model, shape, classes)


def _made(source: str) -> nn.Module:
    found = load_attribute(source)
    if isinstance(found, nn.Module):
        return copy.deepcopy(found)
    expected = "a torch.nn.Module, or a function without arguments that returns one"
    if not callable(found):
        raise InputError(source, expected=expected, got=type(found).__name__, fix="Name the function or the module.")
    try:
        model = found()
    except (Exception, SystemExit) as error:
        at = raised_at(error)
        fix = f"It is raised at {at}." if at else "Write a function that fills in the arguments."
        raise InputError(source, expected=expected, got=_line(error), fix=fix) from error
    if not isinstance(model, nn.Module):
        raise InputError(source, expected=expected, got=type(model).__name__, fix="Return the network itself.")
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the tensors of ``path`` into ``model``; every name and shape has to fit.

    Read are safetensors files, and PyTorch files (.pt, .pth) that hold a state dict and nothing that would run code
    when opened. A state dict may lie under "state_dict" and its names may start with "module.". Floats of another
    precision are converted.

    Raises:
        InputError: a file that cannot be read, or the first tensor that is missing, unexpected, of another shape or
            kind, or not a number.
    """
    path = Path(path)
    if not os.path.isfile(path):
        got = "a directory" if os.path.isdir(path) else "no such file"
        raise InputError(str(path), expected="a file of weights", got=got, fix="Check the path.")
    readers = {".safetensors": _read_safetensors, ".pt": _read_torch, ".pth": _read_torch}
    if path.suffix not in readers:
        raise InputError(
            str(path),
            expected="a .safetensors, .pt or .pth file",
            got=path.suffix or "no suffix",
            fix="Save the weights with safetensors.torch.save_file(model.state_dict(), path).",
        )
    given = readers[path.suffix](path)
    if given and all(name.startswith("module.") for name in given):
        given = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    _check_fit(str(path), given, model.state_dict())
    model.load_state_dict(given)


def _check_fit(path: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    fix = "This is a checkpoint of another architecture, or of other settings (classes, width, image size)."
    for name, tensor in wanted.items():
        # Files older than PyTorch 0.4.1 lack this counter, and PyTorch starts it at 0.
        if name not in given and not name.endswith("num_batches_tracked"):
            raise InputError(
                path, expected=f"tensor {name!r} of shape {tuple(tensor.shape)}", got="no such tensor", fix=fix
            )
    for name, tensor in given.items():
        if name not in wanted:
            raise InputError(path, expected="the model's tensors alone", got=f"also {name!r}", fix=fix)
        if tensor.shape != wanted[name].shape:
            raise InputError(
                path,
                expected=f"tensor {name!r} of shape {tuple(wanted[name].shape)}",
                got=str(tuple(tensor.shape)),
                fix=fix,
            )
        kinds = [(t.is_floating_point(), t.is_complex(), t.dtype == torch.bool) for t in (tensor, wanted[name])]
        if kinds[0] != kinds[1] or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = "a meta" if tensor.is_meta else "a quantized" if tensor.is_quantized else f"a {tensor.layout}"
            raise InputError(
                path,
                expected=f"tensor {name!r} as plain numbers like {wanted[name].dtype}",
                got=f"{kind} tensor of {tensor.dtype}",
                fix=fix,
            )
        if bool(tensor.isnan().any()):
            raise InputError(path, expected=f"numbers in tensor {name!r}", got="NaN", fix="Its training diverged.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    fix = "Copy or download it again; where a run wrote it, delete the run's directory to train again."
    if is_damaged(path.read_bytes()):
        raise InputError(str(path), expected="the content that was written", got="a damaged file", fix=fix)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise InputError(str(path), expected="a safetensors file", got=_line(error), fix=fix) from error
    return tensors


def require_modest(path: Path, what: str) -> None:
    """Refuse a zip archive that would fill the memory when it is unpacked."""
    try:
        members = zipfile.ZipFile(path).infolist() if zipfile.is_zipfile(path) else []
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        # All three come of made-up tables of contents: a wrong mark or place, a name that is no text, and a version of
        # the format that Python does not read.
        raise InputError(what, expected="an archive", got=_line(error), fix="Download or save it again.") from error
    size, there = sum(member.file_size for member in members), path.stat().st_size
    if size > EXPANSION * there:
        raise InputError(
            what,
            expected=f"an archive of at most {EXPANSION} times its size",
            got=f"{size:,} bytes packed into {there:,}",
            fix="Save it again without compression.",
        )


def _read_torch(path: Path) -> dict[str, Tensor]:
    fix = "Where you trust it, load it yourself and save model.state_dict() with safetensors.torch.save_file."
    require_modest(path, str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch suspects of a foreign pickle is said by the error below
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            str(path),
            expected="a state dict of tensors alone",
            got="a pickle that would run code when opened, or a damaged file",
            fix=fix,
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise InputError(str(path), expected="a PyTorch state dict", got=_line(error), fix=fix) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise InputError(str(path), expected="a state dict", got=type(found).__name__, fix=fix)
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise InputError(
                str(path), expected="a state dict of tensors alone", got=f"{type(value).__name__} at {name!r}", fix=fix
            )
    return dict(found)


def check_model(
    model: nn.Module, shape: tuple[int, int, int], classes: int, device: torch.device | str | None = None
) -> nn.Module:
    """The model, tried on a few images of ``shape``; a model with one logit for two classes comes back in OneLogit.

    It runs in eval mode and is left as it was, except that it is moved to ``device`` (None: where it is).

    Raises:
        InputError: a failing forward pass, an output that is not (B, classes), not finite, without gradient, or made
            of probabilities.
    """
    if any(p.is_meta for p in model.parameters()):
        raise InputError("model", expected="weights", got="none, on the device meta", fix="Load its weights first.")
    if device is not None:
        model = model.to(device)
    x = _probe(shape, next((p.device for p in model.parameters()), torch.device(device or "cpu")))
    out = _output(model, x)
    if out.dtype != x.dtype:
        raise InputError(
            "model", expected=f"{x.dtype} logits", got=str(out.dtype), fix="End its forward pass with .float()."
        )
    _check_alone(model, x[:1], out)
    if classes == 2 and out.shape in ((len(x),), (len(x), 1)):
        _check_values(out)
        far = _output(model, FAR * torch.cat([x, -x]))
        if bool(((far >= 0) & (far <= 1)).all()) and bool((far > 0).any()):
            raise _probabilities("one output that stays in [0, 1] for any input", "sigmoid")
        return OneLogit(model)
    if out.shape != (len(x), classes):
        raise InputError(
            "model",
            expected=f"{classes} logits an image, shape ({len(x)}, {classes})",
            got=f"shape {tuple(out.shape)}",
            fix="Take the network that was trained for these classes, or the data that it was trained on.",
        )
    _check_values(out)
    out = out.detach()
    if bool((out >= 0).all()) and float((out.sum(1) - 1).abs().max()) < SUM_TOLERANCE:
        raise _probabilities("rows that are not negative and sum to 1", "softmax")
    return model


def _check_alone(model: nn.Module, x: Tensor, out: Tensor) -> None:
    """Refuse a network that answers one image ``x`` (1, C, H, W) otherwise than several, to which it said ``out``."""
    wanted = (1, *out.shape[1:])
    try:
        shape = tuple(_output(model, x).shape)
        got = "" if shape == wanted or (shape == () and out.dim() == 1) else f"shape {shape}"
    except InputError as error:
        got = error.got
    if got:
        raise InputError(
            "model",
            expected=f"an output of shape {wanted} for one image, as it is {tuple(out.shape)} for {len(out)}",
            got=got,
            fix="Batches have any size: write no number of images into it, and squeeze named dimensions alone.",
        )


def _probe(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Four noisy images (4, C, H, W), the same every time."""
    return torch.rand(4, *shape, generator=Generator().manual_seed(0)).to(device)


def _output(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output for ``x``, with its gradient's history."""
    with untouched(model), torch.enable_grad():
        try:
            out = model(x.clone().requires_grad_())
        except Exception as error:
            raise InputError(
                "model",
                expected=f"a forward pass on images of shape {tuple(x.shape)}",
                got=_line(error),
                fix="Check that channels, size and precision (float32) of the images are those that it was made for.",
            ) from error
    if not isinstance(out, Tensor):
        raise InputError(
            "model",
            expected="a tensor of logits",
            got=type(out).__name__,
            fix="Wrap it in a module that returns the logits, such as output.logits.",
        )
    return out


def _check_values(out: Tensor) -> None:
    if not bool(torch.isfinite(out).all()):
        raise InputError(
            "model",
            expected="finite logits",
            got="NaN or infinity",
            fix="Check the weights, and that the network divides by no zero deviation.",
        )
    if not out.requires_grad:
        raise InputError(
            "model",
            expected="logits with a gradient with respect to the image",
            got="none",
            fix="Remove torch.no_grad, detach, argmax or rounding from its forward pass.",
        )


def _probabilities(got: str, layer: str) -> InputError:
    return InputError(
        "model",
        expected="logits",
        got=f"what looks like probabilities: {got}",
        fix=f"Remove the last {layer}: attacks and margins need what comes before it.",
    )


def _line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
