"""Is a run that was made again the run on record? From numbers and facts alone; starts nothing.

identical        the same weights (sha256) and the same val_bpb, or the same failure; of a run
                 that was stopped early the same dev_bpb up to there
within noise     val_bpb inside the stated interval
not reproduced   anything else, and any part of the record that contradicts another

The stated interval is a prediction interval for one more run: val_bpb then, plus and minus
t sqrt(2) sigma, where sigma is that of a seed as the study measured it and t is Student's 97.5 %
quantile for its degrees of freedom. A run on the same seed owes less to chance than that, so on a
steady machine the interval is wide.

On the clock the machine decides how many steps a run takes, so there the interval also reaches to
the side where the steps lead. How far, the longer of the two runs says: its loss at the other's
number of steps minus that at its end, as a share of all that it learned, times what it learned in
bits per byte. A whole run of so few steps ends better than that, for its learning rate came down:
the reach is an upper bound. Between two points of the curve the loss is taken from the straight
line, and it is never below a later one; both err to the safe side.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from agent.decide import Noise, measure_noise, pair, repeated
from agent.early import Points, dev_points
from agent.journal import Journal, Run, Trial
from agent.settings import HARNESS_KEYS
from agent.trial import _read as read_quietly
from nightshift.fixed.config import Config, flatten
from nightshift.fixed.result import (
    CONFIG_FILE,
    CURVE_FILE,
    RESULT_FILE,
    TRAINING_FILE,
    Training,
    read_curve,
    read_result,
    read_training,
)

# What a number may depend on without being told; clocks and speeds are left out.
MACHINE = ("device", "cpu", "gpu", "cuda", "threads", "dtype", "python", "torch", "lightning")
DIGESTS = ("corpus_digest", "data_digest", "tokenizer_digest")
CODE = ("fixed_code", "editable_code")
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 1 to 10 df
SAME = 5e-7  # val_bpb: the journal's means have six digits


class Stated(NamedTuple):
    """What the study says of noise, before anything is replayed."""

    seed: Noise
    pair: Noise

    @property
    def half_width(self) -> float:
        """Of the interval for one more run; infinite where nothing was repeated."""
        return t_975(self.seed.df) * math.sqrt(2) * (self.seed.sigma or 0.0)


@dataclass(kw_only=True)
class Seen:
    """One run, on record or made again."""

    status: str
    message: str | None = None
    val_bpb: float | None = None
    weights: str | None = None
    steps: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, nats), from a guess on
    guess_bpb: float | None = None  # val_bpb of a uniform guess
    dev: Points = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # digests, commit, versions, machine


class Outcome(NamedTuple):
    kind: str
    why: str
    differs: dict[str, list[Any]]
    interval: tuple[float, float] | None = None


def stated(trials: list[Trial]) -> Stated:
    return Stated(
        measure_noise(repeated(trials)), measure_noise([trial.differences for trial in trials])
    )


def t_975(df: int) -> float:
    """Student's 97.5 % quantile; beyond the table by Cornish and Fisher's expansion."""
    if df < 1:
        return math.inf
    return T_975[df - 1] if df <= len(T_975) else 1.96 + 2.372 / df + 2.823 / df**2


# ---- what a run left ----


def seen_of(study_folder: Path, run: Run) -> Seen:
    """A run with the facts that its files hold."""
    folder = study_folder / (run.folder or "no such folder")
    curve, guess_bpb = learning_of(folder)
    return Seen(
        status=run.status,
        message=run.message,
        val_bpb=run.val_bpb,
        weights=run.weights_sha256,
        steps=run.steps,
        curve=curve,
        guess_bpb=guess_bpb,
        dev=dev_points(read_curve(folder / CURVE_FILE)),
        facts=facts_of(folder),
    )


def facts_of(folder: Path) -> dict[str, Any]:
    """Of result.json's binding and training.json; what is unknown is left out."""
    result = read_quietly(read_result, folder / RESULT_FILE)
    training = training_of(folder)
    facts = vars(training) | training.machine if training else {}
    facts |= (result.binding or {}) if result else {}
    facts |= facts.get("versions") or {}
    # training.json counts the threads of the harness's process; the run's were set by its config.
    if told := config_of(folder).get("runtime.num_threads"):
        facts["threads"] = told
    names = (*MACHINE, *DIGESTS, *CODE, "commit", "config_digest", "steps", "seed")
    return {name: facts[name] for name in names if facts.get(name) is not None}


