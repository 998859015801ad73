"""2000 damaged copies of the demo files: each is read or refused, in bounded time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MUTATIONS = int(os.environ.get("PERA_FAST_MUTATIONS", "2000"))

# A process of its own: a crash of a decoder would take the tests with it. Its last line on standard error is the
# mutation that it was at.
FUZZ = """
import logging, os, random, resource, signal, sys, warnings
from pathlib import Path

from pera_fast.data.sources import DataError, UnreadableImage, read_window, scan

folder, count = Path(sys.argv[1]), int(sys.argv[2])
warnings.simplefilter("ignore")
logging.disable()
originals = [Path(path).read_bytes() for path in map(Path, sys.argv[3:])]
suffixes = [Path(path).suffix for path in sys.argv[3:]]
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
# A size in a damaged header must not become an allocation.
limit = 6 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def flipped(data, rng, where):
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 64))):
        data[rng.randrange(min(where, len(data)))] = rng.randrange(256)
    return bytes(data)

def cut(data, rng):
    return data[: rng.randrange(len(data))]

def zeroed(data, rng):
    start, size = rng.randrange(len(data)), rng.choice((4, 100, 5000))
    return data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]

def moved(data, rng):
    start, size, to = rng.randrange(len(data)), rng.choice((1, 4, 1000)), rng.randrange(len(data))
    return data[:to] + data[start : start + size] + data[to:]

def grafted(data, rng):
    other, size = rng.choice(originals), rng.choice((16, 300, 4000))
    return other[:size] + data[size:]

def memory_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

kinds = [lambda d, r: flipped(d, r, 300), lambda d, r: flipped(d, r, len(d)), cut, zeroed, moved, grafted]
signal.signal(signal.SIGALRM, signal.SIG_DFL)
read = refused = 0
at_first = None
for i in range(count):
    if i == count // 2:
        at_first = memory_mb(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    rng = random.Random(i)
    which = rng.randrange(len(originals))
    print(i, file=sys.stderr)
    signal.alarm(30)
    path = folder / f"damaged{suffixes[which]}"
    path.write_bytes(rng.choice(kinds)(originals[which], rng))
    try:
        for scene in scan(path, max_bad_share=1.0).scenes:  # of a tar shard, several
            size = min(scene.height, 200), min(scene.width, 200)
            at = rng.randrange(scene.height - size[0] + 1), rng.randrange(scene.width - size[1] + 1)
            read_window(scene, *at, *size, bands=None, in_bands=scene.num_bands)
        read += 1
    except (UnreadableImage, DataError) as error:
        assert str(error)
        refused += 1
    signal.alarm(0)
now = memory_mb(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
print(read, refused, now[0] - at_first[0], now[1] - at_first[1], now[2] - at_first[2])
"""


@pytest.mark.timeout(900)
def test_damaged_copies_of_the_demo_files(tmp_path: Path) -> None:
    demo = ROOT / "pera_fast/demo"
    files = sorted(path for path in demo.iterdir() if path.suffix in (".tif", ".jpg"))
    shard = tmp_path / "shard.tar"
    subprocess.run(
        ["tar", "-cf", shard, "-C", demo, "landsat_rmnp.jpg", "neon_soap.jpg", "neon_osbs.tif"], check=True
    )
    folder = tmp_path / "damaged"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(folder), str(MUTATIONS), *map(str, files), str(shard)],
        capture_output=True, text=True, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    read, refused, grown_mb, descriptors, threads = map(float, done.stdout.split())
    assert read + refused == MUTATIONS and min(read, refused) > MUTATIONS / 20
    assert grown_mb < 60 and descriptors == 0 and threads <= 2  # one may be about to end
