"""One self-contained page about a run: `python -m pera_fast.report RUN` writes RUN/report.html."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeGuard

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

import pera_fast
from pera_fast import _cli, checkpoint, pictures
from pera_fast.checkpoint import Checkpoint
from pera_fast.config import PRESETS, Config, ConfigError
from pera_fast.data.index import scan_or_open, window_counts
from pera_fast.data.sources import DataError, Scene, UnreadableImage, printable
from pera_fast.data.statistics import Statistics
from pera_fast.evaluate import untrained_backbone
from pera_fast.features import choose_device
from pera_fast.files import write_whole
from pera_fast.model.vit import VisionTransformer
from pera_fast.pictures import STUDENT, TARGET, TEACHER, CropPair, Picture, ShownScene

_STAGES = 4  # checkpoints whose features are shown, beside the untrained network's
_HEADS = 3  # heads whose attention is shown, beside their mean


class Curve(NamedTuple):
    """One value of metrics.jsonl over the steps."""

    label: str
    meaning: str = ""
    unit: float = 1  # what is recorded is divided by it
    from_zero: bool = False  # else the axis shows the values' own range


_LOSSES = {
    "loss": Curve("Total loss", "what training makes smaller"),
    "distill_global": Curve("Distillation, global crops", "student against teacher, cross-entropy"),
    "distill_local": Curve("Distillation, local crops", "the same for the small crops"),
    "koleo": Curve("KoLeo", "small when the images of a batch lie far apart"),
    "pixel": Curve("Pixel error", "of the target patches that the student paints"),
    "knn_top1": Curve("k-NN accuracy", "during training"),
}
_LOSS_NOTE = (
    "<p>The teacher, whom the student imitates, changes as it learns: a distillation loss that rises is not "
    "by itself a bad sign, nor one that falls a good one. How useful the features are is what k-NN accuracy "
    "measures.</p>\n"
)
_SCHEDULES = {
    "lr": Curve("Learning rate"),
    "momentum": Curve("Teacher momentum", "1 = the teacher stands still"),
    "teacher_temperature": Curve("Teacher temperature", "smaller = surer targets"),
    "grad_norm": Curve("Gradient norm", "before clipping"),
}
_HEALTH = {
    "teacher_entropy": Curve(
        "Teacher's entropy", "of an image's assignment, in nats; log K would say nothing"
    ),
    "prototype_entropy": Curve(
        "Prototypes' entropy", "of all images' mean assignment; 0 = all share one prototype"
    ),
    "kl": Curve("KL, teacher to student", "what the distillation loss can still gain"),
    "feature_std": Curve("Spread of features", "from 0, all images equal (collapse), to 1"),
}
_SPEED = {
    "images_per_second": Curve("Images per second", "on all processors together", from_zero=True),
    "data_wait_share": Curve("Waiting for images", "share of the time; near 0 is good", from_zero=True),
    "peak_memory_bytes": Curve("Peak memory, GiB", "the most held at once so far", 2**30, from_zero=True),
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; color-scheme: light;
       max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
         border-bottom: 1px solid #ddd; }
th { font-weight: 600; width: 38%; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
.pairs { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem .6rem; max-width: 50rem; }
.triples { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1rem .6rem; }
.sixes { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .6rem; }
@media (min-width: 40rem) { .sixes { grid-template-columns: repeat(6, minmax(0, 1fr)); } }
.pairs, .triples, .sixes { margin-bottom: 1.2rem; }
.pairs img, .triples img, .sixes img { width: 100%; }
figure { margin: 0; } figcaption { font-size: .9rem; line-height: 1.3; color: #444; padding-top: .2rem; }
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
    show: Callable[[str, np.ndarray, int | None], object] | None = None,
) -> Path:
    """Write report.html into `run_folder` from its metrics.jsonl, eval.json and checkpoints; return its path.

    backbone: the teacher's, on any device; scenes: what the run was trained on. A missing or unreadable file
    becomes a sentence in the page. show: called with each picture's tag, its pixels [H, W, 3] in 0..1, and
    the step that it belongs to, None at the end. DataError when the page cannot be written.
    """
    run_folder = Path(run_folder)
    metrics = read_metrics(run_folder / "metrics.jsonl")
    subject = Subject(run_folder, backbone, config, statistics, scenes)
    sections = [
        _summary(run_folder, config, scenes, backbone, metrics),
        _curves("Losses", "losses", _LOSSES, metrics, _LOSS_NOTE),
        _curves("Schedules and gradient", "schedules", _SCHEDULES, metrics),
        _curves("Assignments and spread", "health", _HEALTH, metrics),
        _curves("Speed and memory", "speed", _SPEED, metrics),
        *_picture_sections(subject),
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
        + "\n".join(section.html() for section in sections)
        + f"\n<p>pera_fast {pera_fast.__version__}</p>\n</body>\n</html>\n"
    )
    path = run_folder / "report.html"
    write_whole(path, page)
    if show is not None:
        for section in sections:
            for tag, picture in section.tagged():
                show(tag, pictures.enlarged(picture.image), picture.step)
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


def _series(metrics: list[dict[str, Any]], name: str, unit: float = 1) -> tuple[list[float], list[float]]:
    """Steps and values, in `unit`s, of the lines that have a finite `name`."""
    lines = [line for line in metrics if _is_number(line.get(name))]
    return [line["step"] for line in lines], [line[name] / unit for line in lines]


# --- pieces of the page ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """One heading of the page, what it says, and rows of pictures."""

    title: str
    anchor: str
    text: str  # HTML
    rows: Sequence[Sequence[Picture]] = ()
    layout: str = "pairs"  # pairs, triples or sixes: pictures side by side, where the screen is wide enough

    def html(self) -> str:
        rows = "\n".join(
            f'<div class="{self.layout}">{"".join(_figure(picture) for picture in row)}</div>'
            for row in self.rows
        )
        heading = html.escape(self.title)
        return f'<section id="{self.anchor}">\n<h2>{heading}</h2>\n{self.text}\n{rows}\n</section>'

    def tagged(self) -> Iterator[tuple[str, Picture]]:
        """Each picture under a name of its own; the same at several steps under one."""
        for number, row in enumerate(self.rows, 1):
            for picture in row:
                yield f"{self.anchor}/{number} {picture.name}", picture


def _figure(picture: Picture) -> str:
    alt = picture.name if picture.step is None else f"{picture.name} at step {picture.step}"
    shown = pictures.enlarged(picture.image)
    # Photographs are a quarter as large as JPEG; what was enlarged has edges, which only PNG keeps.
    kind = "png" if shown.shape != picture.image.shape else "jpeg"
    buffer = BytesIO()
    Image.fromarray((255 * shown).round().astype(np.uint8)).save(buffer, kind, quality=90, subsampling=0)
    return _image(buffer.getvalue(), alt, picture.caption, kind)


def _image(encoded: bytes, alt: str, caption: str, kind: str = "png") -> str:
    data = base64.b64encode(encoded).decode("ascii")
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">{below}</figure>'


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
) -> Section:
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
        (
            "Images",
            f"{len(scenes):,} files"
            + (f" in {printable(config.data.data)}" if config.data.data else " (demo)"),
        ),
        *_progress_rows(config, scenes, metrics),
        *_knn_rows(run_folder / "eval.json", config),
    ]
    table = "".join(
        f'<tr><th scope="row">{html.escape(k)}</th><td>{html.escape(v)}</td></tr>\n' for k, v in rows
    )
    return Section("Summary", "summary", f"<table>\n{table}</table>")


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
    losses = [f"{curve.label} {last[n]:.4g}" for n, curve in _LOSSES.items() if _is_number(last.get(n))]
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
    if not _is_number(after):
        return
    is_demo = config.data.data is None and config.run.eval_train is None
    question = "which scene does a tile come from" if is_demo else "which class is an image of"
    text = f"{100 * after:.1f} %"
    if _is_number(before):
        text = f"{100 * before:.1f} % before training, {text} after ({100 * (after - before):+.1f} points)"
    yield "k-NN accuracy", f"{text}; {question}, judged by the nearest features ({counts})"


# --- curves ---------------------------------------------------------------------------------------------


def _curves(
    title: str, anchor: str, curves: dict[str, Curve], metrics: list[dict[str, Any]], note: str = ""
) -> Section:
    panels = []
    for name, curve in curves.items():
        steps, values = _series(metrics, name, curve.unit)
        if steps:
            panels.append(_image(_plot(steps, values, curve), f"{curve.label} by step", curve.meaning))
    if not panels:
        sentence = "The metrics.jsonl of this run records nothing to draw here, or is missing."
        return Section(title, anchor, f"<p>{sentence}</p>")
    return Section(title, anchor, f'{note}<div class="panels">{"".join(panels)}</div>')


def _plot(steps: list[float], values: list[float], curve: Curve) -> bytes:
    figure = Figure(figsize=(3.5, 2.4), layout="constrained")
    axes = figure.subplots()
    marker = "o" if len(steps) < 15 else ""  # one point makes no line
    axes.plot(steps, values, color=STUDENT, linewidth=1.5, marker=marker, markersize=3)
    axes.set_title(curve.label, fontsize=12, loc="left")
    axes.set_xlabel("step", fontsize=11)
    axes.tick_params(labelsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if curve.from_zero:
        axes.set_ylim(0, 1.08 * max(*values, 1e-12))  # a level line would lie on the upper edge
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


# --- pictures -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What the pictures are made from; what several sections show is made once."""

    run_folder: Path
    backbone: VisionTransformer
    config: Config
    statistics: Statistics
    scenes: Sequence[Scene]

    @cached_property
    def crop(self) -> CropPair:
        return pictures.first_crop(self.config, self.statistics, self.scenes)

    @cached_property
    def shown(self) -> list[ShownScene]:
        return pictures.shown_scenes(self.config, self.statistics, self.scenes)

    @cached_property
    def note(self) -> str:
        """What a reader has to know of the images shown."""
        deep = any(one.scene.dtype != "uint8" for one in self.shown)
        more = " Images of more than 8 bits are brightened for the eye." if deep else ""
        return _band_note(self.config) + more


