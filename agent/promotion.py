"""What a promotion is, where it is kept, and what its numbers say. Pure but for its two files.

A promotion runs the study's baseline, one trial (its champion) and the champion without each kept
change at a larger scale, on the same seeds. `promotions.jsonl` in the study's folder has one synced
line for each that is through; `promotions/<n>/runs.jsonl` one for each run, so that a killed one
goes on where it stood.

**Verdict**, on paired differences (decide.py): `holds` if the 95 % interval of the gain lies above
0, `hurts` if below, `fades` if 0 is in it. The interval is decide.py's: shrunk, with the noise of a
pair learned from all trials of the study, in sigmas of a seed; sigma is measured anew at the larger
scale. A change's gain is what the champion loses without it. Verdicts are not corrected for their
number: with ten changes of no effect, expect one `holds` or `hurts` in two promotions.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agent.decide import (
    Z_INTERVAL,
    Bar,
    Rule,
    measure_noise,
    pair,
    repeated,
    scatters_of,
    set_bar,
    weigh,
)
from agent.journal import Journal, Run, Trial

PROMOTIONS_FILE, RUNS_FILE, ORDER_FILE = "promotions.jsonl", "runs.jsonl", "order.json"
FOLDER = "promotions"
RULE = (
    "holds: the whole 95 % interval of the gain lies above 0; hurts: below 0; fades: 0 is in it; "
    "cannot be separated: the champion does not apply or run without the change"
)


@dataclass(kw_only=True)
class Order:
    """What was asked for; a promotion that was stopped is found again by it."""

    trial: int
    seeds: list[int]
    given: dict[str, Any]  # flat; what the command line set


@dataclass(kw_only=True)
class Arm:
    """One configuration and code of the comparison."""

    name: str  # baseline | champion | without_<NNN>
    left_out: int | None = None  # the trial whose change it lacks
    commit: str | None = None
    problem: str | None = None  # why it has no number
    runs: list[Run] = field(default_factory=list)

    @property
    def numbers(self) -> list[float]:
        return [run.val_bpb for run in self.runs if run.status == "ok"]

    @property
    def by_seed(self) -> dict[int, Run]:
        return {run.seed: run for run in self.runs}


@dataclass(kw_only=True)
class Verdict:
    """What a change, or all of them together, is worth at the larger scale."""

    change: int | None  # its trial; None: all together
    title: str
    verdict: str  # holds | fades | hurts | cannot be separated
    reason: str
    differences: list[float] = field(default_factory=list)  # without it minus with it, a seed each
    gain: float | None = None
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    evidence: float | None = None  # e-value of a gain, at most 1e9
    before: float | None = None  # the gain in the study, and its interval
    before_low: float | None = None
    before_high: float | None = None


@dataclass(kw_only=True)
class Promotion:
    """One that is through."""

    number: int
    order: Order
    scale: dict[str, Any]  # flat: what the champion has otherwise than its trial had
    arms: list[Arm]
    sigma: float | None  # of a seed, at this scale
    study_sigma: float | None
    verdicts: list[Verdict]  # all together first
    small: dict[str, list[float]]  # val_bpb of baseline and champion in the study, a seed each
    is_head: bool = True  # of the study's incumbent, so that the study's branch follows
    commit: str | None = None  # reproduces the champion; None: it was not promoted
    run: str | None = None  # folder of the registered weights, relative to the study's
    weights_sha256: str | None = None
    dvc_md5: str | None = None  # of champion/checkpoint
    test_bpb: float | None = None
    test_note: str | None = None  # why there is none
    ended_at: str = ""  # UTC, ISO 8601
    wall_s: float | None = None  # of all runs

    @property
    def verdict(self) -> Verdict:
        return self.verdicts[0]

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


# ---- files ----


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Synced: what is in the file happened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.write(json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A line that a kill cut short never was; it is taken off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.decode("utf-8").splitlines()]


def read_promotions(study_folder: Path) -> list[Promotion]:
    return [_promotion(values) for values in read_lines(study_folder / PROMOTIONS_FILE)]


def append_promotion(study_folder: Path, promotion: Promotion) -> None:
    append_line(study_folder / PROMOTIONS_FILE, asdict(promotion))


def _promotion(values: dict[str, Any]) -> Promotion:
    arms = [Arm(**{**arm, "runs": [Run(**r) for r in arm["runs"]]}) for arm in values["arms"]]
    verdicts = [Verdict(**verdict) for verdict in values["verdicts"]]
    order = Order(**values["order"])
    return Promotion(**{**values, "order": order, "arms": arms, "verdicts": verdicts})


def head_of(study_folder: Path, incumbent: Trial | None) -> Promotion | None:
    """The newest promotion of the incumbent: the study's branch stands at its commit."""
    return next(
        (
            promotion
            for promotion in reversed(read_promotions(study_folder))
            if incumbent and promotion.order.trial == incumbent.number and promotion.commit
        ),
        None,
    )


