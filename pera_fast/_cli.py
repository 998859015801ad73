"""What all commands share: `pera-fast COMMAND`, log lines on stderr, and faults of the input as one sentence."""

from __future__ import annotations

import difflib
import errno
import functools
import logging
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pera_fast.config import ConfigError

T = TypeVar("T")

# Before torch brings its OpenMP, which reads this once: threads that spin while they wait take the processor
# from the workers that read images. On two cores with one of them busy, a loss of many short products took
# fifteen times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


COMMANDS = {
    "train": "pre-train with PerA (on several GPUs: torchrun -m pera_fast.train)",
    "evaluate": "k-NN, linear probe and segmentation of a teacher",
    "embed": "embedding map of a scene, embeddings of a folder",
    "report": "a run as one page",
    "export": "a teacher for timm, transformers, ONNX or one file",
    "convert": "a run from the authors' checkpoints, timm's or transformers' weights",
    "stats": "value range, mean and deviation of a folder of images",
    "plan": "memory and work of a run, before it",
    "info": "what this installation can run",
}


def main() -> None:
    """`pera-fast COMMAND …` is `python -m pera_fast.COMMAND …`; without a command, what there is."""
    run(_command)


def _command() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: pera-fast COMMAND [options]\n")
        for command, text in COMMANDS.items():
            print(f"  {command:<{width}}  {text}")
        print("\npera-fast COMMAND --help: its options")
    elif name in ("-V", "--version"):
        from pera_fast import __version__

        print(f"pera_fast {__version__}")
    elif name in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"pera_fast.{name}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"command: expected one of {', '.join(COMMANDS)}, got {name!r}{hint}")


def check_files(read: Sequence[str], **written: str | None) -> None:
    """ConfigError for a file, by its option's name, that cannot be written, or is read from or written to as another.

    Before the work rather than after it.
    """
    taken = [Path(path).resolve() for path in read]
    for name, file in written.items():
        if file is None:
            continue
        got = file.encode("utf-8", "backslashreplace").decode()
        try:
            path = Path(file).resolve()
            if path.is_dir():
                raise ConfigError(f"{name}: expected a file to write, got the folder {got}")
            # A pipe or device, which a whole file would take the place of.
            if path.exists() and not path.is_file():
                raise ConfigError(f"{name}: expected a regular file to write, got {got}")
            if not path.parent.is_dir():
                raise ConfigError(f"{name}: expected a file in a folder that exists, got {got}")
        except OSError as error:
            raise ConfigError(
                f"{name}: expected a file that can be written, got {got}: {error.strerror}"
            ) from None
        if path in taken:
            raise ConfigError(
                f"{name}: expected a file that nothing else is read from or written to, got {got}"
            )
        taken.append(path)


def check_folder(out: str) -> None:
    """ConfigError for a folder that is to be made of nothing but what is written now, and has files in it."""
    got = out.encode("utf-8", "backslashreplace").decode()
    try:
        if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
            raise ConfigError(f"out: expected a new or empty folder, got {got} with files in it")
    except OSError as error:
        raise ConfigError(
            f"out: expected a folder that can be written, got {got}: {error.strerror}"
        ) from None


class _Terminal(StringIO):
    encoding = "utf-8"  # by which tyro chooses the lines of its boxes


def ask(cli: Callable[[], T]) -> T:
    """What a call of tyro makes of the options; ConfigError, one sentence, for those it cannot take.

    Help it prints itself. Nothing but the options may be worked on in the call: it may be made twice.
    """
    framed = _Terminal()
    try:
        with redirect_stdout(_Terminal()), redirect_stderr(framed):
            return cli()
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None:  # a sentence of ours, which tyro would frame
            if isinstance(cause, ConfigError):
                raise cause from None
            cause = cause.__context__
        if not stop.code:
            return cli()
    raise ConfigError(_sentence(framed.getvalue()))


def ask_which(commands: Mapping[str, Callable[..., None]], prog: str, description: str) -> Callable[[], None]:
    """The command that is asked for with its options, to be called."""
    import tyro  # not needed where there are no subcommands to choose from

    def later(command: Callable[..., None]) -> Callable[..., Any]:
        return functools.wraps(command)(lambda **options: functools.partial(command, **options))

    table = {name: later(command) for name, command in commands.items()}
    return ask(
        lambda: tyro.extras.subcommand_cli_from_dict(
            table, prog=prog, description=description, sort_subcommands=False
        )
    )


def _sentence(framed: str) -> str:
    """tyro's box of lines as one sentence: what is wrong, and the options it may have been meant to be."""
    lines = [line.strip("│ ") for line in framed.splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(lines) if line and not line.strip("─")), len(lines))
    what = (
        " ".join(" ".join(lines[:rule] or framed.split()).split()).removeprefix("Error parsing ").rstrip(".:")
    )
    if union := re.match(r"(--[\w-]+): no type matching (.+) could be instantiated from \[(.*?)\]", what):
        option, kinds, got = union.groups()
        what = f"{option}: expected {re.sub('[{}]', '', kinds).replace('|', ' or ')}, got {got}"
    meant = [match[0] for line in lines[rule:] if (match := re.match(r"--[\w-]+", line))]
    hint = (
        f"; did you mean {' or '.join(meant[:3])}?"
        if any("meant" in line for line in lines) and meant
        else ""
    )
    return what[:1].lower() + what[1:] + hint


def run(main: Callable[[], None]) -> None:
    """Run a command. An exception with an `exit_code` ends it with that and `error: <sentence>` on stderr.

    Any other is a fault of the program and keeps its traceback.
    """
    set_up_logging()
    _set_up_streams()
    try:
        _run(main)
    except BaseException as error:
        if _is_in_a_group():  # see distributed.world
            _leave(error)
        raise


def _is_in_a_group() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _leave(error: BaseException) -> NoReturn:
    """End the process with this error's exit code, without anything that Python or a library does at its end."""
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    code = error.code if isinstance(error, SystemExit) else 1
    os._exit(code if isinstance(code, int) else int(code is not None))


def _run(main: Callable[[], None]) -> None:
    try:
        main()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC) or error.filename is not None:
            raise
        # Of `… | head`, or of `… > FILE` on a full disk: nothing more can be said there, nor flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            raise SystemExit(141) from None
        print(f"error: cannot write: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"{'stopped' if code == os.EX_TEMPFAIL else 'error'}: {error}", file=sys.stderr)
        raise SystemExit(code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as a shell reports it; the user knows why


def _set_up_streams() -> None:
    """Characters that a terminal does not have are shown as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def set_up_logging() -> None:
    """Send the log of this package to stderr as `pera_fast: message`, once."""
    log = logging.getLogger("pera_fast")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("pera_fast: %(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO)
