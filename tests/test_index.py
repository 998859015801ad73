"""An index on disk: the same scenes, the same training, and five million of them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import python_path, run_here
from test_train import SMALL

from pera_fast.data import index as index_module
from pera_fast.data.index import SceneTable, dtype_codes, scan_or_open, window_counts, write
from pera_fast.data.shards import Place
from pera_fast.data.sources import DataError, Scene, scan
from pera_fast.data.statistics import plan_windows

SCENES = [
    Scene("/data/a.jpg", 60, 70, 3, "uint8"),
    Scene("/data/b/ä.tif", 900, 10, 4, "uint16"),
    Scene("/data/b/" + os.fsdecode(b"\xff.tif"), 70000, 513, 13, "float32"),
    Scene("/data/c.png", 512, 512, 1, "uint8"),
    Scene("/data/d.tar/../é/x.jpg", 5, 6, 3, "uint8", Place("/data/d.tar", 2**33 + 512, 1999)),
]


@pytest.fixture
def table(tmp_path: Path) -> SceneTable:
    write(tmp_path / "index", "/data", SCENES, [("/data/" + os.fsdecode(b"\xfe"), "empty file")])
    return SceneTable(tmp_path / "index")


def test_scenes_come_back_as_they_went(table: SceneTable) -> None:
    assert len(table) == 5 and list(table) == SCENES
    assert table[-1] == SCENES[4] and [s.path for s in table[1:3]] == [s.path for s in SCENES[1:3]]
    with pytest.raises(IndexError):
        table[5]
    assert table.bad == [("/data/" + os.fsdecode(b"\xfe"), "empty file")]
    again = pickle.loads(pickle.dumps(table))
    assert len(pickle.dumps(table)) < 500 and again[2] == SCENES[2], "a worker maps the file, nothing is sent"


def test_columns_are_those_of_the_list(table: SceneTable) -> None:
    assert window_counts(table, 512).tolist() == window_counts(SCENES, 512).tolist() == [1, 2, 137 * 2, 1, 1]
    for scenes in (table, SCENES):
        names, codes = dtype_codes(scenes)
        assert [names[code] for code in codes] == ["uint8", "uint16", "float32", "uint8", "uint8"]
    plans = [plan_windows(scenes, 3, 512, seed=0) for scenes in (table, SCENES)]
    assert [(s.path, w) for s, w in plans[0]] == [(s.path, w) for s, w in plans[1]]


def test_made_once_and_read_later(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = scan(image_folder)
    first = scan_or_open(image_folder, tmp_path / "index", 0.1)
    monkeypatch.setattr(index_module, "scan", lambda *_: pytest.fail("the headers were read again"))
    second = scan_or_open(image_folder, tmp_path / "index", 0.1)
    assert list(first.scenes) == list(second.scenes) == plain.scenes


def test_training_with_an_index_is_the_same(image_folder: Path, tmp_path: Path) -> None:
    logs = []
    for name, extra in (("plain", ()), ("made", ("--index", tmp_path / "i"))):
        arguments = (*SMALL, "--data", image_folder, "--out", tmp_path / name, "--max-steps", 2, *extra)
        done = run_here("pera_fast.train", *arguments)
        assert done.returncode == 0, done.stderr
        logs.append([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()])
    assert logs[0] == logs[1] and SceneTable(tmp_path / "i").root == str(image_folder)
    with pytest.raises(DataError, match="index: expected one of"):
        scan_or_open(tmp_path, tmp_path / "i", 0.1)


def test_what_cannot_be_used_is_refused(table: SceneTable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="index: .* cannot be read"):
        SceneTable(tmp_path)
    rows = table.folder / "rows.bin"
    whole = rows.read_bytes()
    rows.write_bytes(whole[: -len(whole) // len(SCENES)])
    with pytest.raises(DataError, match="index: expected format 4, whole"):
        SceneTable(table.folder)
    rows.write_bytes(whole[:-3])
    with pytest.raises(DataError, match="index: .* cannot be read"):
        SceneTable(table.folder)
    rows.write_bytes(b"")
    with pytest.raises(DataError, match="index: .* cannot be read"):
        SceneTable(table.folder)


@pytest.mark.parametrize("name", ["rows.bin", "text.bin"])
def test_a_damaged_byte_is_found(name: str, image_folder: Path, tmp_path: Path) -> None:
    scan_or_open(image_folder, tmp_path / "index", 0.1)
    file = tmp_path / "index" / name
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 64
    file.write_bytes(damaged)
    with pytest.raises(DataError, match=f"index: .*{name} is damaged; remove it"):
        scan_or_open(image_folder, tmp_path / "index", 0.1)


def test_a_scan_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def scenes():  # type: ignore[no-untyped-def]
        yield SCENES[0]
        raise OSError("disk full")

    with pytest.raises(DataError, match="index: cannot write .*index: disk full"):
        write(tmp_path / "index", "/data", scenes(), [])
    assert list(tmp_path.iterdir()) == []


MILLIONS = """
import sys, time
started = time.perf_counter()
import numpy as np
from conftest import tiny_config
from pera_fast.data.index import scan_or_open
from pera_fast.data.loader import StreamSampler, WindowDataset
from pera_fast.data.statistics import Statistics

def private_bytes():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Private_"))

zero, ranks = (0.0,) * 3, 64
statistics = Statistics({"uint8": zero}, {"uint8": (255.0,) * 3}, zero, (1.0,) * 3, num_windows=1, num_pixels=1)
before, opened = private_bytes(), time.perf_counter()
found = scan_or_open("/data", sys.argv[1], 0.1)
config = tiny_config(batch_size=128)
dataset = WindowDataset(found, statistics, config)
steps = len(dataset) // (128 * ranks)
seen = np.zeros(len(dataset), np.uint8)
for rank in range(ranks):
    sampler = StreamSampler(config, 0, steps, rank, ranks)
    first = next(iter(sampler))
    assert len(first) == 128 and found.scenes[int(dataset.order(0)[first[0]])].path.endswith(".jpg")
    if rank == 0:
        ready = time.perf_counter() - opened
        worker = private_bytes() - before
    np.add.at(seen, dataset.order(0)[np.concatenate([np.array(batch) for batch in sampler])], 1)
assert seen.max() == 1 and seen.sum() == steps * 128 * ranks
print(len(dataset), ready, worker)
"""


def test_five_million_images_on_64_ranks(tmp_path: Path) -> None:
    """From the index to the first batch in under ten seconds, 300 MB a worker, no image twice in an epoch."""
    count, folder = 5_000_000, tmp_path / "index"
    write(folder, "/data", [Scene("/data/0000000.jpg", 64, 64, 3, "uint8")], [])
    rows = np.tile(np.fromfile(folder / "rows.bin", index_module._ROW), count)
    digits = np.arange(count)[:, None] // 10 ** np.arange(6, -1, -1) % 10 + ord("0")
    text = np.concatenate(
        (digits.astype(np.uint8), np.tile(np.frombuffer(b".jpg", np.uint8), (count, 1))), axis=1
    )
    rows["end"] = np.arange(1, count + 1) * text.shape[1]
    rows.tofile(folder / "rows.bin")
    text.tofile(folder / "text.bin")
    facts = json.loads((folder / "index.json").read_text())
    facts["crc32"] = {name: index_module._checksum(folder / name) for name in ("rows.bin", "text.bin")}
    (folder / "index.json").write_text(json.dumps(facts))
    done = subprocess.run(
        [sys.executable, "-c", MILLIONS, str(folder)], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    windows, seconds, private = map(float, done.stdout.split())
    assert windows == count and seconds < 10 and private < 300e6
