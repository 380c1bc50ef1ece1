"""The tools that read a study's trials: rows, one trial whole, noise and costs.

Functions of (StudyFiles, arguments) that return JSON; agent/tools.py has them by name. From a run's
curve only known names with finite numbers are taken; its texts are quoted (agent/quote.py).
"""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from agent.answer import Arguments, StudyFiles
from agent.decide import Rule, bar_for, measure_noise, repeated
from agent.journal import Run, Trial
from agent.quote import as_data, plain
from agent.workspace import Refused
from nightshift.fixed.result import CURVE_FILE, LOG_FILE, SAMPLES_FILE, read_curve

MAX_DIFF_CHARS = 8_000
MAX_LOG_CHARS = 3_000
MAX_MESSAGE_CHARS = 600
MAX_SAMPLES, MAX_SAMPLE_CHARS = 3, 400
MAX_POINTS = 20
CURVE_NAMES = ("step", "progress", "elapsed_s", "tokens", "train/loss", "dev_bpb", "lr_scale")
RECENT_RUNS = 20  # that costs are taken from
MAX_READ = 100_000  # bytes of a log or a diff, its end


class ListTrials(Arguments):
    status: Literal["ok", "stopped", "crash", "timeout", "oom", "diverged", "invalid"] | None = None
    decision: Literal["keep", "discard"] | None = None
    source: str | None = Field(default=None, max_length=50)
    text: str | None = Field(
        default=None, max_length=100, description="in title, hypothesis, reason, keys or paths"
    )
    sort: Literal["newest", "gain", "score"] = "newest"
    limit: int = Field(default=20, ge=1, le=50)


def list_trials(study: StudyFiles, args: ListTrials) -> dict[str, Any]:
    """Earlier trials, one short row each: filtered, sorted, at most 50."""
    found = [trial for trial in study.journal.trials if _fits(trial, args)]
    found.sort(key=_order(args.sort))
    rows = [row(trial) for trial in found[: args.limit]]
    return {"trials": rows, "found": len(found), "of": len(study.journal)}


def _fits(trial: Trial, args: ListTrials) -> bool:
    proposal = trial.proposal
    for mine, wanted in (
        (trial.status, args.status),
        (trial.decision, args.decision),
        (proposal.source, args.source),
    ):
        if wanted and mine != wanted:
            return False
    names = [*proposal.overrides, *(edit.path for edit in proposal.edits)]
    texts = [proposal.title, proposal.hypothesis, trial.reason, *names]
    return not args.text or args.text.lower() in " ".join(texts).lower()


def _order(sort: str) -> Callable[[Trial], float]:
    """Best first; a trial without the number comes last."""
    if sort == "newest":
        return lambda trial: -trial.number
    if sort == "gain":
        return lambda trial: math.inf if trial.gain is None else -trial.gain
    return lambda trial: math.inf if trial.score is None else trial.score


def row(trial: Trial) -> dict[str, Any]:
    proposal = trial.proposal
    return {
        "trial": trial.number,
        "title": plain(proposal.heading)[:120],
        "source": proposal.source,
        "change": proposal.kind,
        "status": trial.status,
        "decision": trial.decision,
        trial.target: trial.score,
        "gain": trial.gain,
        "reason": reason_of(trial, 200),
    }


def reason_of(trial: Trial, max_chars: int) -> str:
    """Why it was decided so; of a failure that is the run's own word, so it is quoted."""
    if not trial.failed:
        return plain(trial.reason)[:max_chars]
    return as_data(trial.reason, max_chars)


class OpenTrial(Arguments):
    trial: int = Field(ge=0, description="its number")


def open_trial(study: StudyFiles, args: OpenTrial) -> dict[str, Any]:
    """One trial whole: change, numbers for each seed, curve, decision; of a failure its log too."""
    trial = trial_of(study, args.trial)
    proposal, folder = trial.proposal, study.folder / f"trials/{trial.number:03d}"
    answer = row(trial) | {
        "hypothesis": plain(proposal.hypothesis),
        "expected_effect": plain(proposal.expected_effect),
        "reason": reason_of(trial, MAX_MESSAGE_CHARS),
        "parent": trial.parent,
        "repairs": proposal.repairs,
        "builds_on": proposal.builds_on,
        "undoes": proposal.undoes,
        "overrides": proposal.overrides,
        "estimate": [trial.estimate, trial.low, trial.high],
        "lines": f"+{trial.lines_added} -{trial.lines_removed}",
        "seeds": seeds_of(study, trial),
        "wall_s": trial.wall_s,
    }
    if (diff := folder / "diff.patch").exists():
        answer["diff"] = as_data(_text(diff), MAX_DIFF_CHARS)
    if trial.runs and trial.runs[0].folder:
        run_folder = study.folder / trial.runs[0].folder
        answer["curve"] = thin(read_curve(run_folder / CURVE_FILE))
        answer["samples"] = samples_of(run_folder / SAMPLES_FILE)
    if trial.failed:
        answer["failure"] = failure_of(study, trial)
    return answer


