"""Take a study's champion to a larger scale: does it still beat the baseline, and what of it?

    nightshift promote first                        twice the depth, three times the budget
    nightshift promote first trial=4 model.depth=8 budget.amount=450000 seeds=[1,2,3]

Baseline, champion, and the champion without each kept change run on the same seeds, in the study's
sandbox and under its ruler; promotion.py says what the numbers mean. A champion that is not worse
than the baseline is promoted: its first seed's weights (the first, not the best, so that the number
was not picked) read `test` once and go with code, values and DVC's hashes into a commit on the
study's branch and into MLflow's registry.

Killed or stopped anywhere, the same command goes on: each finished run is a synced line. The line
in promotions.jsonl is the moment the promotion is through; branch, MLflow and report follow it.
"""

import shlex
import shutil
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from agent import promotion_report, workspace
from agent.arms import Job, Progress, bench, build_arms, marks_of, recall_runs, run_arms
from agent.decide import Rule
from agent.journal import Journal, Trial
from agent.loop import EXIT_INTERRUPTED
from agent.promotion import (
    FOLDER,
    ORDER_FILE,
    RUNS_FILE,
    Arm,
    Order,
    Promotion,
    append_promotion,
    changes_of,
    folder_of,
    judge,
    read_lines,
    read_promotions,
)
from agent.report import find_study
from agent.scale import Request, estimate_s, minutes, read_plan_of, read_request
from agent.settings import StudyError
from agent.study import Study, close_records, open_study, read_journal, settle, stop_on_signals
from agent.target import VAL
from agent.trial import Bench, Interrupted
from agent.warm import StartError
from nightshift.fixed.config import ROOT, ConfigError, check, flatten, unflatten

EXIT_NOT_PROMOTED = 1

USAGE = """usage: nightshift promote <study> [trial=N] [seeds=[1,2,3]] [key=value ...] [--dry-run]

Runs the study's champion (or trial N) and the baseline at a larger scale, and the champion without
each kept change; reads test once; commits, and registers in MLflow, a champion that is not worse.
  nightshift promote first                       twice the depth, three times the budget
  nightshift promote first model.depth=8 budget.amount=450000
  nightshift promote first depth=6 --dry-run                  how many runs, how long
Keys: of model, optim, schedule, train, filter, tokenizer, budget, evaluate, runtime, sandbox."""


