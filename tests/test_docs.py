"""The pages under docs/: what they show runs, what they name is there, and no network is needed to build or read."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import rasterio
import yaml
from affine import Affine
from conftest import ROOT, run_here
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

from pera_fast import _cli, config, convert, embed, evaluate, export, ops, stats
from pera_fast.ops import _dispatch

DOCS = ROOT / "docs"
PAGES = {p.relative_to(DOCS).as_posix(): p.read_text(encoding="utf-8") for p in sorted(DOCS.rglob("*.md"))}
KERNELS = {name: text for name, text in PAGES.items() if name.startswith("kernels/") and "index" not in name}
OPS = sorted(p.stem for p in (ROOT / "pera_fast/ops").glob("[a-z]*.py"))
RUN = ("stats", "embed", "export", "evaluate", "info")  # the other commands' options are parsed alone
MOST_NOT_RUN = 2
TINY = (
    "--embed-dim 32 --depth 2 --num-heads 2 --head-hidden-dim 32 --head-bottleneck-dim 16 --num-prototypes 64 "
    "--global-px 64 --local-px 32 --num-local 2 --batch-size 4 --workers 0 --max-steps 2 --log-every 1 --device cpu"
).split()


class Block(NamedTuple):
    """What stands between fences; mark: of a comment above it, "not run" with a reason or "needs" with a package."""

    language: str
    title: str | None
    text: str
    line: int
    mark: str | None
    reason: str


_FENCE = re.compile(
    r'(?:^<!-- (?P<mark>not run|needs): (?P<reason>.+?) -->\n)?^```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n'
    r"(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: str) -> list[Block]:
    text = PAGES[page]
    found = [
        Block(
            m["language"],
            m["title"],
            m["text"],
            text.count("\n", 0, m.start("text")),
            m["mark"],
            m["reason"] or "",
        )
        for m in _FENCE.finditer(text)
    ]
    assert 2 * len(found) == text.count("```"), f"{page}: a block that is not seen here"
    return found


# --- what the pages assume to be there ------------------------------------------------------------------


def class_folders(root: Path, per_class: int) -> None:
    random = np.random.default_rng(per_class)
    for number, name in enumerate(("field", "roof", "water")):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.array([40, 200, 90])[[number, (number + 1) % 3, 2]] + random.integers(
                -30, 30, (48, 48, 3)
            )
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


def masked_images(root: Path, count: int) -> None:
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        mask = np.repeat(np.arange(3, dtype=np.uint8), 32)[:, None].repeat(96, 1)
        Image.fromarray(mask).save(root / f"masks/{i}.png")
        Image.fromarray(np.stack([80 * mask, 255 - 80 * mask, mask], -1)).save(root / f"images/{i}.png")


def sentinel2_product(folder: Path) -> None:
    """The 13 bands of a Level-1C product, each at its resolution."""
    folder.mkdir(parents=True)
    for name in ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"):
        step = 1 if name in ("B02", "B03", "B04", "B08") else 6 if name in ("B01", "B09", "B10") else 2
        pixels = np.random.default_rng(0).integers(500, 3000, (1, 120 // step, 120 // step)).astype(np.uint16)
        place = Affine(10 * step, 0, 600000, 0, -10 * step, 5000000)
        with rasterio.open(
            folder / f"T32TQM_20200801T101031_{name}.jp2", "w", driver="GTiff", count=1, dtype="uint16",
            height=120 // step, width=120 // step, crs="EPSG:32632", transform=place,
        ) as band:  # fmt: skip
            band.write(pixels)
        masks = folder.parent / "QI_DATA"  # as products have since baseline 04.00
        masks.mkdir(exist_ok=True)
        (masks / f"MSK_QUALIT_{name}.jp2").write_bytes(b"not of the image")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scenes/, labelled/, seg/, products/ and a run of two steps, runs/mine."""
    root = tmp_path_factory.mktemp("docs")
    (root / "scenes").mkdir()
    for file in (ROOT / "pera_fast/demo").glob("*.[jt][pi][gf]"):
        shutil.copy(file, root / "scenes")
    class_folders(root / "labelled/train", 6)
    class_folders(root / "labelled/val", 3)
    masked_images(root / "seg/train", 5)
    masked_images(root / "seg/val", 2)
    sentinel2_product(root / "products/S2A_MSIL1C_20200801.SAFE/GRANULE/L1C/IMG_DATA")
    run = run_here("pera_fast.train", "--data", root / "scenes", "--out", root / "runs/mine", *TINY)
    assert run.returncode == 0, run.stderr[-3000:]
    (root / "runs/started").mkdir()
    shutil.copy(root / "runs/mine/config.yaml", root / "runs/started")  # of a conversion that is parsed alone
    return root