Made = tuple[str, Sequence[Sequence[Picture]]]  # text as HTML, rows of pictures


def _picture_sections(subject: Subject) -> Iterator[Section]:
    makers: tuple[tuple[str, str, str, Callable[[Subject], Made]], ...] = (
        ("Who sees which patch", "masks", "pairs", _masks),
        ("What the two networks see", "views", "pairs", _views),
        ("What the teacher tells apart", "features", "triples", _features),
        ("The same maps during training", "training", "sixes", _training),
        ("Where the teacher looks", "attention", "sixes", _attention),
        ("What looks alike to the teacher", "neighbours", "sixes", _neighbours),
    )
    for title, anchor, layout, make in makers:
        try:
            text, rows = make(subject)
        except (UnreadableImage, DataError, ConfigError) as error:
            text, rows = f"<p>There is nothing to show here: {html.escape(str(error))}</p>", ()
        yield Section(title, anchor, text, rows, layout)


def _masks(subject: Subject) -> Made:
    pair, patch_px = subject.crop, subject.config.model.patch_px
    student, target, teacher = pair.patches
    total = len(student) + len(target) + len(teacher)
    named = ((STUDENT, "student", student), (TARGET, "target", target), (TEACHER, "teacher", teacher))
    legend = "".join(
        f'<span><i class="swatch" style="background:{colour}"></i>{name}: {len(patches)} patches '
        f"({100 * len(patches) / total:.0f} %)</span> "
        for colour, name, patches in named
    )
    text = (
        f"<p>A crop from the first step of this run, in {total} patches of {patch_px}×{patch_px} px. The "
        "student sees the blue patches and paints the orange ones from memory; the teacher sees the green "
        f'ones. No patch is seen by both.{_band_note(subject.config)}</p>\n<p class="legend">{legend}</p>'
    )
    row = [
        Picture("the crop", pair.display(pair.crop), "The crop"),
        Picture("the crop's patches tinted", pictures.tinted(pair, patch_px), "Its patches, shared out"),
    ]
    return text, [row]


