"""The networks: sizes, whole-image features against a plain ViT, drop-path subsets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config

from pera_fast.config import PRESETS
from pera_fast.model.pera import CropGroup, PerA, draw_subsets
from pera_fast.model.vit import VisionTransformer


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
    subsets = draw_subsets(groups(4), 0.3, depth=3, key=(0, 5))
    assert len(subsets) == 6
    for branch, subset in enumerate(subsets):
        length = 8 if branch < 2 else 13  # block depth // 2 = 1 is the first to see the targets
        assert list(subset.groups) == [(5, length), (22, 4)]
        assert subset.rows is not None and subset.scale is not None
        assert len(subset.rows.unique()) == len(subset.rows) == 5 * length + 22 * 4
        first, rest = subset.rows[: 5 * length], subset.rows[5 * length :]
        assert first.max() < 8 * length <= rest.min() and rest.max() < 8 * length + 32 * 4
        assert subset.scale[0].item() == pytest.approx(8 / 5)
        assert subset.scale[-1].item() == pytest.approx(32 / 22)
    again = draw_subsets(groups(4), 0.3, depth=3, key=(0, 5))
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(subsets, again, strict=True))
    other = draw_subsets(groups(4), 0.3, depth=3, key=(0, 6))
    assert not all(torch.equal(a.rows, b.rows) for a, b in zip(subsets, other, strict=True))


def test_at_least_one_sequence_stays() -> None:
    single = [g._replace(student=g.student[:1]) for g in groups(1)]
    assert [count for count, _ in draw_subsets(single, 0.9, 1, (0,))[0].groups] == [1, 1]
    assert draw_subsets(groups(1), 0.0, 1, (0,))[0].rows is None