@pytest.fixture
def here(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder: a copy, so that no page builds on another's files."""
    shutil.copytree(workplace, tmp_path / "here", ignore=shutil.ignore_patterns("scenes"))
    (tmp_path / "here/scenes").symlink_to(workplace / "scenes")
    monkeypatch.chdir(tmp_path / "here")
    log = logging.getLogger("pera_fast")  # which commands set up for themselves
    before = log.handlers[:], log.propagate, log.level
    yield tmp_path / "here"
    log.handlers[:], log.propagate = before[:2]
    log.setLevel(before[2])


# --- commands -------------------------------------------------------------------------------------------


class Parsed(Exception):
    """The options were understood."""


def pera_fast(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, run: bool) -> None:
    """`pera-fast NAME …` in this process, or its real parser alone. A wrong option raises SystemExit."""
    assert name in _cli.COMMANDS
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        if run:
            runpy.run_module(f"pera_fast.{name}", run_name="__main__", alter_sys=True)
            return
        ask = _cli.ask

        def only_ask(cli: Callable[[], object]) -> None:
            ask(cli)
            raise Parsed

        patch.setattr(_cli, "ask", only_ask)
        with pytest.raises(Parsed):
            runpy.run_module(f"pera_fast.{name}", run_name="__main__", alter_sys=True)


def command(line: str, monkeypatch: pytest.MonkeyPatch, run: bool = False) -> None:
    """Run a line of a shell, or hold it to what would read it; run: in any case."""
    words = shlex.split(line, comments=True)
    while words and (set_here := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
        if set_here[1] == "PERA_FAST_BACKEND":
            with monkeypatch.context() as patch:
                patch.setenv("PERA_FAST_BACKEND", set_here[2])
                assert {_dispatch.requested(op) for op in OPS} != {"auto"}
        if set_here[2].startswith("$("):
            return
        words = words[1:]
    match words:
        case []:
            pass
        case ["pera-fast", name, *rest]:
            is_here = name == "convert" and Path(rest[1]).exists()
            pera_fast(name, rest, monkeypatch, run=run or is_here or name in RUN)
        case ["srun", "torchrun", *rest] | ["torchrun", *rest]:
            launched = torchrun_parser().parse_args(rest)
            assert launched.module and launched.training_script == "pera_fast.train"
            pera_fast("train", launched.training_script_args, monkeypatch, run=False)
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["pip", "install", "-e", where]:
            extras = re.findall(r"[\w-]+", where)
            assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
        case ["python", "-m", "pytest", file, *_]:
            assert (ROOT / file).is_file()
        case ["python", file, what, *_]:
            assert f'"{what}"' in (ROOT / file).read_text()
        case ["mkdir" | "tar", *_]:
            subprocess.run(words, check=True)
        case _:
            raise AssertionError(f"nothing here can tell whether this works: {line}")


def numbers_apart(line: str) -> tuple[str, list[float]]:
    """A line's words, and its numbers."""
    number = r"\d+(?:,\d{3})*(?:\.\d+)?"
    return re.sub(number, "0", " ".join(line.split())), [
        float(x.replace(",", "")) for x in re.findall(number, line)
    ]


def console(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run what follows `$`, and find what follows it, in its order, in what is printed: numbers to a tenth, since
    memory depends on the instructions a processor has."""
    line, *expected = text.splitlines()
    assert line.startswith("$ ")
    capsys.readouterr()
    command(line[2:], monkeypatch, run=True)
    printed = iter("\n".join(capsys.readouterr()).splitlines())
    for wanted in expected:
        words, numbers = numbers_apart(wanted)
        shown = next((got for got in map(numbers_apart, printed) if got[0] == words), None)
        assert shown is not None, f"not printed: {wanted}"
        assert shown[1] == pytest.approx(numbers, rel=0.1), wanted


@pytest.mark.filterwarnings("ignore::RuntimeWarning:runpy")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_what_a_page_shows_runs(
    page: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Block by block in one folder, the Python of a page in one namespace, as a reader goes through it."""
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.mark == "not run" or (block.mark == "needs" and not importlib.util.find_spec(block.reason)):
            continue
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, str(DOCS / page), "exec"), names)
        elif block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                command(line, monkeypatch)
        elif block.language == "console":
            console(block.text, monkeypatch, capsys)
        elif block.language == "yaml":
            Path(block.title or "page.yaml").write_text(block.text)
            config.load_yaml(block.title or "page.yaml")
        else:
            assert block.language == "text", (
                f"{page}, line {block.line}: expected a language, got {block.language!r}"
            )


def test_few_blocks_are_not_run() -> None:
    not_run = [(page, block) for page in PAGES for block in blocks(page) if block.mark == "not run"]
    assert len(not_run) <= MOST_NOT_RUN and all(len(block.reason) > 20 for _, block in not_run)


def test_options_named_in_the_text_exist() -> None:
    """In code within sentences and tables, which no parser sees."""
    sections = [field.default_factory for field in dataclasses.fields(config.Config)]
    classes = (*sections, stats.Args, embed.Args, export.Args)
    fields = [field.name for args in classes for field in dataclasses.fields(args)]  # type: ignore[arg-type]
    functions = (
        evaluate.knn_command, evaluate.linear_command, evaluate.seg_command, convert.official, convert.timm,
        convert.hf,
    )  # fmt: skip
    fields += [name for function in functions for name in inspect.signature(function).parameters]
    known = {"--" + name.replace("_", "-") for name in fields} | {
        "--no-baselines",
        "--no-cuda-graph",
        "--help",
    }
    known |= {"--preset", "--config", "--gpu-memory", "--json"}  # of train and plan
    known |= {option for action in torchrun_parser()._actions for option in action.option_strings}
    for page, text in PAGES.items():
        named = {
            x
            for code in re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
            for x in re.findall(r"--[a-z-]+", code)
        }
        assert named <= known | {"--signal"}, f"{page}: {sorted(named - known)}"  # --signal: of Slurm


# --- the pages as a whole -------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation() -> None:
    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [file for value in values for file in files(value)]  # type: ignore[attr-defined]

    listed = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(PAGES)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_place(op: str) -> None:
    """A page, or a heading of one; with maths, a figure, measurements, limits, and the backends in their order."""
    (page,) = (
        text for name, text in KERNELS.items() if name == f"kernels/{op}.md" or f"\n## `{op}`\n" in text
    )  # fmt: skip
    assert all(f"\n## {heading}\n" in page for heading in ("Maths", "Use", "Numbers", "Limits"))
    assert re.search(rf"\{{\{{ results: (\w+, )*{op}\b", page) and page.count("](../figures/") == 1
    shown = re.search(
        rf"\*\*Backends\*\*(?: of `{op}`)?, in order of preference: (.+)\.$", page, re.MULTILINE
    )
    assert shown and re.findall(r"\w+", shown[1]) == [i.backend for i in _dispatch.registered()[op]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages as they are built, where no address can be reached."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="the pages' tools are not installed: pip install -e .[docs]")
    folder = tmp_path_factory.mktemp("site")
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}, timeout=240,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    kept = (p for p in sorted(folder.rglob("*")) if p.suffix in (".html", ".css"))
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in kept}


