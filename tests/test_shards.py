"""Tar shards: what webdataset and tar write is read like files of a folder, in any order, damage and all."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import run_here, tiny_config
from PIL import Image
from test_train import SMALL, lines

from pera_fast.data import shards
from pera_fast.data.index import scan_or_open
from pera_fast.data.loader import WindowDataset
from pera_fast.data.sources import DataError, Scene, read_window, scan
from pera_fast.data.statistics import compute_statistics
from pera_fast.run import DEMO_SCENES

DEMO = sorted(p for p in DEMO_SCENES.iterdir() if p.suffix in (".tif", ".jpg"))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """The demo scenes, JPEG and GeoTIFF of 8 and 16 bit, in shards of three by webdataset."""
    folder = tmp_path / "shards"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "demo-%03d.tar"), maxcount=3, verbose=0) as writer:
        for path in DEMO:
            writer.write(
                {"__key__": path.stem, path.suffix[1:]: path.read_bytes(), "json": {"from": path.name}}
            )
    return folder


def pixels_of(scene: Scene, in_bands: int = 1) -> np.ndarray:
    return read_window(scene, 3, 5, 40, 50, bands=None, in_bands=in_bands)[0]


def test_shards_of_webdataset_are_read_as_the_files_they_were_made_of(packed: Path) -> None:
    found, files = scan(packed).scenes, {Path(s.path).name: s for s in scan(DEMO_SCENES).scenes}
    assert [Path(s.path).name for s in found] == [p.name for p in DEMO] and not scan(packed).bad
    for scene in found:
        file = files[Path(scene.path).name]
        for name in ("height", "width", "num_bands", "dtype"):
            assert getattr(scene, name) == getattr(file, name)
        assert np.array_equal(pixels_of(scene), pixels_of(file))
    # Those that webdataset itself reads, in its order.
    urls = sorted(map(str, packed.iterdir()))
    samples = webdataset.WebDataset(urls, shardshuffle=False)
    assert [s["__key__"] for s in samples] == [Path(s.path).stem for s in found]


def test_one_shard_and_an_index_of_it(packed: Path, tmp_path: Path) -> None:
    shard = sorted(packed.iterdir())[0]
    plain = scan(shard).scenes
    indexed = scan_or_open(shard, tmp_path / "index", 0.1).scenes
    again = scan_or_open(shard, tmp_path / "index", 0.1).scenes
    assert len(plain) == 3 and list(plain) == list(indexed) == list(again)
    assert np.array_equal(pixels_of(plain[1]), pixels_of(again[1]))


def test_the_stream_of_images_is_that_of_the_folder(packed: Path, tmp_path: Path) -> None:
    """Order, windows and crops do not depend on how the images are stored."""
    config, streams = tiny_config(), []
    for root in (packed, DEMO_SCENES):
        index = scan(root)
        statistics = compute_statistics(index.scenes, bands=None, in_bands=3)
        dataset = WindowDataset(index, statistics, config)
        streams.append([dataset[position] for position in range(0, 3 * len(dataset), 7)])
    for a, b in zip(*streams, strict=True):
        assert np.array_equal(a.pixels, b.pixels) and np.array_equal(
            a.crops["global"]["box"], b.crops["global"]["box"]
        )


def test_a_training_from_shards_is_that_from_files(image_folder: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "all.tar", "."], cwd=image_folder, check=True)
    for data, out in ((image_folder, "files"), (tmp_path / "all.tar", "shard")):
        done = run_here("pera_fast.train", *SMALL, "--data", data, "--out", tmp_path / out, "--max-steps", 3)
        assert done.returncode == 0, done.stderr
    a, b = (lines(tmp_path / out) for out in ("files", "shard"))
    assert [r["loss"] for r in a] == [r["loss"] for r in b] and len(a) == 3


def shard_of(path: Path, members: dict[str, bytes], **facts: object) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(value: int, size: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def test_names_of_any_kind(tmp_path: Path) -> None:
    """A member's name is only a name: nothing is written, whatever it says; long and odd ones are kept."""
    names = [
        "../../out.png",
        "/etc/x.png",
        "ä/" + "long" * 60 + ".png",
        os.fsdecode(b"\xff.PNG"),
        "a.tar/b.png",
    ]
    folder = tmp_path / os.fsdecode(b"\xfe")  # GDAL takes no such name
    folder.mkdir()
    tiff = DEMO_SCENES / "sentinel2_6band.tif"
    members = {name: png(i) for i, name in enumerate(names)} | {"s.tif": tiff.read_bytes(), "notes.txt": b"x"}
    shard = shard_of(folder / "a.tar", members)
    found = scan_or_open(folder, tmp_path / "index", 0.1).scenes
    assert [s.path for s in found] == [f"{shard}/{name}" for name in [*names, "s.tif"]]
    for i, scene in enumerate(found[:-1]):
        assert int(pixels_of(scene).max()) == i
    assert np.array_equal(pixels_of(found[-1], 6), pixels_of(scan(tiff).scenes[0], 6))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([folder.name, "index"])


