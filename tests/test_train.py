"""The training loop against naive transcriptions, closed forms and torch's own schedulers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gen
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import EPOCHS, STEPS, Counting, config, fresh, linear_net, small_splits
from torch import Tensor, nn
from torch.nn import functional as F

from robustlens.attacks.fgsm import FGSM
from robustlens.attacks.noise import UniformNoise
from robustlens.core.rng import forked, generator, seed_torch
from robustlens.core.types import Batch, Split, Splits
from robustlens.core.world import World
from robustlens.objectives.adversarial import Adversarial
from robustlens.objectives.standard import Standard
from robustlens.results.errors import InputError, TrainingStopped
from robustlens.results.store import RunDirectory
from robustlens.threats.lp import Lp
from robustlens.train.config import TrainingConfig
from robustlens.train.loop import train
from robustlens.train.recipe import Recipe
from robustlens.train.together import validate

ATTACK = FGSM(threat=Lp("linf", 0.05))


def run(
    place: Path,
    settings: TrainingConfig,
    *,
    make: Callable[[], nn.Module] = linear_net,
    splits: Splits | None = None,
    objective: Any = None,
    watch: Any = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    model = fresh(make)
    recipe = Recipe(objective=objective or Standard())
    data = splits or small_splits()
    records = train(
        model, data, recipe, settings, seed=3, run=RunDirectory(place), validation=ATTACK, watch=watch or Counting()
    )
    return model, records


def naive(optimizer: Callable[..., Any], rate: Callable[[int, int], float], after: Any = None, **fields: Any) -> Any:
    """Plain training of the linear network, written without the library's loop; yields the weights of each step."""
    model, data = fresh(linear_net), small_splits().train
    steps = optimizer(model.parameters(), **fields)
    trace = []
    for epoch in range(EPOCHS):
        order = torch.randperm(40, generator=generator("cpu", 3, "order", epoch))
        for step in range(STEPS):
            pick = order[8 * step : 8 * step + 8]
            for group in steps.param_groups:
                group["lr"] = rate(epoch, step)
            steps.zero_grad()
            F.cross_entropy(model(data.images[pick]), data.labels[pick]).backward()
            if after is not None:
                after(model)
            steps.step()
            trace.append({name: value.clone() for name, value in model.state_dict().items()})
    return trace


