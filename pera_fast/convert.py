"""Weights of other codebases as the start of a run: `python -m pera_fast.convert official|timm|hf FILE --out RUN`.

`pera_fast.train --config RUN/config.yaml --resume --data DIR` goes on from it; every other command reads it as it
reads a run. Nothing is unpickled but tensors and plain values (torch.load with weights_only).
"""

from __future__ import annotations

import json
import logging
import math
import pickle  # for the name of its error alone
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pera_fast import _cli, checkpoint
from pera_fast.backbone import exported
from pera_fast.config import PRESETS, Config, ConfigError, CropConfig, ModelConfig, OptimConfig, save_yaml
from pera_fast.data.sources import DataError, printable
from pera_fast.data.statistics import Statistics
from pera_fast.distributed import World
from pera_fast.model.names import from_hf, from_official, to_official
from pera_fast.model.pera import PerA
from pera_fast.model.vit import resample_table
from pera_fast.optim import TeacherOptimizer, make

_log = logging.getLogger("pera_fast")

IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean and deviation the authors and most ViTs are fed with
_HEADS = re.compile(
    r"^(head|head_drop|fc_norm|classifier|(vit\.)?pooler|(vit\.)?embeddings\.mask_token|mask_token)\b"
)


# --- files ----------------------------------------------------------------------------------------------


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Whatever else is wrong with what a file holds, as a ConfigError that names the file."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = _plain(f"{type(error).__name__}: {error}")[:160]
        raise ConfigError(
            f"file: expected a network that can be read from {printable(path)}, got {reason}"
        ) from None


