"""A study: propose -> run -> decide -> keep | discard, until its trials are in the journal.

    nightshift study study.name=first study.trials=8 budget=20s

The journal is the truth. Its append is the moment that a trial exists; git refs, MLflow and the
report follow from it in `settle`, which can be repeated. So a study can be killed at any point and
started again with the same command. Ctrl-C stops the running trial and leaves nothing behind.
"""

import json
import shlex
import shutil
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import OmegaConf

from agent import workspace
from agent.decide import (
    Bar,
    Decision,
    Rule,
    bar_for,
    decide,
    has_drifted,
    measure_noise,
    next_seed,
    pair,
)
from agent.journal import Proposal, Run, Trial, proposal_from_json
from agent.proposers import Context, mixed
from agent.settings import StudyError, read_plan
from agent.study import Study, marks_of, open_study, settle, stop_on_signals
from agent.trial import PREPARE_LIMIT_S, Bench, Interrupted, data_digest
from agent.warm import StartError
from nightshift.fixed.config import ROOT, Config, ConfigError
from nightshift.fixed.result import CHECKPOINT_FOLDER, write_json

BASELINE = Proposal(
    title="baseline",
    hypothesis="The configuration as it stands, with each seed: where the study starts from.",
    source="baseline",
)
EXIT_INTERRUPTED = 130


class BaselineFailed(StudyError):
    """There is nothing to compare with."""


USAGE = """usage: nightshift study [key=value ...]

Runs a study: the baseline, then trials; keeps what is better. Started again with the same
study.name it goes on. Every key of `nightshift pretrain --help` can be given too, e.g.
  nightshift study study.name=mine study.trials=40 corpus=folder corpus.path=/my/texts
  nightshift study preset=d12 space=wide

Its own keys, with their defaults (conf/study.yaml):"""


def main(argv: list[str] | None = None, repo: Path = ROOT) -> int:
    """Exit status: 0 done, 1 the baseline failed, 2 it cannot start, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(f"{USAGE}\n\n{(repo / 'conf/study.yaml').read_text(encoding='utf-8')}")
        return 0
    try:
        if options := [argument for argument in argv if argument.startswith("-")]:
            raise ConfigError(f"{options[0]}: there is no such option; a study takes key=value")
        plan = read_plan(repo / "conf", argv)
        with stop_on_signals() as stop, open_study(repo, plan, stop) as study:
            run_study(study)
        return 0
    except Interrupted:
        print(f"stopped. To go on: {shlex.join(['nightshift', 'study', *argv])}", flush=True)
        return EXIT_INTERRUPTED
    except BaselineFailed as error:
        print(error, file=sys.stderr)
        return 1
    except (ConfigError, StudyError, StartError) as error:
        print(error, file=sys.stderr)
        return 2


def run_study(study: Study) -> None:
    settle(study)
    while len(study.journal) <= study.plan.study.trials:
        study.stop.check()
        trial = run_trial(study, len(study.journal), study.journal.incumbent)
        if trial is None:
            study.note("the sources have nothing left to propose; widen conf/space or add recipes")
            break
        study.journal.append(trial)  # from here on the trial exists
        study.view.end(trial)
        settle(study, trial)


def run_trial(study: Study, number: int, parent: Trial | None) -> Trial | None:
    """Propose, apply, run and judge; None when there is no proposal. Changes no branch."""
    folder, started = study.folder / f"trials/{number:03d}", time.monotonic()
    commit = parent.commit if parent else study.settings["first_commit"]
    with workspace.worktree(study.repo, folder / "worktree", commit) as tree:
        proposal = next_proposal(study, number, folder, tree) if parent else BASELINE
        if proposal is None:
            return None
        study.view.begin(number, proposal.title)
        trial = Trial(
            number=number,
            proposal=proposal,
            parent=parent.number if parent else None,
            status="ok",
            decision="discard",
            reason="",
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            config = apply(study, trial, tree, folder, commit)
            run_seeds(study, trial, parent, bench(study, trial, tree, folder, config))
        except workspace.Refused as refusal:
            trial.status, trial.reason = "invalid", str(refusal)
        if trial.decision == "keep":
            title = f"trial {number:03d}: {proposal.title}"
            study.view.show("recording data and weights")
            run_folder, marks = study.folder / trial.runs[0].folder, marks_of(study.folder, number)
            trial.commit = workspace.record_keep(tree, run_folder, title, marks)
    trial.wall_s = round(time.monotonic() - started, 3)
    return trial


def next_proposal(study: Study, number: int, folder: Path, tree: Path) -> Proposal | None:
    """Written down before anything is done with it: a study that was killed goes on with it."""
    path = folder / "proposal.json"
    if path.exists():
        return proposal_from_json(json.loads(path.read_text(encoding="utf-8")))

    def read(name: str) -> str | None:
        return (tree / name).read_text(encoding="utf-8") if (tree / name).is_file() else None

    context = Context(
        number=number,
        seed=study.plan.study.seed,
        journal=study.journal,
        values=workspace.resolve(tree).model_dump(),
        baseline=study.plan.config.model_dump(),
        space=study.plan.space,
        sources=study.plan.study.sources,
        read=read,
        note=study.note,
    )
    proposal = mixed.propose(context)
    if proposal is not None:
        write_json(path, asdict(proposal))
    return proposal


def apply(study: Study, trial: Trial, tree: Path, folder: Path, commit: str):
    """The trial's resolved configuration; fills in what the change is. Raises Refused."""
    if trial.parent is None:
        config, trial.commit = workspace.resolve(tree), commit
        trial.digest = workspace.state_digest(tree, config)
    else:
        title = f"trial {trial.number:03d}: {trial.proposal.title}"
        applied = workspace.apply(tree, trial.proposal, title)
        config, trial.commit, trial.digest = applied.config, applied.commit, applied.digest
        trial.lines_added, trial.lines_removed = applied.lines_added, applied.lines_removed
        (folder / "diff.patch").write_text(applied.diff, "utf-8", "surrogateescape")
    workspace.point_trial(study.repo, study.name, trial.number, trial.commit)
    for earlier in study.journal.trials:
        if earlier.digest == trial.digest:
            raise workspace.Refused(
                f"same configuration and code as trial {earlier.number} "
                f"('{earlier.proposal.title}'); a trial must differ from every earlier one. "
                "Propose another value or another edit."
            )
    config = on_this_machine(study, config)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(config.model_dump()), folder / "config.yaml")
    return config


