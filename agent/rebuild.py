"""Make one run of a study again: its commit, its configuration, its data, through the same ruler.

Everything runs as in a study: in a worktree, from data of its own, in the sandbox, with the fixed
code of the study's first commit, started and ended by agent/trial.py. Before anything is trained,
what git has is compared with what the record says; a difference there is the answer.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from agent import workspace
from agent.compare import (
    Outcome,
    Seen,
    Stated,
    compare,
    contradictions,
    facts_of,
    other_code,
    other_config,
    seen_of,
    training_of,
)
from agent.journal import Run, Trial
from agent.ladder import shortened
from agent.loop import bench
from agent.novelty import State, changed_values, editable_values
from agent.replays import Key
from agent.seeds import on_this_machine
from agent.settings import StudyError
from agent.study import Study
from agent.trial import Bench, Interrupted
from nightshift.fixed.config import ConfigError, config_digest
from nightshift.fixed.result import CHECKPOINT_FOLDER

REPLAYS_FOLDER = "replays"  # in the study's folder, like trials/
APART = ("parent", "short")  # have a folder of their own in that of their trial
PROGRESS_FILE = "progress.f32"  # of a run: what fixed/budget.py recorded of each step
PATIENCE = 4.0  # wall limits, for a run that ended within one: the machine may be busy today


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to make again."""

    trial: Trial
    what: str  # run | parent | short | preflight | refusal
    run: Run | None  # as the journal has it
    clock: str  # recorded | again

    @property
    def key(self) -> Key:
        return Key(self.trial.number, self.what, self.run and self.run.seed, self.clock)

    @property
    def usual_s(self) -> float:
        """What it took then."""
        return (self.run.wall_s if self.run else None) or 5.0


Tell = Callable[[Job, Seen, Seen | None, Outcome], None]


def jobs_of(trial: Trial, seeds: str, clock: str) -> list[Job]:
    """`seeds`: all, also those of the parent that this trial asked for, and its short run; or
    first: the first run, of a failed trial the one that failed, of one that a short run ended that.
    The parent's short run is not made again."""
    short = trial.rung and Job(trial=trial, what="short", run=trial.rung.run, clock=clock)
    if short and not trial.runs:
        return [short]
    if not trial.runs:
        what = "preflight" if trial.reason.startswith("preflight:") else "refusal"
        return [Job(trial=trial, what=what, run=None, clock="recorded")]
    one = trial.runs[-1] if trial.status != "ok" else trial.runs[0]
    runs = [("run", run) for run in (trial.runs if seeds == "all" else [one])]
    runs += [("parent", run) for run in (trial.parent_runs if seeds == "all" else [])]
    jobs = [Job(trial=trial, what=what, run=run, clock=clock) for what, run in runs]
    return jobs + ([short] if short and seeds == "all" else [])


def groups_of(jobs: list[Job]) -> list[list[Job]]:
    """Those that share code and data, in order."""
    groups: dict[tuple, list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.trial.number, job.what), []).append(job)
    return list(groups.values())


def replay_group(
    study: Study, jobs: list[Job], noise: Stated, wrong: list[str], tell: Tell
) -> None:
    """Calls `tell` after each. `wrong`: what in the trial's record contradicts itself."""
    trial, what = jobs[0].trial, jobs[0].what
    folder = study.folder / REPLAYS_FOLDER / f"{trial.number:03d}"
    folder = folder / what if what in APART else folder
    owner = study.journal.trials[trial.parent] if what in ("parent", "refusal") else trial
    left = list(jobs)
    try:
        check_refs(study, owner)
        with workspace.worktree(study.repo, folder / "worktree", owner.commit) as tree:
            if what == "refusal":
                tell(jobs[0], *refuse_again(study, trial, tree, noise, wrong))
                return
            on = rebuilt(study, owner, tree, folder)
            if what == "short":
                on = replace(on, config=shortened(on.config, trial.rung.share))
            data = None if what == "preflight" else Data(on)
            for job in jobs:
                study.stop.check()
                tell(job, *replay_job(study, job, owner, on, data, noise, wrong))
                left.remove(job)
    except (Unbuildable, ConfigError, StudyError, workspace.Refused) as error:
        for job in left:
            why = " ".join("; ".join([*wrong, str(error)]).split())
            outcome = Outcome("not reproduced", why, {})
            tell(job, then_of(study, job), None, outcome)
    finally:
        clear(folder)


class Unbuildable(Exception):
    """What ran cannot be made again; the message says why."""


def check_refs(study: Study, owner: Trial) -> None:
    """Git has the commit, under the name that the study gave it."""
    if owner.commit is None or not workspace.has_commit(study.repo, owner.commit):
        raise Unbuildable(
            f"git has no commit {owner.commit} (trial {owner.number}) any more; fetch "
            f"refs/trials/{study.name}/* from where it still is"
        )
    ref = workspace.trial_ref(study.name, owner.number)
    at = workspace.refs_of(study.repo, study.name).get(ref)
    if at is None:
        study.note(f"{ref} is gone; `nightshift study study.name={study.name}` puts it back")
    elif at != owner.commit:
        raise Unbuildable(f"{ref} is at {at[:12]}, the journal says {owner.commit[:12]}")


