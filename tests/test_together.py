"""Two processes with 4 images each are one process with 8; in the slow set, 64 and 128."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import shared_runs
import torch
from conftest import gen
from shared_runs import PROCESSES, carry_out, cases, require_same
from torch import nn

from robustlens.core.world import SynchronisedBatchNorm, World, one_batch
from robustlens.results.errors import InputError

#: One worker trains them all, where tests are shared out (pytest-xdist, --dist loadgroup).
pytestmark = pytest.mark.xdist_group("together")
CASES = {case: (recipe, settings) for case, recipe, settings in cases()}


@pytest.fixture(scope="module", params=[8, pytest.param(128, marks=pytest.mark.slow)])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """The size of a batch, and where two processes trained every case with it."""
    root, batch = tmp_path_factory.mktemp("shared"), request.param
    commands = [[sys.executable, shared_runs.__file__, str(root), str(rank), str(batch)] for rank in range(PROCESSES)]
    here = Path(shared_runs.__file__).parent
    working = [subprocess.Popen(each, stderr=subprocess.PIPE, text=True, cwd=here) for each in commands]
    said = [process.communicate(timeout=1800)[1] for process in working]
    assert [process.returncode for process in working] == [0] * PROCESSES, said
    return batch, root


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(case: str, shared: tuple[int, Path], tmp_path: Path) -> None:
    """To 1e-10, with random starts, dropout, augmentation and BatchNorm over the whole batch too."""
    batch, root = shared
    carry_out(case, *CASES[case], tmp_path, World(), batch=batch)
    require_same(tmp_path / case, root / case, tolerance=1e-10)


class Own(nn.BatchNorm2d):
    """A BatchNorm of the user's own, which may compute anything."""


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4), Own(4)])
def test_a_batch_norm_that_cannot_be_synchronised_is_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(layer))
    words = rf"with the layer '1.0': expected torch.nn.BatchNorm2d itself, got .*{type(layer).__name__}\. Set it to"
    with pytest.raises(InputError, match=words), one_batch(model, World(0, 2), synchronised=True):
        pass
    assert type(model[0]) is nn.BatchNorm2d
    for world, synchronised in ((World(0, 2), False), (World(), True)):
        with one_batch(model, world, synchronised=synchronised):
            assert type(model[0]) is nn.BatchNorm2d
    with one_batch(model[:1], World(0, 2), synchronised=True):
        assert type(model[0]) is SynchronisedBatchNorm


@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize(
    ("layer", "dimensions"),
    [
        (nn.Dropout(0.3), 2),
        (nn.Dropout(0.3), 4),
        (nn.Dropout1d(0.3), 3),
        (nn.Dropout2d(0.3), 4),
        (nn.Dropout3d(0.3), 5),
    ],
    ids=str,
)
def test_dropout_draws_for_the_whole_batch(layer: nn.Module, dimensions: int, last: bool) -> None:
    shape = (6, 5, 4, 3, 2)[:dimensions]
    laid = torch.channels_last if last and dimensions == 4 else torch.contiguous_format
    x = torch.rand(shape, generator=gen()).contiguous(memory_format=laid)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        alone = layer(x)
        assert (alone == 0).any() and (alone > 1).any()
        for rank in range(3):
            with one_batch(nn.Sequential(layer), World(rank, 3), synchronised=False):
                torch.manual_seed(3)
                part = layer(x[rank::3].contiguous(memory_format=laid))
            torch.testing.assert_close(part, alone[rank::3])
            assert torch.equal(layer.eval()(x), x) and layer.train()