def folder_of(study_folder: Path, number: int) -> Path:
    return study_folder / FOLDER / f"{number:03d}"


# ---- judgement ----


def changes_of(journal: Journal, trial: Trial) -> list[Trial]:
    """The trials whose changes are in this one, oldest first, itself last; not the baseline."""
    found = []
    while trial.parent is not None:
        found.insert(0, trial)
        trial = journal.trials[trial.parent]
    return found


def judge(journal: Journal, trial: Trial, arms: Sequence[Arm], rule: Rule) -> dict[str, Any]:
    """sigma, study_sigma, verdicts and small of a Promotion."""
    by_name = {arm.name: arm for arm in arms}
    sigma = measure_noise([arm.numbers for arm in arms if len(arm.numbers) > 1]).sigma
    study_sigma = measure_noise(repeated(journal.trials)).sigma
    changes = changes_of(journal, trial)
    kinds = {change.proposal.kind for change in changes}
    bar = _bar(journal, sigma, study_sigma, "code" if "code" in kinds else "config", rule)
    baseline, champion = by_name["baseline"], by_name["champion"]
    first, runs = journal.trials[0], journal.runs_of(trial)
    before = pair(journal.runs_of(first), list(runs.values()))
    small_bar = _bar(
        journal, study_sigma, study_sigma, "code" if "code" in kinds else "config", rule
    )
    whole = weigh_pairs("all changes together", None, baseline, champion, bar)
    if before:
        _fill_before(whole, before, small_bar)
    verdicts = [whole]
    for change in changes:
        arm = by_name.get(f"without_{change.number:03d}")
        arm = arm or baseline  # the only change: without it, it is the baseline
        kind_bar = _bar(journal, sigma, study_sigma, change.proposal.kind, rule)
        verdict = weigh_pairs(change.proposal.title, change.number, arm, champion, kind_bar)
        verdict.before, verdict.before_low, verdict.before_high = (
            change.gain,
            change.low,
            change.high,
        )
        verdicts.append(verdict)
    small = {
        "baseline": [r.val_bpb for r in journal.runs_of(first).values() if r.status == "ok"],
        "champion": [r.val_bpb for r in runs.values() if r.status == "ok"],
    }
    return {"sigma": sigma, "study_sigma": study_sigma, "verdicts": verdicts, "small": small}


def _bar(
    journal: Journal, sigma: float | None, study_sigma: float | None, kind: str, rule: Rule
) -> Bar:
    """What the study's trials taught about the noise of a pair, in sigmas of this scale."""
    stretch = (sigma / study_sigma) ** 2 if sigma and study_sigma else 1.0
    scatters = scatters_of(journal.trials)
    scaled = [s._replace(sum_squares=s.sum_squares * stretch) for s in scatters]
    return set_bar(sigma, scaled, kind, 1, rule)


def weigh_pairs(title: str, change: int | None, without: Arm, with_it: Arm, bar: Bar) -> Verdict:
    differences = pair(without.by_seed, with_it.runs)
    if without.problem or not differences:
        reason = without.problem or "no seed on which both have a number"
        return Verdict(change=change, title=title, verdict="cannot be separated", reason=reason)
    seen = weigh(differences, bar)
    low, high = seen.estimate - Z_INTERVAL * seen.sd, seen.estimate + Z_INTERVAL * seen.sd
    name = "holds" if low > 0 else "hurts" if high < 0 else "fades"
    gain = sum(differences) / len(differences)
    return Verdict(
        change=change,
        title=title,
        verdict=name,
        reason=f"gain {gain:+.4f} over {len(differences)} seeds, estimate {seen.estimate:+.4f} "
        f"({low:+.4f} to {high:+.4f})",
        differences=[round(d, 6) for d in differences],
        gain=round(gain, 6),
        estimate=round(seen.estimate, 6),
        low=round(low, 6),
        high=round(high, 6),
        evidence=round(2.718281828459045 ** min(seen.log_e, 20.7), 3),
    )


def _fill_before(verdict: Verdict, differences: list[float], bar: Bar) -> None:
    seen = weigh(differences, bar)
    verdict.before = round(sum(differences) / len(differences), 6)
    verdict.before_low = round(seen.estimate - Z_INTERVAL * seen.sd, 6)
    verdict.before_high = round(seen.estimate + Z_INTERVAL * seen.sd, 6)
