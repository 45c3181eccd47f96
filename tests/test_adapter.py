"""Anybody's network: what is accepted works as it is, and what is a trap is refused in one clear line."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustlens.core.discovery import build
from robustlens.models.adapter import OneLogit, check_model, load_weights
from robustlens.models.normalize import Normalized
from robustlens.results.errors import InputError

SHAPE = (3, 4, 4)


def plain(outputs: int = 5, channels: int = 3) -> nn.Sequential:
    """A small network whose logits are a convolution's mean: it knows its channels, not its size."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(channels, outputs, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Spaced(nn.Module):
    """A network with a feature space."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.hidden = nn.Linear(48, 6)
        self.head = nn.Linear(6, 5)

    def features(self, x):
        return self.hidden(x.flatten(1)).relu()

    def forward(self, x):
        return self.head(self.features(x))


class Output(nn.Module):
    """A network that returns ``change`` of the logits."""

    def __init__(self, change, outputs: int = 5) -> None:
        super().__init__()
        self.inner = plain(outputs)
        self.change = change

    def forward(self, x):
        return self.change(self.inner(x))


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message and ": expected " in message and ", got " in message
    return message


def refused(words: str):
    return pytest.raises(InputError, match=words)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's, importable as ``mine``."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from test_adapter import Spaced, plain\n"
        "ready = Spaced()\n"
        "def one(): return plain(1)\n"
        "def needs(classes): return plain(classes)\n"
        "def dictionary(): return {}\n"
        "number = 3\n"
        "def leaves(): raise SystemExit(0)\n"
        "def lacks(): return {}['conv']\n"
    )
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "needy.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "test_adapter", sys.modules[__name__])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield "mine"
    sys.modules.pop("mine", None)


def external(**settings):
    return build("model", {"name": "external", **settings})


# The plug-in


def test_a_function_a_class_and_a_module(mine):
    x = torch.rand(2, *SHAPE)
    for source in (f"{mine}:plain", f"{mine}:Spaced", f"{mine}:ready"):
        model = external(source=source).build(SHAPE, 5)
        assert model(x).shape == (2, 5)
    import mine as module

    assert model is not module.ready
    torch.testing.assert_close(model(x), module.ready(x))
    with torch.no_grad():
        model.head.bias.add_(1)
    torch.testing.assert_close(model(x), module.ready(x) + 1)


def test_constants_stand_in_front_of_logits_and_features(mine):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    model = external(source=f"{mine}:Spaced", mean=mean, std=std).build(SHAPE, 5)
    x = torch.rand(2, *SHAPE)
    z = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(model(x), Spaced()(z))
    torch.testing.assert_close(model.features(x), Spaced().features(z))
    torch.testing.assert_close(model.head(model.features(x)), model(x))
    without = external(source=f"{mine}:plain", mean=mean, std=std).build(SHAPE, 5)
    assert not hasattr(without, "features") and not hasattr(without, "head")


def test_weights_are_loaded_before_the_constants(mine, tmp_path):
    trained = plain()
    with torch.no_grad():
        trained[0].bias.copy_(torch.arange(5.0))
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    model = external(source=f"{mine}:plain", weights=str(tmp_path / "w.safetensors"), std=(0.5,)).build(SHAPE, 5)
    x = torch.rand(2, *SHAPE)
    torch.testing.assert_close(model(x), trained(2 * x))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere_at_all:net", "nowhere_at_all:net: expected pkg.module:attribute"),
        ("mine:absent", "absent"),
        ("mine", "expected pkg.module:attribute"),
        ("mine:number", "mine:number: expected a torch.nn.Module.*, got int"),
        ("mine:needs", "got TypeError: needs.. missing 1 required positional argument"),
        ("mine:needs", "Write a function that fills in the arguments"),
        ("mine:dictionary", "got dict. Return the network"),
        ("mine:leaves", r"got SystemExit: 0. It is raised at .*mine.py:9"),
        ("mine:lacks", r"got KeyError: 'conv'. It is raised at .*mine.py:10"),
        ("script:net", r"got SystemExit: 0. Put what runs at .*script.py:2 under if __name__"),
        ("needy:net", r"No module named 'nowhere_at_all'. It is raised at .*needy.py:1"),
        ("nowhere_at_all.deep:net", "Check the spelling"),
    ],
)
def test_sources_that_do_not_make_a_network(mine, source, words):
    with refused(words) as caught:
        external(source=source).build(SHAPE, 5)
    one_line(caught)


def test_external_is_checked(mine):
    with refused("shape .4, 7., got shape .4, 5."):
        external(source=f"{mine}:plain").build(SHAPE, 7)
    model = external(source=f"{mine}:one").build(SHAPE, 2)
    assert isinstance(model, OneLogit)
    with refused("field source|value for source"):
        external()


# Weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_files_that_are_read(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    saved, fresh = plain(), plain()
    nn.init.normal_(saved[0].weight)
    (save_file if suffix == ".safetensors" else torch.save)(saved.state_dict(), path)
    load_weights(fresh, path)
    assert torch.equal(fresh[0].weight, saved[0].weight)


def test_wrapped_state_dicts(tmp_path):
    saved, fresh = plain(), plain()
    nn.init.normal_(saved[0].weight)
    parallel = {f"module.{name}": tensor for name, tensor in saved.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": OrderedDict(parallel)}, tmp_path / "w.pt")
    load_weights(fresh, tmp_path / "w.pt")
    assert torch.equal(fresh[0].weight, saved[0].weight)


def test_old_files_lack_the_counter_of_batch_norm(tmp_path):
    saved = nn.Sequential(nn.BatchNorm2d(2))
    saved[0].running_mean.fill_(3)
    state = {name: tensor for name, tensor in saved.state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "w.safetensors")
    fresh = nn.Sequential(nn.BatchNorm2d(2))
    load_weights(fresh, tmp_path / "w.safetensors")
    assert fresh[0].running_mean.tolist() == [3, 3]


def changed(**changes):
    state = {**plain().state_dict(), **changes}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (changed(**{"0.bias": None}), r"expected tensor '0.bias' of shape \(5,\), got no such tensor"),
        (changed(**{"1.bias": torch.ones(2)}), "the model's tensors alone, got also '1.bias'"),
        (
            changed(**{"0.weight": torch.ones(5, 1, 3, 3)}),
            r"tensor '0.weight' of shape \(5, 3, 3, 3\), got \(5, 1, 3, 3\)",
        ),
        ({}, "no such tensor"),
    ],
)
def test_weights_of_another_architecture(tmp_path, state, words):
    save_file(state, tmp_path / "w.safetensors")
    model = plain()
    before = model[0].weight.clone()
    with refused(words) as caught:
        load_weights(model, tmp_path / "w.safetensors")
    assert "a checkpoint of another architecture" in one_line(caught)
    assert torch.equal(model[0].weight, before)


class Bomb:
    """A pickle that would run code when it is opened."""

    def __reduce__(self):
        return (exec, ("import sys; sys.modules['bomb_exploded'] = sys",))


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_pickles_that_run_code_are_refused(tmp_path, save):
    path = tmp_path / "w.pt"
    save({"weight": Bomb()}, path)
    with refused("got a pickle that would run code when opened") as caught:
        load_weights(plain(), path)
    assert "safetensors" in one_line(caught)
    assert "bomb_exploded" not in sys.modules


def test_whole_modules_are_refused(tmp_path):
    torch.save(plain(), tmp_path / "w.pth")
    with refused("would run code when opened"):
        load_weights(plain(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "expected a state dict, got list"),
        ({"epoch": 3, "weight": torch.ones(2)}, "tensors alone, got int at 'epoch'"),
        ({1: torch.ones(2)}, "tensors alone, got Tensor at 1"),
    ],
)
def test_pytorch_files_of_something_else(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pt")
    with refused(words) as caught:
        load_weights(plain(), tmp_path / "w.pt")
    one_line(caught)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("w.safetensors", b"not safetensors", "expected a safetensors file, got SafetensorError"),
        ("w.pt", b"not a pickle", "damaged"),
        ("w.pt", b"", "expected a PyTorch state dict, got EOFError"),
        ("w.pt", b"PK\x03\x04 cut short", "expected a PyTorch state dict, got RuntimeError"),
        ("w.pkl", b"", "expected a .safetensors, .pt or .pth file, got .pkl"),
        ("weights", b"", "got no suffix"),
        ("w.npz", None, "got no such file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(words) as caught:
        load_weights(plain(), tmp_path / name)
    one_line(caught)


# The model


def test_a_good_model_comes_back_as_it_was():
    model = nn.Sequential(plain(), nn.BatchNorm1d(5), nn.Dropout()).train()
    model[0][0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    assert check_model(model, SHAPE, 5, "cpu") is model
    assert model.training and model[2].training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("change", [lambda z: z, lambda z: z.squeeze(1)])
def test_one_logit_becomes_two(change):
    model = Output(change, outputs=1)
    wrapped = check_model(model, SHAPE, 2)
    assert isinstance(wrapped, OneLogit)
    x, y = torch.rand(9, *SHAPE), torch.arange(9) % 2
    z = model.inner(x)[:, 0]
    got = nn.functional.cross_entropy(wrapped(x), y)
    torch.testing.assert_close(got, nn.functional.binary_cross_entropy_with_logits(z, y.float()))
    assert check_model(wrapped, SHAPE, 2) is wrapped


def test_logits_that_look_a_little_like_probabilities_pass():
    """Zero logits (a classifier that starts at 0), log-probabilities, positive logits, one small positive logit."""
    for change in (lambda z: 0 * z, lambda z: z.log_softmax(1), lambda z: z.exp()):
        model = Output(change)
        assert check_model(model, SHAPE, 5) is model
    assert isinstance(check_model(Output(lambda z: 0 * z, outputs=1), SHAPE, 2), OneLogit)
    assert isinstance(check_model(Output(lambda z: 0.5 + 0.01 * z, outputs=1), SHAPE, 2), OneLogit)


@pytest.mark.parametrize(
    ("model", "classes", "words"),
    [
        (plain(channels=1), 5, r"forward pass on images of shape \(4, 3, 4, 4\), got RuntimeError"),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), 5, "got RuntimeError: mat1 and mat2"),
        (plain().to("meta"), 5, "expected weights, got none, on the device meta"),
        (plain(), 7, r"7 logits an image, shape \(4, 7\), got shape \(4, 5\)"),
        (plain(1), 3, r"shape \(4, 3\), got shape \(4, 1\)"),
        (nn.Conv2d(3, 5, 3), 5, r"got shape \(4, 5, 2, 2\)"),
        (Output(lambda z: z / 0), 5, "finite logits, got NaN or infinity"),
        (Output(lambda z: z * float("nan")), 5, "finite logits, got NaN or infinity"),
        (Output(lambda z: z.log() * float("nan"), outputs=1), 2, "finite logits"),
        (Output(lambda z: z.softmax(1)), 5, "expected logits, got what looks like probabilities: rows.*last softmax"),
        (Output(lambda z: (100 * z).softmax(1)), 5, "probabilities"),
        (Output(torch.sigmoid, outputs=1), 2, r"probabilities: one output that stays in \[0, 1\].*last sigmoid"),
        (Output(lambda z: {"logits": z}), 5, "expected a tensor of logits, got dict"),
        (Output(lambda z: (z, z)), 5, "got tuple"),
        (Output(lambda z: z.detach()), 5, "logits with a gradient with respect to the image, got none"),
        (Output(lambda z: z.detach(), outputs=1), 2, "with a gradient"),
    ],
)
def test_models_that_are_refused(model, classes, words):
    with refused(words) as caught:
        check_model(model, SHAPE, classes)
    one_line(caught)


def test_a_refused_model_is_left_as_it_was():
    model = Output(lambda z: z / 0).train()
    with refused("finite"):
        check_model(model, SHAPE, 5)
    assert model.training and all(p.requires_grad for p in model.parameters())


# The images


class Odd(nn.Module):
    """Right for several images in float32, and not else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc = how, nn.Linear(48, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "batch of 4":
            return self.fc(x.view(4, 48))
        logits = self.fc(x.flatten(1))
        return logits.double() if self.how == "double" else logits.squeeze()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("double", r"expected torch.float32 logits, got torch.float64. End its forward pass with .float\(\)"),
        ("batch of 4", r"for one image, as it is \(4, 4\) for 4, got RuntimeError: .*Batches have any size"),
        ("squeezed", r"output of shape \(1, 4\) for one image.*got shape \(4,\)"),
    ],
)
def test_refuses_what_holds_for_some_batches_alone(how, words):
    with refused(words) as caught:
        check_model(Odd(how), SHAPE, 4)
    one_line(caught)


def test_statistics_of_pixels_from_0_to_255_are_refused():
    for settings in ({"mean": (77.0,)}, {"std": (66.0,)}, {"mean": (-0.1,)}):
        with refused(r"statistics of pixels in \[0, 1\].*Divide those of 0–255 pixels by 255"):
            Normalized(**settings).normalizer(3)
