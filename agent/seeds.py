"""One seed after another, of a trial and where needed of its parent, until the trial can be judged.

decide.py says whether another seed is worth its price; here it is run. A pair needs the parent on
the same seed: what the parent has not run yet it runs now, in its own code, and the journal keeps
that run with the trial that asked for it. No run of a parent is made twice.
"""

import shutil
from dataclasses import replace

from agent import early, ladder, strategy, workspace
from agent.base import for_runs
from agent.decide import (
    Bar,
    Decision,
    bar_for,
    decide,
    has_drifted,
    is_same,
    measure_noise,
    next_seed,
    pair,
)
from agent.journal import Run, Rung, Trial
from agent.study import BaselineFailed, Study
from agent.trial import PREPARE_LIMIT_S, Bench, data_digest
from nightshift.fixed.config import Config
from nightshift.fixed.result import CHECKPOINT_FOLDER


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
        climb(study, trial, parent, on)
    while trial.status == "ok" and (seed := wanted_seed(study, trial, parent)) is not None:
        if parent and seed not in study.journal.runs_of(parent, trial):
            trial.parent_runs.append(run_parent(study, parent, seed, on))
            continue
        watch = watch_for(study, trial, parent, seed, on.config.runtime.num_dev_points - 1)
        run = on.run(f"seed_{seed}", seed, limit_s, watch)
        trial.runs.append(run)
        trial.status = run.status
        if watch and watch.passed:
            trial.behind = round(watch.passed.bpb, 6)
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
    seed = next_seed(trial.runs, seeds_for(study, trial), failed)
    return seed if seed is not None and verdict(study, trial, runs).kind == "more" else None


def watch_for(
    study: Study, trial: Trial, parent: Trial | None, seed: int, checks: int
) -> early.Watch | None:
    """Of a trial's first run, once enough is known of earlier ones. None for one that is behind
    already and runs on as a check."""
    known, first = None, parent is not None and not trial.runs
    if first and trial.behind is None and study.plan.study.early_stop and checks >= 1:
        known = limit_for(study, trial, early.history_of(study.folder, study.journal, checks))
    if known is None:
        return None
    parents = early.curve_of(study.folder, study.journal.runs_of(parent, trial)[seed])
    return early.Watch(parents, known, checks, is_check(study))


def limit_for(study: Study, trial: Trial, history: list[early.Past]) -> early.Limit | None:
    bar = bar_for(study.journal.trials, trial.proposal.kind, study.plan.study.rule)
    shorter = trial.lines_removed > trial.lines_added
    hopeless = lambda gain: decide([gain], bar, shorter).kind == "discard"  # noqa: E731
    return early.limit_of(history, hopeless, study.plan.study.early_stop)


def is_check(study: Study) -> bool:
    """Does the next trial that is too far behind run on all the same?"""
    return early.runs_on(sum(t.behind is not None for t in study.journal.trials))


def climb(study: Study, trial: Trial, parent: Trial, on: Bench) -> None:
    """The short run, where the study has a ladder; may end the trial (ladder.py)."""
    share, seed = study.plan.study.ladder, study.plan.study.seeds[0]
    if share is None or trial.proposal.runs_again:
        return
    theirs, made = study.journal.rung_of(parent, share, trial), None
    if theirs is None:
        theirs = made = run_parent(study, parent, seed, on, share)
    short = replace(on, config=ladder.shortened(on.config, share))
    run = short.run("short", seed, short.config.budget.wall_limit_s)
    shutil.rmtree(study.folder / run.folder / CHECKPOINT_FOLDER, ignore_errors=True)
    trial.rung = Rung(share=share, run=run, parent_run=made)
    if {run.status, theirs.status} != {"ok"}:
        return
    behind = trial.rung.behind = round(run.score - theirs.score, 6)
    known = limit_for(study, trial, ladder.history_of(study.journal, share))
    if known and behind > known.behind:
        trial.behind = behind
        if not is_check(study):
            trial.status, trial.reason = "stopped", ladder.why(behind, share, known)


def seeds_for(study: Study, trial: Trial) -> list[int]:
    """In the order in which they are run. A repeat has only those that its state has not run yet:
    its evidence must not be what was seen when the repeat was asked for."""
    settings = study.plan.study
    if trial.proposal.repeats is None:
        return settings.seeds
    same = [t for t in study.journal.trials if t.digest == trial.digest]
    used = {run.seed for t in same for run in t.runs}
    others = range(1, settings.max_seeds + len(used) + len(settings.baseline_seeds) + 1)
    fresh = [seed for seed in dict.fromkeys([*settings.seeds, *others]) if seed not in used]
    return fresh[: settings.max_seeds]


