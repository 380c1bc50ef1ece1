"""The configurations that a promotion compares: a commit for each, and their runs.

Baseline, champion, and the champion without each of its changes: the other trials' proposals
applied anew to the study's first commit. Commits stay under refs/promotions/<study>/<n>/; every
finished run is a synced line of runs.jsonl, so that none is made twice.
"""

import shutil
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from agent import workspace
from agent.journal import Journal, Run, Trial
from agent.promotion import ORDER_FILE, RUNS_FILE, Arm, Order, append_line, changes_of, read_lines
from agent.scale import MACHINE, minutes, scaled
from agent.seeds import on_this_machine
from agent.settings import Plan, StudyError
from agent.study import BASE_FOLDER, Study
from agent.trial import Bench
from agent.warm import MARK, STUDY_MARK
from nightshift.fixed.config import ConfigError, flatten
from nightshift.fixed.result import CHECKPOINT_FOLDER, write_json

PINNED = ("runtime.device", "runtime.num_threads")  # they move the last digits


@dataclass(kw_only=True)
class Job:
    """A promotion that was asked for, checked, before any of its work."""

    plan: Plan  # of the study
    journal: Journal
    trial: Trial
    order: Order
    number: int
    summary: str

    @property
    def machine(self) -> dict[str, Any]:
        """Flat: where it runs, as far as that was given."""
        return {k: v for k, v in self.order.given.items() if k.split(".")[0] in MACHINE}


def build_arms(study: Study, job: Job, folder: Path) -> list[Arm]:
    """A commit for each configuration, made once and kept under refs/promotions/."""
    path = folder / ORDER_FILE
    if path.exists():
        known = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [Arm(**arm) for arm in known["arms"]]
    changes = changes_of(study.journal, job.trial)
    arms = [Arm(name="baseline"), Arm(name="champion")]
    if len(changes) > 1:
        arms += [Arm(name=f"without_{c.number:03d}", left_out=c.number) for c in changes]
    for arm in arms:
        study.view.show(f"building {arm.name}")
        commit_arm(study, job, arm, changes, folder)
    write_json(path, {"order": asdict(job.order), "arms": [asdict(arm) for arm in arms]})
    return arms


def commit_arm(study: Study, job: Job, arm: Arm, changes: list[Trial], folder: Path) -> None:
    first = study.settings["first_commit"]
    start = job.trial.commit if arm.name == "champion" else first
    marks = marks_of(study, job.number)
    with workspace.worktree(study.repo, folder / "build", start) as tree:
        try:
            for change in changes if arm.left_out is not None else ():
                if change.number != arm.left_out:
                    title = f"trial {change.number:03d}: {change.proposal.title}"
                    workspace.apply(tree, change.proposal, title)
            config = scaled(workspace.resolve(tree), job.order.given)
        except (workspace.Refused, ConfigError) as refusal:
            arm.problem = f"does not apply without trial {arm.left_out}: {refusal}"
            return
        wanted = flatten(workspace.reproducible(config.model_dump()))
        wanted["seed"] = job.order.seeds[0]
        machine = flatten(study.plan.config.model_dump()) | job.machine
        wanted |= {key: machine[key] for key in PINNED}
        title = f"promotion {job.number}: {arm.name} of study {study.name} at a larger scale"
        arm.commit = workspace.commit_values(tree, wanted, title, marks)
    ref = workspace.promotion_ref(study.name, job.number, arm.name)
    workspace.git(study.repo, "update-ref", ref, arm.commit)


def recall_runs(arms: list[Arm], folder: Path) -> None:
    by_name = {arm.name: arm for arm in arms}
    for line in read_lines(folder / RUNS_FILE):
        by_name[line.pop("arm")].runs.append(Run(**line))