class Loaded(HTMLParser):
    """Addresses that a browser loads to show a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "link" and given.get("rel") not in ("prev", "next", "canonical"):
            self.found.append(given.get("href") or "")
        elif tag != "a":
            self.found += [given.get(name) or "" for name in ("src", "srcset", "data", "poster")]


def test_no_page_loads_anything_from_elsewhere(site: dict[str, str]) -> None:
    for name, text in site.items():
        loaded = Loaded(text).found if name.endswith(".html") else []
        loaded += re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", text)
        outside = [address for address in loaded if re.match(r"(\w+:)?//", address.strip())]
        assert not outside, f"{name}: {outside}"


def test_figures_and_numbers_are_in_the_pages(site: dict[str, str]) -> None:
    assert not any("{{ " in text for name, text in site.items() if name.endswith(".html"))
    for page in KERNELS:
        text = site[page.replace(".md", ".html")]
        assert '<svg class="fig"' in text and "<td><strong>" in text, page


def test_the_reference_holds_every_public_op(site: dict[str, str]) -> None:
    reference = site["reference.html"]
    missing = [name for name in ops.__all__ if not re.search(rf'id="pera_fast\.[\w.]+\.{name}"', reference)]
    assert not missing
    assert all(f'id="pera_fast.config.{section}"' in reference for section in ("ModelConfig", "RunConfig"))
