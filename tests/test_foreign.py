"""Networks that come as a file, or from timm and RobustBench: what works, and what is refused in one line."""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gen
from small_runs import fresh, small_splits
from torch import Tensor, nn

from robustlens.attacks.pgd import PGD
from robustlens.attacks.verify import evaluate
from robustlens.core.modes import untouched
from robustlens.core.types import Batch
from robustlens.models.adapter import check_model
from robustlens.models.foreign import Program, as_module, is_foreign, is_script, open_foreign, open_program
from robustlens.results.errors import InputError
from robustlens.results.reading import Reading
from robustlens.studies.audit import audit, open_model
from robustlens.threats.lp import Lp

SHAPE = (1, 8, 8)
MINE = {"data": "cifar10", "threat": "linf:8/255"}


def example() -> Tensor:
    return torch.rand(6, *SHAPE, generator=gen(2))


def exported(model: nn.Module, *, dynamic: bool = True) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch", min=1, max=4096)} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (example(),), dynamic_shapes=None if batch is None else (batch,))


def save(model: nn.Module, kind: str, path: Path) -> Path:
    """``model`` as a file: scripted, traced, frozen or exported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "exported":
            torch.export.save(exported(model), path)
            return path
        program = torch.jit.trace(model, example()) if kind == "traced" else torch.jit.script(model)
        torch.jit.save(torch.jit.freeze(program) if kind == "frozen" else program, path)
    return path


KINDS = {"scripted": "net.pt", "traced": "net.ts", "frozen": "net.pth", "exported": "net.pt2"}


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    """SmallNet in eval mode, through a file of each kind."""
    return open_program(save(fresh().eval(), request.param, tmp_path / KINDS[request.param]))


def test_a_program_answers_as_its_source_does_and_has_its_gradient(opened: nn.Module) -> None:
    source, x = fresh().eval(), example().requires_grad_()
    check_model(opened, SHAPE, 4)
    with untouched(opened), untouched(source):
        torch.testing.assert_close(opened(x), source(x))
        found, wanted = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (opened, source))
    torch.testing.assert_close(found, wanted)


def test_a_program_is_attacked_as_its_source_is_and_left_as_it_was(opened: nn.Module) -> None:
    source = fresh().eval()
    before = {name: value.clone() for name, value in opened.state_dict().items()}
    modes = [module.training for module in opened.modules()]
    batch = Batch(example(), torch.arange(6) % 4, torch.arange(6))
    attack = PGD(threat=Lp("linf", 0.1), steps=5)
    found, wanted = (evaluate(attack, model, batch, gen=gen()) for model in (opened, source))
    torch.testing.assert_close(found.x_adv, wanted.x_adv, atol=1e-5, rtol=0)
    assert found.robust.tolist() == wanted.robust.tolist()
    assert all(torch.equal(value, before[name]) for name, value in opened.state_dict().items())
    assert [module.training for module in opened.modules()] == modes
    assert all(p.grad is None for p in opened.parameters())


@pytest.mark.parametrize("size", [0, 1, 5, 40])
def test_batches_of_any_size(opened: nn.Module, size: int) -> None:
    x = torch.rand(size, *SHAPE)
    with torch.no_grad():
        assert opened.eval()(x).shape == (size, 4)


def look(model: nn.Module, out: Path, lenses: list[Any] | None = None) -> dict[str, Reading]:
    split = small_splits().test
    run = audit(model, (split.images, split.labels), threat="l2:0.5", out=out, device="cpu", lenses=lenses)
    return {reading.lens: reading for reading in run.readings()}


def test_lenses_look_at_a_program_or_say_why_they_cannot(opened: nn.Module, tmp_path: Path) -> None:
    """What needs outputs alone finds what it finds in the source; what PyTorch cannot do is a failed reading."""
    attack = {"name": "pgd", "threat": "l2:0.5", "steps": 5, "loss": "margin"}
    same = [{"name": "accuracy", "attack": attack}, "logit-margins", "preprocessing"]
    found = look(opened, tmp_path / "a", [*same, "layer-spectra", {"name": "jacobian-spectrum", "n_examples": 4}])
    wanted = look(fresh().eval(), tmp_path / "b", same)
    for name, source in wanted.items():
        assert found[name].outcome == source.outcome
        for one, other in zip(found[name].quantities, source.quantities, strict=True):
            assert one.value == pytest.approx(other.value, abs=1e-4), one.name
    assert "shows no linear or convolutional layer" in found["layer-spectra"].outcome.why
    if is_script(opened):
        assert found["jacobian-spectrum"].outcome.why.startswith("PyTorch cannot do this with TorchScript (")
        assert found["jacobian-spectrum"].outcome.why.endswith("). Use torch.export.")
    else:
        assert found["jacobian-spectrum"].outcome.status == "ok"


@pytest.mark.slow
def test_every_lens_comes_through_with_a_program(opened: nn.Module, tmp_path: Path) -> None:
    readings = look(opened, tmp_path)
    assert all("\n" not in reading.outcome.why for reading in readings.values())
    failed = {name for name, reading in readings.items() if reading.outcome.status == "failed"}
    needs_training = {"generalisation-gap", "generalization-bound"}
    second = {"hessian", "jacobian-spectrum", "local-linearity", "weight-landscape"} if is_script(opened) else set()
    assert failed == needs_training | {"layer-spectra"} | second


def test_a_script_obeys_eval_mode_and_an_exported_program_keeps_its_own(tmp_path: Path) -> None:
    x = example()
    script = open_program(save(fresh(), "scripted", tmp_path / "a.pt"))
    assert torch.equal(script.eval()(x), fresh().eval()(x))
    program = open_program(save(fresh(), "exported", tmp_path / "b.pt2"))
    with torch.no_grad():
        assert not torch.equal(program.eval()(x), program.eval()(x)), "dropout is in its graph"


def test_modules_and_programs_are_taken_as_they_are() -> None:
    net = fresh().eval()
    assert as_module(net) is net
    program = exported(net)
    for thing in (program, program.module()):
        module = as_module(thing)
        assert isinstance(module, Program) and module.eval()(example()).shape == (6, 4)
    for thing in (lambda x: x, None, {"weight": torch.ones(1)}):
        with pytest.raises(InputError, match=r"expected a torch.nn.Module or a torch.export.ExportedProgram, got "):
            as_module(thing)
    split = small_splits().test
    with pytest.raises(InputError, match=r"Wrap it in a torch.nn.Module"):
        audit(lambda x: x, (split.images, split.labels), threat="l2:0.5")


def test_a_program_for_one_size_of_batch_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.export.save(exported(fresh().eval(), dynamic=False), tmp_path / "net.pt2")
    with pytest.raises(InputError, match="dynamic_shapes") as caught:
        open_program(tmp_path / "net.pt2")
    assert "\n" not in str(caught.value)


class Bomb:
    """A pickle that would run code when it is opened."""

    def __reduce__(self) -> Any:
        return (exec, ("import sys; sys.modules['foreign_bomb'] = sys",))


def rewritten(path: Path, change: dict[str, bytes]) -> Path:
    """A copy of the archive with the members that end so replaced (added where there is none)."""
    other, left = path.with_name(f"changed-{path.name}"), dict(change)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w", zipfile.ZIP_STORED) as target:
        names = source.namelist()
        for name in names:
            found = next((end for end in change if name.endswith(end)), None)
            target.writestr(name, source.read(name) if found is None else left.pop(found))
        for end, content in left.items():
            target.writestr(f"{names[0].split('/')[0]}/{end}", content)
    return other


def bombs() -> list[bytes]:
    buffer = io.BytesIO()
    torch.save((Bomb(), {}), buffer)
    return [buffer.getvalue(), pickle.dumps(Bomb())]


def test_pickles_inside_a_program_are_not_opened(tmp_path: Path) -> None:
    path = save(fresh().eval(), "exported", tmp_path / "net.pt2")
    for bomb in bombs():
        for member in ("data/sample_inputs/model.pt", "data/constants/opaque_obj_0"):
            with pytest.raises(InputError, match=r"would run code when opened|cannot be read") as caught:
                open_program(rewritten(path, {member: bomb}))
            assert "\n" not in str(caught.value) and "foreign_bomb" not in sys.modules
    script = save(fresh().eval(), "scripted", tmp_path / "net.pt")
    for bomb in bombs():
        with pytest.raises(InputError, match="cannot be read"):
            open_program(rewritten(script, {"data.pkl": bomb}))
        assert "foreign_bomb" not in sys.modules
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_files_that_are_no_programs(tmp_path: Path) -> None:
    net = fresh()
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("no network")
    (tmp_path / "empty.pt2").write_bytes(b"")
    for name, kind in (("cut.pt", "scripted"), ("cut.pt2", "exported")):
        content = save(net.eval(), kind, tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    with zipfile.ZipFile(tmp_path / "hollow.pt2", "w") as hollow:
        hollow.writestr("net/models/model.json", "{}")
    words = {
        "weights.pt": "a state dict or another pickle. Where it holds weights, name the network and add --weights",
        "text.pt": "a file of another kind",
        "empty.pt2": "a file of another kind",
        "cut.pt": "a file of another kind",
        "cut.pt2": "a file of another kind",
        "hollow.pt2": "cannot be read",
        "none.pt": "no such file",
    }
    for name, expected in words.items():
        with pytest.raises(InputError, match=expected) as caught:
            open_program(tmp_path / name)
        assert "\n" not in str(caught.value), name


def test_names_of_foreign_networks(tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(b"")
    assert all(map(is_foreign, ("timm:resnet50", "robustbench:Standard", "net.pt2", "a/b.ts", str(tmp_path / "net"))))
    assert not any(map(is_foreign, ("mypkg.net:build", "mlp", "timm", "robustbench.x:y", "nowhere/net")))


FAKE_TIMM = """
import torch
from torch import nn