def run_arms(study: Study, job: Job, arms: list[Arm], folder: Path) -> None:
    progress: Progress = study.view
    todo = [(arm, seed) for arm in arms for seed in job.order.seeds if not arm.problem]
    progress.begin(len(todo), sum(len(arm.runs) for arm in arms))
    for arm in arms:
        if not arm.problem and any(seed not in arm.by_seed for seed in job.order.seeds):
            with workspace.worktree(study.repo, folder / arm.name / "worktree", arm.commit) as tree:
                run_arm(study, job, arm, bench(study, job, arm, arms[0], tree, folder), folder)


def run_arm(study: Study, job: Job, arm: Arm, on: Bench, folder: Path) -> None:
    for seed in job.order.seeds:
        if seed in arm.by_seed:
            continue
        study.stop.check()
        on.show(f"{arm.name}, seed {seed}")
        run = on.prepared_run(f"seed_{seed}", seed, on.config.budget.wall_limit_s)
        if run.status != "ok" and arm.left_out is None:
            raise StudyError(
                f"the {arm.name} failed at this scale ({run.status}), seed {seed}: {run.message}. "
                "Give another scale, or mend it and start again"
            )
        if arm.name != "champion" or seed != job.order.seeds[0]:
            shutil.rmtree(study.folder / run.folder / CHECKPOINT_FOLDER, ignore_errors=True)
        append_line(folder / RUNS_FILE, {"arm": arm.name, **asdict(run)})
        arm.runs.append(run)
        study.view.end_run(arm, run)
        if run.status != "ok":
            arm.problem = f"{run.status} without trial {arm.left_out}: {run.message}"
            return


def bench(study: Study, job: Job, arm: Arm, baseline: Arm, tree: Path, folder: Path) -> Bench:
    """As in a trial (loop.py): the baseline may build the common data, others use their own."""
    config = on_this_machine(study, workspace.resolve(tree))
    shared = (study.repo / config.runtime.cache_dir).resolve()
    work = [run.work for run in baseline.runs if run.work]
    return Bench(
        marks=marks_of(study, job.number),
        study_folder=study.folder,
        folder=folder / arm.name,
        tree=tree,
        base=study.folder / BASE_FOLDER,
        code=workspace.code_of(tree, study.settings["first_commit"]),
        baseline_work=statistics.median(work) if work and arm is not baseline else None,
        config=config,
        own_cache=shared if arm is baseline else folder / arm.name / "cache",
        shared_cache=shared,
        starter=study.starter,
        stop=study.stop,
        show=study.view.show,
    )


def marks_of(study: Study, number: int) -> dict[str, str]:
    mark = f"{study.folder.name}/promotion-{number:03d}"
    return {MARK: mark, STUDY_MARK: str(study.folder)}


class Progress:
    """One line a finished run; on a terminal also what is being done."""

    def __init__(self, *_: Any):  # as View has them
        self.status, self.doing = None, ""
        self.total = self.done = 0
        self.walls: list[float] = []
        if sys.stdout.isatty():
            from rich.console import Console

            self.status = Console().status("starting")
            self.status.start()

    def begin(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def note(self, text: str) -> None:
        print(text, flush=True)

    def show(self, doing: str) -> None:
        if self.status:
            self.status.update(f"{doing} ({self.left})")

    def end_run(self, arm: Arm, run: Run) -> None:
        self.done += 1
        self.walls.append(run.wall_s)
        number = "-" if run.val_bpb is None else f"{run.val_bpb:.4f}"
        said = "" if run.status == "ok" else f"  {run.status}: {run.message}"
        print(
            f"{self.done:>3} of {self.total}  {arm.name:12} seed {run.seed:<3} val_bpb {number}  "
            f"{minutes(run.wall_s):>6}  {self.left}{said}",
            flush=True,
        )

    @property
    def left(self) -> str:
        if not self.walls:
            return f"{self.total - self.done} runs left"
        mean = sum(self.walls) / len(self.walls)
        return f"about {minutes((self.total - self.done) * mean)} left"

    def close(self) -> None:
        if self.status:
            self.status.stop()
