"""Looking at networks that somebody else trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import SmallNet, gen
from rich.console import Console
from safetensors.torch import save_file
from small_runs import fresh, linear_net, small_splits
from torch import Tensor, nn

from robustlens.core.discovery import discover
from robustlens.data.arrays import from_arrays
from robustlens.results.errors import InputError
from robustlens.show import table
from robustlens.studies.audit import audit, fingerprint, open_model, open_splits
from robustlens.studies.watch import SilentStudy

MARGINS = [{"name": "logit-margins", "bins": 5}]


@pytest.fixture
def data() -> tuple[Any, Any]:
    split = small_splits().test
    return split.images.numpy(), split.labels.numpy()


def look(model: nn.Module, data: Any, out: Path, **options: Any) -> Any:
    return audit(model, data, **{"threat": "linf:0.1", "out": out, "device": "cpu", "lenses": MARGINS, **options})


def test_accuracy_of_an_audited_network_against_the_closed_form(tmp_path: Path) -> None:
    """For two classes and a linear network: robust where the margin exceeds eps · ‖w_1 − w_0‖₁ (box inactive)."""
    model = fresh(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    x = torch.rand(100, 1, 8, 8, generator=gen(2)) * 0.4 + 0.3
    with torch.no_grad():
        z = model(x)
        w = model[1].weight[1] - model[1].weight[0]
    y = torch.where(torch.rand(100, generator=gen(4)) < 0.9, z.argmax(1), 1 - z.argmax(1))
    margin = (z[:, 1] - z[:, 0]) * (2 * y - 1)
    eps = round(float(margin.abs().quantile(0.4) / w.abs().sum()), 4)
    lens = {"name": "accuracy", "pictures": 0, "attack": {"name": "pgd", "threat": f"linf:{eps}", "steps": 5}}
    run = audit(model, (x, y), threat=f"linf:{eps}", lenses=[lens], out=tmp_path, device="cpu")
    (reading,) = run.readings()
    assert reading["clean accuracy"].value == pytest.approx(int((margin > 0).sum()) / 100)
    assert reading["robust accuracy"].value == pytest.approx(int((margin > eps * w.abs().sum()).sum()) / 100)


def test_default_lenses_look_at_test_images_alone(data: Any, tmp_path: Path) -> None:
    run = audit(fresh(linear_net), data, threat="l2:0.5", out=tmp_path, device="cpu")
    readings = {reading.lens: reading for reading in run.readings()}
    assert set(readings) == set(discover("lens")) - {"standard-accuracy", "linear-margins"}, "those are on request"
    assert readings["accuracy"].outcome.status in ("ok", "unreliable")
    assert readings["layer-spectra"].outcome.status == "ok"
    failed = {name: reading.outcome.why for name, reading in readings.items() if reading.outcome.status == "failed"}
    assert set(failed) == {"generalisation-gap", "generalization-bound"}, "there are no training images to compare with"
    assert not any("\n" in why for why in failed.values())
    assert run.read_json("run.json")["finished"] is True


def test_the_network_is_left_as_it_was(data: Any, tmp_path: Path) -> None:
    model = fresh()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    look(model, data, tmp_path)
    with pytest.raises(InputError):
        look(model, (data[0], data[1] + 1), tmp_path)
    assert model.training and model.drop.training and not model.norm.training
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.get_rng_state().equal(random)


class Scaled(nn.Module):
    """A network whose code has a constant that no weight shows."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 4)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.flatten(1) * self.factor)
        return logits


def test_an_address_names_network_data_and_threat(data: Any, tmp_path: Path) -> None:
    base = look(fresh(linear_net), data, tmp_path)
    written = (base.path / "run.json").read_bytes()
    file = next(base.path.glob("readings/*/reading.json"))
    time = file.stat().st_mtime_ns
    again = look(fresh(linear_net), (torch.tensor(data[0]), data[1].astype(np.int32)), tmp_path, label="model")
    assert again.path == base.path and file.stat().st_mtime_ns == time and len(written) > 100
    other = fresh(linear_net)
    with torch.no_grad():
        other[1].weight[0, 0] += 1e-4
    flipped = (data[0], (data[1] + 1) % 4)
    relu = nn.Sequential(*fresh(linear_net), nn.Identity())
    different = [
        look(other, data, tmp_path),
        look(fresh(linear_net), flipped, tmp_path),
        look(fresh(linear_net), data, tmp_path, threat="linf:0.2"),
        look(fresh(linear_net), data, tmp_path, seed=1),
        look(relu, data, tmp_path),
        look(fresh(lambda: Scaled(1.0)), data, tmp_path),
        look(fresh(lambda: Scaled(2.0)), data, tmp_path),
    ]
    assert len({run.path for run in [base, *different]}) == 8


