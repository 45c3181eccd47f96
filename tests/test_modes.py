"""Core: models are left as they were, random draws can be replayed, settings become plug-ins or one clear line."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import gen
from torch import Tensor, nn

from robustlens.attacks.pgd import PGD
from robustlens.core.discovery import build, describe, find, load_attribute
from robustlens.core.modes import channels_last, precision, untouched
from robustlens.core.rng import derive, generator
from robustlens.core.types import Threat
from robustlens.objectives.adversarial import Adversarial
from robustlens.objectives.standard import Standard
from robustlens.results.errors import InputError, unknown_name
from robustlens.results.reading import Reading
from robustlens.threats.lp import Lp


def snapshot(net: nn.Module) -> dict[str, Any]:
    return {
        "modes": [module.training for module in net.modules()],
        "wanted": [p.requires_grad for p in net.parameters()],
        "tensors": {name: value.clone() for name, value in net.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["modes"] == after["modes"] and before["wanted"] == after["wanted"]
    assert all(before["tensors"][name].equal(after["tensors"][name]) for name in before["tensors"])
    for old, new in zip(before["grads"], after["grads"], strict=True):
        assert (old is None) == (new is None) and (old is None or old.equal(new))
    assert before["random"].equal(after["random"])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("fails", [False, True])
def test_untouched_restores_everything(mode: Any, fails: bool, net: nn.Module, images: torch.Tensor) -> None:
    net.norm.eval()  # a module frozen by hand, among others in train mode
    net.fc.bias.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    before = snapshot(net)
    moved = False
    try:
        with untouched(net, mode=mode):
            assert {module.training for module in net.modules()} == {mode == "train"}
            assert not any(p.requires_grad for p in net.parameters())
            x = images.clone().requires_grad_()
            net(x).sum().backward()
            assert x.grad is not None and bool((x.grad != 0).any())
            torch.rand(3)
            moved = not before["tensors"]["norm.running_mean"].equal(net.norm.running_mean)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert moved == (mode == "train"), "BatchNorm moves in train mode alone, so there was something to restore"
    assert_same(before, snapshot(net))


def test_precision_autocasts_crafting_alone() -> None:
    layer, x = nn.Linear(3, 3), torch.rand(2, 3)
    for choice, dtype in (("float32", torch.float32), ("bf16-craft", torch.bfloat16)):
        with precision(choice, x.device):
            assert layer(x).dtype == dtype
    assert layer(x).dtype == torch.float32


def test_derived_seeds_are_pinned() -> None:
    """Runs can be repeated by later versions: these numbers must never change."""
    assert derive(0, "step", 3, 14) == int(hashlib.sha256(b"0/step/3/14").hexdigest()[:16], 16) // 2
    assert derive(0, "weights") == 133441691874178746
    drawn = torch.rand(3, generator=generator("cpu", 7, "order", 0)).tolist()
    assert drawn == pytest.approx([0.5840340852737427, 0.02284914255142212, 0.8967245817184448], abs=1e-7)


def test_generators_are_independent_of_each_other_and_of_the_global_state() -> None:
    seeds = {derive(s, *purpose) for s in range(30) for purpose in [("a",), ("b",), *(("a", k) for k in range(30))]}
    assert len(seeds) == 30 * 32
    assert all(0 <= seed < 2**63 for seed in seeds)
    before = torch.get_rng_state()
    one, other = (torch.randn(4000, generator=generator("cpu", 0, "step", k)) for k in range(2))
    assert torch.get_rng_state().equal(before)
    correlation = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
    assert abs(correlation) < 5 / math.sqrt(4000)  # 5 standard errors: errs once in a million
    assert one.equal(torch.randn(4000, generator=generator("cpu", 0, "step", 0)))


@dataclass(frozen=True, kw_only=True)
class Shout:
    """A lens of the user's own."""

    name: ClassVar[str] = "shout"

    words: tuple[str, ...]
    times: int = 1
    loud: bool = False
    threat: Threat | None = None

    def look(self, subject: Any, *, gen: Any) -> Any:
        return Reading("shout", " ".join(self.words * self.times) + ".")


class NotADataclass:
    name = "plain"


def test_build_makes_nested_plugins_and_threats() -> None:
    settings = {"name": "adversarial", "attack": {"name": "pgd", "threat": "linf:8/255", "steps": 7}, "clean_weight": 1}
    made = build("objective", settings)
    assert made == Adversarial(attack=PGD(threat=Lp("linf", 8 / 255), steps=7), clean_weight=1.0)
    assert isinstance(made.clean_weight, float)
    assert settings["attack"]["name"] == "pgd", "the settings given are not changed"
    assert build("objective", "standard") == Standard()
    plain = describe(made)
    assert plain["attack"]["threat"] == f"linf:{8 / 255!r}" and plain["attack"]["step_size"] is None
    assert build("objective", plain) == made
    expected = {"name", "label_smoothing", "craft_mode", "precision", "clean_weight", "attack"}
    assert set(plain) == expected, "every default is written out"


def test_plugins_of_the_users_own() -> None:
    made = build("lens", {"name": f"{__name__}:Shout", "words": ["a", "b"], "threat": "l2:1/2"})
    assert made == Shout(words=("a", "b"), threat=Lp("l2", 0.5))
    plain = describe(made)
    assert plain == {
        "name": f"{__name__}:Shout",
        "words": ["a", "b"],
        "times": 1,
        "loud": False,
        "threat": "l2:0.5",
    }
    assert build("lens", plain) == made


