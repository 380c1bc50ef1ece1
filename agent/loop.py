"""A study: propose -> run -> decide -> keep | discard, until its trials are in the journal.

    nightshift study study.name=first study.trials=8 budget=20s

The journal is the truth. Its append is the moment that a trial exists; git refs, MLflow and the
report follow from it in `settle`, which can be repeated. So a study can be killed at any point and
started again with the same command. Ctrl-C stops the running trial and leaves nothing behind.
"""

import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import OmegaConf

from agent import workspace
from agent.decide import decide, measure_noise, next_seed, repeated
from agent.journal import Journal, Proposal, Trial, proposal_from_json
from agent.proposers import Context, mixed
from agent.report import write_report
from agent.settings import Plan, StudyError, differences, read_plan
from agent.tracking import Mirror
from agent.trial import PREPARE_LIMIT_S, Bench, Interrupted, Stop, data_digest
from agent.view import View, summary
from agent.warm import MARK, STUDY_MARK, Starter, StartError, kill_marked
from nightshift.fixed.config import ROOT, ConfigError
from nightshift.fixed.result import CHECKPOINT_FOLDER, write_json
from nightshift.fixed.tracking import open_store

BASELINE = Proposal(
    title="baseline",
    hypothesis="The configuration as it stands, with each seed: where the study starts from.",
    source="baseline",
)
EXIT_INTERRUPTED = 130