def on_this_machine(study: Study, config: Config) -> Config:
    """The machine's side is the study's own, whatever conf/runtime says at the commit."""
    given = study.plan.config
    return config.model_copy(update={"runtime": given.runtime, "tracking": given.tracking})


def bench(study: Study, trial: Trial, tree: Path, folder: Path, config) -> Bench:
    """The baseline builds the common data; a trial reads them and writes to its own place."""
    shared = (study.repo / config.runtime.cache_dir).resolve()
    return Bench(
        marks=marks_of(study.folder, trial.number),
        study_folder=study.folder,
        folder=folder,
        tree=tree,
        config=config,
        own_cache=shared if trial.parent is None else folder / "cache",
        shared_cache=shared,
        starter=study.starter,
        stop=study.stop,
        show=study.view.show,
    )


def run_seeds(study: Study, trial: Trial, parent: Trial | None, on: Bench) -> None:
    """Preflight, then one seed after another while they can still change the decision."""
    settings, limit_s = study.plan.study, on.config.budget.wall_limit_s
    preflight_limit_s = limit_s if parent else PREPARE_LIMIT_S
    first = settings.baseline_seeds[0]
    check = on.preflight(first, settings.preflight_steps, preflight_limit_s)
    if check.status != "ok":
        trial.status, trial.reason = check.status, f"preflight: {check.message}"
    elif parent:
        check_drift(study, trial, parent, on)
    while trial.status == "ok" and (seed := wanted_seed(study, trial, parent)) is not None:
        if parent and seed not in study.journal.runs_of(parent, trial):
            trial.parent_runs.append(run_parent(study, parent, seed, on))
            continue
        run = on.run(f"seed_{seed}", seed, limit_s)
        trial.runs.append(run)
        trial.status = run.status
        if parent:
            trial.differences = pair(study.journal.runs_of(parent, trial), trial.runs)
    judge(study, trial, parent)