def _views(subject: Subject) -> Made:
    pair, patch_px = subject.crop, subject.config.model.patch_px
    student, teacher = (pair.display(view) for view in pair.views)
    text = (
        "<p>Both views are the same crop of the same place, with different colours. From its few patches the "
        "student has to say the same about the place as the teacher.</p>"
    )
    shown = (
        (student, "Student's view: colours changed at random"),
        (pictures.only(student, pair.patches[0], patch_px), "What the student gets of it"),
        (teacher, "Teacher's view: colours rarely changed"),
        (pictures.only(teacher, pair.patches[2], patch_px), "What the teacher gets of it"),
    )
    return text, [[Picture(caption, image, caption) for image, caption in shown]]


def _features(subject: Subject) -> Made:
    """Patches of like colour have like features."""
    maps = [pictures.patch_features(subject.backbone, one.pixels) for one in subject.shown]
    rows = []
    for one, among_all, features in zip(subject.shown, pictures.pca_colours(maps), maps, strict=True):
        name, (within,) = _name(one.scene), pictures.pca_colours([features])
        rows.append(
            [
                Picture(name, one.image, name),
                Picture(f"features of {name} among all scenes", among_all, "Among all scenes"),
                Picture(f"features of {name} within the scene", within, "Within the scene"),
            ]
        )
    text = (
        "Beside each image, the teacher's description of every patch as a colour: the three main directions "
        "in which descriptions differ become red, green and blue. Patches of like colour look alike to the "
        "teacher. “Among all scenes” has one set of colours for all images here; “within the scene” spends "
        "them on one image, and its colours mean nothing elsewhere. After a good training, the colours "
        "follow what is on the ground."
    )
    return f"<p>{text}{subject.note}</p>", rows


