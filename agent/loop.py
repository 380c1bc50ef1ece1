"""A study: propose -> run -> decide -> keep | discard, until its trials are in the journal.

    nightshift study study.name=first study.trials=8 budget=20s

The journal is the truth. Its append is the moment that a trial exists; git refs, MLflow and the
report follow from it in `settle`, which can be repeated. So a study can be killed at any point and
started again with the same command. Ctrl-C stops the running trial and leaves nothing behind.
"""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

from omegaconf import OmegaConf

from agent import outside, tools, workspace
from agent.after import read_plan_with_origin
from agent.answer import StudyFiles
from agent.base import ensure_base, for_runs
from agent.costs import Paused
from agent.journal import Journal, Proposal, Trial, proposal_from_json
from agent.novelty import State, changed_values, editable_values, near_trial
from agent.proposers import Context, mixed
from agent.seeds import on_this_machine, run_seeds
from agent.settings import StudyError
from agent.study import (
    BASE_FOLDER,
    BaselineFailed,
    Study,
    marks_of,
    open_study,
    settle,
    stop_on_signals,
)
from agent.trial import Bench, Interrupted
from agent.warm import StartError
from nightshift.fixed.config import ROOT, Config, ConfigError
from nightshift.fixed.result import write_json

BASELINE = Proposal(
    title="baseline",
    hypothesis="The configuration as it stands, with each seed: where the study starts from.",
    source="baseline",
)
EXIT_INTERRUPTED = 130
EXIT_PAUSED = 3


USAGE = """usage: nightshift study [key=value ...]

Runs a study: the baseline, then trials; keeps what is better. Started again with the same
study.name it goes on. Every key of `nightshift pretrain --help` can be given too, e.g.
  nightshift study study.name=mine study.trials=40 corpus=folder corpus.path=/my/texts
  nightshift study preset=d12 space=wide

Its own keys, with their defaults (conf/study.yaml):"""


