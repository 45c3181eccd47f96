"""Data sets of a Hub: really downloaded, from one on loopback, by processes that know no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_hub import Hub, hub
from test_data_files import pixels, write

#: The card of ufldl-stanford/svhn in miniature: configurations with their files, and the names of the classes.
CARD = """---
configs:
- config_name: cropped_digits
  data_files:
  - {split: train, path: cropped_digits/train-*}
  - {split: test, path: cropped_digits/test-*}
  - {split: extra, path: cropped_digits/extra-*}
- config_name: full_numbers
  data_files:
  - {split: train, path: full_numbers/train-*}
dataset_info:
- config_name: cropped_digits
  features:
  - {name: image, dtype: image}
  - name: label
    dtype: {class_label: {names: {'0': 'no', '1': 'yes'}}}
- config_name: full_numbers
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: int64}
---
"""
#: Loads what its arguments name and writes a line for each: what came, or the error.
LOAD = """
import json, sys
from robustlens.data.config import DataConfig
from robustlens.data.sources import load, open_source
from robustlens.results.errors import InputError
for name in sys.argv[1:]:
    try:
        source, splits = open_source(DataConfig(source=name)), load(DataConfig(source=name))
        images = source.splits["train"].images().flatten().tolist()
        print(json.dumps([sorted(source.splits), splits.classes, images]))
    except InputError as error:
        print(json.dumps(str(error)))
"""
TRAIN = pixels(20)


def loaded(cache: Path, *names: str, **environment: str) -> list[Any]:
    outside = {"HF_HOME": str(cache), "ROBUSTLENS_DATA": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names],
        capture_output=True,
        text=True,
        env={**os.environ, **outside, **environment},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    place = tmp_path_factory.mktemp("hub")
    for split, images in {"train": TRAIN, "test": pixels(4, seed=1), "extra": pixels(2, seed=2)}.items():
        write(place / f"{split}.parquet", images, [0, 1] * (len(images) // 2))
    part = {split: (place / f"{split}.parquet").read_bytes() for split in ("train", "test", "extra")}
    svhn = {f"cropped_digits/{split}-00000-of-00001.parquet": data for split, data in part.items()}
    svhn |= {"full_numbers/train-00000-of-00001.parquet": part["extra"], "README.md": CARD.encode()}
    plain = {f"data/{split}-00000-of-00001.parquet": part[split] for split in ("train", "test")}
    empty = {"README.md": b"Nothing here yet.\n"}
    with hub({"ufldl-stanford/svhn": svhn, "some.body/plain_set": plain, "some.body/empty": empty}) as server:
        yield server


def test_a_known_name_is_downloaded_once_and_then_read_without_a_network(house: Hub, tmp_path: Path) -> None:
    (first,) = loaded(tmp_path, "svhn", HF_ENDPOINT=house.endpoint)
    splits, classes, images = first
    assert splits == ["test", "train"] and classes == ["no", "yes"]
    np.testing.assert_array_equal(images, TRAIN.transpose(0, 3, 1, 2).flatten())
    files = [path for path in house.downloads if path.endswith("parquet")]
    # Also the split that is not used, because `datasets` takes a configuration as a whole; the other one not.
    assert sorted(files) == [f"cropped_digits/{split}-00000-of-00001.parquet" for split in ("extra", "test", "train")]
    before = len(house.downloads)
    assert loaded(tmp_path, "svhn", HF_ENDPOINT=house.endpoint) == [first] and len(house.downloads) == before
    assert loaded(tmp_path, "svhn", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1") == [first]


def test_any_id_and_what_can_be_wrong_with_it(house: Hub, tmp_path: Path) -> None:
    plain, nobody, empty, which, unknown = loaded(
        tmp_path,
        "some.body/plain_set",
        "nobody/nothing",
        "some.body/empty",
        "ufldl-stanford/svhn",
        "ufldl-stanford/svhn:letters",
        HF_ENDPOINT=house.endpoint,
    )
    assert plain[0] == ["test", "train"] and plain[1] == ["0", "1"]
    assert nobody.startswith("data set 'nobody/nothing': expected the id of a public data set")
    assert empty.startswith("data set 'some.body/empty': expected") and "data files" in empty
    for error in (which, unknown):
        assert "'cropped_digits', 'full_numbers'" in error and "Write ufldl-stanford/svhn:configuration" in error


def test_without_a_network_it_says_how_to_go_on(tmp_path: Path) -> None:
    (error,) = loaded(tmp_path, "nobody-here/no-such-set", HF_HUB_OFFLINE="1")
    assert "expected the Hugging Face Hub to answer" in error and "directory of its parquet files" in error