def trial_of(study: StudyFiles, number: int) -> Trial:
    if number >= len(study.journal):
        raise Refused(
            f"trial {number}: there is no such trial; the last is {len(study.journal) - 1}."
        )
    return study.journal.trials[number]


def seeds_of(study: StudyFiles, trial: Trial) -> list[dict[str, Any]]:
    """A row for each seed, with the parent's number beside it."""
    parents: dict[int, Run] = {}
    if trial.parent is not None:
        parents = study.journal.runs_of(study.journal.trials[trial.parent])
    names = ("seed", "status", trial.target, "steps", "tokens", "train_s", "tokens_per_s")
    names += ("peak_memory_gb", "num_params")
    rows = [{name: getattr(run, name) for name in names} for run in trial.runs]
    for each in rows:
        parent = parents.get(each["seed"])
        each[f"parent_{trial.target}"] = parent.score if parent else None
    return rows


def failure_of(study: StudyFiles, trial: Trial) -> dict[str, Any]:
    """What a failed trial said, and the end of the log that says it."""
    folder = study.folder / f"trials/{trial.number:03d}"
    failed = [study.folder / run.folder for run in trial.runs if run.status != "ok" and run.folder]
    places = [*failed[-1:], folder / "preflight", folder / "prepare"]
    log = next((p / LOG_FILE for p in places if (p / LOG_FILE).is_file()), None)
    failure = {"message": as_data(trial.reason, MAX_MESSAGE_CHARS)}
    if log:
        text = _text(log).replace(f"{study.repo}/", "")  # where the person works is no business of
        failure["log"] = as_data(text[-MAX_LOG_CHARS:], MAX_LOG_CHARS)  # a provider
    return failure


def thin(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """About MAX_POINTS points of a curve, the last among them."""
    every = max(1, math.ceil(len(points) / MAX_POINTS))
    return [_numbers(point) for point in reversed(points[::-1][::every])]


def _numbers(point: Any) -> dict[str, float]:
    values = point if isinstance(point, dict) else {}
    return {name: round(v, 5) for name in CURVE_NAMES if _is_finite(v := values.get(name))}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def samples_of(path: Path) -> list[str]:
    """What the trained model wrote, quoted; [] where there is nothing that can be read."""
    try:
        samples = json.loads(_text(path)) if path.exists() else []
        texts = [
            f"{sample['prompt']} -> {sample['completion']}" for sample in samples[:MAX_SAMPLES]
        ]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return [as_data(text, MAX_SAMPLE_CHARS) for text in texts]


def _text(path: Path) -> str:
    return path.read_bytes()[-MAX_READ:].decode("utf-8", "replace")


# ---- numbers ----


class Noise(Arguments):
    pass


def noise(study: StudyFiles, args: Noise) -> dict[str, Any]:
    """How much the number moves by chance: with the seed, and between two runs on one seed."""
    trials, asked = study.journal.trials, study.settings.get("study", {})
    seen = measure_noise(repeated(trials))
    rule = Rule(
        asked.get("false_keeps", 0.05),
        asked.get("equal_within", 0.1),
        len(asked.get("baseline_seeds", [1, 2, 3])),
        asked.get("max_seeds", 12),
    )
    taus = {}
    for kind in ("config", "code"):
        bar = bar_for(trials, kind, rule)
        taus[kind] = round(
            math.exp(float((bar.weights * [math.log(t) for t in bar.taus]).sum())), 6
        )
    return {
        "sigma_of_a_seed": seen.sigma and round(seen.sigma, 6),
        "degrees_of_freedom": seen.df,
        "tau_of_a_pair": taus,
        "unit": "bits per byte; a gain below about three tau takes many seeds to be shown",
    }


class Costs(Arguments):
    pass


def costs(study: StudyFiles, args: Costs) -> dict[str, Any]:
    """What runs cost (speed, memory, time) and what each source's proposals came to."""
    trials = study.journal.trials
    runs = [run for trial in trials for run in trial.runs if run.status == "ok"][-RECENT_RUNS:]
    names = ("tokens_per_s", "peak_memory_gb", "train_s", "wall_s", "steps", "tokens")
    return {
        "median_of_recent_runs": {
            name: _median([getattr(run, name) for run in runs]) for name in names
        },
        "budget": study.settings.get("config", {}).get("budget"),
        "sources": {
            name: _credit(trials, name) for name in sorted({t.proposal.source for t in trials})
        },
    }


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 4) if known else None


def _credit(trials: list[Trial], source: str) -> dict[str, Any]:
    mine = [trial for trial in trials if trial.proposal.source == source]
    usages = [trial.proposal.usage for trial in mine if trial.proposal.usage]
    dollars = [usage.dollars for usage in usages if usage.dollars is not None]
    return {
        "trials": len(mine),
        "kept": sum(trial.decision == "keep" for trial in mine),
        "failed": sum(trial.failed for trial in mine),
        "estimated_gain_kept": round(
            sum(trial.estimate or 0 for trial in mine if trial.decision == "keep"), 6
        ),
        "median_wall_s": _median([trial.wall_s for trial in mine]),
        "model_tokens": sum(usage.input_tokens + usage.output_tokens for usage in usages),
        "model_dollars": round(sum(dollars), 6) if dollars else None,
    }
