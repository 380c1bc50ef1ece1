"""A recipe (agent/proposers/recipes.py) put into today's code, in memory or as a tree on disk."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import yaml

from agent.journal import Proposal
from agent.workspace import CHAMPION, merge_into_champion
from nightshift.fixed.config import ROOT, flatten

MODULES = ("model", "optim", "schedule", "filtering", "training")  # in the order of their imports


def edited_files(recipe: Proposal) -> dict[str, str]:
    """Path -> text after the edits; each search text must occur once in what the edits before it
    left."""
    texts: dict[str, str] = {}
    for edit in recipe.edits:
        text = texts.get(edit.path, (ROOT / edit.path).read_text(encoding="utf-8"))
        assert text.count(edit.search) == 1, (
            f"{edit.path}: {text.count(edit.search)} times: {edit.search}"
        )
        texts[edit.path] = text.replace(edit.search, edit.replace)
    return texts


def load_edited(recipe: Proposal, monkeypatch) -> dict[str, types.ModuleType]:
    """The five editable modules with the recipe applied, each seeing the others' edited form."""
    texts, loaded = edited_files(recipe), {}
    for name in MODULES:
        path = f"src/nightshift/{name}.py"
        source = texts.get(path, (ROOT / path).read_text(encoding="utf-8"))
        module = types.ModuleType(f"nightshift.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(source, path, "exec"), module.__dict__)
        loaded[name] = module
    return loaded


def changed_values(recipe: Proposal) -> dict[str, Any]:
    """Dotted keys that the recipe's overrides and its edits of conf/<group>/*.yaml set."""
    changed: dict[str, Any] = {}
    for path, text in edited_files(recipe).items():
        if path.endswith(".yaml"):
            group = Path(path).parent.name
            before = flatten(yaml.safe_load((ROOT / path).read_text(encoding="utf-8")))
            after = flatten(yaml.safe_load(text))
            changed |= {f"{group}.{k}": v for k, v in after.items() if before.get(k, ...) != v}
    return changed | recipe.overrides


def write_tree(recipe: Proposal, tree: Path) -> Path:
    """A copy of src and conf with the recipe applied, as a trial's worktree has it."""
    for part in ("src", "conf"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in edited_files(recipe).items():
        (tree / path).write_text(text, encoding="utf-8")
    if recipe.overrides:
        merge_into_champion(tree / CHAMPION, recipe.overrides)
    return tree


def pretrain(tree: Path, run: Path, *overrides: str) -> subprocess.CompletedProcess:
    """`python -m nightshift.pretrain` with the tree's own code, as a study starts it."""
    command = [sys.executable, "-m", "nightshift.pretrain", "tracking=off"]
    return subprocess.run(
        [*command, *overrides, f"hydra.run.dir={run}"],
        cwd=tree,
        env={"PYTHONPATH": "src", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
