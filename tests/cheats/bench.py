"""One entry through both evaluators, in its worker's own laboratory. Facts: run.py judges."""

import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

from cheats.entries import Entry
from cheats.lab import Alarms, Lab
from cheats.watch import Outcome, Watch, size
from omegaconf import OmegaConf

from agent import workspace
from agent.journal import Run
from agent.trial import Bench, Stop
from agent.warm import MARK, STUDY_MARK, Starter, kill_marked
from nightshift.fixed.config import check

SEED, NUM_PREFLIGHT_STEPS = 1, 2
NUMBERS = ("val_bpb", "steps", "tokens", "num_params", "work", "train_s", "wall_s")
NUM_FORKS_UNGUARDED, NUM_FORKS_GUARDED = 20, 600
UNGUARDED = Path(__file__).parent / "unguarded.py"


class Worker:
    """A laboratory, its listeners, and a server that starts runs warm."""

    def __init__(self, lab: Lab):
        self.lab, self.alarms = lab, Alarms(lab.reference, lab.secret)
        self.starter = Starter(lab.study, warm=True)
        self.base = lab.study / "base"
        if not self.base.exists():
            workspace.git(lab.project, "worktree", "add", "--detach", str(self.base), "HEAD")
        self.number = 0
        self.first_commit = workspace.git(lab.project, "rev-parse", "HEAD")
        os.environ["HOME"] = str(lab.home)

    def close(self) -> None:
        self.starter.close()
        self.alarms.close()
        kill_marked(self.lab.study)

    # -- the evaluator that believes

    def unguarded(self, entry: Entry, keep: Path | None = None) -> Outcome:
        """Entry's code in a copy of the checkout, with a cache of its own to spoil.

        `keep` gets the run's folder, which is otherwise gone afterwards.
        """
        place = self.lab.root / "unguarded" / entry.name
        tree, run, cache = place / "tree", place / "run", place / "cache"
        for part in ("src", "conf"):
            shutil.copytree(self.lab.project / part, tree / part)
        shutil.copy(UNGUARDED, tree / "src/nightshift/unguarded.py")
        shutil.copytree(self.lab.cache, cache)
        entry = entry.filled(self._places(cache, tree, run, NUM_FORKS_UNGUARDED))
        for edit in entry.proposal.edits:
            path = tree / edit.path
            path.write_text(path.read_text().replace(edit.search, edit.replace, 1))
        workspace.merge_into_champion(tree / workspace.CHAMPION, entry.proposal.overrides)
        run.mkdir(parents=True)
        _write_config(tree, run, cache, entry)
        self._plant(entry, run, tree)
        with self._watched(entry, f"unguarded/{entry.name}", run, place) as outcome:
            started = time.monotonic()
            code = self._start(entry, tree, run)
            outcome.wall_s = time.monotonic() - started
            outcome.status = "timeout" if code is None else "ok" if code == 0 else "crash"
            outcome.val_bpb = reported(run)
            outcome.bytes = size(run)
            if keep:
                shutil.copytree(run, keep)
        return outcome

    def _start(self, entry: Entry, tree: Path, run: Path) -> int | None:
        marks = {MARK: f"unguarded/{entry.name}", STUDY_MARK: str(self.lab.study)}
        environment = os.environ | entry.environment | marks
        number = self.starter.start(
            "nightshift.unguarded",
            [str(run)],
            src=tree / "src",
            env=environment | {"OPENAI_API_KEY": self.lab.secret, "GOMP_SPINCOUNT": "0"},
            log=run / "run.log",
        )
        return self.starter.wait(number, entry.limit_s)

    # -- the ruler

    def guarded(self, entry: Entry, own_cache: Path | None = None) -> Outcome:
        """Entry as a trial of the laboratory's study."""
        self.number += 1
        trial = self.lab.study / f"trials/{self.number:03d}"
        run, mark = trial / "seed_1", f"{self.lab.study.name}/{trial.name}"
        with workspace.worktree(self.lab.project, trial / "worktree", "HEAD") as tree:
            entry = entry.filled(self._places(self.lab.cache, tree, run, NUM_FORKS_GUARDED))
            try:
                config = workspace.apply(tree, entry.proposal, entry.proposal.title).config
                code = workspace.code_of(tree, self.first_commit)
            except workspace.Refused as refusal:
                return Outcome(status="invalid", message=str(refusal))
            bench = Bench(
                marks={MARK: mark, STUDY_MARK: str(self.lab.study)},
                study_folder=self.lab.study,
                folder=trial,
                tree=tree,
                base=self.base,
                code=code,
                baseline_work=self.lab.baseline_work,
                config=config,
                own_cache=own_cache or trial / "cache",
                shared_cache=self.lab.cache,
                starter=self.starter,
                stop=Stop(),
                show=lambda doing: None,
            )
            self._plant(entry, run, tree)
            watched = self._watched(entry, mark, run, trial)
            with watched as outcome, _environment(entry, self.lab.secret):
                result = self._run(bench, entry)
                outcome.status, outcome.message = result.status, result.message or ""
                for name in (
                    "val_bpb",
                    "steps",
                    "tokens",
                    "num_params",
                    "work",
                    "train_s",
                    "wall_s",
                ):
                    setattr(outcome, name, getattr(result, name))
                outcome.bytes = size(trial, without=tree)
                self._look_at_the_tree(tree, entry, outcome)
        return outcome

    def _run(self, bench: Bench, entry: Entry) -> Run:
        """Preflights make the data; without other data to make they only cost time here."""
        if entry.makes_data or self.lab.baseline_work is None:
            preflight = bench.preflight(SEED, NUM_PREFLIGHT_STEPS, entry.limit_s)
            if preflight.status != "ok":
                return preflight
        changes = {"budget": entry.budget or {}, "evaluate": {"limit_s": entry.limit_s}}
        return bench.run("seed_1", SEED, entry.limit_s, **changes)

    def _look_at_the_tree(self, tree: Path, entry: Entry, outcome: Outcome) -> None:
        """Nothing but what was planted may be new in the worktree."""
        planted = {name.removeprefix("tree/") for name in entry.plant}
        lines = workspace.git(tree, "status", "--porcelain", "-uall").splitlines()
        if changed := [line for line in lines if line[3:] not in planted]:
            outcome.alarms.append(f"the worktree was changed: {changed[0].strip()}")

    # -- both

    def _places(self, cache: Path, tree: Path, run: Path, forks: int) -> dict[str, str]:
        places = self.lab.places(self.alarms, cache, forks)
        return places | {"TREE": str(tree), "RUN": str(run)}

    def _plant(self, entry: Entry, run: Path, tree: Path) -> None:
        roots = {"run": run, "tree": tree, "home": self.lab.home}
        for name, text in entry.plant.items():
            root, _, rest = name.partition("/")
            path = roots[root] / rest
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    @contextmanager
    def _watched(self, entry: Entry, mark: str, run: Path, place: Path):
        """Yields the outcome, and completes it afterwards."""
        watch = Watch(self.lab, self.alarms, entry, mark=mark, run=run, place=place)
        try:
            yield watch.outcome
            watch.look()
        finally:
            watch.put_back()


def reported(run: Path) -> float | None:
    """The peers' way: the last line of the log that says so, else the file that lies there."""
    log = run / "run.log"
    text = log.read_bytes()[-200_000:].decode("utf-8", "replace") if log.exists() else ""
    try:
        if lines := re.findall(r"^val_bpb:\s+(\S+)", text, re.MULTILINE):
            return float(lines[-1])
        return float(json.loads((run / "result.json").read_text())["val_bpb"])
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def _environment(entry: Entry, secret: str):
    """What a person's shell has set, and what the entry adds."""
    added = {"OPENAI_API_KEY": secret} | entry.environment
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _write_config(tree: Path, run: Path, cache: Path, entry: Entry) -> None:
    values = workspace.resolve(tree).model_dump()
    values["seed"] = SEED
    values["runtime"] |= {"cache_dir": str(cache), "shared_cache_dir": None}
    values["budget"] |= entry.budget or {}
    OmegaConf.save(OmegaConf.create(check(values).model_dump()), run / "config.yaml")