def _training(subject: Subject) -> Made:
    """Features of a few scenes before training and at checkpoints that were kept."""
    shown = subject.shown[:2]
    stages: list[tuple[int, list[np.ndarray]]] = []
    for step, network in _networks(subject):
        network = network.to(subject.backbone.cls_token.device)
        stages.append((step, [pictures.patch_features(network, one.pixels) for one in shown]))
    if len(stages) == 1:
        raise DataError("no checkpoint of this run can be read")
    rows = []
    for place, one in enumerate(shown):
        name = _name(one.scene)
        row = [Picture(name, one.image, name)]
        maps = pictures.matched_colours([features[place] for _, features in stages])
        for (step, _), colours in zip(stages, maps, strict=True):
            caption = f"Step {step:,}" if step else "Before training"
            row.append(Picture(f"features of {name}", colours, caption, step))
        rows.append(row)
    text = (
        "The same kind of map, of the teacher before training and at checkpoints of this run. Each map shows "
        "the three main directions of its own time, and its colours are turned to match those of the map "
        "after it as well as they can: where a patch keeps its colour, its description has kept its place "
        "among the others."
    )
    return f"<p>{text}</p>", rows


def _networks(subject: Subject) -> Iterator[tuple[int, VisionTransformer]]:
    """Step and teacher: untrained, then of checkpoints spread over those kept; one in memory at a time."""
    yield 0, untrained_backbone(subject.config)
    kept = checkpoint.complete(subject.run_folder / "checkpoints")
    for i in pictures.spread(len(kept), _STAGES):
        try:
            found = Checkpoint.open(kept[i])
            yield found.step, found.teacher()
        except ConfigError:
            continue  # of another version, or just being replaced by the run


def _attention(subject: Subject) -> Made:
    rows = []
    for one in subject.shown[:2]:
        name, grid = _name(one.scene), one.pixels.shape[1] // subject.backbone.patch_px
        # The token's attention to itself has no place on the map.
        heads = pictures.cls_attention(subject.backbone, one.pixels)[:, 1:].unflatten(1, (grid, -1)).numpy()
        row = [
            Picture(name, one.image, name),
            Picture(f"attention over {name}", pictures.heat(heads.mean(0)), "Mean of all heads"),
        ]
        for i in pictures.spread(len(heads), _HEADS) if len(heads) > 1 else ():
            row.append(
                Picture(f"attention over {name}, head {i + 1}", pictures.heat(heads[i]), f"Head {i + 1}")
            )
        rows.append(row)
    text = (
        "The class token stands for the whole image, and is what you use to compare or classify images. In "
        "its last block the teacher gathers it from the patches: bright ones weigh much, black ones nothing. "
        "Several heads look at the same time, each for something of its own. Each map is as bright as its "
        "own brightest patches. A network that has learnt nothing looks everywhere alike, or by place only."
    )
    return f"<p>{text}{subject.note}</p>", rows


def _neighbours(subject: Subject) -> Made:
    tiles = pictures.seen_tiles(subject.backbone, subject.config, subject.statistics, subject.scenes)
    rows = []
    for query, others in pictures.nearest(tiles):
        asked = tiles[query]
        row = [Picture(f"tile of {_name(asked.tile.scene)}", asked.image, "This tile")]
        for rank, i in enumerate(others, 1):
            similarity = float(asked.token @ tiles[i].token)
            where = "same image" if tiles[i].tile.scene == asked.tile.scene else "another image"
            name = f"nearest tile {rank}, of {_name(tiles[i].tile.scene)}"
            row.append(Picture(name, tiles[i].image, f"{similarity:.3f}, {where}"))
        rows.append(row)
    if not rows:
        raise DataError("no two tiles that lie apart can be read")
    text = (
        f"{len(rows)} of {len(tiles)} tiles drawn from the images, each followed by those that the teacher "
        "describes most similarly. The number is the cosine similarity of the two descriptions (class "
        "tokens); 1 means the same. Tiles that touch the first one are left out. After a good training, a "
        "row shows one kind of place, also where its tiles come from different images."
    )
    return f"<p>{text}{_band_note(subject.config)}</p>", rows


def _name(scene: Scene) -> str:
    return printable(Path(scene.path).name)


# --- command --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """Write report.html of a run anew, from its newest checkpoint, metrics.jsonl and eval.json."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder."""


def main() -> None:
    arguments = _cli.ask(lambda: tyro.cli(Args, prog="pera_fast.report"))
    opened = Checkpoint.open(arguments.run)
    in_run = opened.path.parent.name == "checkpoints"
    data = opened.config.data
    root = data.data or Path(pera_fast.__file__).parent / "demo"
    index = scan_or_open(root, data.index, data.max_bad_share)
    path = write_report(
        opened.path.parent.parent if in_run else Path(arguments.run),
        backbone=opened.teacher().to(choose_device("auto")),
        config=opened.config, statistics=opened.statistics, scenes=index.scenes,
    )  # fmt: skip
    print(path)


if __name__ == "__main__":
    _cli.run(main)
