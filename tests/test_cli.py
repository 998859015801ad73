"""`pera-fast COMMAND`: every command is there, and wrong options are one sentence.

Most commands run in this process, since each fresh one takes seconds to import torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_here, run_module

from pera_fast import __version__, _cli
from pera_fast.config import ConfigError


def shown(*arguments: str) -> tuple[int, str, str]:
    """The exit code of `pera-fast` with these arguments, and what it prints."""
    done = run_here("pera_fast", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_every_command_is_a_module_and_the_other_way_round() -> None:
    modules = {p.stem for p in (ROOT / "pera_fast").glob("*.py") if '__name__ == "__main__"' in p.read_text()}
    assert modules == set(_cli.COMMANDS)


def test_the_version_is_in_one_place() -> None:
    installed = Path(sys.executable).with_name("pera-fast")
    text = subprocess.run([installed, "--version"], capture_output=True, text=True, check=True).stdout
    assert text == f"pera_fast {__version__}\n"
    for name in ("CITATION.cff", "CHANGELOG.md"):
        assert re.search(
            rf"^(version: |## ){re.escape(__version__)}\b", (ROOT / name).read_text(), re.MULTILINE
        ), name
    assert 'dynamic = ["readme", "version"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_without_a_command_all_are_named(arguments: tuple[str, ...]) -> None:
    code, out, _ = shown(*arguments)
    assert code == 0 and all(f"  {name} " in out for name in _cli.COMMANDS)


def test_a_command_is_its_module() -> None:
    assert run_module("pera_fast", "info", "--json").stdout == run_module("pera_fast.info", "--json").stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("trian",), "command: expected one of .*, got 'trian'; did you mean train\\?"),
        (("train", "--batch-size", "banana"), "--batch-size: expected INT or auto, got 'banana'"),
        (("train", "--lr", "banana"), "--lr: could not convert string to float: 'banana'"),
        (("train", "--lrr", "3"), "unrecognized options: --lrr, 3; did you mean --lr\\?"),
        (("train", "--betas", "1"), "missing value for argument '--betas'. Expected 2 values"),
        (("train", "--shard", "x"), "invalid choice 'x' for argument '--shard'. Expected one of .*"),
        (("train", "--num-heads", "7"), "num_heads: expected a divisor of embed_dim = 192, got 7"),
        (("stats",), "missing from pera_fast.stats: .*"),
        (("report",), "missing from pera_fast.report: .*"),
        (("evaluate",), "expected one of {knn, linear, seg}"),
        (("evaluate", "knn", "--checkpoint", "x"), "missing from pera_fast.evaluate knn: --train.*"),
        (("embed",), "missing from pera_fast.embed: .*"),
        (("export", "--format", "x"), "invalid choice 'x' for argument '--format'. Expected one of .*"),
        (("convert", "offical", "x"), "unrecognized options: offical, x"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    code, out, err = shown(*arguments)
    assert code == 2 and out == ""
    assert re.fullmatch(f"error: {sentence}\n", err), err


@pytest.mark.parametrize("name", _cli.COMMANDS)
def test_help_is_shown(name: str) -> None:
    code, out, err = shown(name, "--help")
    assert code == 0 and "usage" in (out + err).lower()


def test_what_tyro_may_change_is_still_a_sentence() -> None:
    """Should its box look otherwise one day, all it says is kept."""

    def cli() -> None:
        print("something\n is wrong", file=sys.stderr)
        sys.exit(2)

    with pytest.raises(ConfigError, match="^something is wrong$"):
        _cli.ask(cli)


def test_nothing_needs_a_terminal() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pera_fast", "train", "--lr", "x"], stdin=subprocess.DEVNULL, capture_output=True,
        env={**os.environ, "LC_ALL": "C", "COLUMNS": "20", "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert run.stderr.startswith(b"error: --lr: could not convert string to float")


@pytest.mark.parametrize("arguments", [("--help",), ("info", "--json")])
def test_a_reader_may_stop_reading(arguments: tuple[str, ...]) -> None:
    """As `… | head` does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pera_fast", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_onto_a_full_disk(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "pera_fast", "--version"], stdout=full, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert (run.returncode, run.stderr) == (2, "error: cannot write: No space left on device\n")


def test_help_needs_no_unicode() -> None:
    shown = run_module("pera_fast", "train", "--help", PYTHONIOENCODING="ascii")
    assert shown.returncode == 0 and "--embed-dim" in shown.stdout


def test_files_that_are_written(tmp_path: Path) -> None:
    read = [str(tmp_path / "in"), str(tmp_path)]
    _cli.check_files(read, out=str(tmp_path / "a"), other=str(tmp_path / "b"), third=None)
    os.mkfifo(tmp_path / "pipe")
    for file, sentence in (
        (tmp_path / "pipe", "out: expected a regular file to write, got"),
        (tmp_path, "out: expected a file to write, got the folder"),
        (tmp_path / "no/a", "out: expected a file in a folder that exists"),
        (tmp_path / "no/../in", "out: expected a file that nothing else is read from"),
        (tmp_path / ("x" * 300), "out: expected a file that can be written"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            _cli.check_files(read, out=str(file))
    with pytest.raises(
        ConfigError, match="other: expected a file that nothing else is read from or written to"
    ):
        _cli.check_files(read, out=str(tmp_path / "a"), other=str(tmp_path / "a"))