def test_hidden_members_are_left_out_as_in_folders(tmp_path: Path) -> None:
    """macOS's tar adds one to each file."""
    shard = shard_of(
        tmp_path / "a.tar", {"./._0.png": b"x", "./0.png": png(0), "../.cache/1.png": b"x", "2.png": png(2)}
    )
    found = scan(tmp_path)
    assert [s.path for s in found.scenes] == [f"{shard}/./0.png", f"{shard}/2.png"] and not found.bad


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_named(tmp_path: Path, kind: bytes) -> None:
    shard = shard_of(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(20)})
    with tarfile.open(shard, "a") as tar:
        for name in ("link.png", "notes.txt"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "0.png"
            tar.addfile(link)
    found = scan(tmp_path)
    assert len(found.scenes) == 20
    assert [(path, reason.split(":")[0]) for path, reason in found.bad] == [
        (f"{shard}/link.png", "a link in a tar shard")
    ]


def test_joined_shards_are_not_lost_in_silence(tmp_path: Path) -> None:
    parts = [
        shard_of(tmp_path / f"{name}.part", {f"{name}{i}.png": png(i) for i in range(10)}) for name in "ab"
    ]
    (tmp_path / "a.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    found = scan(tmp_path)
    assert len(found.scenes) == 10 and "another archive was joined to it" in found.bad[0][1]


@pytest.mark.parametrize("damage", ["cut in a member", "cut in a header", "garbage", "empty", "not a tar"])
def test_a_damaged_shard_gives_what_comes_before_the_damage(tmp_path: Path, damage: str) -> None:
    whole = shard_of(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(20)})
    data, places = whole.read_bytes(), [place for _, place in shards.members(str(whole))]
    broken = {
        "cut in a member": data[: places[12].start + 50],
        "cut in a header": data[: places[12].start - 100],
        "garbage": data[: places[12].start - 512] + b"\x55" * 512 + data[places[12].start :],
        "empty": b"",
        "not a tar": png(0) * 9,
    }[damage]
    whole.write_bytes(broken)
    shard_of(tmp_path / "b.tar", {f"{i}.png": png(i) for i in range(20)})
    index = scan(tmp_path)
    expected = 12 if damage in ("cut in a member", "cut in a header", "garbage") else 0
    assert len(index.scenes) == expected + 20
    assert [path for path, _ in index.bad] == [str(whole)] and index.bad[0][1], index.bad


def test_a_member_that_is_no_image_and_one_that_goes_away(tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "a.tar", {f"{i:02}.png": png(i) for i in range(20)} | {"x.jpg": b"nothing"})
    index = scan(tmp_path)
    assert index.bad == [(f"{shard}/x.jpg", "not a JPEG, PNG or TIFF file")]
    statistics = compute_statistics(index.scenes, bands=None, in_bands=3)
    shard_of(shard, {"00.png": png(0)})
    dataset = WindowDataset(index, statistics, tiny_config())
    sample = dataset[0]
    assert (sample.pixels == 0).all(), "the one that is left"
    assert sample.bad and {reason for _, reason in sample.bad} <= {
        "empty file",
        "not a JPEG, PNG or TIFF file",
    }
    shard.unlink()
    with pytest.raises(DataError, match="no image is readable any more"):
        dataset[0]


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(DataError, match="a compressed tar can only be read from its start: decompress it"):
        scan(tmp_path)
    (tmp_path / "a.tar.gz").unlink()
    shard_of(tmp_path / "a.tar", {"notes.txt": b"nothing"})
    with pytest.raises(DataError, match="no image .* found in the tar shards"):
        scan(tmp_path)


def test_a_part_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(256)) * 40)
    with shards.open_image("x", shards.Place(str(tmp_path / "x"), 250, 9000)) as part:
        data = (tmp_path / "x").read_bytes()[250:9250]
        assert part.read(3) == data[:3] and part.tell() == 3
        assert part.seek(-5, os.SEEK_END) == 8995 and part.read() == data[-5:] and part.read(1) == b""
        assert part.seek(100) == 100 and part.seek(7, os.SEEK_CUR) == 107 and part.read(5) == data[107:112]
        part.seek(0)
        assert part.read() == data
