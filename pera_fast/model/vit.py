"""A vision transformer over packed rows: every sequence's tokens lie one after the other in one matrix.

Parameter names are the field's (DINO, timm), so weights move in and out by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pera_fast import ops
from pera_fast.config import ModelConfig
from pera_fast.model.shadow import weight_of
from pera_fast.ops.linear import Norm, dtype_of_products
from pera_fast.ops.packed_attention import attention_parts

Groups = Sequence[tuple[int, int]]  # (number of sequences, their length), in row order


class Subset(NamedTuple):
    """The rows one residual branch works on; all of them when rows is None."""

    groups: Groups
    rows: Tensor | None = None  # int64 [r]
    scale: Tensor | None = None  # float32 [r], b / subset size of the row's group


def _linear(layer: nn.Linear, x: Tensor | Sequence[Tensor], norm: Norm | None = None) -> Tensor:
    return ops.linear(x, weight_of(layer), layer.bias, norm=norm)


def _gelu_linear(layer: nn.Linear, hidden: Tensor) -> Tensor:
    return _linear(layer, F.gelu(hidden))


def _again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), of which the inputs alone are kept: the rest is made again in the backward pass, up to the
    last tensor that is needed. A product at its end is not taken twice."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return cast(Tensor, checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False))


class Branch(nn.Module):
    """Half of a block, in three parts: `enter` is its first product; what `attend` makes of it is kept for the
    backward pass; `leave` is the last product, and what comes before it and is quickly made again."""

    def enter(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        """norm: what x was made of, and is kept instead of it."""
        raise NotImplementedError

    def attend(self, hidden: Tensor, groups: Groups) -> list[Tensor]:
        return [hidden]

    def leave(self, *kept: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        groups: Groups,
        recompute: str,
        affine: tuple[Tensor, Tensor],
        normalised: Tensor | None = None,
    ) -> Tensor:
        """[rows, D] -> [rows, D]. x: after the norm; with recompute "blocks", before its weight and bias, `affine`.
        normalised: given, kept instead of x, which it is before weight and bias."""
        weight, bias = affine

        def whole(x: Tensor) -> Tensor:
            hidden = self.enter(torch.addcmul(bias, x, weight).to(x.dtype))
            return self.leave(*self.attend(hidden, groups))

        if recompute == "blocks":
            return _again(whole, x)
        hidden = self.enter(x, None if normalised is None else (normalised, weight, bias))
        return _again(self.leave, *self.attend(hidden, groups))


class Attention(Branch):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def enter(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return _linear(self.qkv, x, norm)

    def attend(self, hidden: Tensor, groups: Groups) -> list[Tensor]:
        return attention_parts(hidden.unflatten(-1, (3, self.num_heads, -1)), groups)

    def leave(self, *kept: Tensor) -> Tensor:
        return _linear(self.proj, [part.flatten(1) for part in kept])


class Mlp(Branch):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def enter(self, x: Tensor, norm: Norm | None = None) -> Tensor:
        return _linear(self.fc1, x, norm)

    def leave(self, *kept: Tensor) -> Tensor:  # GELU: a hundredth of the step's work, a quarter of its memory
        return _gelu_linear(self.fc2, *kept)


class Block(nn.Module):
    """Parameters of one pre-norm block; `VisionTransformer.blocks_forward` runs its two branches."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))


class PatchEmbed(nn.Module):
    """A patch's pixels to a token: the parameters of the usual ViT's convolution, as `embed` applies them."""

    def __init__(self, patch_px: int, in_bands: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_bands, dim, kernel_size=patch_px, stride=patch_px)


