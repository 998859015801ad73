"""disjoint_masks: reference against the compiled op, Philox against its published vectors, statistics."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import needs_cuda

from pera_fast.ops import BackendError, _dispatch, _library, disjoint_masks
from pera_fast.reference import disjoint_masks as disjoint_masks_reference
from pera_fast.reference import philox4x32_10

needs_cpp = pytest.mark.skipif(_library.why_no_cpp() is not None, reason=f"cpp: {_library.why_no_cpp()}")

# (num_patches, num_student, num_target): the method's own, both extremes of each count, no multiples of four.
SIZES = [
    (784, 157, 157),
    (36, 7, 7),
    (36, 7, 0),
    (2, 1, 0),
    (3, 1, 1),
    (4, 2, 1),
    (5, 1, 0),
    (7, 5, 1),
    (64, 62, 1),
    (65, 1, 63),
    (1023, 204, 205),
    (4096, 819, 819),
]
SEEDS_AND_STEPS = [(0, 0), (1, 2), (2**32 - 1, 2**32 - 1), (2**63, 7), (2**64 - 1, 2**31)]


def draw(backend, monkeypatch, crop_index, **arguments):
    monkeypatch.setenv("PERA_FAST_BACKEND", f"disjoint_masks={backend}")
    return disjoint_masks(crop_index, **arguments)


def assert_same(actual, expected):
    for name, left, right in zip(("student", "target", "teacher"), actual, expected, strict=True):
        assert left.dtype == right.dtype == torch.int64, name
        assert torch.equal(left.cpu(), right.cpu()), name


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    words = philox4x32_10([torch.tensor(word) for word in counter], key)
    assert tuple(map(int, words)) == expected


def test_reference_follows_the_documented_counter():
    """A loop over one crop, with Python integers: the docstring's definition, word for word."""

    def philox(c, k):
        c, k = list(c), list(k)
        for _ in range(10):
            p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [p1 >> 32 ^ c[1] ^ k[0], p1 % 2**32, p0 >> 32 ^ c[3] ^ k[1], p0 % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        return c

    seed, step, crop = 0x0123456789ABCDEF, 0xFEDCBA98, 0x0011223344556677
    keys = []
    for patch in range(37):
        counter = (patch // 4, step, crop % 2**32, crop >> 32)
        keys.append((philox(counter, (seed % 2**32, seed >> 32))[patch % 4], patch))
    order = [patch for _, patch in sorted(keys)]
    sets = disjoint_masks_reference(torch.tensor([crop]), seed, step, 37, 8, 9)
    assert [row.tolist() for row in sets] == [
        [sorted(order[:8])],
        [sorted(order[8:17])],
        [sorted(order[17:])],
    ]


@needs_cpp
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed, step", SEEDS_AND_STEPS)
def test_cpp_equals_reference(size, seed, step, monkeypatch):
    crop_index = torch.tensor([0, 1, 2, 3, 2**32 - 1, 2**32, 2**40 + 5, 2**63 - 1, -1])
    num_patches, num_student, num_target = size
    arguments = dict(
        seed=seed, step=step, num_patches=num_patches, num_student=num_student, num_target=num_target
    )
    expected = draw("reference", monkeypatch, crop_index, **arguments)
    assert_same(draw("cpp", monkeypatch, crop_index, **arguments), expected)


@needs_cuda
@pytest.mark.parametrize("size", [*SIZES, (8192, 1638, 1638), (8193, 1638, 1638), (40001, 28000, 0)])
@pytest.mark.parametrize("seed, step", SEEDS_AND_STEPS)
def test_cuda_equals_reference(size, seed, step, monkeypatch):
    crop_index = torch.tensor([0, 1, 2, 3, 2**32 - 1, 2**32, 2**40 + 5, 2**63 - 1, -1])
    num_patches, num_student, num_target = size
    arguments = dict(
        seed=seed, step=step, num_patches=num_patches, num_student=num_student, num_target=num_target
    )
    expected = draw("reference", monkeypatch, crop_index, **arguments)
    assert_same(draw("cuda", monkeypatch, crop_index.cuda(), **arguments), expected)


@needs_cuda
def test_cuda_does_not_wait_for_the_host_and_can_be_captured():
    crop_index = torch.arange(8, device="cuda")
    arguments = dict(seed=3, step=4, num_patches=784, num_student=157, num_target=157)
    expected = disjoint_masks(crop_index, **arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        disjoint_masks(crop_index, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = disjoint_masks(crop_index, **arguments)
    for tensor in captured:
        tensor.fill_(-1)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, expected)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
class TestEveryBackend:
    @pytest.mark.parametrize("size", SIZES)
    def test_sets_are_disjoint_ascending_and_cover(self, backend, size, monkeypatch):
        num_patches, num_student, num_target = size
        sets = draw(
            backend, monkeypatch, torch.arange(5), seed=9, step=1,
            num_patches=num_patches, num_student=num_student, num_target=num_target,
        )  # fmt: skip
        counts = (num_student, num_target, num_patches - num_student - num_target)
        for patches, count in zip(sets, counts, strict=True):
            assert patches.shape == (5, count)
            assert (patches.diff(dim=1) > 0).all()
        everything = torch.cat(sets, 1).sort(1).values
        assert torch.equal(everything, torch.arange(num_patches).expand(5, -1))

    def test_a_crop_does_not_depend_on_its_batch(self, backend, monkeypatch):
        arguments = dict(seed=5, step=6, num_patches=100, num_student=20, num_target=20)
        whole = draw(backend, monkeypatch, torch.arange(64), **arguments)
        for part in (torch.tensor([63, 0, 17, 17]), torch.arange(64)[::3], torch.arange(64).flip(0)):
            rows = draw(backend, monkeypatch, part, **arguments)
            assert_same(rows, [patches[part] for patches in whole])

    def test_seed_step_and_crop_all_matter(self, backend, monkeypatch):
        def student(seed, step, crop):
            sets = draw(
                backend, monkeypatch, torch.tensor([crop]), seed=seed, step=step,
                num_patches=784, num_student=157, num_target=157,
            )  # fmt: skip
            return tuple(sets[0][0].tolist())

        drawn = {
            student(seed, step, crop)
            for seed in (0, 1, 2**32, 2**63)
            for step in (0, 1, 2**31)
            for crop in (0, 1, 2**32)
        }
        assert len(drawn) == 36

    def test_no_crops(self, backend, monkeypatch):
        sets = draw(
            backend, monkeypatch, torch.empty(0, dtype=torch.int64),
            seed=0, step=0, num_patches=36, num_student=7, num_target=7,
        )  # fmt: skip
        assert [tuple(patches.shape) for patches in sets] == [(0, 7), (0, 7), (0, 22)]

    def test_statistics(self, backend, monkeypatch):
        """Inclusion of each patch, and of each pair, as often as random subsets would have it."""
        crops, num_patches, counts = 20000, 36, (7, 7, 22)
        sets = draw(
            backend, monkeypatch, torch.arange(crops), seed=1234, step=5,
            num_patches=num_patches, num_student=counts[0], num_target=counts[1],
        )  # fmt: skip
        for patches, count in zip(sets, counts, strict=True):
            member = torch.zeros(crops, num_patches, dtype=torch.float64).scatter_(1, patches, 1.0)
            inclusion = count / num_patches
            spread = math.sqrt(inclusion * (1 - inclusion) / crops)
            assert (member.mean(0) - inclusion).abs().max() < 4.5 * spread  # 36 z-scores
            pair = count * (count - 1) / (num_patches * (num_patches - 1))
            together = (member.T @ member / crops)[~torch.eye(num_patches, dtype=torch.bool)]
            spread = math.sqrt(pair * (1 - pair) / crops)
            assert (together - pair).abs().max() < 5.5 * spread  # 630 z-scores
        # Neighbouring crops and neighbouring steps are independent draws: their students share
        # count^2 / num_patches patches on average.
        member = torch.zeros(crops, num_patches, dtype=torch.float64).scatter_(1, sets[0], 1.0)
        other_step = draw(
            backend, monkeypatch, torch.arange(crops), seed=1234, step=6,
            num_patches=num_patches, num_student=7, num_target=7,
        )[0]  # fmt: skip
        other = torch.zeros(crops, num_patches, dtype=torch.float64).scatter_(1, other_step, 1.0)
        expected = 7 * 7 / 36
        variance = 7 * (7 / 36) * (29 / 36) * (29 / 35)  # hypergeometric
        for shared in ((member[1:] * member[:-1]).sum(1), (member * other).sum(1)):
            assert abs(shared.mean() - expected) < 4.5 * math.sqrt(variance / crops)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_equal_keys_go_by_patch_index(backend, monkeypatch):
    """The boundary of the student's set is put between two patches of the same key."""
    num_patches = 2**18  # so many that some keys collide: 8 pairs are expected
    zero = torch.zeros(num_patches // 4, dtype=torch.int64)
    words = philox4x32_10([torch.arange(num_patches // 4), zero, zero, zero], (0, 0))
    keys, order = torch.stack(words, 1).flatten().sort(stable=True)
    collisions = (keys.diff() == 0).nonzero().flatten().tolist()
    assert collisions
    for rank in collisions[:2]:
        first, second = int(order[rank]), int(order[rank + 1])
        assert first < second
        student, target, _ = draw(
            backend, monkeypatch, torch.tensor([0]), seed=0, step=0,
            num_patches=num_patches, num_student=rank + 1, num_target=1,
        )  # fmt: skip
        assert (student == first).any() and target.item() == second


GOOD = dict(seed=0, step=0, num_patches=36, num_student=7, num_target=7)


@pytest.mark.parametrize(
    "changed, sentence",
    [
        (dict(crop_index=torch.arange(3).int()), r"crop_index: expected int64 \[n\], got int32 \[3\]"),
        (dict(crop_index=torch.zeros(2, 2).long()), r"crop_index: expected int64 \[n\], got int64 \[2, 2\]"),
        (dict(seed=-1), r"seed: expected 0 <= seed < 2\*\*64, got -1"),
        (dict(seed=2**64), r"seed: expected 0 <= seed < 2\*\*64, got 18446744073709551616"),
        (dict(step=-1), r"step: expected 0 <= step < 2\*\*32, got -1"),
        (dict(step=2**32), r"step: expected 0 <= step < 2\*\*32, got 4294967296"),
        (dict(num_patches=0), r"num_patches: expected 1 <= num_patches < 2\*\*31, got 0"),
        (dict(num_student=0), "num_student: expected at least 1, got 0"),
        (dict(num_student=-3), "num_student: expected at least 1, got -3"),
        (dict(num_target=-1), "num_target: expected at least 0, got -1"),
        (dict(num_student=29), r"num_student \+ num_target: .*num_patches = 36.*got 29 \+ 7"),
        (dict(num_target=40), r"num_student \+ num_target: .*num_patches = 36.*got 7 \+ 40"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changed, sentence):
    arguments = {"crop_index": torch.arange(3), **GOOD, **changed}
    with pytest.raises(ValueError, match=sentence):
        disjoint_masks(arguments.pop("crop_index"), **arguments)


@needs_cpp
@pytest.mark.parametrize(
    "arguments",
    [
        (torch.arange(3).int(), 0, 0, 36, 7, 7),
        (torch.arange(3), 0, 2**32, 36, 7, 7),
        (torch.arange(3), 0, 0, 36, -7, 7),
        (torch.arange(3), 0, 0, 36, 30, 7),
        (torch.arange(3), 0, 0, 36, 2**62, 2**62),
    ],
)
def test_the_op_itself_guards_its_memory(arguments):
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.pera_fast.disjoint_masks(*arguments)


@needs_cpp
@pytest.mark.parametrize("num_target", [0, 7])
@pytest.mark.parametrize("crops", [0, 3])
def test_opcheck(crops, num_target):
    arguments = (torch.arange(crops), -5, 6, 36, 7, num_target)
    torch.library.opcheck(torch.ops.pera_fast.disjoint_masks.default, arguments)


@needs_cpp
def test_forced_backend_is_the_one_that_runs(monkeypatch):
    ran = []
    spied = []
    for implementation in _dispatch.registered()["disjoint_masks"]:

        def spy(*arguments, _of=implementation):
            ran.append(_of.backend)
            return _of.function(*arguments)

        spied.append(_dispatch.Implementation(implementation.backend, spy, implementation.why_missing))
        monkeypatch.setitem(_dispatch._functions, ("disjoint_masks", implementation.backend), spy)
    monkeypatch.setitem(_dispatch.registered(), "disjoint_masks", spied)
    for backend in ("cpp", "reference", "auto"):
        draw(backend, monkeypatch, torch.arange(2), **GOOD)
    assert ran == ["cpp", "reference", "cpp"]


def test_forced_backend_that_cannot_run_raises(monkeypatch):
    with pytest.raises(
        BackendError, match="'cuda' was asked for but is not usable: needs cuda tensors, got cpu"
    ):
        draw("cuda", monkeypatch, torch.arange(2), **GOOD)
    with pytest.raises(BackendError, match="has no backend 'triton'"):
        draw("triton", monkeypatch, torch.arange(2), **GOOD)
    monkeypatch.setattr(_library, "_PACKAGE", _library._PACKAGE / "nowhere")
    monkeypatch.setitem(
        _dispatch.registered(),
        "disjoint_masks",
        [_dispatch.Implementation("cpp", lambda *_: None, _library.why_no_cpp.__wrapped__)],
    )
    with pytest.raises(BackendError, match="'cpp' was asked for but is not usable: library not built"):
        draw("cpp", monkeypatch, torch.arange(2), **GOOD)


def test_works_without_the_library():
    """Auto falls back to the reference and says so once."""
    program = (
        "import torch, logging; logging.basicConfig()\n"
        "def fail(path): raise OSError('undefined symbol: x')\n"
        "torch.ops.load_library = fail\n"
        "from pera_fast.ops import disjoint_masks\n"
        "for _ in range(2):\n"
        "    sets = disjoint_masks(\n"
        "        torch.arange(2), seed=0, step=0, num_patches=36, num_student=7, num_target=7)\n"
        "print(*(tuple(patches.shape) for patches in sets))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PERA_FAST_BACKEND"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "(2, 7) (2, 7) (2, 22)", done.stderr
    assert done.stderr.count("disjoint_masks runs on backend reference: cpp library ") == 1
