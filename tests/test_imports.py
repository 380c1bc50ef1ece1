"""Imports run one way: fixed <- model, optim, schedule, filtering <- training <- pretrain.

The agent stands apart.
"""

import ast
import subprocess
import sys

import pytest

from nightshift.fixed.config import ROOT

# For each module: what of ours it may import, by the first parts of the name.
EDITABLE = ("model", "optim", "schedule", "filtering")
ALLOWED = {
    "model": {"nightshift.fixed"},
    "optim": {"nightshift.fixed", "nightshift.model"},
    "schedule": {"nightshift.fixed"},
    "filtering": {"nightshift.fixed"},
    "training": {"nightshift.fixed", *(f"nightshift.{m}" for m in EDITABLE)},
    "lora": set(),
    "tuning": {"nightshift.fixed", *(f"nightshift.{m}" for m in (*EDITABLE, "training", "lora"))},
}
# The arrows that point up, each inside a function: the candidate's model, filter and training.
EXCEPTIONS = {
    ("checkpoint", "nightshift.model"),
    ("logits", "nightshift.model"),
    ("batches", "nightshift.filtering"),
    ("candidate", "nightshift.pretrain"),
    ("candidate", "nightshift.sft"),
}
TORCH_FREE = {
    "nightshift.command",
    "nightshift.fixed.config",
    "nightshift.fixed.result",
    "nightshift.fixed.sandbox",
    "nightshift.fixed.tracking",
}
SOURCES = ROOT / "src" / "nightshift"


def imports_of(path) -> set[str]:
    """Our own modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            package = node.module
            found |= {
                f"{package}.{a.name}" if is_module(f"{package}.{a.name}") else package
                for a in node.names
            }
    return {name for name in found if name.split(".")[0] in ("nightshift", "agent")}


def is_module(name: str) -> bool:
    base = ROOT / "src" if name.startswith("nightshift") else ROOT
    path = base.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


@pytest.mark.parametrize("path", sorted((SOURCES / "fixed").glob("*.py")), ids=lambda p: p.stem)
def test_the_ruler_imports_nothing_above_it(path):
    above = {
        name
        for name in imports_of(path)
        if not name.startswith("nightshift.fixed") and name != "nightshift"
    }
    assert {(path.stem, name) for name in above} <= EXCEPTIONS


@pytest.mark.parametrize("name", ALLOWED)
def test_editable_modules_import_only_what_is_below(name):
    for imported in imports_of(SOURCES / f"{name}.py"):
        assert any(imported.startswith(allowed) for allowed in ALLOWED[name]), imported


@pytest.mark.parametrize("path", sorted((ROOT / "agent").rglob("*.py")), ids=lambda p: p.stem)
def test_the_loop_imports_only_the_torch_free_part(path):
    ours = {name for name in imports_of(path) if name.startswith("nightshift")}
    assert ours <= TORCH_FREE, ours - TORCH_FREE


def test_importing_the_loop_does_not_import_torch():
    code = "import sys, agent.loop, agent.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_agent_is_this_repository_s_agent():
    import agent

    assert agent.__file__.startswith(str(ROOT))
