"""Who finds a better configuration for the same trial-seconds?

    python benchmarks/search [key=value ...]

    repeats=20   of each search, on the surrogate (landscape.py)
    runs=300     trial-seconds of a search, in runs of the baseline
    only=words   searches whose name has one of these, between semicolons
    nothing=true a surrogate in which nothing helps or hurts: how often does a study keep something?
    real=true    real runs instead of the surrogate (about repeats x runs x 4 s of CPU for a search)
    seed=0

Real runs are read from runs.jsonl.gz (collect.py makes the surrogate's). Prints tables, writes
benchmarks/out/search/{surrogate,real,nothing}.json; for the surrogate draws docs/img/search.png.
"""

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import NamedTuple

from landscape import Landscape, Nothing
from runs import OUT, Point, Runner, Score, Setting
from searches import RIVALS, ours
from tqdm import tqdm

from nightshift.fixed.config import ROOT

OURS = {
    "nightshift": {},
    "nightshift, ahead but not proven": {"ahead": True},
    "islands, proven": {"strategy": "islands"},
    "greedy, proven": {"strategy": "greedy"},
}
COLORS = (  # of RIVALS, in order
    *("#BBBBBB", "#888888", "#F0E442", "#E69F00", "#8B4513", "#CC79A7", "#D55E00"),
    *("#009E73", "#000000"),
)
TARGET_AFTER = 100  # random trials
LOOKS = (36, 100)  # runs after which the tables say where a search is, and at its end
FRESH = (9001, 9002, 9003)  # seeds on which real results are measured again


class Told(NamedTuple):
    """One search: at each step the seconds, the trials, and what it would deliver is worth."""

    seconds: list[float]
    trials: list[int]
    values: list[float]
    moved: bool  # it delivers something else than the baseline

    def at(self, seconds: float) -> float:
        """The value of what is delivered after so many seconds."""
        done = [v for s, v in zip(self.seconds, self.values, strict=True) if s <= seconds]
        return done[-1] if done else self.values[0]

    def reached(self, value: float) -> tuple[float, int] | None:
        """(seconds, trials) when it first delivers this or better."""
        for seconds, trials, now in zip(*self[:3], strict=True):
            if now <= value:
                return seconds, trials
        return None


def follow(steps, horizon: float) -> list[tuple[float, int, Point]]:
    """The steps of a search that it can pay for."""
    paid = list(takewhile(lambda step: step[0] <= horizon, steps))
    return paid or [next(iter(steps))]


def told_of(steps: list[tuple[float, int, Point]], worth: Callable) -> Told:
    known = {point: worth(point) for _, _, point in steps}
    seconds, trials, points = map(list, zip(*steps, strict=True))
    moved = points[-1] != Point.of({})
    return Told(seconds, trials, [known[point] for point in points], moved)


def looked_at(steps: list, looks: list[float]) -> list:
    """The last step before each look: real values are measured for these alone."""
    return [[step for step in steps if step[0] <= look or step is steps[0]][-1] for look in looks]


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    real, seed = given.get("real") == "true", int(given.get("seed", 0))
    repeats, runs = int(given.get("repeats", 5 if real else 20)), float(given.get("runs", 300))
    nothing = given.get("nothing") == "true"
    words = [word for word in given.get("only", "").split(";") if word]
    setting = Setting()
    with Runner(setting) as runner:
        land = (Nothing if nothing else Landscape)(setting, runner.known)
        horizon = runs * land.costs[""]
        hours = {"hours": horizon / 3600, "trials": None}  # a study proves what is ahead at its end
        searches = {name: partial(ours, **hours, **changes) for name, changes in OURS.items()}
        searches = {
            name: search
            for name, search in (searches | RIVALS).items()
            if not words or any(word in name for word in words)
        }
        looks = [n * land.costs[""] for n in LOOKS if n < runs] + [horizon]
        told: dict[str, list[Told]] = {name: [] for name in searches}
        for repeat in tqdm(range(seed, seed + repeats), desc="repeats"):
            shift = 1000 * (repeat + 1)

            def evaluate(point: Point, number: int, shift: int = shift) -> Score:
                if not real:
                    return land(point, shift + number)
                # A busy machine stretches CPU seconds too: a run costs what its kind cost.
                return runner(point, shift + number)._replace(seconds=land.cost(point))

            worth = partial(measured, runner) if real else land.truth
            for name, search in searches.items():
                steps = follow(search(setting, evaluate, repeat), horizon)
                steps = looked_at(steps, looks) if real else steps
                told[name].append(told_of(steps, worth))
                save(told, "nothing" if nothing else "real" if real else "surrogate")
    if nothing:
        return report_kept(told, horizon / land.costs[""])
    report(told, land, horizon, real)


