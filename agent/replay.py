"""Replay: make trials again from what is on record, and say whether they come out the same.

    nightshift replay first/3                 one trial, each of its seeds
    nightshift replay <mlflow run id>         the same, named by its run in MLflow
    nightshift replay --all first             an audit: every trial, discarded and failed ones too

An audit adds a line for each run to outputs/studies/<study>/replays.jsonl and goes on where it was
cut off. It reads the journal and changes neither it nor a trial's folder nor a ref.
"""

import re
import shlex
import shutil
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agent import replays, workspace
from agent.compare import Outcome, Seen, arithmetic, sigmas, stated
from agent.journal import Trial
from agent.loop import EXIT_INTERRUPTED
from agent.rebuild import APART, REPLAYS_FOLDER, Job, clear, groups_of, jobs_of, replay_group
from agent.replays import Replay
from agent.report import find_study, mirror_of, write_report
from agent.screen import Screen
from agent.settings import Bounds, Plan, StudyError, StudySettings, compose
from agent.study import BASE_FOLDER, Study, examine_sandbox, lock, read_journal, stop_on_signals
from agent.target import VAL
from agent.tracking import read_identity, read_settings
from agent.trial import PREPARE_LIMIT_S, Interrupted
from agent.warm import Starter, StartError, kill_marked
from nightshift.fixed.config import ROOT, ConfigError, check, flatten, nearest, unflatten
from nightshift.fixed.tracking import load_tracking, open_store

USAGE = """usage: nightshift replay <study>/<trial> | <mlflow run id> | --all <study> [key=value]

Makes trials again from git, configuration and data, and says for each run: identical, within noise
or not reproduced, and why. Exit status 0: all reproduced; 1: some not; 2: it cannot start.

  seeds=all|first        the runs of a trial; first (of a failed one: its last) is --all's default
  clock=recorded|again   a budget in seconds: step for step as recorded, or on the clock once more
  again=true             also what was replayed already
  tracking.uri=...       where the MLflow run id is looked up"""
OPTIONS = {
    "seeds": ("all", "first"),
    "clock": ("recorded", "again"),
    "again": ("true", "false"),
}
MLFLOW_ID = re.compile(r"[0-9a-f]{32}")
STUDIES = "outputs/studies"


@dataclass(frozen=True, kw_only=True)
class Request:
    study: str
    trial: int | None  # None: all
    seeds: str
    clock: str
    again: bool


def main(argv: list[str] | None = None, repo: Path = ROOT) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        return 0
    try:
        request = read_request(argv, repo)
        with stop_on_signals() as stop, open_study(repo, request.study, stop) as study:
            return audit(study, request)
    except Interrupted:
        print(f"stopped. To go on: {shlex.join(['nightshift', 'replay', *argv])}", flush=True)
        return EXIT_INTERRUPTED
    except (ConfigError, StudyError, StartError) as error:
        print(error, file=sys.stderr)
        return 2


# ---- what is asked for ----


def read_request(argv: list[str], repo: Path) -> Request:
    """Raises ConfigError."""
    options = {"clock": "recorded", "again": "false"}
    names = [a for a in argv if "=" not in a and a != "--all"]
    tracking = [a for a in argv if a.startswith("tracking.") and "=" in a]
    for key, value in (a.split("=", 1) for a in argv if "=" in a and a not in tracking):
        if key not in OPTIONS:
            raise ConfigError(
                f"{key}={value}: there is no such key. Keys: {', '.join(OPTIONS)}, tracking.uri."
                f"{nearest(key, OPTIONS)}"
            )
        if value not in OPTIONS[key]:
            raise ConfigError(f"{key}={value}: must be {' or '.join(OPTIONS[key])}")
        options[key] = value
    if unknown := [name for name in names if name.startswith("-")]:
        raise ConfigError(f"{unknown[0]}: there is no such option; there is --all <study>")
    if len(names) != 1:
        raise ConfigError(USAGE.splitlines()[0])
    study, trial = target(names[0], "--all" in argv, tracking, repo)
    seeds = options.get("seeds", "first" if trial is None else "all")
    again = options["again"] == "true"
    return Request(study=study, trial=trial, seeds=seeds, clock=options["clock"], again=again)


def target(name: str, whole: bool, tracking: list[str], repo: Path) -> tuple[str, int | None]:
    """(study, trial) of first/3, of an MLflow run id or, with --all, of first."""
    if MLFLOW_ID.fullmatch(name):
        study, trial = named_by_mlflow(name, tracking, repo)
        return study, None if whole else trial
    study, _, trial = name.partition("/")
    find_study(study, repo / STUDIES)
    if whole and trial:
        raise ConfigError(f"--all {name}: give the study alone: --all {study}")
    if whole:
        return study, None
    if not re.fullmatch(r"\d{1,6}", trial):
        raise ConfigError(
            f"{name}: give a trial by its number, such as {study}/3, or the whole study: "
            f"nightshift replay --all {study}"
        )
    return study, int(trial)