PGD_L2 = {"name": "pgd", "threat": "l2:1"}
BAD = [
    ("attack", "pdg", r"attack: expected one of apgd, .* got 'pdg'\. Did you mean 'pgd'\?"),
    ("attack", "zzzzzz", "See `robustlens list`"),
    ("attack", "", "expected one of"),
    ("attack", {}, 'settings with a "name", got {}'),
    ("attack", {"name": 3}, 'settings with a "name"'),
    ("attack", {"name": "pgd"}, "attack 'pgd': expected a value for threat, got none. Add threat"),
    ("attack", {**PGD_L2, "stepz": 3}, r"field of attack 'pgd': .*got 'stepz'\. Did you mean 'steps'\?"),
    ("attack", {**PGD_L2, "steps": "many"}, "attack 'pgd', field steps: .*a whole number.*got 'many'"),
    ("attack", {**PGD_L2, "steps": 2.5}, "field steps: .*got 2.5"),
    ("attack", {**PGD_L2, "steps": True}, "field steps: expected a number, got True"),
    ("attack", {**PGD_L2, "step_size": True}, "field step_size: expected a number, got True"),
    ("attack", {**PGD_L2, "step_size": math.inf}, "field step_size: .*finite number, got inf"),
    ("attack", {**PGD_L2, "step_size": math.nan}, "field step_size: .*finite number, got nan"),
    ("attack", {**PGD_L2, "steps": 0}, "at least 1, got 0"),
    ("attack", {**PGD_L2, "loss": "cee"}, "field loss: .*'ce'.*got 'cee'"),
    ("attack", {"name": "pgd", "threat": "l3:1"}, "norm: expected one of l1, l2, linf, got 'l3'"),
    ("attack", {"name": "pgd", "threat": "l2"}, "a norm and a radius"),
    ("attack", {"name": "pgd", "threat": "linf:8"}, 'in 0–255 units, write "linf:8/255"'),
    ("attack", {"name": "pgd", "threat": 5}, "field threat: .*got 5"),
    ("attack", {"name": "pgd", "threat": {"norm": "l2"}}, "field threat"),
    ("objective", {"name": "adversarial", "attack": "pgd"}, "attack 'pgd': expected a value for threat"),
    ("objective", {"name": "adversarial", "attack": {**PGD_L2, "stepz": 3}}, "Did you mean 'steps'"),
    ("objective", {"name": "adversarial", "attack": 3}, "field attack: .*got 3"),
    ("model", {"name": "mlp", "hidden": [1]}, "model 'mlp', field hidden"),
    ("lens", f"{__name__}:Shout", "a value for words"),
    ("lens", {"name": f"{__name__}:Shout", "words": "ab"}, "field words"),
    ("lens", f"{__name__}:NotADataclass", "a frozen dataclass"),
    ("lens", f"{__name__}:Shouting", "AttributeError: module .* has no attribute 'Shouting'"),
    ("lens", "no.such.module:Lens", "ModuleNotFoundError: No module named 'no'"),
    ("lens", ".relative:Lens", "can be imported, got TypeError"),
    ("lens", ":Lens", "can be imported, got ValueError"),
    ("lens", "os:", "can be imported, got AttributeError"),
]


@pytest.mark.parametrize(("kind", "settings", "words"), BAD, ids=[f"{kind}-{settings}" for kind, settings, _ in BAD])
def test_bad_settings_are_one_line(kind: str, settings: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        build(kind, settings)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_module_that_fails_when_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_on_import.py").write_text("1 / 0")
    (tmp_path / "not_python.py").write_text("def (")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="ZeroDivisionError"):
        load_attribute("fails_on_import:net")
    with pytest.raises(InputError, match="SyntaxError"):
        find("lens", "not_python:Lens")


def test_errors_are_always_one_line() -> None:
    error = InputError("a\nb", expected="c\r\n  d", got="e\t\tf", fix="g.\n")
    assert str(error) == "a b: expected c d, got e f. g."
    assert "Did you mean 'epochs'?" in str(unknown_name("field", "epoch", ["epochs", "seed"]))


def test_plugins_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        build("attack", PGD_L2).steps = 3


class Flat(nn.Module):
    """A network that views its activations flat, which channels-last ones do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Conv2d(20, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.convolutions(x).view(len(x), -1)


def test_channels_last_inside_and_the_same_weights_after() -> None:
    x = torch.rand(2, 3, 8, 8, generator=gen())
    model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 4, 1), nn.Flatten(), nn.Linear(144, 2))
    weight, data = model[0].weight, model[0].weight.data
    before = model(x)
    with channels_last(model, x):
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(model(x), before, atol=1e-6)
    assert model[0].weight is weight and weight.data.data_ptr() == data.data_ptr() and weight.is_contiguous()
    with pytest.raises(RuntimeError, match="stop"), channels_last(model, x):
        raise RuntimeError("stop")
    assert weight.is_contiguous() and torch.equal(model(x), before)


def test_activations_of_gray_images_are_channels_last_too() -> None:
    x, first = torch.rand(2, 1, 8, 8, generator=gen()), nn.Conv2d(1, 20, 3)
    with channels_last(nn.Sequential(first, nn.Conv2d(20, 4, 3)), x):
        found = first(x)
    assert found.is_contiguous(memory_format=torch.channels_last) and not found.is_contiguous()


def test_narrow_networks_keep_the_usual_layout() -> None:
    x, model = torch.rand(2, 3, 8, 8, generator=gen()), nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3))
    with channels_last(model, x):
        assert model(x).is_contiguous()


def test_a_network_that_cannot_is_left_alone() -> None:
    x, model = torch.rand(2, 3, 8, 8, generator=gen()), Flat()
    before = model(x)
    with channels_last(model, x):
        assert torch.equal(model(x), before)