def learning_of(folder: Path) -> tuple[list[tuple[int, float]], float | None]:
    """(curve, guess_bpb) of a run; ([], None) where its files do not say."""
    result = read_quietly(read_result, folder / RESULT_FILE)
    vocab_size = config_of(folder).get("tokenizer.vocab_size")
    if result is None or not (vocab_size and result.num_bytes and result.num_tokens):
        return [], None
    points = read_curve(folder / CURVE_FILE)
    losses = [(p["step"], p["train/loss"]) for p in points if {"step", "train/loss"} <= p.keys()]
    guess_bpb = math.log2(vocab_size) * result.num_tokens / result.num_bytes
    return [(0, math.log(vocab_size)), *losses], guess_bpb


def config_of(folder: Path) -> dict[str, Any]:
    """The run's configuration, flat; {} if it cannot be read."""
    try:
        return flatten(yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return {}


def training_of(folder: Path) -> Training | None:
    return read_quietly(read_training, folder / TRAINING_FILE)


# ---- does the record agree with itself? ----


def contradictions(study_folder: Path, run: Run) -> list[str]:
    """Where the files of a run and the journal disagree about what came out."""
    result = read_quietly(read_result, study_folder / (run.folder or "") / RESULT_FILE)
    if result is None or run.status != "ok":
        return []
    told = {"status": result.status, "val_bpb": result.val_bpb, "weights": result.weights_sha256}
    kept = {"status": run.status, "val_bpb": run.val_bpb, "weights": run.weights_sha256}
    return [
        f"the journal says {name} {_short(kept[name])}, {RESULT_FILE} {_short(told[name])}"
        for name in told
        if kept[name] is not None and kept[name] != told[name]
    ]


def arithmetic(journal: Journal, trial: Trial, baseline_seeds: list[int]) -> list[str]:
    """Where a trial's val_bpb, differences and gain do not follow from the runs in the journal."""
    if trial.status != "ok" or not trial.runs:
        return []
    numbers = [run.val_bpb for run in trial.runs if run.seed in baseline_seeds]
    wrong = _off("val_bpb", trial.val_bpb, _mean(numbers))
    if trial.parent is None:
        return wrong
    then = journal.before(trial)
    runs = then.runs_of(then.trials[trial.parent], trial)
    differences = pair(runs, trial.runs)
    pairs = zip(differences, trial.differences, strict=False)
    if len(differences) != len(trial.differences) or any(abs(a - b) > SAME for a, b in pairs):
        wrong.append(f"its differences do not follow from its runs and those of {trial.parent}")
    return wrong + _off("gain", trial.gain, _mean(trial.differences))


def _off(name: str, said: float | None, follows: float | None) -> list[str]:
    if said is None or follows is None or abs(said - follows) <= 2 * SAME:
        return []
    return [f"its {name} is {said:.6f} in the journal, its runs make {follows:.6f}"]


def _mean(numbers: list[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def other_code(then: Seen, now: dict[str, Any], commits: tuple[str, ...]) -> list[str]:
    """Where the code or the configuration that git has is not what ran."""
    wrong = [
        f"{name} was {then.facts[name]}, the commit's is {now[name]}"
        for name in (*CODE, "config_digest")
        if name in then.facts and then.facts[name] != now[name]
    ]
    ran = then.facts.get("commit")
    if ran is not None and ran not in commits:
        wrong.append(f"commit {ran[:12]} ran, the journal says {commits[0][:12]}")
    return wrong


def other_config(folder: Path, config: Config) -> list[str]:
    """The first key of the run's config.yaml that the commit does not have like that."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return []
    told = config_of(folder)
    if not told:
        return [f"{path.name} of the run cannot be read"]
    rebuilt = flatten(config.model_dump())
    keys = [k for k in rebuilt if k.split(".")[0] not in (*HARNESS_KEYS, "seed")]
    return [
        f"{path.name} of the run says {key} {told.get(key)!r}, the commit {rebuilt[key]!r}"
        for key in keys
        if told.get(key) != rebuilt[key]
    ][:1]


# ---- then against now ----


def compare(then: Seen, now: Seen, noise: Stated, wrong: list[str]) -> Outcome:
    """`wrong`: what in the record contradicts itself."""
    differs = differences_of(then, now)
    where = "; ".join(f"{k} was {a}, is {b}" for k, (a, b) in differs.items())
    other = [
        f"{name} was {then.facts[name]}, is {now.facts[name]}"
        for name in DIGESTS
        if name in then.facts and name in now.facts and then.facts[name] != now.facts[name]
    ]
    stated = interval(then, now, noise)
    kind, why = _numbers(then, now, noise, stated, where)
    if other or wrong:
        kind, why = "not reproduced", "; ".join([*wrong, *other, why])
    return Outcome(kind, " ".join(why.split()), differs, stated)


def interval(then: Seen, now: Seen, noise: Stated) -> tuple[float, float] | None:
    """Where val_bpb should be now; None where it was not ok, or nothing was ever repeated."""
    if then.val_bpb is None or noise.seed.sigma is None:
        return None
    low, high = then.val_bpb - noise.half_width, then.val_bpb + noise.half_width
    if then.steps and now.steps and now.val_bpb is not None:
        low -= reach(now, then.steps)
        high += reach(then, now.steps)
    return round(low, 6), round(high, 6)


def reach(longer: Seen, steps: int) -> float:
    """bpb that the steps beyond `steps` brought this run, at most; 0 if it has no more than that,
    or where its curve is not known."""
    if len(longer.curve) < 2 or longer.guess_bpb is None or steps >= longer.steps:
        return 0.0
    at = [step for step, _ in longer.curve]
    losses = [loss for _, loss in longer.curve]
    bounds = np.maximum.accumulate(losses[::-1])[::-1]  # never below a later point
    learned = losses[0] - losses[-1]
    share = (np.interp(steps, at, bounds) - losses[-1]) / learned if learned > 0 else 0.0
    return float(min(1.0, share) * max(0.0, longer.guess_bpb - longer.val_bpb))


def differences_of(then: Seen, now: Seen) -> dict[str, list[Any]]:
    """What of the machine is known of both and differs."""
    pairs = {name: [then.facts.get(name), now.facts.get(name)] for name in MACHINE}
    return {name: p for name, p in pairs.items() if None not in p and p[0] != p[1]}


def _numbers(then: Seen, now: Seen, noise: Stated, stated, where: str) -> tuple[str, str]:
    if then.status == "stopped" and now.status == "ok":
        return _run_on(then, now, noise, where)
    if then.status != now.status:
        said = f": {now.message}" if now.message else ""
        also = f" ({where})" if where else ""
        return "not reproduced", f"it was {then.status}, now it is {now.status}{said}{also}"
    if then.status != "ok":
        return "identical", f"failed again: {now.status}, {now.message or 'without a message'}"
    same_weights = then.weights is not None and then.weights == now.weights
    if same_weights and then.val_bpb == now.val_bpb:
        return "identical", f"the same weights and val_bpb{'; ' + where if where else ''}"
    change = (
        f"val_bpb {then.val_bpb:.6f} then, {now.val_bpb:.6f} now: {in_sigmas(then, now, noise)}"
    )
    if then.steps != now.steps:
        change += f"; {then.steps} steps then, {now.steps} now"
    if same_weights and not where:
        return "not reproduced", f"the same weights, but {change}: the number was changed"
    change += f"; {where or 'of the machine nothing on record differs'}"
    if then.weights is None:
        change += "; the weights were not recorded"
    if stated is None:
        return "not reproduced", f"no noise is known: {change}"
    change += f"; stated interval {stated[0]:.4f} to {stated[1]:.4f}"
    inside = stated[0] <= now.val_bpb <= stated[1]
    return ("within noise", change) if inside else ("not reproduced", f"outside: {change}")


def _run_on(then: Seen, now: Seen, noise: Stated, where: str) -> tuple[str, str]:
    """A run that was stopped early is made again to its end: is it the same up to there?"""
    change = max((abs(a[1] - b[1]) for a, b in zip(then.dev, now.dev, strict=False)), default=None)
    if change is None or len(now.dev) < len(then.dev):
        return "not reproduced", "it was stopped early, and its curve of dev_bpb is gone"
    end = f"; run on to its end it has val_bpb {now.val_bpb:.6f}"
    also = f"; {where}" if where else ""
    if change < SAME:
        return "identical", f"the same dev_bpb up to where it was stopped{end}{also}"
    said = f"dev_bpb moved by up to {change:.6f} before it was stopped{end}{also}"
    return ("within noise" if change <= noise.half_width else "not reproduced"), said


def in_sigmas(then: Seen, now: Seen, noise: Stated) -> str:
    words = [f"{now.val_bpb - then.val_bpb:+.6f}"]
    for name, each in (("a seed", noise.seed), ("a pair", noise.pair)):
        if (count := sigmas(then, now, each)) is not None:
            words.append(f"{count:.1f} sigma of {name}")
    return ", ".join(words)


def sigmas(then: Seen, now: Seen, noise: Noise) -> float | None:
    if not noise.sigma or then.val_bpb is None or now.val_bpb is None:
        return None
    return round(abs(now.val_bpb - then.val_bpb) / noise.sigma, 3)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