def report_kept(told: dict[str, list[Told]], runs: float) -> None:
    print(f"a surrogate in which nothing helps, {runs:.0f} runs a study\n")
    print("| search | studies | delivered something | trials a study |\n|---|---|---|---|")
    for name, ends in told.items():
        kept = sum(end.moved for end in ends)
        print(
            f"| {name} | {len(ends)} | {kept} | {statistics.mean(e.trials[-1] for e in ends):.0f} |"
        )


def measured(runner: Runner, point: Point) -> float:
    """The mean on fresh seeds; not paid for by the search."""
    return statistics.mean(runner(point, seed).val_bpb for seed in FRESH)


def save(told: dict[str, list[Told]], kind: str) -> None:
    (OUT / f"{kind}.json").write_text(json.dumps(told))


def report(told: dict[str, list[Told]], land: Landscape, horizon: float, real: bool) -> None:
    unit = land.costs[""]
    far = not real and horizon >= TARGET_AFTER * unit
    target, name = target_of(told, unit) if far else (None, "")
    print(
        f"{'real runs' if real else 'surrogate'}; {unit:.2f} s a run, "
        f"{horizon / unit:.0f} runs a search"
    )
    if target is not None:
        print(f"target: {target:.4f}, the median best of {TARGET_AFTER} trials of '{name}'")
    checks = [n for n in LOOKS if n * unit < horizon] + [horizon / unit]
    head = " | ".join(f"after {n:g} runs" for n in checks)
    print(f"\n| search | {head} | target reached | runs (trials) to the target |")
    print("|---" * (3 + len(checks)) + "|")
    for name, ends in told.items():
        cells = []
        for n in checks:
            values = [one.at(n * unit) for one in ends]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        reached = [one.reached(target) for one in ends] if target else []
        times = [r[0] / unit if r else float("inf") for r in reached]
        trials = [r[1] if r else float("inf") for r in reached]
        share = f"{sum(map(bool, reached))} of {len(ends)}" if target else ""
        cost = f"{statistics.median(times):.0f} ({statistics.median(trials):.0f})" if target else ""
        print(f"| {name} | {' | '.join(cells)} | {share} | {cost} |")
    if not real:
        draw(told, unit, horizon)


def target_of(told: dict[str, list[Told]], unit: float) -> tuple[float | None, str]:
    """The better of the random searches."""
    best = {
        name: statistics.median(one.at(TARGET_AFTER * unit) for one in ends)
        for name, ends in told.items()
        if name.startswith("random")
    }
    name = min(best, key=best.get, default="")
    return best.get(name), name


def draw(told: dict[str, list[Told]], unit: float, horizon: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Okabe and Ito's colours; ours is blue, dashed where it is not proven
    blue = "#0072B2"
    colors = dict(zip(RIVALS, COLORS, strict=True)) | dict.fromkeys(OURS, blue)
    shown = [n for n in told if n.startswith("nightshift") or n in RIVALS]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    grid = [unit * n for n in range(1, int(horizon / unit) + 1)]
    for name in shown:
        curves = [[one.at(s) for s in grid] for one in told[name]]
        middle = [statistics.median(column) for column in zip(*curves, strict=True)]
        axes.plot(
            [s / unit for s in grid],
            middle,
            color=colors[name],
            lw=2.5 if name in OURS else 1.2,
            ls=":" if "not proven" in name else "-",
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xlabel("trial-seconds, in runs of the baseline")
    axes.set_ylabel("true val_bpb of what is delivered")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs/img/search.png", dpi=120)


if __name__ == "__main__":
    main()
