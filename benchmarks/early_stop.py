"""What would early stopping have saved, and whom would it have stopped wrongly?

Reads studies that ran every trial to its end. Their trials, in the order in which they ran, are
one history: at each trial the limit of agent/early.py is set from what came before it alone, and
compared with what the trial then did. Nothing is trained.

    python benchmarks/early_stop.py [rate=0.05] outputs/studies/first outputs/studies/second ...

A trial is hopeless if agent/decide.py, with the bar of its own study at its time, discards it after
its first run (false_keeps 0.05, max_seeds 12, whatever the study had: it may have been cut short).
One order gives few numbers, so the same is done for random orders of the trials.

Writes benchmarks/out/early_stop.json and docs/img/early_stop.png.
"""

import json
import math
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from agent import early
from agent.decide import Rule, bar_for, decide
from agent.journal import Journal, Trial
from nightshift.fixed.config import ROOT
from nightshift.fixed.result import CURVE_FILE, TRAINING_FILE, read_curve, read_training

OUT = ROOT / "benchmarks" / "out"
CHART = ROOT / "docs" / "img" / "early_stop.png"
RULE = Rule(false_keeps=0.05, equal_within=0.1, min_seeds=3, max_seeds=12)
CHECKS = 3  # runtime.num_dev_points - 1
ORDERS = 1000


@dataclass(frozen=True)
class Case:
    """A trial that ran to its end."""

    name: str
    kept: bool
    past: early.Past | None  # None: it has no pair of curves (it failed, or was refused)
    cut: float  # a gain below it is hopeless, at this point of its study
    wall_s: float  # of the whole trial
    saved_s: tuple[float, ...]  # by a stop at each check

    @property
    def hopeless(self) -> bool:
        return self.past is not None and self.past.gain < self.cut

    @property
    def study(self) -> str:
        return self.name.split("/")[0]


def cases_of(folder: Path) -> list[tuple[str, Case]]:
    """(when it was begun, case) of each trial of a study."""
    journal = Journal(folder / "journal.jsonl", repair=False)
    return [(t.started_at, case_of(folder, journal, t)) for t in journal.trials[1:]]


def case_of(folder: Path, journal: Journal, trial: Trial) -> Case:
    past, cut = early.past_of(folder, journal, trial, CHECKS), cut_of(journal, trial)
    name, kept = f"{folder.name}/{trial.number}", trial.decision == "keep"
    saved = saved_s(folder, trial) if past else ()
    return Case(name, kept, past, cut, trial.wall_s or 0.0, saved)


def cut_of(journal: Journal, trial: Trial) -> float:
    """The gain of a first run below which decide.py discards; by bisection."""
    bar = bar_for(journal.before(trial).trials, trial.proposal.kind, RULE)
    shorter = trial.lines_removed > trial.lines_added
    low, high = -100 * bar.sigma, 100 * bar.sigma
    for _ in range(20):
        middle = (low + high) / 2
        discarded = decide([middle], bar, shorter).kind == "discard"
        low, high = (middle, high) if discarded else (low, middle)
    return high


def saved_s(folder: Path, trial: Trial) -> tuple[float, ...]:
    """Seconds from each check to the end of training, and all that comes after training."""
    run = trial.runs[0]
    points = [p for p in read_curve(folder / run.folder / CURVE_FILE) if "time" in p]
    checks = [p["time"] for p in points if "dev_bpb" in p][:CHECKS]
    after = run.wall_s - read_training(folder / run.folder / TRAINING_FILE).total_s
    return tuple(points[-1]["time"] - at + after for at in checks)


def replay(cases: list[Case], rate: float) -> dict[str, float]:
    """One pass in this order, as a study would have gone; counted is what came once it was on."""
    tally = dict.fromkeys(
        ("on", "with_hope", "false", "hopeless", "stopped", "checked", "kept_lost"), 0
    )
    tally |= {"stated": 0.0, "wall_s": 0.0, "stopped_wall_s": 0.0, "saved_s": 0.0}
    history: list[early.Past] = []
    for case in cases:
        known = early.limit_of(history, case.cut.__gt__, rate)
        passed = known and case.past and passed_at(case.past, known)
        goes_on = passed is None or early.runs_on(tally["stopped"] + tally["checked"])
        if known:
            count(tally, case, known, passed, goes_on)
        if goes_on and case.past:
            history.append(case.past)
    return tally


def passed_at(past: early.Past, known: early.Limit) -> int | None:
    """The first check at which it is too far behind."""
    return next((i for i, share in enumerate(past.behind) if share > known.behind), None)