def test_fingerprints_of_every_kind_of_tensor() -> None:
    class Odd(nn.Module):
        def __init__(self, *, flag: bool = True) -> None:
            super().__init__()
            self.short = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
            self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())
            self.register_buffer("flag", torch.tensor(flag))
            self.register_buffer("count", torch.tensor(3))
            self.register_buffer("empty", torch.zeros(0, 3))

    assert fingerprint(Odd()) == fingerprint(Odd()) != fingerprint(Odd(flag=False))
    assert fingerprint(fresh()) == fingerprint(fresh()) != fingerprint(fresh(seed=6))


def outputs(count: int, channels: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 2, 3), nn.Flatten(), nn.Linear(72, count))


def bad_pixels(value: float) -> Any:
    x = small_splits().test.images.clone()
    x[3, 0, 2, 2] = value
    return x, small_splits().test.labels


X, Y = small_splits().test.images, small_splits().test.labels
BAD: list[tuple[Any, Any, dict[str, Any], str]] = [
    (outputs(5), (X, Y), {}, "model: expected 4 logits an image"),
    (outputs(4, 3), (X, Y), {}, r"forward pass on images of shape \(4, 1, 8, 8\)"),
    (nn.Sequential(outputs(4), nn.Softmax(1)), (X, Y), {}, "looks like probabilities"),
    (outputs(4), bad_pixels(1.5), {}, r"pixels in \[0, 1\], got values from .* to 1.5"),
    (outputs(4), bad_pixels(-0.5), {}, "They look normalised"),
    (outputs(4), bad_pixels(float("nan")), {}, "NaN or infinity in image 3"),
    (outputs(4), (255 * X, Y), {}, "They look like 0–255"),
    (outputs(4), (X, Y - 1), {}, "labels from 0 to K-1, got values from -1"),
    (outputs(4), (X, Y + 0.5), {}, "whole numbers"),
    (outputs(4), (X, Y[:-1]), {}, "16 labels, one for each image, got 15"),
    (outputs(4), (X[:0], Y[:0]), {}, "at least one image"),
    (outputs(4), (X.expand(-1, 2, -1, -1), Y), {}, "1 or 3 channels"),
    (outputs(4), (X, Y), {"threat": "linf:8"}, 'write "linf:8/255"'),
    (outputs(4), (X, Y), {"threat": "linf:-0.1"}, "a finite number ≥ 0"),
    (outputs(4), (X, Y), {"threat": "l2:128"}, 'write "l2:128/255"'),
    (outputs(4), (X, Y), {"threat": None}, "threat: expected a norm and a radius"),
    (outputs(4), (X, Y), {"threat": 0.5}, "threat: expected a norm and a radius"),
    (outputs(4), (X, Y, Y), {}, "data: expected splits, or"),
    (outputs(4), (X, Y.clone().index_fill(0, torch.tensor(0), 10**12)), {}, "labels from 0 to 99,999 at most"),
    (outputs(4), (X, Y), {"lenses": [{"name": "accuracy", "radii": [8]}]}, 'write "linf:8/255"'),
    (outputs(4), (X, Y), {"lenses": None, "depth": "ful"}, "Did you mean 'full'"),
    (outputs(4), (X, Y), {"lenses": ["acuracy"]}, "Did you mean 'accuracy'"),
    (outputs(4), (X, Y), {"device": "gpu"}, "device: expected"),
    (outputs(4), (X, Y), {"device": "meta"}, "device: expected"),
]


