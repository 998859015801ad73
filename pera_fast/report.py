"""One self-contained page about a run: `python -m pera_fast.report RUN` writes RUN/report.html."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeGuard

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from torch import Tensor

import pera_fast
from pera_fast import _cli, reference
from pera_fast.checkpoint import Checkpoint, write_whole
from pera_fast.config import PRESETS, Config
from pera_fast.data.index import scan_or_open, window_counts
from pera_fast.data.loader import Sample, WindowDataset
from pera_fast.data.sources import DataError, Scene, SceneIndex, UnreadableImage, printable, read_window
from pera_fast.data.statistics import Statistics
from pera_fast.features import normalise, resize, to_unit
from pera_fast.model.vit import VisionTransformer

# Okabe and Ito's colours, told apart with any kind of colour vision.
_STUDENT, _TARGET, _TEACHER = "#0072B2", "#E69F00", "#009E73"
_HIDDEN = 0.93  # grey level of patches that a network does not see
_SHOWN_PX = 384  # side of a small image in the page: sharp on a phone, small in the file
_PCA_SCENES, _PCA_GRID = 4, 36

_LOSSES = {
    "loss": ("Total loss", "what training makes smaller"),
    "distill_global": ("Distillation, global crops", "student against teacher, cross-entropy"),
    "distill_local": ("Distillation, local crops", "the same for the small crops"),
    "koleo": ("KoLeo", "small when the images of a batch lie far apart"),
    "pixel": ("Pixel error", "of the target patches that the student paints"),
    "knn_top1": ("k-NN accuracy", "during training"),
}
_LOSS_NOTE = (
    "<p>The teacher, whom the student imitates, changes as it learns: a distillation loss that rises is not "
    "by itself a bad sign, nor one that falls a good one. How useful the features are is what k-NN accuracy "
    "measures.</p>\n"
)
_SCHEDULES = {
    "lr": ("Learning rate", ""),
    "momentum": ("Teacher momentum", "1 = the teacher stands still"),
    "teacher_temperature": ("Teacher temperature", "smaller = surer targets"),
    "grad_norm": ("Gradient norm", "before clipping"),
}
_HEALTH = {
    "teacher_entropy": ("Teacher's entropy", "of an image's assignment, in nats; log K would say nothing"),
    "prototype_entropy": (
        "Prototypes' entropy",
        "of all images' mean assignment; 0 = all share one prototype",
    ),
    "kl": ("KL, teacher to student", "what the distillation loss can still gain"),
    "feature_std": ("Spread of features", "from 0, all images equal (collapse), to 1"),
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; color-scheme: light;
       max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
         border-bottom: 1px solid #ddd; }
th { font-weight: 600; width: 38%; } td { overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
.pairs { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem .6rem; max-width: 50rem; }
.triples { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1rem .6rem; }
.pairs img, .triples img { width: 100%; }
figure { margin: 0; } figcaption { font-size: .85rem; color: #444; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .9em; height: .9em; margin-right: .3em; vertical-align: -.08em; }
.legend span { margin-right: 1.2em; white-space: nowrap; }
"""