def main(argv: list[str] | None = None, repo: Path = ROOT) -> int:
    """Exit status: 0 done, 1 the baseline failed, 2 it cannot start, 3 paused by a cap,
    130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(f"{USAGE}\n\n{(repo / 'conf/study.yaml').read_text(encoding='utf-8')}")
        return 0
    try:
        if options := [argument for argument in argv if argument.startswith("-")]:
            raise ConfigError(f"{options[0]}: there is no such option; a study takes key=value")
        plan = read_plan_with_origin(repo, argv)
        with stop_on_signals() as stop, open_study(repo, plan, stop) as study:
            run_study(study)
        return 0
    except Paused as reason:
        print(f"{reason}: {shlex.join(['nightshift', 'study', *argv])}", file=sys.stderr)
        return EXIT_PAUSED
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
    ensure_base(study)
    settle(study)
    try:
        run_trials(study)
    finally:
        if study.researcher:
            study.researcher.close()


def run_trials(study: Study) -> None:
    while not study.plan.study.end.is_reached(study.journal.trials):
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
    folder = study.folder / f"trials/{number:03d}"
    commit = parent.commit if parent else study.settings["first_commit"]
    with workspace.worktree(study.repo, folder / "worktree", commit) as tree:
        proposal = next_proposal(study, number, folder, tree) if parent else BASELINE
        if proposal is None:
            return None
        started = time.monotonic()  # waiting for a proposal is no cost of the trial
        study.view.begin(number, proposal.heading)
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
            think_ahead(study, trial)
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

    if study.researcher:
        study.view.begin(number, "asking the model")

    def read(name: str) -> str | None:
        return (tree / name).read_text(encoding="utf-8") if (tree / name).is_file() else None

    context = context_of(study, number, study.journal, workspace.resolve(tree).model_dump(), read)
    proposal = mixed.propose(context)
    if proposal is not None:
        write_json(path, asdict(proposal))
    return proposal


def think_ahead(study: Study, trial: Trial) -> None:
    """If it is the model's turn after this trial, let it propose while this one runs. The baseline
    and the last trial run alone, and so does one whose successor is written down."""
    number = trial.number + 1
    last = number > study.plan.study.end.trials
    if not thinks_ahead(study) or trial.parent is None or last:
        return
    if (study.folder / f"trials/{number:03d}/proposal.json").exists():
        return
    files = StudyFiles(study.repo, study.folder, study.journal.while_running(trial))
    read = cache(partial(tools.text_at, study.repo, files.head))
    context = context_of(study, number, files.journal, tools.incumbent_values(files), read)
    if mixed.turn(context)[0][0] == "llm":
        study.researcher.think_ahead(context)


def thinks_ahead(study: Study) -> bool:
    return bool(study.researcher) and study.plan.study.llm.thinks_ahead


def context_of(
    study: Study, number: int, journal: Journal, values: dict, read: Callable[[str], str | None]
) -> Context:
    """`values` and `read`: of the incumbent."""
    return Context(
        number=number,
        seed=study.plan.study.seed,
        journal=journal,
        values=values,
        baseline=study.plan.config.model_dump(),
        space=study.plan.space,
        sources=study.plan.study.sources,
        strategy=study.plan.study.strategy,
        rule=study.plan.study.rule,
        end=study.plan.study.end,
        plateau_after=study.plan.study.plateau_after,
        read=read,
        target=study.plan.study.judged_by,
        note=study.note,
        memory=study.memory,
        outside=lambda patient: outside.take(study, number, patient),
        researcher=study.researcher,
        ahead=thinks_ahead(study),
    )


def apply(study: Study, trial: Trial, tree: Path, folder: Path, commit: str):
    """The trial's resolved configuration; fills in what the change is. Raises Refused."""
    if trial.parent is None:
        config, trial.commit = workspace.resolve(tree), commit
        trial.digest = workspace.state_digest(tree, config)
        trial.shape = workspace.shape_at(tree, study.plan.study.judged_by)
    else:
        title = f"trial {trial.number:03d}: {trial.proposal.title}"
        applied = workspace.apply(tree, trial.proposal, title, study.plan.study.judged_by)
        config, trial.commit = applied.config, applied.commit
        trial.digest, trial.shape = applied.digest, applied.shape
        trial.lines_added, trial.lines_removed = applied.lines_added, applied.lines_removed
        (folder / "diff.patch").write_text(applied.diff, "utf-8", "surrogateescape")
    workspace.point_trial(study.repo, study.name, trial.number, trial.commit)
    check_novelty(study, trial, config)
    config = on_this_machine(study, config)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(config.model_dump()), folder / "config.yaml")
    return for_runs(study, config)


def check_novelty(study: Study, trial: Trial, config: Config) -> None:
    """Raises Refused; fills in what later trials are compared with."""
    baseline, space = editable_values(study.plan.config), study.plan.space
    trial.changed = changed_values(config, baseline)
    state = State(trial.digest, trial.changed, trial.shape)
    workspace.must_be_new(study.journal, trial.proposal, state, baseline, space)
    near = near_trial(study.journal.trials, state, baseline, space)
    if near and near.number not in trial.proposal.near:
        trial.proposal.near.append(near.number)


def bench(study: Study, trial: Trial, tree: Path, folder: Path, config) -> Bench:
    """The baseline builds the common data; a trial reads them and writes to its own place."""
    shared, target = (study.repo / config.runtime.cache_dir).resolve(), study.plan.study.judged_by
    return Bench(
        marks=marks_of(study.folder, trial.number),
        study_folder=study.folder,
        folder=folder,
        tree=tree,
        base=study.folder / BASE_FOLDER,
        code=workspace.code_of(tree, study.settings["first_commit"], target),
        baseline_work=baseline_work(study) if trial.parent is not None else None,
        config=config,
        own_cache=shared if trial.parent is None else folder / "cache",
        shared_cache=shared,
        starter=study.starter,
        stop=study.stop,
        show=study.view.show,
        target=target,
        base_sha256=study.base and study.base.sha256,
    )


def baseline_work(study: Study) -> float | None:
    """The median of the baseline's runs (agent/trial.py: WORK_LIMIT)."""
    known = [run.work for run in study.journal.trials[0].runs if run.work]
    return statistics.median(known) if known else None
