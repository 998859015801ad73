"""Rules of the house, kept by tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import ONE, ROOT, tiny_config

from pera_fast import checkpoint
from pera_fast.data.statistics import Statistics
from pera_fast.engine import Engine

PACKAGE = ROOT / "pera_fast"
OPS = sorted(p.stem for p in (PACKAGE / "ops").glob("[a-z]*.py"))


def imports(path: Path) -> set[str]:
    """Absolute module names that a file imports, `from a import b` as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


# What each room may import of pera_fast; imports point downwards only.
ALLOWED = {
    "config.py": set(),
    "reference.py": set(),
    "ops": {"pera_fast.ops", "pera_fast.reference", "pera_fast.kernels"},
    "model": {"pera_fast.model", "pera_fast.ops", "pera_fast.config"},
    "data": {"pera_fast.data", "pera_fast.config", "pera_fast.reference"},
}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_downwards(room: str) -> None:
    for path in [PACKAGE / room] if room.endswith(".py") else (PACKAGE / room).glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("pera_fast.")}
        wrong = {n for n in ours if not any(n == a or n.startswith(a + ".") for a in ALLOWED[room])}
        assert not wrong, f"{path.name} imports {sorted(wrong)}"


def test_config_needs_no_torch() -> None:
    assert not any(name.split(".")[0] == "torch" for name in imports(PACKAGE / "config.py"))


def test_only_ops_touch_kernels_and_compiled_ops() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "ops" and path.name != "info.py":
            assert not any("pera_fast.kernels" in name for name in imports(path)), path
            assert "torch.ops.pera_fast" not in path.read_text(), path


@pytest.mark.parametrize("op", OPS)
def test_each_op_has_a_test_and_a_bench(op: str) -> None:
    assert (ROOT / f"tests/test_{op}.py").exists()
    assert (ROOT / f"bench/bench_{op}.py").exists()


def test_train_fits_on_a_screen() -> None:
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 80


def test_no_pickle_is_loaded() -> None:
    """pera_fast.convert reads files of torch.save, of which it lets through tensors and plain values alone."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        calls = re.findall(r"torch\.load\(.*", text)
        allowed = path.name == "convert.py" and all("weights_only=True" in call for call in calls)
        assert not calls or allowed, path
        assert not re.search(r"\bpickle\.loads?\(|from pickle|Unpickler", text), path


SNIPPETS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippets_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the run that README speaks of."""
    three = Statistics({"uint8": (0.0,) * 3}, {"uint8": (255.0,) * 3}, (0.5,) * 3, (0.2,) * 3, 1, 1)
    engine = Engine(tiny_config(), three, ONE)
    folder = tmp_path / "runs/mine/checkpoints"
    checkpoint.save(folder, 1, engine.model, engine.optimizer, engine.config, three, keep=1, world=ONE)
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), {})
