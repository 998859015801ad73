"""Benchmarks import their neighbours as plain modules."""

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """One that was interrupted before its first round would keep pytest-benchmark from writing the others."""
    benchmarks = getattr(session.config, "_benchmarksession", None)
    if benchmarks is not None:
        benchmarks.benchmarks = [b for b in benchmarks.benchmarks if b.stats.data]
    yield