def main(argv: list[str] | None = None, repo: Path = ROOT) -> int:
    """Exit status: 0 promoted, 1 the baseline is better, 2 it cannot start, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(USAGE)
        return 0 if argv else 2
    try:
        request = read_request(argv)
        study_folder = find_study(request.study, repo / "outputs/studies")
        job = plan_job(repo, study_folder, request)
        print(job.summary, flush=True)
        if request.dry_run:
            return 0
        with stop_on_signals() as stop:
            with open_study(repo, job.plan, stop, Progress, end) as study:
                settle(study)
                promotion = run_promotion(study, job)
                follow(study, promotion)
        tracked = job.plan.config.tracking.enabled
        print(promotion_report.told(promotion, study_folder, tracked), flush=True)
        return 0 if promotion.commit else EXIT_NOT_PROMOTED
    except Interrupted:
        print(f"stopped. To go on: {shlex.join(['nightshift', 'promote', *argv])}", flush=True)
        return EXIT_INTERRUPTED
    except (ConfigError, StudyError, StartError) as error:
        print(error, file=sys.stderr)
        return 2


def end(study: Study, status: str) -> None:
    """Whatever became of the promotion: the study itself is as it was."""
    close_records(study, "FINISHED")


# ---- what is to be done ----


def plan_job(repo: Path, study_folder: Path, request: Request) -> Job:
    """Everything that can be refused is refused here. Raises ConfigError or StudyError."""
    plan, journal = read_plan_of(repo, study_folder), read_journal(study_folder)
    if plan.study.judged_by is not VAL:
        raise ConfigError(
            f"study ({study_folder.name}): judged by {plan.study.target}; only a study of "
            f"{VAL.name} can be promoted so far. Its branch has the champion: git checkout "
            f"study/{study_folder.name}"
        )
    trial = chosen(journal, request.trial, study_folder.name)
    seeds = request.seeds or plan.study.baseline_seeds
    given, baseline, larger = request.resolve(repo, journal.trials[0], trial)
    order = Order(trial=trial.number, seeds=seeds, given=given)
    num_changes = len(changes_of(journal, trial))
    arms = 2 + (num_changes if num_changes > 1 else 0)
    number = number_of(study_folder, order)
    done = len(read_lines(folder_of(study_folder, number) / RUNS_FILE))
    left = max(0, arms * len(seeds) - done)
    each_s = estimate_s(journal.trials[0].runs, baseline, larger)
    summary = (
        f"promotion {number}: trial {trial.number} ({trial.proposal.title}) against the baseline, "
        f"depth {baseline.model.depth} -> {larger.model.depth}, {larger.budget.kind} "
        f"{baseline.budget.amount:,.0f} -> {larger.budget.amount:,.0f}, {arms} configurations x "
        f"{len(seeds)} seeds: {left} runs left, about {minutes(left * each_s)}"
    )
    return Job(
        plan=plan, journal=journal, trial=trial, order=order, number=number,
        summary=summary,
    )  # fmt: skip


def chosen(journal: Journal, number: int | None, name: str) -> Trial:
    if not journal.trials:
        raise ConfigError(f"study ({name}): no trial yet; run nightshift study study.name={name}")
    trial = journal.incumbent if number is None else None
    if number is not None:
        if not 0 <= number < len(journal):
            raise ConfigError(f"trial={number}: study {name} has trials 0 to {len(journal) - 1}")
        trial = journal.trials[number]
    if trial.parent is None:
        raise ConfigError(
            f"trial 0 of {name} is its baseline: there is nothing to promote. "
            "Run more trials (study.trials=...), or give another: trial=N"
        )
    if trial.status != "ok":
        raise ConfigError(f"trial={number}: it ended as {trial.status}; choose one that is ok")
    return trial


def number_of(study_folder: Path, order: Order) -> int:
    """Of the promotion with this order, finished or not; else the next one."""
    numbers = [0]
    for path in sorted((study_folder / FOLDER).glob(f"*/{ORDER_FILE}")):
        numbers.append(int(path.parent.name))
        if yaml.safe_load(path.read_text(encoding="utf-8"))["order"] == asdict(order):
            return numbers[-1]
    return max(numbers) + 1


# ---- the work ----


def run_promotion(study: Study, job: Job) -> Promotion:
    known = {p.number: p for p in read_promotions(study.folder)}
    if job.number in known:
        promotion = known[job.number]
        test = "test is not read again" if promotion.commit else "it was not promoted"
        study.view.note(f"promotion {job.number} is through already; {test}")
        return promotion
    folder = folder_of(study.folder, job.number)
    arms = build_arms(study, job, folder)
    recall_runs(arms, folder)
    config = study.plan.config
    changed = check(unflatten(flatten(config.model_dump()) | job.machine))
    study.plan = replace(study.plan, config=changed)
    try:
        run_arms(study, job, arms, folder)
        promotion = conclude(study, job, arms, folder)
    finally:
        for cache in folder.glob("*/cache"):
            shutil.rmtree(cache, ignore_errors=True)
    append_promotion(study.folder, promotion)  # from here on it is through
    return promotion


# ---- what follows from the numbers ----


def conclude(study: Study, job: Job, arms: list[Arm], folder: Path) -> Promotion:
    settings = study.plan.study
    rule = Rule(settings.false_keeps, settings.equal_within, 2, settings.max_seeds)
    champion = arms[1]
    promotion = Promotion(
        number=job.number,
        order=job.order,
        is_head=job.trial is job.journal.incumbent,
        scale=differences_of(study, job.trial.commit, champion.commit),
        arms=arms,
        ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=round(sum(run.wall_s or 0.0 for arm in arms for run in arm.runs), 1),
        **judge(study.journal, job.trial, arms, rule),
    )
    if promotion.verdict.verdict != "hurts":
        run = champion.by_seed[job.order.seeds[0]]
        promotion.run, promotion.weights_sha256 = run.folder, run.weights_sha256
        with workspace.worktree(study.repo, folder / "champion/worktree", champion.commit) as tree:
            on = bench(study, job, champion, arms[0], tree, folder)
            read_test(study, promotion, on)
            record(study, job, promotion, on)
    return promotion


def differences_of(study: Study, before: str, after: str) -> dict[str, Any]:
    values = []
    for commit in (before, after):
        with workspace.conf_at(study.repo, commit) as conf:
            values.append(flatten(workspace.compose(conf, "config", [])))
    return {key: value for key, value in values[1].items() if values[0].get(key) != value}


def read_test(study: Study, promotion: Promotion, on: Bench) -> None:
    ledger, limit_s = on.base / "src/nightshift/fixed/ledger.py", on.config.evaluate.limit_s
    if ledger.exists() and "main_checkout" not in ledger.read_text(encoding="utf-8"):
        promotion.test_note = "the study's base commit is older than the ledger of all worktrees"
        return
    result, why = on.read_test(study.folder / promotion.run, limit_s)
    if result is not None and result.status == "ok":
        promotion.test_bpb = result.val_bpb
    else:
        promotion.test_note = why or "no number"


def record(study: Study, job: Job, promotion: Promotion, on: Bench) -> None:
    """params.yaml, dvc.lock, metrics and weights of the champion, as if `dvc repro` had run."""
    on.show("recording data and weights")
    on.prepare(job.order.seeds[0], on.config.budget.wall_limit_s)  # gone with a stopped process
    title = f"promotion {job.number}: the champion of study {study.name}"
    run_folder = study.folder / promotion.run
    promotion.commit = workspace.record_keep(on.tree, run_folder, title, on.marks)
    promotion.dvc_md5 = weights_md5(on.tree / "dvc.lock")
    ref = workspace.promotion_ref(study.name, job.number, "champion")
    workspace.git(study.repo, "update-ref", ref, promotion.commit)


def weights_md5(lock: Path) -> str | None:
    """What DVC calls champion/checkpoint."""
    if not lock.exists():
        return None
    stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
    outs = stages.get("pretrain", {}).get("outs", [])
    return next((out["md5"] for out in outs if out["path"] == "champion/checkpoint"), None)


def follow(study: Study, promotion: Promotion) -> None:
    """Branch, card, chart and MLflow say what the line in promotions.jsonl says; repeatable."""
    settle(study)
    study.view.show("writing the card and MLflow")
    files = promotion_report.write(study, promotion)
    entry = promotion_report.entry(promotion)
    study.mirror.log_promotion(entry, files, lambda run_id: register(study, promotion, run_id))


def register(study: Study, promotion: Promotion, run_id: str) -> bool:
    """The weights as the next version of MLflow's model, alias `champion`; False if that failed."""
    store = study.mirror.store
    if not (study.repo / "src/nightshift/mlflow_model.py").exists() or not promotion.commit:
        return True
    card = folder_of(study.folder, promotion.number) / promotion_report.CARD_FILE
    words = [f"tracking.uri={store.uri}", f"tracking.experiment={store.tracking.experiment}"]
    words += [f"--name={promotion_report.MODEL_NAME}", f"--card={card}", f"--run={run_id}"]
    tags = promotion_report.tags(promotion) | {"study": study.name}
    words += [f"--tag={key}={value}" for key, value in tags.items()]
    folder, marks = str(study.folder / promotion.run), marks_of(study, promotion.number)
    try:
        workspace.run_module(study.repo, marks, "nightshift.mlflow_model", folder, *words)
    except StudyError as error:
        study.note(f"not registered: {error}. The same command tries again")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
