"""A library of known code changes, each tried at most once in a study: recipes/*.yaml, and where
another target than val_bpb is judged, recipes/<target>/*.yaml.

    title: squared ReLU -> GELU
    hypothesis: One sentence that says why it should help.
    edits:
      - {path: src/nightshift/model.py, search: ..., replace: ...}
    overrides: {model.mlp_ratio: 3}     # optional

`search` occurs exactly once in the file. A recipe that no longer fits the incumbent's code is left
out with a note; it is no trial. In a study that begins after another one, what that one kept is
left out, and what it tried in vain comes last. Where kept changes are taken out (strategy.py), only
recipes that need this are tried.
"""

import random
from pathlib import Path
from typing import Any

import yaml

from agent.journal import Edit, Proposal, Trial
from agent.proposers import Context, misfit
from agent.target import VAL, Target
from nightshift.fixed.config import ConfigError

FOLDER = Path(__file__).parent / "recipes"


def folder_of(target: Target) -> Path:
    return FOLDER if target is VAL else FOLDER / target.name


def propose(context: Context, folder: Path | None = None) -> Proposal | None:
    tried = {t.proposal.title for t in context.journal.trials if t.proposal.source == "recipes"}
    recipes = read_recipes(folder or folder_of(context.target))
    random.Random(f"recipes/{context.seed}").shuffle(recipes)
    for recipe in _by_memory(recipes, context.memory):
        if recipe.title in tried:
            continue
        if why := misfit(recipe, context.read):
            context.note(f"recipe '{recipe.title}' left out: {why}")
            continue
        if context.stem.undoes and not misfit(recipe, context.root.read):
            continue  # its one trial is not spent beside the loss of what is taken out
        return recipe
    return None


def _by_memory(recipes: list[Proposal], memory: list[Trial]) -> list[Proposal]:
    """What an earlier study kept is in the code already; what it did not keep comes last."""
    known = [t for t in memory if t.proposal.source == "recipes"]
    kept = {t.proposal.title for t in known if t.decision == "keep"}
    tried = {t.proposal.title for t in known}
    return sorted((r for r in recipes if r.title not in kept), key=lambda r: r.title in tried)


def read_recipes(folder: Path = FOLDER) -> list[Proposal]:
    """In order of file names. Raises ConfigError that names the file that is not a recipe."""
    recipes = [_recipe(path) for path in sorted(folder.glob("*.yaml"))]
    titles = [recipe.title for recipe in recipes]
    for title in titles:
        if titles.count(title) > 1:
            raise ConfigError(f"{folder}: two recipes have the title '{title}'; a title names one")
    return recipes


def _recipe(path: Path) -> Proposal:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _proposal(values)
    except (yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ConfigError(
            f"{path} is not a recipe: {what}. It needs title, hypothesis and edits, each with "
            "path, search and replace."
        ) from None


def _proposal(values: dict[str, Any]) -> Proposal:
    unknown = set(values) - {"title", "hypothesis", "edits", "overrides"}
    if unknown:
        raise ValueError(f"unknown key '{sorted(unknown)[0]}'")
    edits = [Edit(**edit) for edit in values["edits"]]
    texts = [values["title"], values["hypothesis"]]
    texts += [text for edit in edits for text in (edit.path, edit.search, edit.replace)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a value that must be text is not; quote it")
    if not edits or not all(edit.search for edit in edits):
        raise ValueError("no edit, or an empty search text")
    return Proposal(
        title=" ".join(values["title"].split()),
        hypothesis=" ".join(values["hypothesis"].split()),
        source="recipes",
        edits=edits,
        overrides=values.get("overrides") or {},
    )
