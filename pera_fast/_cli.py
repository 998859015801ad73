"""What all commands share: log lines on stderr, and faults of the user's input as one sentence."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

# Before torch brings its OpenMP, which reads this once: threads that spin while they wait take the processor
# from the workers that read images. On two cores with one of them busy, a loss of many short products took
# fifteen times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def run(main: Callable[[], None]) -> None:
    """Run a command. DataError, ConfigError and BackendError end it with `error: <sentence>` on stderr and exit code 2.

    Any other exception is a fault of the program and keeps its traceback.
    """
    set_up_logging()
    try:
        main()
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as a shell reports it; the user knows why


def set_up_logging(level: int = logging.INFO) -> None:
    """Send the log of this package to stderr as `pera_fast: message`, once."""
    log = logging.getLogger("pera_fast")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("pera_fast: %(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(level)


def _user_errors() -> tuple[type[Exception], ...]:
    """DataError, ConfigError and BackendError, where their modules are loaded: else none of them can have been raised.

    Not imported here, so that a command without data needs no image library.
    """
    places = (
        ("pera_fast.data.sources", "DataError"),
        ("pera_fast.config", "ConfigError"),
        ("pera_fast.ops._dispatch", "BackendError"),
    )
    return tuple(getattr(sys.modules[module], name) for module, name in places if module in sys.modules)