class PretrainedCfg:
    def __init__(self, **fields): self.__dict__.update(fields)

def create_model(model_name, pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, checkpoint_path=None,
                 cache_dir=None, scriptable=None, exportable=None, no_jit=None, **kwargs):
    assert pretrained is True
    if model_name not in ("tiny", "tiny.old"):
        raise RuntimeError(f"Unknown model ({model_name})\\nsecond line")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    fields = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 8, 8)}
    model.pretrained_cfg = fields if model_name == "tiny.old" else PretrainedCfg(**fields)
    return model
"""
FAKE_ROBUSTBENCH = """
import torch
from torch import nn

def load_model(model_name, model_dir="./models", dataset="cifar10", threat_model="Linf", custom_checkpoint="",
               norm=None):
    known = {("Carmon2019Unlabeled", "cifar10", "Linf"): 3.0, ("Carmon2019Unlabeled", "cifar100", "L2"): 4.0}
    layer = nn.Linear(192, 5)
    nn.init.constant_(layer.bias, known[model_name, dataset, threat_model])
    return nn.Sequential(nn.Flatten(), layer).eval()
"""


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small packages with the surface of timm 1.0.31 and robustbench 1.1.1 that is used."""
    for name in ("timm", "robustbench", "robustbench.utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(FAKE_TIMM)
    (tmp_path / "robustbench").mkdir()
    (tmp_path / "robustbench" / "__init__.py").write_text("")
    (tmp_path / "robustbench" / "utils.py").write_text(FAKE_ROBUSTBENCH)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("timm", "robustbench", "robustbench.utils"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("libraries")
def test_a_network_of_timm_has_its_own_normalisation_inside() -> None:
    x = torch.rand(3, 3, 8, 8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    for name in ("timm:tiny", "timm:tiny.old"):
        model = open_foreign(name, **MINE)
        torch.testing.assert_close(model(x), model.model((x - mean) / std))
    with pytest.raises(InputError, match=r"got RuntimeError: Unknown model \(huge\). See timm.list_models") as caught:
        open_foreign("timm:huge", **MINE)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("libraries")
def test_a_network_of_robustbench_by_data_and_threat() -> None:
    assert open_foreign("robustbench:Carmon2019Unlabeled", **MINE)[1].bias[0] == 3
    other = {"data": "uoft-cs/CIFAR-100", "threat": " L2: 0.5"}
    assert open_foreign("robustbench:Carmon2019Unlabeled", **other)[1].bias[0] == 4
    with pytest.raises(InputError, match="a network of RobustBench for cifar10 and Linf, got KeyError"):
        open_foreign("robustbench:Nobody2020", **MINE)
    for wrong in ({"data": "mnist", "threat": "linf:0.1"}, {"data": "cifar10", "threat": "l1:12"}):
        with pytest.raises(InputError, match="cifar10, cifar100, imagenet and a threat in linf or l2"):
            open_foreign("robustbench:Carmon2019Unlabeled", **wrong)


def test_a_library_that_is_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustbench", None)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(InputError, match="pip install robustbench"):
        open_foreign("robustbench:Standard", **MINE)
    (tmp_path / "timm.py").write_text("import no_such_torchvision\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"expected the package timm, got ModuleNotFoundError: .*pip install timm"):
        open_foreign("timm:resnet50", **MINE)


def test_constants_beside_a_file(tmp_path: Path) -> None:
    path, splits = save(fresh().eval(), "scripted", tmp_path / "net.pt"), small_splits()
    x = example()
    with torch.no_grad():
        model = open_model(str(path), splits, mean="0.5", std="0.25").eval()
        torch.testing.assert_close(model(x), fresh().eval()((x - 0.5) / 0.25))
        assert torch.equal(open_model(str(path), splits).eval()(x), fresh().eval()(x))
    with pytest.raises(InputError, match=r"--weights: expected none beside .*net.pt"):
        open_model(str(path), splits, weights=tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="--std: expected none beside timm:resnet50, got 0"):
        open_model("timm:resnet50", splits, std="0.2")


def test_copies_of_a_program_compute_the_same(opened: nn.Module) -> None:
    """Lenses look at a copy of the network in float64, or at one with fresh weights."""
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(opened).eval()(example()), opened.eval()(example()))
