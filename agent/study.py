"""One study, as the process that runs it knows it: how it is opened, settled and closed.

`settle` makes git, the disk and MLflow follow the journal, and can be repeated. Opening a study
first removes what a killed process left of it; closing it leaves the journal, the report and the
weights of what was kept.
"""

import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import workspace
from agent.after import read_memory, remember
from agent.decide import measure_noise, repeated
from agent.journal import Journal, Trial
from agent.promotion import head_of
from agent.report import write_report
from agent.settings import Plan, StudyError, differences
from agent.tracking import Mirror
from agent.trial import Interrupted, Stop
from agent.view import View, summary
from agent.warm import MARK, STUDY_MARK, Starter, kill_marked
from nightshift.fixed.config import ROOT
from nightshift.fixed.result import CHECKPOINT_FOLDER, write_json
from nightshift.fixed.sandbox import ENVIRONMENT
from nightshift.fixed.tracking import open_store

BASE_FOLDER = "base"  # in the study's folder: a worktree of its first commit, the harness's code


class BaselineFailed(StudyError):
    """There is nothing to compare with."""


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
    base: Any = None  # agent.base.Base; of a study of chat_bpb
    researcher: Any = None  # agent.proposers.llm.Researcher, if a language model proposes
    told: set[str] = field(default_factory=set)
    memory: list[Trial] = field(default_factory=list)  # of earlier studies (after.py)
    given_up: bool = False  # the last wait for a proposal from outside was in vain (outside.py)

    @property
    def name(self) -> str:
        return self.plan.study.name

    def note(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            self.view.note(text)


def marks_of(study_folder: Path, number: int) -> dict[str, str]:
    """In the environment of every process of a trial, so that none escapes (warm.py)."""
    return {MARK: f"{study_folder.name}/{number:03d}", STUDY_MARK: str(study_folder)}


def settle(study: Study, trial: Trial | None = None) -> None:
    """Make git, the disk and MLflow follow the journal: all of it, or the trial just added."""
    first_commit = study.settings["first_commit"]
    promoted = head_of(study.folder, study.journal.incumbent)
    at = promoted and promoted.commit
    if left := workspace.settle(study.repo, study.name, study.journal, first_commit, at):
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


def examine_sandbox(plan: Plan) -> dict:
    """What holds here: {"layers": ..., "open": [...]}. Raises StudyError if that is too little."""
    found = ask_doctor()
    if refused := [name for name in plan.config.sandbox.require if name in found["open"]]:
        raise StudyError(
            f"sandbox.require: {', '.join(refused)} does not hold on this machine; "
            "`nightshift doctor` shows which attack got through. Take it out of sandbox.require, "
            "or run the study elsewhere"
        )
    return {"layers": found["layers"], "open": found["open"]}


@functools.cache
def ask_doctor() -> dict:
    """`nightshift doctor --json`. Raises StudyError."""
    command = [sys.executable, "-m", "nightshift.fixed.doctor", "--json"]
    environment = {k: v for k, v in os.environ.items() if k in ENVIRONMENT}
    environment["PYTHONPATH"] = str(ROOT / "src")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise StudyError(f"the sandbox cannot be examined: {last}. Try nightshift doctor") from None


@contextmanager
def open_study(repo: Path, plan: Plan, stop: Stop, make_view: Callable = View, end=None):
    """A study that is ready to run, alone, with nothing left of an earlier process.

    `end(study, status)` closes it; `close_study` unless told otherwise.
    """
    base = workspace.base_commit(repo)
    name, folder = plan.study.name, repo / "outputs/studies" / plan.study.name
    with lock(folder, name), ExitStack() as bases:
        kill_marked(folder)
        sandbox = examine_sandbox(plan)
        journal = read_journal(folder)
        settings = recall(repo, folder, plan, journal)
        researcher = open_researcher(repo, folder, plan, journal, stop)
        workspace.remove_worktrees_under(repo, folder)
        workspace.remove_stale_locks(repo, name)
        starter = Starter(folder, plan.study.warm)  # its imports go on while MLflow is opened
        study, status = None, "FAILED"
        try:
            store = open_store(plan.config.tracking)
            settings = settings or begin(repo, folder, plan, base)
            bases.enter_context(
                workspace.worktree(repo, folder / BASE_FOLDER, settings["first_commit"])
            )
            mirror = Mirror(store, name, folder)
            mirror.open_study(flat_settings(settings), settings["base_commit"])
            settings["sandbox"] = sandbox
            view = make_view(journal, plan.study.end, plan.study.judged_by)
            if sandbox["open"]:
                view.note(
                    f"this machine's sandbox does not hold for: {', '.join(sandbox['open'])} "
                    "(nightshift doctor). Each run's record says so"
                )
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
                memory=read_memory(folder),
                researcher=researcher,
            )
            if researcher:
                researcher.caller.show = view.show
            yield study
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            raise
        finally:
            starter.close()
            kill_marked(folder)
            if study:
                (end or close_study)(study, status)


def open_researcher(repo: Path, folder: Path, plan: Plan, journal: Journal, stop: Stop) -> Any:
    """The model that proposes, or None. Imported only here: without it LangChain is not needed."""
    if not plan.study.sources.get("llm"):
        return None
    from agent.answer import StudyFiles
    from agent.proposers.llm import Researcher

    return Researcher(plan.study.llm, StudyFiles(repo, folder, journal), stop)


def close_study(study: Study, status: str) -> None:
    report = close_records(study, status)
    if status == "FINISHED":
        where = Path(os.path.relpath(report))
        target = study.plan.study.judged_by
        print(summary(study.journal, study.folder, study.name, where, target), flush=True)


def close_records(study: Study, status: str) -> Path | None:
    """The report and MLflow's parent run; returns the report's folder."""
    if status == "KILLED":  # a failure's files stay: they say why
        clear_half_trial(study.folder, len(study.journal))
    study.view.close()
    report = None
    if study.journal.trials:
        report = write_report(study.folder, study.journal, study.settings)
        study.mirror.attach_report(report)
    study.mirror.close_study(status)
    return report


def flat_settings(settings: dict) -> dict:
    """What MLflow shows of a study: its settings, and the baseline's configuration."""
    return {"study": settings["study"], **settings["config"]}


def read_journal(folder: Path, repair: bool = True) -> Journal:
    try:
        return Journal(folder / "journal.jsonl", repair)
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
    name, base = plan.study.name, plan.origin["commit"] if plan.origin else base
    if changed := workspace.uncommitted(repo):
        names = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        print(f"{len(changed)} uncommitted changes are not part of the study: {names}", flush=True)
    with workspace.worktree(repo, folder / "trials/000/worktree", base) as tree:
        first = workspace.write_first_commit(tree, plan.config, name, marks_of(folder, 0))
    if plan.origin:
        remember(folder.parent, folder, plan.origin)
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


def _locked(file) -> bool:
    """Tried for a moment: who asks whether the study runs (outside.py) holds the lock so long."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False


@contextmanager
def lock(folder: Path, name: str):
    """One process a study. The file goes when the study ends; after a kill it means nothing."""
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
        if not _locked(file):
            raise StudyError(
                f"study.name ({name}): another process runs this study or a replay of it. Wait for "
                "it, or choose another study.name"
            )
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break  # else its owner removed the file between our open and our lock
    try:
        yield
    finally:
        if not (folder / "settings.json").exists():  # refused: nothing of a study is in it
            shutil.rmtree(folder)
        path.unlink(missing_ok=True)
        file.close()