def _plain(text: str) -> str:
    """On one line, without what a terminal would take for a command."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())


def read_tensors(path: Path) -> Any:
    """What a safetensors or PyTorch file holds, tensors on the CPU. ConfigError when it holds other objects or none."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            start = file.read(2)
        if start[:1] != b"\x80" and start != b"PK":  # of a pickle, and of the archive that torch.save writes
            raise ConfigError(f"file: expected a safetensors or PyTorch file, got {printable(path)}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"file: cannot read {printable(path)}: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise ConfigError(
            f"file: expected tensors and plain values alone, got {printable(path)} with other objects, which could run "
            "a program when loaded"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
        reason = _plain(str(error))[:160] or type(error).__name__
        raise ConfigError(f"file: {printable(path)} cannot be read: {reason}") from None


def _model_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """Weights of a model's folder or file, the folder's JSON settings merged, and the file that holds the weights."""
    if not path.is_dir():
        return _only_tensors(read_tensors(path), path), {}, path
    names = ("model.safetensors", "pytorch_model.bin")
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise ConfigError(f"file: expected {' or '.join(names)} in {printable(path)}, got neither")
    settings: dict[str, Any] = {}
    for name in ("config.json", "preprocessor_config.json"):
        if (path / name).is_file():
            try:
                settings |= json.loads((path / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, TypeError, RecursionError) as error:
                raise ConfigError(
                    f"file: {printable(path / name)} cannot be read: {_plain(str(error))}"
                ) from None
    return _only_tensors(read_tensors(file), file), settings, file


def _only_tensors(found: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(
            isinstance(name, str) and isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
            for name, x in found.items()
        )
    ):
        raise ConfigError(f"file: expected tensors by their names in {printable(path)}, got something else")
    return dict(found)


# --- what a network's shapes say of it ------------------------------------------------------------------


def _model_of(
    weights: Mapping[str, Tensor], prefix: str, base: ModelConfig, num_heads: int | None
) -> ModelConfig:
    """The settings of the ViT whose tensors begin with `prefix`; those that no shape shows are `base`'s."""
    try:
        dim, in_bands, patch_px, _ = weights[f"{prefix}patch_embed.proj.weight"].shape
        hidden = len(weights[f"{prefix}blocks.0.mlp.fc1.weight"])
    except KeyError as error:
        raise ConfigError(
            f"file: expected a vision transformer's tensors, got none called {error.args[0]}"
        ) from None
    depth = 1 + max(
        int(m[1]) for name in weights if (m := re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", name))
    )
    if num_heads is None:
        num_heads = max(1, dim // 64)
        _log.info(
            "num_heads is taken to be %d, one for every 64 of the width; --num-heads gives another", num_heads
        )
    ratio = hidden / dim
    if int(dim * ratio) != hidden:  # the width of the MLP is cut to a whole number
        ratio = math.nextafter(ratio, math.inf)
    return replace(
        base,
        embed_dim=dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=ratio,
        patch_px=patch_px,
        in_bands=in_bands,
    )


def _grid_of(table: Tensor) -> int:
    """Patches along a side of a position table [1, 1 + L, D]."""
    grid = math.isqrt(max(0, table.shape[1] - 1)) if table.ndim == 3 else 0
    if grid == 0 or grid**2 + 1 != table.shape[1]:
        raise ConfigError(
            f"file: expected a position table of a CLS token and a square of patches, got shape {list(table.shape)}"
        )
    return grid


def _like(model: ModelConfig) -> Config:
    """The preset of this width and depth, for the settings that no file holds; the paper's, if there is none."""
    sizes = {(p.model.embed_dim, p.model.depth): p for name, p in PRESETS.items() if name != "demo"}
    return sizes.get((model.embed_dim, model.depth), Config())


def _crops_of(base: CropConfig, grid: int, patch_px: int, global_px: int | None) -> CropConfig:
    """Crops whose global size the position table has, or is to have."""
    px = grid * patch_px if global_px is None else global_px
    if px % patch_px or not 0 < px <= 1024 * patch_px:
        raise ConfigError(
            f"global_px: expected a multiple of patch_px = {patch_px} up to 1024 of them, got {px}"
        )
    # Of the same share; two patches a side are the fewest that can be shared out.
    local = max(2, round(px * base.local_px / base.global_px / patch_px)) * patch_px
    return replace(base, global_px=px, local_px=base.local_px if px == base.global_px else local)


def _check_fit(
    wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], path: Path, theirs: Callable[[str], str] = str
) -> None:
    """ConfigError that lists the tensors missing, unknown or of another shape, by `theirs` of our names."""
    wrong = [f"{theirs(name)} is missing" for name in wanted if name not in got]
    wrong += [f"{theirs(name)} is not one of this network's" for name in got if name not in wanted]
    both = [name for name in wanted if name in got]
    wrong += [
        f"{theirs(name)} has shape {list(got[name].shape)}, expected {list(wanted[name].shape)}"
        for name in both
        if got[name].shape != wanted[name].shape
    ]
    wrong += [f"{theirs(name)} has numbers that are not finite" for name in both if not _is_finite(got[name])]
    if wrong:
        more = f"; and {len(wrong) - 50} more" if len(wrong) > 50 else ""
        listed = _plain("; ".join(wrong[:50]))
        raise ConfigError(f"file: {printable(path)} does not hold this network: {listed}{more}")


def _is_finite(x: Tensor) -> bool:
    return x.is_floating_point() and bool(x.isfinite().all())


# --- the run it becomes ---------------------------------------------------------------------------------


def _statistics(path: str | None, in_bands: int, mean: Any = None, std: Any = None) -> Statistics:
    """Of a --stats file; else 8 bit over 255 and the mean and deviation given, or ImageNet's for three bands."""
    if path is not None:
        return Statistics.read(path, in_bands)
    if mean is None and std is None and in_bands == 3:
        mean, std = IMAGENET
        _log.info("mean and deviation of the bands are taken to be ImageNet's; --stats gives others")
    if mean is None or std is None:
        raise ConfigError(f"stats: expected a file of pera_fast.stats for {in_bands} bands, got none")
    if len(mean) != in_bands or len(std) != in_bands:
        raise ConfigError(
            f"file: expected a mean and a std of {in_bands} bands, got {len(mean)} and {len(std)}"
        )
    zero, full = [0.0] * in_bands, [255.0] * in_bands
    values = {"low": {"uint8": zero}, "high": {"uint8": full}, "mean": list(mean), "std": list(std)}
    return Statistics.from_json(json.dumps(values | {"num_windows": 0, "num_pixels": 0}))


def _write(
    out: str,
    config: Config,
    model: PerA,
    optimizer: TeacherOptimizer,
    statistics: Statistics,
    images_seen: int = 0,
) -> None:
    """A run with one checkpoint, of step 0, whole or not at all."""
    folder = Path(out).resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    config = replace(config, run=replace(config.run, out=str(folder)))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        one = World(0, 1, torch.device("cpu"))
        checkpoint.save(
            partial / "checkpoints", 0, model, optimizer, config, statistics, 1, one, images_seen=images_seen
        )
        save_yaml(config, partial / "config.yaml")
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, checkpoint.WriteError)):
            raise DataError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from None
        raise
    print(f"{out}: go on with  pera-fast train --config {Path(out) / 'config.yaml'} --resume --data DIR")


def _optimizer(model: PerA, optim: OptimConfig) -> TeacherOptimizer:
    return make(
        "adamw_ema", model.ema_pairs(), betas=optim.betas, eps=optim.eps, clip_norm=optim.clip_norm,
        decay_all=optim.decay_all,
    )  # fmt: skip


# --- commands -------------------------------------------------------------------------------------------


def official(
    file: Annotated[str, tyro.conf.Positional],
    out: str,
    global_px: int | None = None,
    num_heads: int | None = None,
    images_seen: int = 0,
    stats: str | None = None,
) -> None:
    """The PerA authors' checkpoint (….params): student, teacher, heads and optimiser.

    The centre is in none of their files and starts at 0, as when they resume.

    Args:
        file: What their training saved: {model, optimizer, scaler, best_loss, epoch}, or the model's tensors alone.
        out: Folder for the run.
        global_px: Side of the global crops to come; the positions are resampled (default: what they were made for).
        num_heads: Attention heads, which no tensor's shape shows (default: one for every 64 of the width).
        images_seen: Images that training has seen, where its schedules are to go on (default: they begin anew).
        stats: A file of pera_fast.stats (default: 8 bit, ImageNet's mean and deviation, as the authors train).
    """
    _cli.check_folder(out)
    if images_seen < 0:
        raise ConfigError(f"images_seen: expected a whole number of at least 0, got {images_seen}")
    path = Path(file)
    found = read_tensors(path)
    is_wrapped = isinstance(found, Mapping) and isinstance(found.get("model"), Mapping)
    theirs = _only_tensors(found["model"] if is_wrapped else found, path)
    weights = {from_official(name): value.float() for name, value in theirs.items()}
    saved = found.get("optimizer") if is_wrapped else None
    if saved == {}:
        saved = None
    with _understood(path):
        config = _official_config(weights, global_px, num_heads)
        if saved is not None:
            config = replace(config, optim=_official_optim(saved, config.optim, path))
        model = _official_model(weights, config, path)
        moments = {} if saved is None else _official_moments(saved, weights, path)
    trained, optimizer = dict(model.named_parameters()), _optimizer(model, config.optim)
    for name, state in moments.items():
        # A second moment that is interpolated can fall below 0, so that of resized positions begins anew.
        if state["exp_avg"].shape == trained[name].shape:
            optimizer.state[trained[name]] = state
    statistics = _statistics(stats, config.model.in_bands)
    _log.info(
        "%d tensors of the model and the moments of %d read%s", len(theirs), len(moments),
        f", of epoch {found['epoch']}" if is_wrapped and "epoch" in found else "",
    )  # fmt: skip
    _write(out, config, model, optimizer, statistics, images_seen)


def _official_model(weights: Mapping[str, Tensor], config: Config, path: Path) -> PerA:
    """A PerA of these tensors, their positions at the config's size, and a centre of 0."""
    grid = config.crops.global_px // config.model.patch_px
    given = dict(weights)
    for name in [name for name in weights if name.endswith("pos_embed")]:
        if _grid_of(weights[name]) != grid:
            given[name] = resample_table(weights[name], grid)
    with torch.device("meta"):
        model = PerA(config)
    _check_fit(
        {name: x for name, x in model.state_dict().items() if name != "centre"}, given, path, to_official
    )
    model.load_state_dict({**given, "centre": torch.zeros(config.model.num_prototypes)}, assign=True)
    return model


def _official_config(weights: Mapping[str, Tensor], global_px: int | None, num_heads: int | None) -> Config:
    model = _model_of(weights, "student.backbone.", ModelConfig(), num_heads)
    layers = sorted(
        (int(m[1]), name)
        for name in weights
        if (m := re.fullmatch(r"student\.cls_head\.mlp\.(\d+)\.weight", name))
    )
    needed = ("student.cls_head.last_layer.weight_v", "student.backbone.pos_embed")
    missing = [name for name in needed if name not in weights] + ([] if layers else ["student.cls_head.mlp"])
    if missing:
        raise ConfigError(f"file: expected the authors' checkpoint, got one without {', '.join(missing)}")
    prototypes, bottleneck = weights[needed[0]].shape
    base = _like(model)
    model = replace(
        model, drop_path=base.model.drop_path, head_layers=len(layers), head_bottleneck_dim=bottleneck,
        head_hidden_dim=len(weights[layers[0][1]]) if len(layers) > 1 else model.head_hidden_dim,
        num_prototypes=prototypes,
    )  # fmt: skip
    crops = _crops_of(base.crops, _grid_of(weights[needed[1]]), model.patch_px, global_px)
    return replace(base, model=model, crops=crops)


def _official_optim(saved: Any, base: OptimConfig, path: Path) -> OptimConfig:
    try:
        if not isinstance(saved, Mapping):
            raise TypeError
        (group,) = saved["param_groups"]
        return replace(base, betas=tuple(group["betas"]), eps=group["eps"])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"file: expected one group of AdamW as optimizer in {printable(path)}, got other"
        ) from None


def _official_moments(saved: Any, weights: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """State by parameter.

    Theirs counts the model's tensors in order, the teacher's, which have no state, among them; or the trained alone.
    """
    ids, state = saved["param_groups"][0]["params"], saved["state"]
    trained = [name for name in weights if not name.startswith("teacher.")]
    names = list(weights) if len(ids) == len(weights) else trained
    if len(ids) != len(names):
        raise ConfigError(
            f"file: expected an optimizer of the model's {len(weights)} tensors, or of the {len(trained)} trained "
            f"ones, in {printable(path)}, got {len(ids)}"
        )
    moments, wrong = {}, []
    for name, number in zip(names, ids, strict=True):
        if number not in state:
            continue
        entry = {
            key: torch.as_tensor(state[number].get(key, ())) for key in ("step", "exp_avg", "exp_avg_sq")
        }
        shapes = [list(value.shape) for value in entry.values()]
        expected = list(weights[name].shape)
        if shapes != [[], expected, expected] or name.startswith("teacher."):
            wrong.append(f"{to_official(name)} of shape {expected} has a step and moments of {shapes}")
        elif not all(_is_finite(x.float()) for x in entry.values()) or entry["step"] < 0:
            wrong.append(f"{to_official(name)} has a step or moments that are not finite, or a step below 0")
        moments[name] = {key: value.float() for key, value in entry.items()}
    wrong += [f"state {number} is of no tensor" for number in state if number not in ids]
    if wrong:
        raise ConfigError(
            f"file: the optimizer in {printable(path)} does not fit its model: {'; '.join(wrong)}"
        )
    return moments


def timm(
    file: Annotated[str, tyro.conf.Positional],
    out: str,
    preset: str | None = None,
    global_px: int | None = None,
    num_heads: int | None = None,
    stats: str | None = None,
) -> None:
    """A timm ViT, or a file of pera_fast.export: student and teacher start from it, the heads from scratch.

    Args:
        file: model.safetensors, a PyTorch file of tensors, or a folder with one of these and config.json.
        out: Folder for the run.
        preset: Whose crops, heads and schedules to take (default: that of the network's width and depth).
        global_px: Side of the global crops to come; the positions are resampled (default: what they were made for).
        num_heads: Attention heads, which no tensor's shape shows (default: one for every 64 of the width).
        stats: A file of pera_fast.stats (default: 8 bit, with the mean and deviation of config.json or ImageNet's).
    """
    _cli.check_folder(out)
    weights, settings, holder = _model_folder(Path(file))
    with _understood(Path(file)):
        fed = settings.get("pretrained_cfg") or settings
        heads = (settings.get("model_args") or {}).get("num_heads") if num_heads is None else num_heads
        _start(weights, out, holder, preset, global_px, heads, stats, fed.get("mean"), fed.get("std"))


def hf(
    file: Annotated[str, tyro.conf.Positional],
    out: str,
    preset: str | None = None,
    global_px: int | None = None,
    num_heads: int | None = None,
    stats: str | None = None,
) -> None:
    """A ViT of Hugging Face transformers: student and teacher start from it, the heads from scratch.

    Args:
        file: What save_pretrained wrote, a folder with config.json; or its model.safetensors alone.
        out: Folder for the run.
        preset: Whose crops, heads and schedules to take (default: that of the network's width and depth).
        global_px: Side of the global crops to come; the positions are resampled (default: what they were made for).
        num_heads: Attention heads (default: config.json's, or one for every 64 of the width).
        stats: A file of pera_fast.stats (default: 8 bit, mean and deviation of preprocessor_config.json or ImageNet's).
    """
    _cli.check_folder(out)
    weights, settings, holder = _model_folder(Path(file))
    if (act := settings.get("hidden_act") or "gelu") != "gelu":
        raise ConfigError(f"file: expected a ViT with hidden_act gelu, got {act}")
    if (eps := settings.get("layer_norm_eps") or 1e-6) > 1e-5:
        raise ConfigError(f"file: expected a ViT with layer_norm_eps of 1e-5 at most, got {eps:g}")
    if eps != 1e-6:
        _log.info(
            "its norms had eps %g, ours have 1e-06: outputs differ a little, more where they are small", eps
        )
    with _understood(Path(file)):
        mean, std = settings.get("image_mean"), settings.get("image_std")
        heads = settings.get("num_attention_heads") if num_heads is None else num_heads
        _start(from_hf(weights), out, holder, preset, global_px, heads, stats, mean, std)


def _start(
    weights: dict[str, Tensor], out: str, path: Path, preset: str | None, global_px: int | None,
    num_heads: int | None, stats: str | None, mean: Any, std: Any,
) -> None:  # fmt: skip
    """A run whose student and teacher begin as the ViT with these weights, by our names."""
    left_out = [name for name in weights if _HEADS.match(name)]
    weights = {name: value.float() for name, value in weights.items() if name not in left_out}
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    own = exported(path) if path.suffix == ".safetensors" else None  # knows its bands, statistics and heads
    given = PRESETS[preset] if preset else own[0] if own else None
    if own and num_heads is None:
        num_heads = own[0].model.num_heads
    model = _model_of(weights, "", given.model if given else ModelConfig(), num_heads)
    base = given or _like(model)
    if "pos_embed" not in weights:
        raise ConfigError(f"file: expected pos_embed among the tensors of {printable(path)}, got nothing")
    grid = _grid_of(weights["pos_embed"])
    crops = _crops_of(base.crops, grid, model.patch_px, global_px)
    data = own[0].data if own else base.data
    if stats is not None:  # else an override of the run that was exported would be in its place
        data = replace(data, mean=None, std=None)
    config = replace(base, model=model, crops=crops, data=data)
    if crops.global_px // model.patch_px != grid:
        weights["pos_embed"] = resample_table(weights["pos_embed"], crops.global_px // model.patch_px)
    statistics = own[1] if own and stats is None else _statistics(stats, model.in_bands, mean, std)
    torch.manual_seed(config.run.seed)
    peer = PerA(config)
    for network in (peer.student, peer.teacher):
        _check_fit(network.backbone.state_dict(), weights, path)
        network.backbone.load_state_dict(weights)
    _log.info("%d tensors read%s", len(weights), f", left out: {', '.join(left_out)}" if left_out else "")
    _write(out, config, peer, _optimizer(peer, config.optim), statistics)


def main() -> None:
    commands: dict[str, Callable[..., None]] = {"official": official, "timm": timm, "hf": hf}
    _cli.ask_which(commands, "pera_fast.convert", "Start a run from weights of other codebases.")()


if __name__ == "__main__":
    _cli.run(main)
