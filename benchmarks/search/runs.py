"""Real short runs of a point: editable values and recipes, on a seed -> val_bpb and CPU seconds.

The setting is small so that hundreds of runs fit into an hour of one core: two layers of width
64, 40,000 tokens in batches of 512. Runs are remembered in runs.jsonl.gz beside this file, so
an interrupted collection goes on, and no search pays twice for a run that another one made.
"""

import gzip
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from agent.journal import Edit, Proposal
from agent.proposers.recipes import read_recipes
from agent.settings import Plan, read_plan
from agent.warm import Starter
from nightshift.fixed.config import CONF, ROOT, Config, check, flatten, unflatten
from nightshift.fixed.result import CONFIG_FILE

OUT = Path(__file__).parents[1] / "out" / "search"
MEMORY = Path(__file__).with_name("runs.jsonl.gz")  # in git: hours of one core
SETTING = [
    "tracking=off", "runtime.num_threads=1", "runtime.progress_bar=false", "runtime.device=cpu",
    "runtime.num_dev_points=0", "evaluate.sample_prompts=[]", "evaluate.max_bytes=60000",
    "model.depth=2", "train.batch_tokens=512", "train.micro_batch_size=2", "budget.amount=40000",
]  # fmt: skip
LIMIT_S = 240.0


class Point(NamedTuple):
    """What a trial computes."""

    values: tuple[tuple[str, Any], ...]  # those that are not the baseline's, sorted by key
    recipes: tuple[str, ...]  # titles, in the order in which they were applied

    @staticmethod
    def of(values: dict[str, Any], recipes=()) -> "Point":
        return Point(tuple(sorted(values.items())), tuple(recipes))


class Score(NamedTuple):
    val_bpb: float | None  # null: it crashed or diverged
    seconds: float


@dataclass
class Setting:
    """The study that the searches stand for: its plan, and its recipes by title."""

    plan: Plan = field(default_factory=lambda: read_plan(CONF, SETTING))
    recipes: dict[str, Proposal] = field(
        default_factory=lambda: {recipe.title: recipe for recipe in read_recipes()}
    )

    @property
    def baseline(self) -> dict[str, Any]:
        return flatten(self.plan.config.model_dump())

    def texts(self, recipes) -> dict[str, str] | None:
        """Path -> text with the recipes applied one after another; null: one does not fit."""
        return apply_edits([edit for title in recipes for edit in self.recipes[title].edits])

    def config(self, point: Point, texts: dict[str, str], seed: int) -> Config:
        values = self.baseline | {"seed": seed}
        for title in point.recipes:
            values |= self.recipes[title].overrides
        return check(unflatten(values | values_of(texts) | dict(point.values)))


def apply_edits(edits: list[Edit]) -> dict[str, str] | None:
    texts: dict[str, str] = {}
    for edit in edits:
        text = texts.get(edit.path) or (ROOT / edit.path).read_text(encoding="utf-8")
        if text.count(edit.search) != 1:
            return None
        texts[edit.path] = text.replace(edit.search, edit.replace)
    return texts


def values_of(texts: dict[str, str]) -> dict[str, Any]:
    """What edited files of conf/ set."""
    values = {}
    for path, text in texts.items():
        if path.endswith(".yaml"):
            before = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
            after = yaml.safe_load(text)
            group = Path(path).parent.name
            values |= {f"{group}.{k}": v for k, v in after.items() if before.get(k) != v}
    return values


class Runner:
    """Makes real runs; a context manager, for it holds the fork server."""

    def __init__(self, setting: Setting, folder: Path = OUT):
        self.setting, self.folder = setting, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.memory = MEMORY
        self.known: dict[tuple[Point, int], Score] = {}
        for line in lines_of(self.memory):
            point, seed, score = json.loads(line)
            self.known[Point(tuple(map(tuple, point[0])), tuple(point[1])), seed] = Score(*score)
        self.starter: Starter | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.starter:
            self.starter.close()

    def __call__(self, point: Point, seed: int) -> Score:
        if (point, seed) not in self.known:
            score = self.run(point, seed)
            self.known[point, seed] = score
            with gzip.open(self.memory, "at") as file:
                file.write(json.dumps([point, seed, score]) + "\n")
        return self.known[point, seed]

    def run(self, point: Point, seed: int) -> Score:
        texts = self.setting.texts(point.recipes)
        config = self.setting.config(point, texts, seed)
        tree, folder = self.tree(texts), self.folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        values = config.model_dump()
        values["runtime"]["cache_dir"] = str(ROOT / ".cache")
        OmegaConf.save(OmegaConf.create(values), folder / CONFIG_FILE)
        self.starter = self.starter or Starter(self.folder, True)
        number = self.starter.start(
            "short_run", [str(folder)], src=tree / "src", env=environment(), log=folder / "log"
        )
        deadline = time.monotonic() + LIMIT_S
        while (code := self.starter.wait(number, 1.0)) is None and time.monotonic() < deadline:
            pass
        if code != 0:
            (self.folder / "failed.log").write_text((folder / "log").read_text())
            return Score(None, 1.0)
        told = json.loads((folder / "score.json").read_text())
        return Score(told["val_bpb"], told["seconds"])

    def tree(self, texts: dict[str, str]) -> Path:
        """A copy of src with the edits, made once for the same edits."""
        tree = self.folder / "trees" / digest_of(texts)
        if not tree.exists():
            shutil.copytree(
                ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__")
            )
            shutil.copytree(ROOT / "conf", tree / "conf")
            for path, text in texts.items():
                (tree / path).write_text(text, encoding="utf-8")
            shutil.copy(Path(__file__).parent / "short_run.py", tree / "src")
        return tree


def lines_of(path: Path) -> list[str]:
    if not path.exists():
        return []
    with gzip.open(path, "rt") as file:
        return file.readlines()


def digest_of(texts: dict[str, str]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]


def environment() -> dict[str, str]:
    from agent.warm import MARK

    return {MARK: "search", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