def count(tally: dict, case: Case, known: early.Limit, passed: int | None, goes_on: bool) -> None:
    could_be_stopped = case.past is not None and any(case.past.behind)
    tally["on"] += 1
    tally["wall_s"] += case.wall_s
    tally["hopeless"] += could_be_stopped and case.hopeless
    if could_be_stopped and not case.hopeless:
        tally["with_hope"] += 1
        tally["stated"] += known.rate
        tally["false"] += passed is not None
    if passed is not None:
        tally["checked" if goes_on else "stopped"] += 1
    if not goes_on:
        tally["saved_s"] += case.saved_s[passed]
        tally["stopped_wall_s"] += case.wall_s
        tally["kept_lost"] += case.kept


# ---- what is said of it ----


def interval(k: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % for a share k of n, by bisection on the binomial's tails."""

    def tail(p: float, low: int, high: int) -> float:
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(low, high + 1))

    def solve(rises) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if rises(middle) else (middle, high)
        return low

    low = solve(lambda p: tail(p, k, n) > 0.025) if k else 0.0
    return low, solve(lambda p: tail(p, 0, k) < 0.025) if k < n else 1.0


def in_words(tally: dict) -> str:
    false, with_hope = tally["false"], tally["with_hope"]
    low, high = interval(false, with_hope) if with_hope else (0.0, 1.0)
    return (
        f"on for {tally['on']} trials, {with_hope} of them with hope and {tally['hopeless']} "
        f"hopeless: {tally['stopped']} stopped, {tally['checked']} checked, {false} false stops "
        f"({false / max(1, with_hope):.1%}, 95 % {low:.1%} to {high:.1%}; stated "
        f"{tally['stated'] / max(1, with_hope):.1%}), {tally['kept_lost']} kept trials lost; saved "
        f"{tally['saved_s']:.0f} of {tally['wall_s']:.0f} trial-seconds "
        f"({tally['saved_s'] / max(1, tally['wall_s']):.1%}; of those stopped "
        f"{tally['saved_s'] / max(1, tally['stopped_wall_s']):.0%})"
    )


def over_orders(cases: list[Case], rate: float) -> dict[str, float]:
    """Means over random orders: shares, and the middle 95 % of the saving."""
    rng, tallies = random.Random(0), []
    for _ in range(ORDERS):
        tallies.append(replay(rng.sample(cases, len(cases)), rate))
    with_hope = sum(t["with_hope"] for t in tallies)
    savings = sorted(t["saved_s"] / t["wall_s"] for t in tallies if t["wall_s"])
    return {
        "false_stops": sum(t["false"] for t in tallies) / max(1, with_hope),
        "stated": sum(t["stated"] for t in tallies) / max(1, with_hope),
        "passed_of_hopeless": sum(t["checked"] + t["stopped"] - t["false"] for t in tallies)
        / max(1, sum(t["hopeless"] for t in tallies)),
        "saving": statistics.mean(savings),
        "saving_low": savings[len(savings) // 40],
        "saving_high": savings[-1 - len(savings) // 40],
    }


def draw(cases: list[Case], path: Path) -> None:
    """How far behind a trial ever was, against what came out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [case for case in cases if case.past and any(case.past.behind)]
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for color, label, fits in (
        ("#56B4E9", "with hope, discarded", lambda case: not case.hopeless and not case.kept),
        ("#D55E00", "hopeless", lambda case: case.hopeless and not case.kept),
        ("#0072B2", "kept", lambda case: case.kept),
    ):
        mine = [case for case in shown if fits(case)]
        x, y = [max(case.past.behind) for case in mine], [case.past.gain for case in mine]
        axes.plot(x, y, "o", color=color, markersize=5, label=f"{label} ({len(mine)})")
    axes.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_xscale("symlog", linthresh=0.05)
    axes.set_yscale("symlog", linthresh=0.005)
    axes.set_xlabel("furthest behind its parent, as a share of what that still learned")
    axes.set_ylabel("gain at the end (bpb)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(path, dpi=160)


def main() -> None:
    given = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    rate = float(given.pop("rate", 0.05))
    folders = [Path(a) for a in sys.argv[1:] if "=" not in a]
    if given or not folders:
        sys.exit(__doc__)
    begun = [pair for folder in folders for pair in cases_of(folder)]
    cases = [case for _, case in sorted(begun, key=lambda pair: pair[0])]
    pairs = [case for case in cases if case.past and any(case.past.behind)]
    print(f"{len(folders)} studies, {len(cases)} trials, {len(pairs)} with a curve that differs")
    own = [replay([c for c in cases if c.study == f.name], rate) for f in folders]
    alone = {key: sum(one[key] for one in own) for key in own[0]}
    print(f"each study with its own history: {in_words(alone)}")
    in_time = replay(cases, rate)
    print(f"all as one history, in the order of time: {in_words(in_time)}")
    orders = over_orders(cases, rate)
    print(f"over {ORDERS} random orders: {json.dumps({k: round(v, 4) for k, v in orders.items()})}")
    OUT.mkdir(parents=True, exist_ok=True)
    found = {"rate": rate, "alone": alone, "in_time": in_time, "orders": orders}
    (OUT / "early_stop.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(cases, CHART)


if __name__ == "__main__":
    main()