@dataclass(kw_only=True)
class Study:
    """Everything that one process knows of the study that it runs."""

    repo: Path
    folder: Path
    plan: Plan
    journal: Journal
    settings: dict  # of settings.json
    starter: Starter
    stop: Stop
    view: View
    mirror: Mirror
    told: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.plan.study.name

    def note(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            self.view.note(text)


def main(argv: list[str] | None = None, repo: Path = ROOT) -> int:
    """Exit status: 0 done, 1 the baseline failed, 2 it cannot start, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
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
            run_folder, marks = study.folder / trial.runs[0].folder, marks_of(study.folder, number)
            trial.commit = workspace.record_keep(tree, run_folder, title, marks)
    trial.wall_s = round(time.monotonic() - started, 3)
    return trial


def marks_of(study_folder: Path, number: int) -> dict[str, str]:
    """In the environment of every process of a trial, so that none escapes (warm.py)."""
    return {MARK: f"{study_folder.name}/{number:03d}", STUDY_MARK: str(study_folder)}


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
    # The machine's side is the study's own, whatever conf/runtime says at the commit.
    given = study.plan.config
    config = config.model_copy(update={"runtime": given.runtime, "tracking": given.tracking})
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(config.model_dump()), folder / "config.yaml")
    return config


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
    seeds = settings.baseline_seeds
    preflight_limit_s = limit_s if parent else PREPARE_LIMIT_S
    check = on.preflight(seeds[0], settings.preflight_steps, preflight_limit_s)
    if check.status != "ok":
        trial.status, trial.reason = check.status, f"preflight: {check.message}"
    while trial.status == "ok" and (seed := next_seed(parent, trial.runs, seeds)) is not None:
        run = on.run(f"seed_{seed}", seed, limit_s)
        trial.runs.append(run)
        trial.status = run.status
    judge(study, trial, parent)


def judge(study: Study, trial: Trial, parent: Trial | None) -> None:
    """Fill in decision, reason and numbers. Raises BaselineFailed."""
    numbers = [run.val_bpb for run in trial.runs if run.status == "ok"]
    trial.val_bpb = sum(numbers) / len(numbers) if numbers and trial.status == "ok" else None
    trial.data_digest = data_digest(study.folder, trial.runs[0]) if trial.runs else None
    if parent is None:
        if trial.status != "ok":
            reason = trial.reason or f"seed {trial.runs[-1].seed}: {trial.runs[-1].message}"
            raise BaselineFailed(f"the baseline failed ({trial.status}), {reason}")
        sigma = measure_noise([numbers]).sigma
        trial.decision = "keep"
        trial.reason = f"baseline: sigma {sigma:.4f} over {len(numbers)} seeds"
    elif trial.runs:
        noise = measure_noise(repeated([*study.journal.trials, trial]))
        decision = decide(parent, trial.runs, noise, study.plan.study.z)
        trial.decision, trial.reason, trial.gain = decision.kind, decision.reason, decision.gain


class BaselineFailed(StudyError):
    """There is nothing to compare with."""


def settle(study: Study, trial: Trial | None = None) -> None:
    """Make git, the disk and MLflow follow the journal: all of it, or the trial just added."""
    first_commit = study.settings["first_commit"]
    if left := workspace.settle(study.repo, study.name, study.journal, first_commit):
        study.note(left)
    study.settings["sigma"] = measure_noise(repeated(study.journal.trials)).sigma
    write_json(study.folder / "settings.json", study.settings)
    for each in [trial] if trial else study.journal.trials:
        clear_trial(study, each)
    clear_half_trial(study.folder, len(study.journal))
    if trial is None:
        study.mirror.reconcile(study.journal)
    else:
        study.mirror.log_trial(trial)


def clear_trial(study: Study, trial: Trial) -> None:
    """Remove what a judged trial leaves: its data, and the weights of a discarded one."""
    folder = study.folder / f"trials/{trial.number:03d}"
    shutil.rmtree(folder / "cache", ignore_errors=True)
    shutil.rmtree(folder / "preflight" / CHECKPOINT_FOLDER, ignore_errors=True)
    if trial.decision != "keep" and not study.plan.study.keep_checkpoints:
        for run in trial.runs:
            shutil.rmtree(study.folder / run.folder / CHECKPOINT_FOLDER, ignore_errors=True)


def clear_half_trial(folder: Path, number: int) -> None:
    """Back to its proposal."""
    half = folder / f"trials/{number:03d}"
    for path in half.iterdir() if half.exists() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "proposal.json":
            path.unlink()


# ---- opening and closing ----


@contextmanager
def stop_on_signals():
    """Ctrl-C, SIGTERM and a closed terminal only set a flag: nothing is cut in the middle."""
    stop = Stop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        numbers.append(signal.SIGHUP)
    request = lambda *_: setattr(stop, "requested", True)  # noqa: E731
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def open_study(repo: Path, plan: Plan, stop: Stop):
    """A study that is ready to run, alone, with nothing left of an earlier process."""
    base = workspace.base_commit(repo)
    name, folder = plan.study.name, repo / "outputs/studies" / plan.study.name
    with lock(folder, name):
        kill_marked(folder)
        journal = read_journal(folder)
        settings = recall(repo, folder, plan, journal)
        workspace.remove_worktrees_under(repo, folder)
        workspace.remove_stale_locks(repo, name)
        starter = Starter(folder, plan.study.warm)  # its imports go on while MLflow is opened
        study, status = None, "FAILED"
        try:
            store = open_store(plan.config.tracking)
            settings = settings or begin(repo, folder, plan, base)
            mirror = Mirror(store, name, folder)
            mirror.open_study(flat_settings(settings), settings["base_commit"])
            view = View(journal, plan.study.trials)
            study = Study(
                repo=repo,
                folder=folder,
                plan=plan,
                journal=journal,
                settings=settings,
                starter=starter,
                stop=stop,
                view=view,
                mirror=mirror,
            )
            yield study
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            raise
        finally:
            starter.close()
            kill_marked(folder)
            if study:
                close_study(study, status)


def close_study(study: Study, status: str) -> None:
    if status == "KILLED":  # a failure's files stay: they say why
        clear_half_trial(study.folder, len(study.journal))
    study.view.close()
    report = None
    if study.journal.trials:
        report = write_report(study.folder, study.journal, study.settings)
        study.mirror.attach_report(report)
    study.mirror.close_study(status)
    if status == "FINISHED":
        where = Path(os.path.relpath(report))
        print(summary(study.journal, study.folder, study.name, where), flush=True)


def flat_settings(settings: dict) -> dict:
    """What MLflow shows of a study: its settings, and the baseline's configuration."""
    return {"study": settings["study"], **settings["config"]}


def read_journal(folder: Path) -> Journal:
    try:
        return Journal(folder / "journal.jsonl")
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{folder / 'journal.jsonl'} is damaged: {error}") from None


def recall(repo: Path, folder: Path, plan: Plan, journal: Journal) -> dict | None:
    """The settings of a study that has trials; None for a new one. Raises StudyError."""
    path, name = folder / "settings.json", plan.study.name
    if place := workspace.place_of(repo, f"study/{name}"):
        raise StudyError(
            f"branch study/{name} is checked out at {place}; a study moves its own branch. "
            "Check out another branch there, or choose another study.name"
        )
    if not journal.trials:
        if workspace.refs_of(repo, name) and not path.exists():
            raise StudyError(
                f"study.name ({name}): git has refs of such a study, but {folder} is gone. Choose "
                f"another study.name, or forget it: {workspace.forget_command(name)}"
            )
        return None
    settings = json.loads(path.read_text(encoding="utf-8"))
    if differing := differences(settings, plan):
        raise StudyError(
            f"study.name ({name}): that study has other settings ({'; '.join(differing[:3])}). "
            "Choose another study.name, or give what it was started with: "
            f"{os.path.relpath(path)} has it"
        )
    return settings | {"study": plan.study.model_dump()}


def begin(repo: Path, folder: Path, plan: Plan, base: str) -> dict:
    """The study's first commit and settings.json; the branch follows in `settle`."""
    name = plan.study.name
    if changed := workspace.uncommitted(repo):
        names = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        print(f"{len(changed)} uncommitted changes are not part of the study: {names}", flush=True)
    with workspace.worktree(repo, folder / "trials/000/worktree", base) as tree:
        first = workspace.write_first_commit(tree, plan.config, name, marks_of(folder, 0))
    settings = {
        "name": name,
        "branch": f"study/{name}",
        "base_commit": base,
        "first_commit": first,
        "sigma": None,
        **plan.as_json(),
    }
    write_json(folder / "settings.json", settings)
    return settings


@contextmanager
def lock(folder: Path, name: str):
    """One process a study. The file goes when the study ends; after a kill it means nothing."""
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(
                f"study.name ({name}): another process runs this study. Wait for it, or choose "
                "another study.name"
            ) from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break  # else its owner removed the file between our open and our lock
    try:
        yield
    finally:
        if not (folder / "settings.json").exists():  # refused: nothing of a study is in it
            shutil.rmtree(folder)
        path.unlink(missing_ok=True)
        file.close()