def rebuilt(study: Study, owner: Trial, tree: Path, folder: Path) -> Bench:
    """The bench for a trial's code. Raises Unbuildable, Refused, ConfigError."""
    config = workspace.resolve(tree)
    digest = workspace.state_digest(tree, config)
    if owner.digest not in (None, digest) and same_python(study, owner):
        raise Unbuildable(
            f"the journal's digest of configuration and code is {owner.digest}, commit "
            f"{owner.commit[:12]} has {digest}"
        )
    on = bench(study, owner, tree, folder, on_this_machine(study, config))
    return replace(on, own_cache=folder / "cache")


def same_python(study: Study, owner: Trial) -> bool:
    """Syntax trees, which the digest names, are written down differently by each Python."""
    ran = [facts_of(study.folder / run.folder).get("python") for run in owner.runs if run.folder]
    here = f"{sys.version_info.major}.{sys.version_info.minor}."
    return all(version is None or version.startswith(here) for version in ran)


class Data:
    """The data of a group, made before its first run."""

    def __init__(self, on: Bench):
        self.on, self.made, self.problem = on, False, None

    def make(self, seed: int):
        """What went wrong, or None."""
        if not self.made:
            self.made = True
            self.problem = self.on.prepare(seed, PATIENCE * self.on.config.budget.wall_limit_s)
        return self.problem


def then_of(study: Study, job: Job) -> Seen:
    if job.run is None:
        return Seen(status=job.trial.status, message=job.trial.reason)
    return seen_of(study.folder, job.run)


def replay_job(study, job: Job, owner: Trial, on: Bench, data: Data | None, noise, wrong) -> tuple:
    """(then, now, outcome)"""
    then = then_of(study, job)
    if job.what == "preflight":
        settings = study.plan.study
        seed, limit_s = settings.baseline_seeds[0], on.config.budget.wall_limit_s
        run = on.preflight(seed, settings.preflight_steps, limit_s)
        now = Seen(status=run.status, message=run.message)
        return then, now, compare(then, now, noise, wrong)
    code = other_code(then, expected(job, on), commits_of(study, owner))
    code += other_config(study.folder / job.run.folder, on.config)
    wrong = [*wrong, *contradictions(study.folder, job.run)]
    if code:
        return then, None, Outcome("not reproduced", "; ".join([*wrong, *code]), {})
    now = run_again(study, job, on, data)
    return then, now, compare(then, now, noise, wrong)


def expected(job: Job, on: Bench) -> dict[str, str]:
    """The digests of what would run now, to compare with those of what ran."""
    config = on.config.model_copy(update={"seed": job.run.seed})
    return {
        "fixed_code": on.code.fixed,
        "editable_code": on.code.editable,
        "config_digest": config_digest(config),
    }


def commits_of(study: Study, owner: Trial) -> tuple[str, ...]:
    """A kept trial's commit may be one more than the one that ran: with the state of DVC."""
    before = workspace.parent_of(study.repo, owner.commit)
    return (owner.commit, before) if owner.decision == "keep" and before else (owner.commit,)


def run_again(study: Study, job: Job, on: Bench, data: Data) -> Seen:
    run, limit_s = job.run, on.config.budget.wall_limit_s
    if problem := data.make(run.seed):
        return Seen(status=problem.status, message=f"preparing its data: {problem.message}")
    replay = progress_of(study, job, on)
    if run.status == "ok" and job.clock == "recorded":
        limit_s *= PATIENCE
    name = f"seed_{run.seed}" if job.clock == "recorded" else f"seed_{run.seed}_clock"
    try:
        again = on.run(name, run.seed, limit_s, budget={"replay": replay and str(replay)})
    except Interrupted:
        shutil.rmtree(on.folder / name, ignore_errors=True)
        raise
    return seen_of(study.folder, again)


def progress_of(study: Study, job: Job, on: Bench) -> Path | None:
    """The recorded progress, where the clock was the budget and the run came to an end of its own;
    None: its budget says all."""
    folder = study.folder / job.run.folder
    training = training_of(folder)
    ended = training is not None and training.status in ("ok", "diverged")
    if on.config.budget.kind != "seconds" or job.clock == "again" or not ended:
        return None
    path = folder / PROGRESS_FILE
    if not path.is_file():
        study.note(f"{path} is gone: trial {job.trial.number} is replayed on the clock")
        return None
    return path.resolve()


def refuse_again(study: Study, trial: Trial, tree: Path, noise, wrong: list[str]) -> tuple:
    """A proposal that was refused is applied once more, to the same commit."""
    then, now = Seen(status=trial.status, message=trial.reason), Seen(status="ok")
    try:
        applied = workspace.apply(tree, trial.proposal, f"trial {trial.number:03d}: again")
        workspace.code_of(tree, study.settings["first_commit"])
        must_be_new(study, trial, applied)
    except workspace.Refused as error:
        now = Seen(status="invalid", message=str(error))
    return then, now, compare(then, now, noise, wrong)


def must_be_new(study: Study, trial: Trial, applied: workspace.Applied) -> None:
    """As the loop asked when the trial's turn came. Raises Refused."""
    baseline = editable_values(study.plan.config)
    changed = changed_values(applied.config, baseline)
    state = State(applied.digest, changed, applied.shape)
    earlier = study.journal.before(trial)
    workspace.must_be_new(earlier, trial.proposal, state, baseline, study.plan.space)


def clear(folder: Path) -> None:
    """Data and weights go; what the runs said stays."""
    for name in ("cache", "prepare", "worktree"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for weights in folder.glob(f"*/{CHECKPOINT_FOLDER}"):
        shutil.rmtree(weights, ignore_errors=True)
