"""The networks: sizes, whole-image features against a plain ViT, drop-path subsets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_cuda, tiny_config
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pera_fast.config import PRESETS, Config
from pera_fast.model.pera import CropGroup, Patches, PerA, draw_subsets
from pera_fast.model.vit import Subset, VisionTransformer
from pera_fast.ops.linear import plain
from pera_fast.plan import synthetic_patches


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("vit_ti", 5.6), ("vit_s", 21.8), ("vit_b", 86.1), ("vit_l", 303.7), ("vit_g_1024", 505.3)],
)
def test_backbone_sizes(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model = PerA(PRESETS[preset])
    count = sum(p.numel() for p in model.student.backbone.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.01)
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_teacher_starts_as_the_student() -> None:
    model = PerA(tiny_config())
    for ours, theirs in zip(model.student.parameters(), model.teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_features_of_whole_images_against_a_plain_vit() -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(tiny_config().model, 40)
    images = torch.randn(2, 3, 40, 40)
    x = backbone.patch_embed.proj(images).flatten(2).mT
    x = torch.cat((backbone.cls_token.expand(2, -1, -1), x), 1) + backbone.pos_embed
    for block in backbone.blocks:
        heads = block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(x)).view(2, 26, 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = (qkv[0] @ qkv[1].mT) / qkv.shape[-1] ** 0.5
        x = x + block.attn.proj((scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(2, 26, -1))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    x = F.layer_norm(x, x.shape[-1:], backbone.norm.weight, backbone.norm.bias, 1e-6)
    cls, patches = backbone(images)
    torch.testing.assert_close(cls, x[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patches, x[:, 1:], rtol=1e-4, atol=1e-5)


def test_other_image_sizes_and_their_refusal() -> None:
    backbone = VisionTransformer(tiny_config().model, 40)
    cls, patches = backbone(torch.randn(1, 3, 24, 64))
    assert cls.shape == (1, 32) and patches.shape == (1, 3 * 8, 32)
    with pytest.raises(ValueError, match="images: expected height and width in multiples of 8, got 24x60"):
        backbone(torch.randn(1, 3, 24, 60))


def groups(batch: int) -> list[CropGroup]:
    def group(crops: int, students: int, targets: int) -> CropGroup:
        return CropGroup(*(torch.zeros(crops * batch, n, dtype=torch.int64) for n in (students, targets, 1)))

    return [group(2, 7, 5), group(8, 3, 0)]


def test_drop_path_subsets() -> None:
    subsets = draw_subsets(groups(4), 0.3, depth=3, step=5)
    assert len(subsets) == 6
    for branch, subset in enumerate(subsets[:-1]):
        seen = 8 if branch < 2 else 13  # block depth // 2 = 1 is the first to see the targets
        assert list(subset.groups) == [(5, seen), (22, 4)]
        assert subset.rows is not None and subset.scale is not None
        assert len(subset.rows.unique()) == len(subset.rows) == 5 * seen + 22 * 4
        first, rest = subset.rows[: 5 * seen], subset.rows[5 * seen :]
        assert first.max() < 8 * 13 <= rest.min() and rest.max() < 8 * 13 + 32 * 4
        assert (first % 13).max() == seen - 1  # a sequence ends before its targets, or with them
        assert subset.scale[0].item() == pytest.approx(8 / 5)
        assert subset.scale[-1].item() == pytest.approx(32 / 22)
    last = subsets[-1]  # CLS and targets of a global crop's 13 tokens, CLS of a local one's 4
    assert list(last.groups) == [(5, 6), (22, 1)] and last.rows is not None and last.scale is not None
    assert len(last.rows.unique()) == len(last.rows) == len(last.scale) == 5 * 6 + 22
    assert (last.rows[:30].view(5, 6) % 13 == torch.tensor([0, 8, 9, 10, 11, 12])).all()
    assert ((last.rows[30:] - 8 * 13) % 4 == 0).all()
    again = draw_subsets(groups(4), 0.3, depth=3, step=5)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(subsets, again, strict=True))
    other = draw_subsets(groups(4), 0.3, depth=3, step=6)
    assert not all(torch.equal(a.rows, b.rows) for a, b in zip(subsets, other, strict=True))


def test_at_least_one_sequence_stays() -> None:
    single = [g._replace(student=g.student[:1]) for g in groups(1)]
    assert [count for count, _ in draw_subsets(single, 0.9, 1)[0].groups] == [1, 1]


def test_without_drop_path_only_unseen_targets_and_unread_rows_are_left_out() -> None:
    subsets = draw_subsets(groups(1), 0.0, 3)
    visible = [13 * i + j for i in range(2) for j in range(8)] + list(range(26, 26 + 8 * 4))
    read = [13 * i + j for i in range(2) for j in (0, *range(8, 13))] + list(range(26, 26 + 8 * 4, 4))
    want = [visible] * 2 + [None] * 3 + [read]
    assert [s.rows.tolist() if s.rows is not None else None for s in subsets] == want
    assert all(s.scale is None for s in subsets)


def drawn_patches(config: Config, batch: int) -> Patches:
    """Random pixels of random patches, in the layout of Engine.patches."""
    crops, patch_px, random = config.crops, config.model.patch_px, torch.Generator().manual_seed(0)
    row_size, found, students, teachers = 3 * patch_px**2, [], [], []
    for crop_px, count in ((crops.global_px, crops.num_global), (crops.local_px, crops.num_local)):
        sizes = crops.mask_counts((crop_px // patch_px) ** 2)
        order = torch.rand(batch * count, sum(sizes), generator=random).argsort(1)
        student, target, teacher = order.split(sizes, 1)
        found.append(CropGroup(student, target if not found else target[:, :0], teacher))
        for rows, patches in ((students, student), (teachers, teacher)):
            pixels = torch.randn(len(order), patches.shape[1], row_size, generator=random)
            rows.append(F.pad(pixels, (0, 0, 1, 0)).flatten(0, 1))
    pixels = torch.randn(*found[0].target.shape, row_size, generator=random)
    return Patches(found, torch.cat(students), pixels, torch.cat(teachers))


def run(model: PerA, config: Config, precision: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of one pass with drop path."""
    patches = drawn_patches(config, 4)
    subsets = draw_subsets(patches.groups, 0.3, config.model.depth)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        losses = model(patches, subsets, 0.04)
    losses.total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": losses.total.detach(), **gradients}


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_rows_left_out_of_the_last_mlp_are_not_read(
    drop_path: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients are those of a last MLP that works on every token of its sequences."""
    config = tiny_config()
    torch.manual_seed(0)
    model = PerA(config).double()
    patches = drawn_patches(config, 4)
    patches = Patches(patches.groups, *(x.double() for x in patches[1:]))
    subsets = draw_subsets(patches.groups, drop_path, config.model.depth)

    def one_pass() -> dict[str, torch.Tensor]:
        model.zero_grad()
        losses = model(patches, subsets, 0.04)
        losses.total.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"losses": torch.stack((losses.total.detach(), losses.pixel, losses.koleo)), **found}

    def with_every_token(last: Subset, attention: Subset) -> Subset:
        rows, scales, start = [], [], 0
        for (count, read), (_, length) in zip(last.groups, attention.groups, strict=True):
            stop = start + count * read
            rows.append((last.rows[start:stop:read, None] + torch.arange(length)).flatten())
            if last.scale is not None:
                scales.append(last.scale[start].expand(count * length))
            start = stop
        counts = [(n, length) for (n, _), (_, length) in zip(last.groups, attention.groups, strict=True)]
        return Subset(counts, torch.cat(rows), torch.cat(scales) if scales else None)

    got, rows_left_out = one_pass(), []
    blocks_forward = VisionTransformer.blocks_forward

    def on_every_row(self: VisionTransformer, x: torch.Tensor, subsets: Sequence[Subset]) -> torch.Tensor:
        last = with_every_token(subsets[-1], subsets[-2])
        rows_left_out.append(len(last.rows) - len(subsets[-1].rows))
        return blocks_forward(self, x, [*subsets[:-1], last])

    monkeypatch.setattr(VisionTransformer, "blocks_forward", on_every_row)
    for name, value in one_pass().items():
        assert torch.allclose(got[name], value, rtol=1e-10, atol=1e-13), name
    assert len(rows_left_out) == 2 and min(rows_left_out) > 0  # teacher and student


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["norms", "blocks"])
def test_recomputing_changes_the_memory_alone(recompute: str, precision: str) -> None:
    config = tiny_config()
    config = replace(config, model=replace(config.model, embed_dim=64, depth=4))
    torch.manual_seed(0)
    model = PerA(config)
    want = run(model, config, precision)
    model.student.backbone.recompute = recompute
    got = run(model, config, precision)
    for name, value in want.items():
        slack = 1e-5 if precision == "fp32" else 4e-2
        assert (got[name] - value).norm() <= slack * value.norm() + 1e-7, name


class Calls(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Made(TorchDispatchMode):
    """What GELU made, which a storage's end does not wait for, and concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[str, list[StorageWeakRef]] = {"gelu": [], "cat": []}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if (name := func.overloadpacket.__name__) in self.storages:
            self.storages[name].append(StorageWeakRef(out.untyped_storage()))
        return out


def test_what_is_quickly_made_again_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """GELU of blocks and heads; the library's attention of several crop sizes as one matrix is not even made."""
    config = tiny_config()
    student = PerA(config).student
    patches = drawn_patches(config, 4)
    monkeypatch.setenv("PERA_FAST_BACKEND", "packed_attention=torch")
    rows = sum(len(group.student) * (1 + group.student.shape[1]) for group in patches.groups)
    groups = [(len(group.student), 1 + group.student.shape[1]) for group in patches.groups]
    x = torch.randn(rows, config.model.embed_dim, requires_grad=True)

    def forward() -> torch.Tensor:
        subsets = [Subset(groups)] * (2 * config.model.depth)
        tokens = student.backbone.blocks_forward(x + 0, subsets)
        return student.cls_head(tokens[:9]).sum() + tokens.square().sum()

    with plain():  # in the backward pass, too: what is made again must be what was made
        with Made() as made:
            out = forward()
        expected = config.model.depth + config.model.head_layers - 1
        assert [len(made.storages[name]) for name in ("gelu", "cat")] == [expected, 0]
        assert all(storage.expired() for storages in made.storages.values() for storage in storages)
        got = torch.autograd.grad(out, x)[0]
    monkeypatch.setattr("pera_fast.model.vit._again", lambda function, *inputs: function(*inputs))
    with plain():
        with Made() as made:
            out = forward()
        assert not any(storage.expired() for storages in made.storages.values() for storage in storages)
        assert torch.equal(got, torch.autograd.grad(out, x)[0])


def test_a_pass_never_waits_for_the_device() -> None:
    """No value is read back and no shape depends on values, forward and backward, so a GPU is never waited for."""
    config = tiny_config()
    model = PerA(config)
    patches = drawn_patches(config, 4)
    subsets = draw_subsets(patches.groups, 0.3, config.model.depth)
    with Calls() as calls:
        model(patches, subsets, 0.04).total.backward()
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}
    assert not waits & set(calls.counts), calls.counts
    with Calls() as calls:
        torch.ones(2).sum().item()
    assert waits & set(calls.counts)  # the count does see one


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pass_on_a_gpu_can_be_captured(precision: str) -> None:
    """Forward and backward, replayed: the gradients of the pass itself."""
    config = tiny_config(precision=precision)
    model = PerA(config).cuda()
    patches = synthetic_patches(config, 4, torch.device("cuda"))
    patches.student_rows.normal_()
    patches.teacher_rows.normal_()
    subsets = draw_subsets(patches.groups, 0.3, config.model.depth)

    def once() -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            losses = model(patches, subsets, 0.04)
        losses.total.backward()
        return losses.total.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazily made workspaces are made outside of the graph
        for _ in range(3):
            plain = once()
    torch.cuda.current_stream().wait_stream(side)
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    graph.replay()
    torch.testing.assert_close(captured, plain)
    got = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_recomputing_norms_takes_no_product_again() -> None:
    config = tiny_config()
    model = PerA(config)
    counts = {}
    for recompute in ("none", "norms", "blocks"):
        model.student.backbone.recompute = recompute
        with Calls() as calls:
            run(model, config, "fp32")
        products = ("addmm", "mm", "convolution", "_linear_pointwise")
        counts[recompute] = sum(calls.counts[name] for name in products)
    assert counts["none"] == counts["norms"] < counts["blocks"]