@pytest.mark.parametrize(("model", "data", "options", "words"), BAD, ids=[words for *_, words in BAD])
def test_what_cannot_be_audited_is_one_line_and_no_file(
    model: Any, data: Any, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        look(model, data, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


NET = """
import torch
from conftest import SmallNet

def build():
    return SmallNet(10)
"""


def test_a_network_by_its_name_with_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "audited_net.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    trained = fresh(lambda: SmallNet(10)).eval()
    weights = tmp_path / "w.safetensors"
    save_file(trained.state_dict(), weights)
    splits = open_splits("digits", examples=12)
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (12, 12, 12)
    x = splits.test.batch(torch.arange(12)).x
    with torch.no_grad():
        opened = open_model("audited_net:build", splits, weights=weights).eval()
        assert opened(x).equal(trained(x))
        normal = open_model("audited_net:build", splits, weights=weights, mean="0.5", std="0.25").eval()
        torch.testing.assert_close(normal(x), trained((x - 0.5) / 0.25))
    with pytest.raises(InputError, match="expected its weights, got none"):
        open_model("mlp", splits)
    with pytest.raises(InputError, match="checkpoint of another architecture"):
        open_model("mlp", splits, weights=weights)
    with pytest.raises(InputError, match="--mean: expected numbers with commas between, got 'a,b'"):
        open_model("audited_net:build", splits, weights=weights, mean="a,b", std="1,1")


def test_autoattack_standard_on_request_goes_on_where_it_was_stopped(data: Any, tmp_path: Path) -> None:
    """The state lies in the run directory; Ctrl-C in the middle loses one batch at most."""

    class Impatient(SilentStudy):
        heard: ClassVar[list[str]] = []

        def attacked(self, chunk: int, attack: str, done: int, batches: int, standing: int) -> None:
            self.heard.append(attack)
            if len(self.heard) == 2:
                raise KeyboardInterrupt

    lenses = [{"name": "standard-accuracy", "effort": 0.02}]

    def stopped(watch: SilentStudy | None = None) -> Any:
        return look(fresh(linear_net), data, tmp_path / "stopped", lenses=lenses, threat="l2:0.2", watch=watch)

    (whole,) = look(fresh(linear_net), data, tmp_path / "whole", lenses=lenses, threat="l2:0.2").readings()
    watch = Impatient()
    with pytest.raises(KeyboardInterrupt):
        stopped(watch)
    assert watch.heard == ["apgd-ce", "apgd-targeted"]
    again = stopped(watch)
    assert watch.heard[2:] == ["fab", "square"]
    (resumed,) = again.readings()
    assert resumed.quantities == whole.quantities and (resumed.examples["robust"] == whole.examples["robust"]).all()
    assert list((again.path / "state").glob("standard-accuracy-*/chunk-000000.safetensors"))


class Drops(nn.Module):
    """Dropout that is always on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(nn.functional.dropout(x.flatten(1), 0.5, training=True))


def coupled() -> nn.Module:
    """BatchNorm by the batch, also in eval mode."""
    return nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, 4))


@pytest.mark.parametrize("made", [Drops, coupled])
def test_answers_that_depend_on_chance_or_company_are_for_lenses_that_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: type[nn.Module]
) -> None:
    x, y = torch.rand(40, 1, 8, 8, generator=gen(1)), torch.arange(40) % 4
    splits = from_arrays(train=(x, y), test=(x, y))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made()
    lenses = [{"name": name} for name in discover("lens") if name != "standard-accuracy"]
    lenses.append({"name": "standard-accuracy", "effort": 0.02})
    run = audit(model, splits, lenses=lenses, threat="linf:0.1", out=tmp_path, device="cpu")
    states = {reading.lens: reading.outcome for reading in run.readings()}
    spoken = {"accuracy", "standard-accuracy", "health", "preprocessing"}
    assert states.keys() == discover("lens").keys()
    assert {name for name, outcome in states.items() if outcome.status == "unreliable"} == spoken
    refused = {name: outcome.why for name, outcome in states.items() if name not in spoken | {"layer-spectra"}}
    assert all("the same answer to an image every time" in why for why in refused.values())
    table(Console(width=100), [run])
    said = capsys.readouterr().out
    assert all(f"{name} was not measured: {why}"[:60] in said for name, why in refused.items())


def test_a_lens_that_breaks_leaves_the_others_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network that will not run in double precision once gradients are asked for."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad and x.dtype == torch.float64:
                raise RuntimeError("not today")
            return self.fc(x.flatten(1).to(self.fc.weight.dtype))

    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 4
    splits = from_arrays(train=(x, y), test=(x, y))
    run = audit(Odd(), splits, threat="linf:0.1", out=tmp_path, device="cpu")
    states = {reading.lens: reading.outcome for reading in run.readings()}
    failed = {name: outcome.why for name, outcome in states.items() if outcome.status == "failed"}
    assert len(states) >= 15 and failed and states["accuracy"].status == "ok"
    assert any("not today" in why for why in failed.values())
    table(Console(width=100), [run])
    said = capsys.readouterr().out
    assert all(f"{name} was not measured: {why}"[:60] in said for name, why in failed.items())