class VisionTransformer(nn.Module):
    """ViT with learned positions and a CLS token: pre-norm, GELU (erf), qkv bias, LayerNorm eps 1e-6."""

    def __init__(self, config: ModelConfig, image_px: int) -> None:
        super().__init__()
        self.patch_px = config.patch_px
        self.recompute = config.activation
        self.grid = image_px // config.patch_px
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2 + 1, dim))
        self.patch_embed = PatchEmbed(config.patch_px, config.in_bands, dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.blocks.apply(init_linear)

    def positions(self, grid_height: int, grid_width: int) -> Tensor:
        """Position of every patch of a grid, float32 [height * width, D]."""
        return resample_positions(self.pos_embed[0, 1:].float(), grid_height, grid_width)

    def embed(
        self,
        rows: Tensor,
        patches: Sequence[Tensor],
        positions: Sequence[Tensor],
        masked: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Tokens of chosen patches of crops of several sizes, CLS first: one product over all of them.

        rows: float [R, C·p²], of every crop a row of zeros and then its patches in (band, row, column) order.
        patches: int64 [n, S] of each crop size, R = Σ n·(1 + S). positions: [L, D] of each crop size.
        masked: mask token [1, 1, D] and patches int64 [n, P] of the first crop size, appended to each of its
        sequences as tokens that know only where they are.
        Returns float [R + n·P, D] in the dtype of positions or better.
        """
        proj = self.patch_embed.proj
        assert proj.bias is not None
        # What is added to each row's product: of a zero row it is all there is.
        added = [(self.cls_token + self.pos_embed[:, :1])[0], *(table + proj.bias for table in positions)]
        starts = [1 + sum(len(table) for table in positions[:i]) for i in range(len(positions))]
        index = [F.pad(p + start, (1, 0)) for p, start in zip(patches, starts, strict=True)]
        place = None
        if masked is not None:
            token, targets = masked
            index[0] = torch.cat((index[0], targets + sum(len(table) for table in added)), dim=1)
            added.append(token[0] + positions[0])
            every = torch.arange(sum(i.numel() for i in index), device=rows.device)
            first, rest = every.tensor_split([index[0].numel()])
            place = torch.cat((first.view_as(index[0])[:, : 1 + patches[0].shape[1]].flatten(), rest))
        entries = torch.cat([i.flatten() for i in index])
        return ops.patch_embed(rows, weight_of(proj).flatten(1), torch.cat(added), entries, place)

    def blocks_forward(self, x: Tensor, subsets: Sequence[Subset]) -> Tensor:
        """Run the blocks on x [rows, D], which is overwritten; subsets: one per branch (attention, MLP, …)."""
        output, last = None, Subset(())
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        dtype = dtype_of_products(x)
        blocks = cast(list[Block], list(self.blocks))
        branches = [pair for b in blocks for pair in ((b.norm1, b.attn), (b.norm2, b.mlp))]
        for (norm, branch), subset in zip(branches, subsets, strict=True):
            weight, bias = (None, None) if recompute == "blocks" else (norm.weight, norm.bias)
            x, y, *normalised = ops.residual_norm(
                x, output, last.rows, last.scale, subset.rows, weight, bias, norm.eps,
                dtype=dtype, inplace=True, with_normalised=recompute == "norms",
            )  # fmt: skip
            output = branch(y, subset.groups, recompute, (norm.weight, norm.bias), *normalised)
            last = subset
        return x if output is None else ops.residual_add(x, output, last.rows, last.scale, inplace=True)

    def norm_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """The final LayerNorm, of chosen rows only. x [R, D], rows int64 [r] -> [r, D]."""
        norm, dtype = self.norm, dtype_of_products(x)
        return ops.residual_norm(x, None, None, None, rows, norm.weight, norm.bias, norm.eps, dtype=dtype)[1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of whole images: normalised [b, C, H, W] -> (CLS [b, D], patches [b, L, D]), after the norm.

        Height and width: multiples of patch_px, else ValueError.
        """
        batch, _, height, width = images.shape
        grid_height, grid_width = height // self.patch_px, width // self.patch_px
        if min(height, width) < 1 or (grid_height * self.patch_px, grid_width * self.patch_px) != (
            height,
            width,
        ):
            raise ValueError(
                f"images: expected height and width in multiples of {self.patch_px}, got {height}x{width}"
            )
        rows = F.pad(F.unfold(images, self.patch_px, stride=self.patch_px).mT, (0, 0, 1, 0))
        length = rows.shape[1]
        every_patch = torch.arange(length - 1, device=rows.device).expand(batch, -1)
        x = self.embed(rows.flatten(0, 1), [every_patch], [self.positions(grid_height, grid_width)])
        subsets = [Subset([(batch, length)])] * (2 * len(self.blocks))
        x = self.blocks_forward(x, subsets)
        normed = ops.residual_norm(
            x, None, None, None, None, self.norm.weight, self.norm.bias, self.norm.eps
        )[1]
        tokens = normed.unflatten(0, (batch, length))
        return tokens[:, 0], tokens[:, 1:]


def resample_positions(table: Tensor, grid_height: int, grid_width: int) -> Tensor:
    """Positions of a square grid, float [L, D], at those of another: [height * width, D].

    Bicubic, with the 0.1 that DINO adds to the target size before it forms the scale factor: it shifts the sampling
    points, so weights trained with it need it.
    """
    grid = math.isqrt(len(table))
    if (grid_height, grid_width) == (grid, grid):
        return table
    resized = F.interpolate(
        table.reshape(1, grid, grid, -1).permute(0, 3, 1, 2),
        scale_factor=((grid_height + 0.1) / grid, (grid_width + 0.1) / grid),
        mode="bicubic",
    )
    return resized.flatten(2)[0].T


def resample_table(table: Tensor, grid: int) -> Tensor:
    """`pos_embed` [1, 1 + L, D], the CLS token's position first, at another square grid."""
    patches = resample_positions(table[0, 1:].float(), grid, grid)
    return torch.cat((table[:, :1], patches[None].to(table.dtype)), dim=1)


def init_linear(module: nn.Module) -> None:
    """Truncated normal of deviation .02 and zero bias, as the authors initialise every linear layer."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class Prototypes(nn.Module):
    """Weight-normalised linear layer without bias: logits = z · (g v/‖v‖)ᵀ; g starts at 1."""

    def __init__(self, in_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, in_dim))
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # nn.Linear's own

    def forward(self, z: Tensor) -> Tensor:
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
        return ops.linear(z, weight)


class Head(nn.Module):
    """MLP to an L2-normalised bottleneck; its last layer holds the prototypes or pixel outputs."""

    def __init__(self, config: ModelConfig, out_dim: int) -> None:
        super().__init__()
        widths = [
            config.embed_dim, *[config.head_hidden_dim] * (config.head_layers - 1), config.head_bottleneck_dim
        ]  # fmt: skip
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers += ([nn.GELU()] if i else []) + [nn.Linear(fan_in, fan_out)]
        self.mlp = nn.Sequential(*layers).apply(init_linear)
        self.last_layer = Prototypes(config.head_bottleneck_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[n, embed_dim] -> unit rows [n, bottleneck] in float32 or better; the last layer is the caller's."""
        first, *others = [layer for layer in self.mlp if isinstance(layer, nn.Linear)]
        z = _linear(first, x)
        for layer in others:
            z = _again(partial(_gelu_linear, layer), z)
        # Normalising in float32 keeps unit length to 1e-7 where bfloat16 would leave 1e-2.
        z = z if z.dtype == torch.float64 else z.float()
        return F.normalize(z, dim=-1, eps=1e-12)