def wanted_seed(study: Study, trial: Trial, parent: Trial | None) -> int | None:
    """The next seed to run, here or first at the parent; None when the trial can be judged."""
    settings = study.plan.study
    if parent is None:
        return next_seed(trial.runs, settings.baseline_seeds)
    runs = study.journal.runs_of(parent, trial)
    failed = [seed for seed, run in runs.items() if run.status != "ok"]
    seed = next_seed(trial.runs, settings.seeds, failed)
    return seed if seed is not None and verdict(study, trial).kind == "more" else None


def verdict(study: Study, trial: Trial) -> Decision:
    shorter = trial.lines_removed > trial.lines_added
    return decide(trial.differences, bar_of(study, trial), shorter)


def bar_of(study: Study, trial: Trial) -> Bar:
    settings = study.plan.study
    rule = Rule(
        false_keeps=settings.false_keeps,
        equal_within=settings.equal_within,
        min_seeds=len(settings.baseline_seeds),
        max_seeds=settings.max_seeds,
    )
    return bar_for(study.journal.trials, trial.proposal.kind, rule)


def check_drift(study: Study, trial: Trial, parent: Trial, on: Bench) -> None:
    """Now and then the incumbent runs a seed again: do its old numbers still compare?

    Only where the clock is the budget. With tokens or steps a run on the same machine repeats.
    """
    every = study.plan.study.drift_every
    if on.config.budget.kind != "seconds" or not every or trial.number % every:
        return
    before = study.journal.runs_of(parent)
    seed, then = next((s, run) for s, run in before.items() if run.status == "ok")
    now = run_parent(study, parent, seed, on)
    trial.parent_runs.append(now)
    if now.status == "ok":
        trial.drift = round(now.val_bpb - then.val_bpb, 6)
        trial.drifted = has_drifted(trial.drift, bar_of(study, trial))
    if trial.drifted:
        study.view.note(
            f"trial {trial.number}: the incumbent's val_bpb on seed {seed} moved by "
            f"{trial.drift:+.4f} since it was measured; its old numbers no longer compare, so it "
            "runs each seed again"
        )


def run_parent(study: Study, parent: Trial, seed: int, on: Bench) -> Run:
    """The parent on a seed that it has not run yet, so that there is a pair: in its own code, with
    its own data, as it ran before."""
    folder = on.folder / "parent"
    study.view.show(f"parent on seed {seed}")
    with workspace.worktree(study.repo, folder / "worktree", parent.commit) as tree:
        config = on_this_machine(study, workspace.resolve(tree))
        place = replace(on, folder=folder, tree=tree, config=config, own_cache=folder / "cache")
        run = place.run(f"seed_{seed}", seed, config.budget.wall_limit_s)
    for leftover in (folder / "cache", study.folder / run.folder / CHECKPOINT_FOLDER):
        shutil.rmtree(leftover, ignore_errors=True)
    return run


def judge(study: Study, trial: Trial, parent: Trial | None) -> None:
    """Fill in decision, reason and numbers. Raises BaselineFailed."""
    common = study.plan.study.baseline_seeds  # so that val_bpb compares along the lineage
    numbers = [run.val_bpb for run in trial.runs if run.status == "ok" and run.seed in common]
    if numbers and trial.status == "ok":
        trial.val_bpb = round(sum(numbers) / len(numbers), 6)  # as result.json and MLflow have it
    trial.data_digest = data_digest(study.folder, trial.runs[0]) if trial.runs else None
    if parent is None:
        if trial.status != "ok":
            reason = trial.reason or f"seed {trial.runs[-1].seed}: {trial.runs[-1].message}"
            raise BaselineFailed(f"the baseline failed ({trial.status}), {reason}")
        sigma = measure_noise([numbers]).sigma
        trial.decision = "keep"
        trial.reason = f"baseline: sigma {sigma:.4f} over {len(numbers)} seeds"
    elif trial.status != "ok" and trial.runs:
        failed = trial.runs[-1]
        trial.reason = f"{failed.status} on seed {failed.seed}: {failed.message}"
    elif trial.runs:
        fill_in(trial, verdict(study, trial))


def fill_in(trial: Trial, decision: Decision) -> None:
    """`more` with no seed left to run is a discard."""
    trial.decision = "keep" if decision.kind == "keep" else "discard"
    trial.reason = decision.reason
    for name in ("gain", "estimate", "low", "high", "evidence"):
        value = getattr(decision, name)
        setattr(trial, name, None if value is None else round(value, 6))