def verdict(study: Study, trial: Trial, parent_runs: dict[int, Run]) -> Decision:
    shorter = trial.lines_removed > trial.lines_added
    same = is_same(parent_runs, trial.runs)
    return decide(trial.differences, bar_of(study, trial), shorter, same)


def bar_of(study: Study, trial: Trial) -> Bar:
    settings = study.plan.study
    return strategy.bar_of(trial, study.journal, settings.strategy, settings.rule, settings.end)


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
        trial.drift = round(now.score - then.score, 6)
        trial.drifted = has_drifted(trial.drift, bar_of(study, trial))
    if trial.drifted:
        study.view.note(
            f"trial {trial.number}: the incumbent's {now.target} on seed {seed} moved by "
            f"{trial.drift:+.4f} since it was measured; its old numbers no longer compare, so it "
            "runs each seed again"
        )


def run_parent(
    study: Study, parent: Trial, seed: int, on: Bench, share: float | None = None
) -> Run:
    """The parent on a seed that it has not run yet, so that there is a pair: in its own code, with
    its own data, as it ran before. `share`: of the budget, for a short run."""
    folder = on.folder / "parent"
    study.view.show(f"parent on seed {seed}")
    with workspace.worktree(study.repo, folder / "worktree", parent.commit) as tree:
        config = for_runs(study, on_this_machine(study, workspace.resolve(tree)))
        config = ladder.shortened(config, share) if share else config
        place = replace(
            on,
            folder=folder,
            tree=tree,
            code=workspace.code_of(tree, study.settings["first_commit"], on.target),
            config=config,
            own_cache=folder / "cache",
        )
        limit_s = config.budget.wall_limit_s
        run = place.prepared_run("short" if share else f"seed_{seed}", seed, limit_s)
    for leftover in (folder / "cache", study.folder / run.folder / CHECKPOINT_FOLDER):
        shutil.rmtree(leftover, ignore_errors=True)
    return run


def on_this_machine(study: Study, config: Config) -> Config:
    """The machine's side is the study's own, whatever conf/runtime says at the commit."""
    given = study.plan.config
    return config.model_copy(
        update={
            "runtime": given.runtime,
            "sandbox": given.sandbox,
            "tracking": given.tracking,
        }
    )


def judge(study: Study, trial: Trial, parent: Trial | None) -> None:
    """Fill in decision, reason and numbers. Raises BaselineFailed."""
    common = study.plan.study.baseline_seeds  # so that trials compare along the lineage
    ok = [run for run in trial.runs if run.status == "ok"]
    numbers = [run.score for run in ok if run.seed in common] or [run.score for run in ok]
    if numbers and trial.status == "ok":
        mean = round(sum(numbers) / len(numbers), 6)  # as result.json and MLflow have it
        setattr(trial, study.plan.study.target, mean)
    trial.data_digest = data_digest(study.folder, trial.runs[0]) if trial.runs else None
    if parent is None:
        if trial.status != "ok":
            reason = trial.reason or f"seed {trial.runs[-1].seed}: {trial.runs[-1].message}"
            raise BaselineFailed(f"the baseline failed ({trial.status}), {reason}")
        sigma = measure_noise([numbers]).sigma
        trial.decision = "keep"
        trial.reason = f"baseline: sigma {sigma:.4f} over {len(numbers)} seeds"
    elif trial.status == "stopped" and trial.runs:
        trial.reason = f"stopped early: {trial.runs[-1].message}"
    elif trial.status != "ok" and trial.runs:
        failed = trial.runs[-1]
        trial.reason = f"{failed.status} on seed {failed.seed}: {failed.message}"
    elif trial.status == "ok":
        fill_in(trial, verdict(study, trial, study.journal.runs_of(parent, trial)))
        if trial.behind is not None:
            trial.reason += f"; {early.ran_on(trial)}"


def fill_in(trial: Trial, decision: Decision) -> None:
    """`more` with no seed left to run is a discard."""
    trial.decision = "keep" if decision.kind == "keep" else "discard"
    trial.reason = decision.reason
    for name in ("gain", "estimate", "low", "high", "evidence"):
        value = getattr(decision, name)
        setattr(trial, name, None if value is None else round(value, 6))
