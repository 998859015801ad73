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


@pytest.fixture(autouse=True)
def compile_for_each_shape() -> Generator[None, None, None]:
    """torch.compile would else meet a second shape with code for any, several times slower, whose backward pass of
    torch 2.13 keeps the first one's scale."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