def named_by_mlflow(run_id: str, tracking: list[str], repo: Path) -> tuple[str, int]:
    """The study and trial that a run's tags name. Raises ConfigError."""
    store = open_store(load_tracking(tracking))
    found = {run.info.run_id: run for run in store.search("")}.get(run_id)
    if found is None:
        raise ConfigError(
            f"{run_id}: there is no such run in {store.uri} (experiment "
            f"{store.tracking.experiment}); give tracking.uri=..., or the trial as <study>/<number>"
        )
    tags = found.data.tags
    if tags.get("kind") != "trial":
        raise ConfigError(not_a_trial(run_id, tags))
    study = tags["study"]
    folder = find_study(study, repo / STUDIES)
    if read_identity(folder).get("study_id") != tags["study_id"]:
        raise ConfigError(
            f"{run_id}: a trial of another study named {study}, not of that in {folder}"
        )
    return study, int(tags["trial"])


def not_a_trial(run_id: str, tags: dict[str, str]) -> str:
    if tags.get("kind") == "study":
        name = tags.get("study")
        return f"{run_id}: the study {name} itself. Run: nightshift replay --all {name}"
    return (
        f"{run_id}: a {tags.get('kind', 'run')} of your own, no trial. By hand: git checkout "
        f"{tags.get('commit') or '<its commit>'}, then the same command with "
        "budget.replay=<its folder>; training.json has the weights' sha256 to compare"
    )


# ---- the study, opened to look at ----


@contextmanager
def open_study(repo: Path, name: str, stop):
    """A study that is there, alone, with nothing left of an earlier process; not a byte of its
    journal, settings, trials and refs is written."""
    folder = find_study(name, repo / STUDIES)
    settings = read_settings(folder)
    if not settings:  # before the lock, whose end removes a folder without settings
        raise StudyError(f"study ({name}): {folder / 'settings.json'} is gone; put it back")
    with lock(folder, name), ExitStack() as bases:
        kill_marked(folder)
        journal, plan = read_journal(folder, repair=False), plan_of(repo, settings)
        if plan.study.judged_by is not VAL:
            raise StudyError(
                f"study ({name}): judged by {plan.study.target}; only studies of {VAL.name} are "
                f"replayed so far. Its champion: git checkout study/{name} && dvc repro -f "
                f"--no-run-cache {plan.study.judged_by.stage}"
            )
        if not workspace.has_commit(repo, settings["first_commit"]):
            raise StudyError(
                f"study ({name}): git has no commit {settings['first_commit'][:12]} any more, "
                f"which holds its fixed code. Fetch study/{name} from where it still is"
            )
        examine_sandbox(plan)
        workspace.remove_worktrees_under(repo, folder)
        for place in (folder / REPLAYS_FOLDER).glob("*"):
            for each in (place, *(place / name for name in APART)):
                clear(each)
        base = workspace.worktree(repo, folder / BASE_FOLDER, settings["first_commit"])
        bases.enter_context(base)
        starter = Starter(folder, plan.study.warm)
        screen = Screen()
        try:
            yield Study(
                repo=repo,
                folder=folder,
                plan=plan,
                journal=journal,
                settings=settings,
                starter=starter,
                stop=stop,
                view=screen,
                mirror=mirror_of(folder, name),
            )
        finally:
            screen.close()
            starter.close()
            kill_marked(folder)


def plan_of(repo: Path, settings: dict) -> Plan:
    """What the study was asked; keys that were invented since have their defaults."""
    try:
        defaults = compose(repo / "conf", "study", [])
        study = defaults.pop("study") | settings["study"]
        defaults.pop("space", None)
        space = {key: check(each, Bounds) for key, each in settings.get("space", {}).items()}
        config = check(unflatten(flatten(defaults) | flatten(settings["config"])))
        return Plan(study=check(study, StudySettings), space=space, config=config)
    except ConfigError as error:
        raise StudyError(
            f"study ({settings.get('name')}): its settings do not fit the code of this checkout "
            f"({str(error).splitlines()[0]}). Check out what it was started from: "
            f"{settings.get('base_commit')}"
        ) from None


# ---- the audit ----


def audit(study: Study, request: Request) -> int:
    """Replay what is asked for and not on record yet; exit status."""
    jobs = all_jobs(study, request)
    known = replays.on_record(study.folder, study.journal.path)
    number, keys = replays.left_to_do([job.key for job in jobs], known, request.again)
    todo = [job for job in jobs if job.key in set(keys)]
    if todo:
        run_jobs(study, todo, number, len(jobs) - len(todo))
    else:
        print("all of it is on record already; again=true replays it once more")
    return conclude(study, {job.key for job in jobs}, bool(todo))