OPTIMIZERS = [
    ({"name": "sgd", "lr": 0.1}, torch.optim.SGD, {"momentum": 0.9}),
    (
        {"name": "sgd", "lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
        torch.optim.SGD,
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    ),
    ({"name": "adam", "lr": 0.01, "weight_decay": 0.1}, torch.optim.Adam, {"weight_decay": 0.1}),
    (
        {"name": "adamw", "lr": 0.01, "betas": [0.8, 0.9]},
        torch.optim.AdamW,
        {"betas": (0.8, 0.9), "weight_decay": 0.01},
    ),
    (
        {"name": "rmsprop", "lr": 0.01, "alpha": 0.9, "momentum": 0.5},
        torch.optim.RMSprop,
        {"alpha": 0.9, "momentum": 0.5},
    ),
]


@pytest.mark.parametrize(("settings", "optimizer", "fields"), OPTIMIZERS, ids=lambda v: str(v)[:60])
def test_bit_for_bit_as_a_plain_loop(settings: dict[str, Any], optimizer: Any, fields: Any, tmp_path: Path) -> None:
    schedule = {"name": "step", "every": 2, "gamma": 0.5}
    model, records = run(tmp_path, config(optimizer=settings, schedule=schedule))
    trace = naive(optimizer, lambda epoch, step: settings["lr"] * (0.5 if epoch == 2 else 1), lr=1.0, **fields)
    for name, value in model.state_dict().items():
        assert value.equal(trace[-1][name])
    assert load_file(tmp_path / "last.safetensors")["1.weight"].equal(trace[-1]["1.weight"])
    assert [r["learning_rate"] for r in records] == [settings["lr"]] * 2 + [settings["lr"] / 2]


def test_dropout_draws_as_after_torchs_own_seeding() -> None:
    x = torch.ones(1000)
    with forked():
        torch.manual_seed(11)
        theirs = F.dropout(x)
        seed_torch(torch.device("cpu"), 11)
        assert torch.equal(F.dropout(x), theirs) and not torch.equal(F.dropout(x), theirs)


def test_defaults_of_the_optimizers_are_torch_ones(tmp_path: Path) -> None:
    """A field that the configuration does not name (eps, dampening, …) has torch's default."""
    model, _ = run(tmp_path, config(optimizer={"name": "adam"}))
    assert model[1].weight.equal(naive(torch.optim.Adam, lambda *_: 1e-3)[-1]["1.weight"])


def test_the_average_is_the_moving_average_of_the_weights(tmp_path: Path) -> None:
    model, _ = run(tmp_path, config(optimizer={"lr": 0.1}, averaging=0.7))
    mean = fresh(linear_net)[1].weight.detach().double()
    trace = naive(torch.optim.SGD, lambda *_: 0.1, lr=1.0, momentum=0.9)
    for weights in trace:
        mean = 0.7 * mean + 0.3 * weights["1.weight"].double()
    torch.testing.assert_close(model[1].weight.detach().double(), mean, rtol=1e-5, atol=1e-7)
    assert load_file(tmp_path / "last.safetensors")["1.weight"].equal(model[1].weight)
    assert float((mean - trace[-1]["1.weight"]).abs().max()) > 1e-3


def test_gradients_are_clipped_to_the_whole_norm(tmp_path: Path) -> None:
    norms = []

    def clip(model: nn.Module) -> None:
        norm = torch.sqrt(sum((p.grad.square().sum() for p in model.parameters()), torch.tensor(0.0)))
        norms.append(float(norm))
        for p in model.parameters():
            p.grad *= min(1.0, 0.9 / float(norm))

    model, _ = run(tmp_path, config(optimizer={"lr": 0.1}, grad_clip=0.9))
    trace = naive(torch.optim.SGD, lambda *_: 0.1, after=clip, lr=1.0, momentum=0.9)
    torch.testing.assert_close(model[1].weight.detach(), trace[-1]["1.weight"], rtol=1e-4, atol=1e-6)
    assert min(norms) < 0.9 < max(norms), "some steps are clipped and some are not"


def test_label_smoothing() -> None:
    x, y = torch.rand(8, 1, 8, 8, generator=gen(1)), torch.arange(8) % 4
    model = fresh(linear_net)
    objective = Standard(label_smoothing=0.2)
    loss = objective.loss(model, objective.craft(model, Batch(x, y, y), gen=gen())).loss
    log_p = model(x).detach().double().log_softmax(1)
    target = 0.8 * F.one_hot(y, 4) + 0.2 / 4
    assert float(loss.detach()) == pytest.approx(float(-(target * log_p).sum(1).mean()), rel=1e-6)


def torch_schedule(make: Callable[[Any], Any], epochs: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


lr = torch.optim.lr_scheduler
SCHEDULES = [
    ({"name": "constant"}, lambda o: lr.ConstantLR(o, factor=1.0)),
    ({"name": "step", "every": 3, "gamma": 0.5}, lambda o: lr.StepLR(o, 3, 0.5)),
    ({"name": "multistep", "milestones": [2, 7], "gamma": 0.1}, lambda o: lr.MultiStepLR(o, [2, 7], 0.1)),
    ({"name": "cosine"}, lambda o: lr.CosineAnnealingLR(o, 12)),
]


@pytest.mark.parametrize(("settings", "make"), SCHEDULES, ids=lambda v: v["name"] if isinstance(v, dict) else "")
def test_schedules_are_torch_ones(settings: dict[str, Any], make: Any) -> None:
    schedule = config(schedule=settings).schedule
    assert [schedule.scale(epoch, 12) for epoch in range(12)] == pytest.approx(torch_schedule(make, 12), abs=1e-12)


def test_closed_forms_of_schedules() -> None:
    one_cycle = config(schedule={"name": "one-cycle", "peak": 0.25}).schedule
    points = np.linspace(0, 8, 33)
    expected = np.interp(points, [0, 2, 8], [0, 1, 0])
    assert [one_cycle.scale(p, 8) for p in points] == pytest.approx(list(expected))
    cosine = config(schedule={"name": "cosine", "warmup": 2}).schedule
    values = [cosine.scale(p, 10) for p in (0, 1, 2, 6, 10)]
    assert values == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-12)
    milestones = config(schedule={"name": "multistep", "milestones": [1.5]}).schedule
    assert [milestones.scale(p, 3) for p in (0, 1.49, 1.5, 2)] == [1, 1, 0.1, 0.1]


def test_the_rate_follows_every_step(tmp_path: Path) -> None:
    settings = config(optimizer={"name": "sgd", "lr": 0.2, "momentum": 0.0}, schedule={"name": "cosine", "warmup": 1})
    model, records = run(tmp_path, settings)

    def rate(epoch: int, step: int) -> float:
        t = epoch + step / STEPS
        return 0.2 * (t if t < 1 else (1 + math.cos(math.pi * (t - 1) / (EPOCHS - 1))) / 2)

    assert [r["learning_rate"] for r in records] == pytest.approx([rate(e, STEPS - 1) for e in range(EPOCHS)])
    trace = naive(torch.optim.SGD, rate, lr=1.0)
    torch.testing.assert_close(model[1].weight.detach(), trace[-1]["1.weight"], rtol=1e-6, atol=1e-7)


def test_augmentation_reaches_the_images_and_repeats_itself(tmp_path: Path) -> None:
    flipped = config(augment=["small_runs:Negative"])
    model, _ = run(tmp_path / "a", flipped)
    data = small_splits()
    turned = Splits("", Split(1 - data.train.images, data.train.labels), data.valid, data.test, data.classes)
    other, _ = run(tmp_path / "b", config(), splits=turned)
    assert model[1].weight.equal(other[1].weight)
    crops = config(augment=["flip", {"name": "pad-crop", "padding": 2}])
    one, two, plain = (run(tmp_path / p, c)[0][1].weight for p, c in (("c", crops), ("d", crops), ("e", config())))
    assert one.equal(two) and not one.equal(plain)
    assert data.train.images.equal(small_splits().train.images), "the images in memory stay as they are"


def test_best_is_the_first_epoch_of_the_best_robust_accuracy(tmp_path: Path) -> None:
    """With a constant rate the weights after k epochs are those of a run of k epochs."""
    settings = {"optimizer": {"lr": 0.8}, "epochs": 8}
    _, records = run(tmp_path / "all", config(**settings))
    scores = [r["valid_robust_accuracy"] for r in records]
    best = scores.index(max(scores)) + 1
    assert 1 < best < 8 and len(set(scores)) > 2, scores
    run(tmp_path / "short", config(**{**settings, "epochs": best}))
    short, kept = tmp_path / "short" / "last.safetensors", tmp_path / "all" / "best.safetensors"
    assert kept.read_bytes() == short.read_bytes()
    with safe_open(kept, framework="pt") as file:
        assert json.loads(file.metadata()["facts"])["epoch"] == best
    assert RunDirectory(tmp_path / "all").metrics() == records


def test_validation_against_the_closed_form() -> None:
    """FGSM is exact for two linear classes: robust where the margin exceeds eps · ‖w_1 − w_0‖₁ (box inactive)."""
    model = fresh(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    x = torch.rand(200, 1, 8, 8, generator=gen(2)) * 0.4 + 0.3
    y = torch.randint(2, (200,), generator=gen(3))
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    with torch.no_grad():
        z = model(x)
    margin = (z[:, 1] - z[:, 0]) * (2 * y - 1)
    eps = float(margin.abs().median() / w.abs().sum())
    found = validate(model, Split(x, y), FGSM(threat=Lp("linf", eps)), seed=0, epoch=0, batch_size=64, world=World())
    assert found["valid_accuracy"] == pytest.approx(int((margin > 0).sum()) / 200)
    robust = int((margin > eps * w.abs().sum()).sum()) / 200
    assert found["valid_robust_accuracy"] == pytest.approx(robust)
    assert 0.1 < robust < found["valid_accuracy"]
    assert found["valid_loss"] == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-5)


def test_only_some_epochs_and_images_are_validated(tmp_path: Path) -> None:
    model, records = run(tmp_path, config(epochs=5, validate_every=2, validation_examples=7))
    assert [r["epoch"] for r in records if "valid_accuracy" in r] == [2, 4, 5]
    split = small_splits().valid.first(7)
    with torch.no_grad():
        right = int((model(split.images).argmax(1) == split.labels).sum())
    assert records[-1]["valid_accuracy"] == right / 7


def test_records_are_means_over_the_examples(tmp_path: Path) -> None:
    """At a rate of almost nothing the weights stay, so the epoch's loss is that of the network."""
    splits = small_splits(44)  # the last batch has 4
    model, records = run(tmp_path, config(optimizer={"lr": 1e-30}), splits=splits)
    with torch.no_grad():
        logits = model(splits.train.images)
    assert records[0]["loss"] == pytest.approx(float(F.cross_entropy(logits, splits.train.labels)), rel=1e-6)
    assert records[0]["accuracy"] == int((logits.argmax(1) == splits.train.labels).sum()) / 44
    with safe_open(tmp_path / "best.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["facts"])["epoch"] == 1, "of equals the first is kept"


class Sizes(nn.Module):
    """Remembers the sizes of the batches that it learns from; ``broken`` is the first one that it answers with NaN."""

    def __init__(self, broken: int = 10**9, scale: float = 1.0) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 4)
        self.seen: list[int] = []
        self.broken, self.scale = broken, scale

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(len(x))
        logits: Tensor = self.fc(x.flatten(1)) * self.scale
        return logits * math.nan if self.training and len(self.seen) >= self.broken else logits


@pytest.mark.parametrize(
    ("examples", "size", "expected"), [(41, 8, [8] * 5), (42, 8, [8] * 5 + [2]), (5, 1, [1] * 5), (1, 8, [1])]
)
def test_a_last_batch_of_one_is_left_out(examples: int, size: int, expected: list[int], tmp_path: Path) -> None:
    watch = Counting()
    splits, settings = small_splits(examples), config(epochs=1, batch_size=size)
    model, _ = run(tmp_path, settings, make=Sizes, splits=splits, watch=watch)
    assert model.seen == expected
    assert watch.steps == list(range(1, len(expected) + 1))


def test_a_loss_that_is_nan_names_its_place_and_keeps_the_checkpoints(tmp_path: Path) -> None:
    settings = config(checkpoint_seconds=0)
    run(tmp_path / "short", config(epochs=1), make=Sizes)
    with pytest.raises(TrainingStopped, match=r"the loss is nan in epoch 2, step 3\..*smaller learning rate") as caught:
        run(tmp_path / "nan", settings, make=lambda: Sizes(broken=STEPS + 3))
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    last = load_file(tmp_path / "nan" / "last.safetensors")
    assert last["fc.weight"].equal(load_file(tmp_path / "short" / "last.safetensors")["fc.weight"])
    with safe_open(tmp_path / "nan" / "state.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])["progress"]
        assert bool(torch.isfinite(file.get_tensor("model/fc.weight")).all())
    assert (facts["epoch"], facts["step"]) == (1, 2)
    assert len(RunDirectory(tmp_path / "nan").metrics()) == 1


def test_an_attack_that_meets_nan_stops_the_run_in_the_same_way(tmp_path: Path) -> None:
    in_train_mode = Adversarial(attack=FGSM(threat=Lp("l2", 0.5)), craft_mode="train")
    with pytest.raises(TrainingStopped, match=r"the attack failed \(FGSM .*\) in epoch 1, step 3\..*smaller learning"):
        run(tmp_path, config(), make=lambda: Sizes(broken=5), objective=in_train_mode)


@pytest.mark.parametrize("every", [1, 2])
def test_weights_that_overflow_never_reach_a_file(every: int, tmp_path: Path) -> None:
    """The loss of the only step is finite; what it does to the weights is not."""
    huge = config(optimizer={"lr": 3e38, "momentum": 0.0}, batch_size=40, validate_every=every)
    with pytest.raises(TrainingStopped, match=r"fc\.weight are not finite after epoch 1, step 1\. The last good"):
        run(tmp_path, huge, make=lambda: Sizes(scale=1e4))
    assert list(tmp_path.iterdir()) == []


def test_the_model_ends_in_eval_mode_and_the_world_as_it_was(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    model = fresh()
    recipe = Recipe(objective=Standard())
    attack = UniformNoise(threat=Lp("l2", 0.1))
    train(model, small_splits(), recipe, config(), seed=0, run=RunDirectory(tmp_path), validation=attack)
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert before[0].equal(torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002


def test_empty_splits_are_refused(tmp_path: Path) -> None:
    data = small_splits()
    nothing = data.train.first(0)
    for splits, name in (
        (Splits("", nothing, data.valid, data.test, data.classes), "training"),
        (Splits("", data.train, nothing, data.test, data.classes), "validation"),
    ):
        with pytest.raises(InputError, match=f"{name} split: expected examples"):
            run(tmp_path, config(), splits=splits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": {"name": "sgd", "nesterov": True, "momentum": 0.0}},
        {"optimizer": {"name": "adam", "betas": [0.9, 1.0]}},
        {"optimizer": {"name": "sgd", "lr": math.inf}},
        {"optimizer": {"name": "sgd", "lr": math.nan}},
        {"optimizer": {"name": "sgd", "lr": "0.1"}},
        {"epochs": True},
        {"epochs": 2.0},
        {"batch_size": 0},
        {"averaging": 1.0},
        {"grad_clip": 0.0},
        {"schedule": {"name": "one-cycle", "peak": 1.0}},
        {"schedule": {"name": "multistep"}},
    ],
    ids=str,
)
def test_settings_that_torch_or_sense_would_refuse(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainingConfig.model_validate(settings)