def write_report(
    run_folder: str | Path,
    *,
    backbone: VisionTransformer,
    config: Config,
    statistics: Statistics,
    scenes: Sequence[Scene],
) -> Path:
    """Write report.html into `run_folder` from its metrics.jsonl and eval.json, and return its path.

    backbone: the teacher's, on any device; scenes: what the run was trained on. A missing or unreadable file
    becomes a sentence in the page. DataError when the page cannot be written.
    """
    run_folder = Path(run_folder)
    metrics = read_metrics(run_folder / "metrics.jsonl")
    sections = [
        _summary(run_folder, config, scenes, backbone, metrics),
        _curves("Losses", "losses", _LOSSES, metrics, _LOSS_NOTE),
        _curves("Schedules and gradient", "schedules", _SCHEDULES, metrics),
        _curves("Assignments and spread", "health", _HEALTH, metrics),
        _crop_sections(config, statistics, scenes),
        _pca_section(backbone, config, statistics, scenes),
    ]
    name = html.escape(printable(run_folder.resolve().name))
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>PerA run {name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>PerA run “{name}”</h1>\n"
        "<p>A vision transformer was trained on satellite and aerial images without labels. Two networks see "
        "different parts of the same place: the student learns to agree with the teacher, and the teacher is "
        "a slow average of the student. The teacher is what you use afterwards.</p>\n"
        + "\n".join(sections)
        + f"\n<p><small>pera_fast {getattr(pera_fast, '__version__', '')}</small></p>\n</body>\n</html>\n"
    )
    path = run_folder / "report.html"
    write_whole(path, page)
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole; none if there is no such file."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:  # the last line of a run that was killed
            continue
        if isinstance(line, dict) and _is_number(line.get("step")):
            lines.append(line)
    return lines


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _series(metrics: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that have a finite `name`."""
    lines = [line for line in metrics if _is_number(line.get(name))]
    return [line["step"] for line in lines], [line[name] for line in lines]


# --- pieces of the page ---------------------------------------------------------------------------------


def _section(title: str, anchor: str, body: str) -> str:
    return f'<section id="{anchor}">\n<h2>{html.escape(title)}</h2>\n{body}\n</section>'


def _image(png: bytes, alt: str, caption: str = "") -> str:
    data = base64.b64encode(png).decode("ascii")
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">{below}</figure>'


def _png(image: np.ndarray) -> bytes:
    """[H, W, 3] in 0..1 -> PNG, small images enlarged by whole pixels."""
    times = max(1, round(_SHOWN_PX / max(image.shape[:2])))
    buffer = BytesIO()
    imsave(buffer, np.clip(image, 0, 1).repeat(times, 0).repeat(times, 1), format="png")
    return buffer.getvalue()


class Display:
    """How the pixels of one image become the page's: stretched as the image needs, the first three bands.

    8-bit images stay as they are. The range that other dtypes share can leave one sensor's images black, so
    each band of those is stretched from its 2nd to its 98th percentile.
    """

    def __init__(self, image: Tensor, dtype: str) -> None:
        bands = self._three(image)
        self.low, self.high = np.zeros(3), np.ones(3)
        if dtype != "uint8":
            self.low, self.high = np.percentile(bands, (2, 98), axis=(0, 1))
            self.high = np.maximum(self.high, self.low + 1e-6)

    @staticmethod
    def _three(image: Tensor) -> np.ndarray:
        shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        return shown.permute(1, 2, 0).numpy()

    def __call__(self, image: Tensor) -> np.ndarray:
        """[C, H, W] in 0..1 -> [H, W, 3] in 0..1; grey where there are fewer than three bands."""
        return ((self._three(image) - self.low) / (self.high - self.low)).clip(0, 1)


def _band_note(config: Config) -> str:
    bands = config.model.in_bands
    if bands > 3:
        return f" Shown are the first 3 of {bands} bands, as red, green and blue."
    return " Shown is the first band, in grey." if bands < 3 else ""


# --- summary --------------------------------------------------------------------------------------------


def _summary(
    run_folder: Path,
    config: Config,
    scenes: Sequence[Scene],
    backbone: VisionTransformer,
    metrics: list[dict[str, Any]],
) -> str:
    model, crops = config.model, config.crops
    parameters = sum(p.numel() for p in backbone.parameters())
    preset = next((n for n, p in PRESETS.items() if (p.model, p.crops) == (model, crops)), None)
    rows = [
        (
            "Network",
            f"ViT of width {model.embed_dim}, {model.depth} blocks, {model.num_heads} heads, "
            f"{model.patch_px} px patches, {model.in_bands} bands: {parameters / 1e6:.1f} million parameters"
            + (f" (preset {preset})" if preset else ""),
        ),
        (
            "Crops per image",
            f"{crops.num_global} global of {crops.global_px} px"
            + (f", {crops.num_local} local of {crops.local_px} px" if crops.num_local else ""),
        ),
        ("Images", f"{len(scenes):,} files" + (f" in {config.data.data}" if config.data.data else " (demo)")),
        *_progress_rows(config, scenes, metrics),
        *_knn_rows(run_folder / "eval.json", config),
    ]
    table = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>\n" for k, v in rows)
    return _section("Summary", "summary", f"<table>\n{table}</table>")


def _progress_rows(
    config: Config, scenes: Sequence[Scene], metrics: list[dict[str, Any]]
) -> Iterator[tuple[str, str]]:
    lines = [line for line in metrics if "loss" in line]
    if not lines:
        return
    last = lines[-1]
    step = last["step"]
    images = config.run.images * config.run.accumulate * step
    epoch = last.get("epoch")
    if _is_number(epoch) and images:
        window_px = config.data.window_px
        per_epoch = int(window_counts(scenes, window_px).sum())
        images *= max(1, round(epoch * per_epoch / images))  # the number of ranks is in no setting
    yield "Steps", f"{step:,}" + (f" ({epoch:.4g} epochs)" if _is_number(epoch) else "")
    yield "Image windows seen", f"{images:,}"
    if speeds := _series(lines, "images_per_second")[1]:
        yield "Speed", f"{np.median(speeds):,.1f} images per second (median)"
    if memory := _series(lines, "peak_memory_bytes")[1]:
        yield "Peak memory", f"{max(memory) / 2**30:.1f} GiB"
    named = _LOSSES.items()
    losses = [f"{label} {last[n]:.4g}" for n, (label, _) in named if _is_number(last.get(n))]
    yield "Last losses", "; ".join(losses) or "not finite"
    for name, what in (("skipped_steps", "Skipped steps"), ("bad_images", "Unreadable images")):
        if last.get(name):
            yield what, f"{last[name]}"


def _knn_rows(path: Path, config: Config) -> Iterator[tuple[str, str]]:
    """k-NN before and after; nothing when the run was not evaluated."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        after, before = result["top1"], result.get("untrained_top1")
        counts = f"{result['val']} images, {len(result['classes'])} classes, k = {result['k']}"
    except (OSError, ValueError, KeyError, TypeError):
        return
    is_demo = config.data.data is None and config.run.eval_train is None
    question = "which scene does a tile come from" if is_demo else "which class is an image of"
    text = f"{100 * after:.1f} %"
    if before is not None:
        text = f"{100 * before:.1f} % before training, {text} after ({100 * (after - before):+.1f} points)"
    yield "k-NN accuracy", f"{text}; {question}, judged by the nearest features ({counts})"


# --- curves ---------------------------------------------------------------------------------------------


def _curves(
    title: str, anchor: str, names: dict[str, tuple[str, str]], metrics: list[dict[str, Any]], note: str = ""
) -> str:
    panels = []
    for name, (label, meaning) in names.items():
        steps, values = _series(metrics, name)
        if steps:
            panels.append(_image(_curve(steps, values, label), f"{label} by step", meaning))
    if not panels:
        sentence = "The metrics.jsonl of this run records nothing to draw here, or is missing."
        return _section(title, anchor, f"<p>{sentence}</p>")
    return _section(title, anchor, f'{note}<div class="panels">{"".join(panels)}</div>')


def _curve(steps: list[float], values: list[float], label: str) -> bytes:
    figure = Figure(figsize=(4, 2.6), layout="constrained")
    axes = figure.subplots()
    marker = "o" if len(steps) < 15 else ""  # one point makes no line
    axes.plot(steps, values, color=_STUDENT, linewidth=1.5, marker=marker, markersize=3)
    axes.set_title(label, fontsize=12, loc="left")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


# --- one crop of the run: masks and views ---------------------------------------------------------------


@dataclass(frozen=True)
class CropPair:
    """A global crop of the run's first step: its pixels, its two views, and who sees which patch."""

    crop: Tensor  # [C, px, px] in 0..1, before colours change
    views: tuple[Tensor, Tensor]  # student's, teacher's
    patches: tuple[Tensor, Tensor, Tensor]  # int64, raster indices: student, target, teacher
    display: Display


def first_crop(config: Config, statistics: Statistics, scenes: Sequence[Scene]) -> CropPair:
    """A global crop as the run drew it in its first step.

    If possible a typical one: with the student's colours changed and the teacher's not.

    UnreadableImage or DataError when the images cannot be read.
    """
    sample, crop, crop_index = _choose_crop(config, statistics, scenes)
    crops, table = config.crops, {k: torch.from_numpy(v[crop]) for k, v in sample.crops["global"].items()}
    image = to_unit(sample.pixels, str(sample.pixels.dtype), statistics)
    cropped = reference.window(image, table["box"].tolist())
    image = reference.cut(cropped, table["flip"].tolist(), crops.global_px)
    student, teacher = (
        reference.colour(image, table["factor"][view], table["order"][view], bool(table["grey"][view]))
        for view in range(2)
    )
    counts = crops.mask_counts((crops.global_px // config.model.patch_px) ** 2)
    masks = reference.disjoint_masks(
        torch.tensor([crop_index]), config.run.seed, 0, sum(counts), counts[0], counts[1]
    )
    display = Display(image, str(sample.pixels.dtype))
    return CropPair(image, (student, teacher), (masks[0][0], masks[1][0], masks[2][0]), display)


def _choose_crop(config: Config, statistics: Statistics, scenes: Sequence[Scene]) -> tuple[Sample, int, int]:
    """A sample of the first step, one of its global crops, and that crop's index in the whole batch."""
    dataset = WindowDataset(SceneIndex(scenes, []), statistics, config)
    num_global, crops_per_image = config.crops.num_global, config.crops.num_global + config.crops.num_local
    for position in range(min(config.run.images, 8)):
        sample = dataset[position]
        for crop in range(num_global):
            student, teacher = sample.crops["global"]["order"][crop][:, 0] >= 0
            if student and not teacher:
                return sample, crop, position * crops_per_image + crop
    return dataset[0], 0, 0


def _crop_sections(config: Config, statistics: Statistics, scenes: Sequence[Scene]) -> str:
    titles = ("Who sees which patch", "masks"), ("What the two networks see", "views")
    try:
        pair = first_crop(config, statistics, scenes)
    except (UnreadableImage, DataError) as error:
        sentence = f"<p>No image could be read to show this: {html.escape(str(error))}</p>"
        return "\n".join(_section(*title, sentence) for title in titles)
    student, target, teacher = pair.patches
    total = len(student) + len(target) + len(teacher)
    named = ((_STUDENT, "student", student), (_TARGET, "target", target), (_TEACHER, "teacher", teacher))
    legend = "".join(
        f'<span><i class="swatch" style="background:{colour}"></i>{name}: {len(patches)} patches '
        f"({100 * len(patches) / total:.0f} %)</span> "
        for colour, name, patches in named
    )
    patch_px = config.model.patch_px
    masks = (
        f"<p>A crop from the first step of this run, in {total} patches of {patch_px}×{patch_px} px. The "
        "student sees the blue patches and paints the orange ones from memory; the teacher sees the green "
        f"ones. No patch is seen by both.{_band_note(config)}</p>\n"
        f'<p class="legend">{legend}</p>\n<div class="pairs">'
        + _image(_png(pair.display(pair.crop)), "the crop", "The crop")
        + _image(_png(_overlay(pair, patch_px)), "the crop's patches tinted", "Its patches, shared out")
        + "</div>"
    )
    shown = [
        (pair.display(pair.views[0]), "Student's view: colours changed at random"),
        (_only(pair.display(pair.views[0]), student, patch_px), "What the student gets of it"),
        (pair.display(pair.views[1]), "Teacher's view: colours rarely changed"),
        (_only(pair.display(pair.views[1]), teacher, patch_px), "What the teacher gets of it"),
    ]
    views = (
        "<p>Both views are the same crop of the same place, with different colours. From its few patches the "
        "student has to say the same about the place as the teacher.</p>\n"
        f'<div class="pairs">{"".join(_image(_png(image), text, text) for image, text in shown)}</div>'
    )
    return "\n".join(_section(*title, body) for title, body in zip(titles, (masks, views), strict=True))


def _patch_mask(patches: Tensor, side: int, patch_px: int) -> np.ndarray:
    """True at the pixels of the given patches, [side * patch_px] * 2."""
    grid = np.zeros(side * side, bool)
    grid[patches.numpy()] = True
    return grid.reshape(side, side).repeat(patch_px, 0).repeat(patch_px, 1)


def _overlay(pair: CropPair, patch_px: int) -> np.ndarray:
    """[H, W, 3]: the crop under the colours of the three sets."""
    # On grey the three colours mean one thing only.
    image = pair.display(pair.crop).mean(-1, keepdims=True).repeat(3, -1)
    side = len(image) // patch_px
    for colour, patches in zip((_STUDENT, _TARGET, _TEACHER), pair.patches, strict=True):
        tint = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        mask = _patch_mask(patches, side, patch_px)
        image[mask] = 0.4 * image[mask] + 0.6 * tint
    return image


def _only(image: np.ndarray, patches: Tensor, patch_px: int) -> np.ndarray:
    """[H, W, 3]: an image with all but the given patches blank."""
    shown = image.copy()
    shown[~_patch_mask(patches, len(shown) // patch_px, patch_px)] = _HIDDEN
    return shown


# --- features as colours --------------------------------------------------------------------------------


class PcaMap(NamedTuple):
    """Patch features of one scene as colours; all images are [H, W, 3] in 0..1."""

    scene: Scene
    image: np.ndarray
    among_all: np.ndarray  # principal components of all shown scenes' patches
    within: np.ndarray  # of this scene's own


def pca_maps(
    backbone: VisionTransformer, config: Config, statistics: Statistics, scenes: Sequence[Scene]
) -> list[PcaMap]:
    """Maps of up to four readable scenes spread over the list: patches of like colour have like features."""
    shown: list[tuple[Scene, np.ndarray, Tensor]] = []
    count = len(scenes)
    spread = sorted({round(i * (count - 1) / (_PCA_SCENES - 1)) for i in range(_PCA_SCENES)} if count else ())
    # The others stand in for scenes that cannot be read.
    for i in [*spread, *sorted(set(range(count)) - set(spread))][: 4 * _PCA_SCENES]:
        if len(shown) == _PCA_SCENES:
            break
        try:
            image = _pca_input(scenes[i], config, statistics)
        except UnreadableImage:
            continue
        features = _patch_features(backbone, normalise(image, statistics, config))
        shown.append((scenes[i], Display(image, scenes[i].dtype)(image), features))
    if not shown:
        return []
    sizes = [features.shape[:2].numel() for _, _, features in shown]
    among_all = np.split(
        _pca_colours(torch.cat([features.flatten(0, 1) for _, _, features in shown]).numpy()),
        np.cumsum(sizes)[:-1],
    )
    return [
        PcaMap(
            scene, image, colours.reshape(*features.shape[:2], 3),
            _pca_colours(features.flatten(0, 1).numpy()).reshape(*features.shape[:2], 3),
        )
        for (scene, image, features), colours in zip(shown, among_all, strict=True)
    ]  # fmt: skip


def _pca_colours(features: np.ndarray) -> np.ndarray:
    """[n, D] -> [n, 3] in 0..1: three principal components, each from its 2nd to its 98th percentile."""
    components = min(3, *features.shape)
    scores = PCA(components, svd_solver="full").fit_transform(features)
    low, high = np.percentile(scores, (2, 98), axis=0)
    colours = ((scores - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return np.pad(colours, ((0, 0), (0, 3 - components)))


def _pca_input(scene: Scene, config: Config, statistics: Statistics) -> Tensor:
    """The scene, or its middle if it is large, in 0..1 at whole patches: [C, rows * p, columns * p]."""
    patch_px = config.model.patch_px
    # At most as much ground per patch as training shows, so that a vast scene is neither read whole nor
    # shrunk to a scale that the network never saw.
    most = max(1, config.data.window_px * _PCA_GRID * patch_px // config.crops.global_px)
    height, width = min(scene.height, most), min(scene.width, most)
    pixels, _ = read_window(
        scene, (scene.height - height) // 2, (scene.width - width) // 2, height, width,
        bands=config.data.bands, in_bands=config.model.in_bands, nodata=config.data.nodata,
    )  # fmt: skip
    rows, columns = (max(1, round(_PCA_GRID * side / max(height, width))) for side in (height, width))
    return resize(to_unit(pixels, scene.dtype, statistics), rows * patch_px, columns * patch_px)


def _patch_features(backbone: VisionTransformer, image: Tensor) -> Tensor:
    """Normalised [C, H, W] -> float32 [rows, columns, D] on the CPU."""
    device = next(backbone.parameters()).device
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        patches = backbone(image[None].to(device))[1][0].float().cpu()
    return patches.unflatten(0, (image.shape[1] // backbone.patch_px, -1))


def _pca_section(
    backbone: VisionTransformer, config: Config, statistics: Statistics, scenes: Sequence[Scene]
) -> str:
    title = "What the teacher tells apart", "features"
    maps = pca_maps(backbone, config, statistics, scenes)
    if not maps:
        return _section(*title, "<p>No image could be read to show this.</p>")
    figures = []
    for scene, image, among_all, within in maps:
        name = printable(Path(scene.path).name)
        figures.append(_image(_png(image), name, name))
        figures.append(_image(_png(among_all), f"features of {name} among all scenes", "Among all scenes"))
        figures.append(_image(_png(within), f"features of {name} within the scene", "Within the scene"))
    text = (
        "Beside each image, the teacher's description of every patch as a colour: the three main directions "
        "in which descriptions differ become red, green and blue. Patches of like colour look alike to the "
        "teacher. “Among all scenes” has one set of colours for all images here; “within the scene” spends "
        "them on one image, and its colours mean nothing elsewhere. After a good training, the colours "
        "follow what is on the ground."
    )
    note = _band_note(config)
    if any(scene.dtype != "uint8" for scene, *_ in maps):
        note += " Images of more than 8 bits are brightened for the eye."
    return _section(*title, f'<p>{text}{note}</p>\n<div class="triples">{"".join(figures)}</div>')


# --- command --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """Write report.html of a run anew, from its newest checkpoint, metrics.jsonl and eval.json."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder."""


def main() -> None:
    arguments = tyro.cli(Args, prog="python -m pera_fast.report")
    opened = Checkpoint.open(arguments.run)
    in_run = opened.path.parent.name == "checkpoints"
    data = opened.config.data
    root = data.data or Path(pera_fast.__file__).parent / "demo"
    index = scan_or_open(root, data.index, data.max_bad_share)
    path = write_report(
        opened.path.parent.parent if in_run else Path(arguments.run), backbone=opened.teacher(),
        config=opened.config, statistics=opened.statistics, scenes=index.scenes,
    )  # fmt: skip
    print(path)


if __name__ == "__main__":
    _cli.run(main)