def all_jobs(study: Study, request: Request) -> list[Job]:
    trials = study.journal.trials
    if request.trial is not None and request.trial >= len(trials):
        raise ConfigError(
            f"{study.name}/{request.trial}: there is no such trial; the study has 0 to "
            f"{len(trials) - 1}"
        )
    chosen = trials if request.trial is None else [trials[request.trial]]
    in_seconds = study.plan.config.budget.kind == "seconds"
    clock = request.clock if in_seconds else "recorded"  # tokens and steps are no matter of time
    return [job for trial in chosen for job in jobs_of(trial, request.seeds, clock)]


def run_jobs(study: Study, jobs: list[Job], number: int, num_done: int) -> None:
    digests = replays.line_digests(study.journal.path)
    noise, started = stated(study.journal.trials), time.monotonic()
    study.view.begin([job.usual_s for job in jobs], num_done)

    def tell(job: Job, then: Seen, now: Seen | None, outcome: Outcome) -> None:
        nonlocal started
        wall_s, started = round(time.monotonic() - started, 3), time.monotonic()
        replay = line(job, then, now, outcome, noise)
        replay.journal, replay.audit, replay.wall_s = digests[job.trial.number], number, wall_s
        replays.append(study.folder, replay)
        study.view.end(replay, job.trial.proposal.heading)

    try:
        restore_data(study)
        for group in groups_of(jobs):
            study.stop.check()
            trial = group[0].trial
            wrong = arithmetic(study.journal, trial, study.plan.study.baseline_seeds)
            replay_group(study, group, noise, wrong, tell)
            tag(study, trial)
    finally:
        study.view.close()


def line(job: Job, then: Seen, now: Seen | None, outcome: Outcome, noise) -> Replay:
    now = now or Seen(status=None)
    low, high = outcome.interval or (None, None)
    return Replay(
        trial=job.trial.number,
        what=job.what,
        seed=job.run and job.run.seed,
        clock=job.clock,
        outcome=outcome.kind,
        why=outcome.why,
        status_then=then.status,
        status_now=now.status,
        val_bpb_then=then.val_bpb,
        val_bpb_now=now.val_bpb,
        low=low,
        high=high,
        sigmas=sigmas(then, now, noise.seed),
        pair_sigmas=sigmas(then, now, noise.pair),
        weights_then=then.weights,
        weights_now=now.weights,
        steps_then=then.steps,
        steps_now=now.steps,
        differs=outcome.differs,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def restore_data(study: Study) -> None:
    """The corpus that all trials read, if its cache was deleted: built as the baseline built it."""
    from agent.loop import bench

    shared = (study.repo / study.plan.config.runtime.cache_dir).resolve()
    baseline = study.journal.trials[0]
    if any(shared.glob("corpus/*/manifest.json")) or not baseline.commit:
        return
    folder = study.folder / REPLAYS_FOLDER / "data"
    with workspace.worktree(study.repo, folder / "worktree", baseline.commit) as tree:
        config = workspace.resolve(tree)
        problem = bench(study, baseline, tree, folder, config).prepare(1, PREPARE_LIMIT_S)
    shutil.rmtree(folder, ignore_errors=True)
    if problem:
        study.note(f"the study's data are gone and could not be built again: {problem.message}")


def tag(study: Study, trial: Trial) -> None:
    """The trial's run in MLflow says what came of it."""
    if study.mirror is not None:
        known = replays.on_record(study.folder, study.journal.path)
        word = replays.word_on(replays.newest(r for r in known if r.trial == trial.number))
        study.mirror.tag_replay(trial.number, word)


def conclude(study: Study, wanted: set, changed: bool) -> int:
    """The report and the last lines; exit status."""
    known = replays.newest(replays.on_record(study.folder, study.journal.path))
    asked = [replay for replay in known if replay.key in wanted]
    if changed:
        report = write_report(study.folder, study.journal, study.settings)
        if study.mirror is not None:
            study.mirror.attach_report(report)
    print(f"---\n{'replayed:':12} {replays.counts(asked)}")
    if inside := replays.on_the_clock(asked):
        print(f"{'':12} {inside}")
    bad = [replay for replay in asked if replay.outcome == replays.OUTCOMES[-1]]
    for replay in bad:
        print(f"{'':12} {replays.name_of(replay)}: {replay.why}")
    print(f"{'record:':12} {STUDIES}/{study.name}/{replays.REPLAYS_FILE}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
