"""How often does the rule keep what is no gain, and how often does it miss what is one?

Thousands of synthetic studies of 200 trials go through the real code of agent/decide.py and, for
comparison, through four simpler rules. The truth of each trial is known. A run is

    val_bpb = level + effect of the seed + what the lineage does to that seed + noise of the run

where the first two cancel in a paired difference and the last two are its noise. Its size tau is
drawn for each trial, log-uniformly, for config and for code changes from ranges of their own, and
is three times as large in one trial of twenty. OTHER_NOISE breaks these assumptions on purpose.

    python benchmarks/decide_simulation.py [studies=1000] [seed=0]

Prints the tables of benchmarks/README.md and draws benchmarks/out/decide.png.
"""

import math
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from agent.decide import Bar, Rule, decide, level_of, measure_noise, scatter_of, set_bar
from nightshift.fixed.config import ROOT

OUT = ROOT / "benchmarks" / "out"
NUM_TRIALS = 200
SIGMA = 0.0033  # of a seed, LOG 2026-11-23
BASELINE_SEEDS = (1, 2, 3)
GAINS = (1, 2, 3, 5, 10, 30)  # in units of the trial's own tau
RULE = Rule(false_keeps=0.05, equal_within=0.1, min_seeds=3, max_seeds=12)  # conf/study.yaml
# Okabe and Ito's colours
COLORS = ("#999999", "#E69F00", "#D55E00", "#56B4E9", "#0072B2")


class Noise(NamedTuple):
    """How tau is drawn, and what the differences look like."""

    taus: dict[str, tuple[float, float]]  # kind of change -> range, log-uniform
    heavy_share: float = 0.05
    heavy_factor: float = 3.0
    run_share: float = 0.5  # of the smallest tau's variance: noise of the runs, the parent's too
    heavy_tails: bool = False  # Student's t with 3 degrees of freedom instead of a normal

    def tau(self, rng: random.Random, kind: str) -> float:
        low, high = self.taus[kind]
        tau = low * (high / low) ** rng.random()
        return tau * (self.heavy_factor if rng.random() < self.heavy_share else 1.0)

    def draw(self, rng: random.Random, sigma: float) -> float:
        if not self.heavy_tails:
            return rng.gauss(0, sigma)
        squares = rng.gammavariate(1.5, 2.0)  # chi-square with 3 degrees of freedom
        return sigma * rng.gauss(0, 1) / math.sqrt(squares)  # of variance sigma**2


MEASURED = Noise({"config": (0.0001, 0.0005), "code": (0.0002, 0.0007)})  # paired_noise.py
OTHER_NOISE = {
    "as measured": MEASURED,
    "1 trial of 5 scatters 5 times as much": MEASURED._replace(heavy_share=0.2, heavy_factor=5.0),
    "heavy tails (t, 3 df)": MEASURED._replace(heavy_tails=True),
    "the incumbent's luck is half of it": Noise(
        dict.fromkeys(("config", "code"), (0.0003, 0.0004)), run_share=0.95
    ),
    "pairing is in vain (tau = 1.4 sigma)": Noise(
        dict.fromkeys(("config", "code"), (1.41 * SIGMA, 1.42 * SIGMA))
    ),
}


class Change(NamedTuple):
    """A trial's truth."""

    kind: str
    tau: float  # of its paired difference
    gain: float
    size: float | None  # gain / tau where that is one of GAINS, 0 for none, None for a loss


@dataclass
class Outcome:
    """What a rule made of a trial."""

    change: Change
    kept: bool
    runs: int  # of the trial
    parent_runs: int = 0  # of its parent, for this trial
    gain: float = math.nan  # as seen
    estimate: float = math.nan  # as reported
    low: float = math.nan
    high: float = math.nan


@dataclass
class Line:
    """One trial's runs by seed, made when they are asked for."""

    rng: random.Random
    level: float
    seed_effects: Callable[[int], float]
    interaction: Callable[[int], float]
    run_noise: float
    runs: dict[int, float] = field(default_factory=dict)

    def run(self, seed: int) -> float:
        if seed not in self.runs:
            noise = self.rng.gauss(0, self.run_noise)
            self.runs[seed] = self.level + self.seed_effects(seed) + self.interaction(seed) + noise
        return self.runs[seed]


class World:
    """One study's truth: the incumbent and what a change of it would give."""

    def __init__(self, seed: str, noise: Noise):
        self.rng, self.noise = random.Random(seed), noise
        smallest = min(low for low, _ in noise.taus.values())
        self.run_noise = math.sqrt(noise.run_share / 2) * smallest
        self.seed_effects = lru_cache(maxsize=None)(lambda seed: self.rng.gauss(0, SIGMA))
        self.incumbent = Line(self.rng, 2.0, self.seed_effects, lambda seed: 0.0, self.run_noise)
        self.baseline = [self.incumbent.run(seed) for seed in BASELINE_SEEDS]

    def change(self, change: Change) -> Line:
        own = math.sqrt(change.tau**2 - 2 * self.run_noise**2)
        inherited, level = self.incumbent.interaction, self.incumbent.level - change.gain
        both = lru_cache(maxsize=None)(
            lambda seed: inherited(seed) + self.noise.draw(self.rng, own)
        )
        return Line(self.rng, level, self.seed_effects, both, self.run_noise)

    def differences(self, line: Line, seeds) -> list[float]:
        return [self.incumbent.run(seed) - line.run(seed) for seed in seeds]


# ---- truths ----


def draw_change(
    rng: random.Random, noise: Noise, share_of_gains: float, share_of_losses: float
) -> Change:
    kind = rng.choice(("config", "code"))
    tau = noise.tau(rng, kind)
    where = rng.random()
    if where < share_of_gains:
        size = rng.choice(GAINS)
        return Change(kind, tau, size * tau, size)
    if where < share_of_gains + share_of_losses:
        return Change(kind, tau, -rng.expovariate(1 / (3 * SIGMA)), None)
    return Change(kind, tau, 0.0, 0)


# ---- rules: a study's state, and what each makes of a trial ----


class Greedy:
    """Lower on one seed is better: what most loops do."""

    def __init__(self, world: World):
        self.world = world

    def judge(self, line: Line, change: Change) -> Outcome:
        (gain,) = self.world.differences(line, BASELINE_SEEDS[:1])
        return Outcome(change, gain > 0, 1, gain=gain, estimate=gain)


class FixedSeeds(Greedy):
    """A lower mean over three seeds is better."""

    def judge(self, line: Line, change: Change) -> Outcome:
        gains = self.world.differences(line, BASELINE_SEEDS)
        gain = statistics.mean(gains)
        return Outcome(change, self.accepts(gains), len(gains), gain=gain, estimate=gain)

    def accepts(self, gains: list[float]) -> bool:
        return statistics.mean(gains) > 0


class TwoSigma(FixedSeeds):
    """Three seeds, paired: the mean gain is above two of its own standard errors."""

    def accepts(self, gains: list[float]) -> bool:
        return statistics.mean(gains) > 2 * statistics.stdev(gains) / math.sqrt(len(gains))


class SeedSigma:
    """nightshift until now: better on one seed, then by two standard errors of unpaired means."""

    def __init__(self, world: World):
        self.world, self.groups = world, [world.baseline]

    def judge(self, line: Line, change: Change) -> Outcome:
        gains, kept = self.world.differences(line, BASELINE_SEEDS[:1]), False
        if gains[0] > 0:
            gains = self.world.differences(line, BASELINE_SEEDS)
            self.groups.append([line.run(seed) for seed in BASELINE_SEEDS])
            kept = statistics.mean(gains) > self.needed()
        gain = statistics.mean(gains)
        return Outcome(change, kept, len(gains), gain=gain, estimate=gain)

    def needed(self) -> float:
        sigma, df = measure_noise(self.groups)
        z = 2 * (8 * df + 3) / (8 * df + 1)  # Wallace 1959
        return math.sqrt(df * math.expm1(z**2 / df)) * sigma * math.sqrt(2 / 3)


class Nightshift:
    """agent/decide.py as the loop uses it."""

    def __init__(self, world: World, rule: Rule = RULE):
        self.world, self.rule, self.scatters = world, rule, []
        self.lineage, self.rank, self.bars = [world.incumbent], 0, {}

    def judge(self, line: Line, change: Change, shorter: bool = False) -> Outcome:
        self.rank += 1
        bar, known = self.bar(change.kind), len(self.world.incumbent.runs)
        for num_seeds in range(1, self.rule.max_seeds + 1):
            seeds = range(1, num_seeds + 1)
            gains = self.world.differences(line, seeds)
            decision = decide(gains, bar, shorter)
            if decision.kind != "more":
                break
        made = len(self.world.incumbent.runs) - known
        if decision.kind == "keep":
            self.lineage.append(line)
        if made or len(gains) > 1:
            self.scatters.append(scatter_of(change.kind, gains))
            self.bars = {}
        return Outcome(
            change, decision.kind == "keep", num_seeds, made,
            decision.gain, decision.estimate, decision.low, decision.high,
        )  # fmt: skip

    def bar(self, kind: str) -> Bar:
        """Learned anew only when something was learned: the same numbers, sooner."""
        if kind not in self.bars:
            sigma = measure_noise([list(line.runs.values()) for line in self.lineage]).sigma
            self.bars[kind] = set_bar(sigma, self.scatters, kind, self.rank, self.rule)
        return self.bars[kind]._replace(level=level_of(self.rank, self.rule.false_keeps))


RULES = {
    "greedy, one seed": Greedy,
    "mean of 3 seeds": FixedSeeds,
    "2 sigma of 3 pairs": TwoSigma,
    "2 sigma of a seed (old)": SeedSigma,
    "nightshift": Nightshift,
}


# ---- studies ----


def study(make, seed: str, noise: Noise, gains: float, losses: float) -> list[Outcome]:
    """The outcomes of one study's trials. What is kept is the next incumbent."""
    world, rng = World(seed, noise), random.Random(f"{seed} changes")
    rule, outcomes = make(world), []
    for _ in range(NUM_TRIALS):
        change = draw_change(rng, noise, gains, losses)
        line = world.change(change)
        outcomes.append(rule.judge(line, change))
        if outcomes[-1].kept:
            world.incumbent = line
    return outcomes


def studies(
    make, count: int, seed: int, gains: float, losses: float, noise: Noise = MEASURED
) -> list[list[Outcome]]:
    return [study(make, f"{seed}/{number}", noise, gains, losses) for number in range(count)]


def interval(successes: int, count: int) -> str:
    """A share with its 95 % interval (Wilson 1927)."""
    if not count:
        return "-"
    p, z2 = successes / count, 1.96**2
    center = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (p * (1 - p) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return f"{p:6.1%} ({max(0.0, center - half):.1%} to {center + half:.1%})"


class Row(NamedTuple):
    false_keeps: float  # a study
    runs: float  # a trial, its parent's for it included


def null_table(count: int, seed: int) -> dict[str, Row]:
    print(f"## {NUM_TRIALS} trials that change nothing")
    print(f"{'rule':38} {'studies':>7} {'with a false keep':>24} {'false keeps':>12} {'runs':>5}")
    few = max(1, count // 10)
    rows = {
        name: null_row(name, make, count if make is Nightshift else few, seed, MEASURED)
        for name, make in RULES.items()
    }
    print("nightshift where the noise is")
    for name, noise in OTHER_NOISE.items():
        null_row(f"  {name}", Nightshift, max(1, count // 4), seed + 1, noise)
    return rows


def null_row(name: str, make, count: int, seed: int, noise: Noise) -> Row:
    results = studies(make, count, seed, 0.0, 0.0, noise)
    wrong = [sum(o.kept for o in one) for one in results]
    row = Row(sum(wrong) / count, mean_runs([o for one in results for o in one]))
    share = interval(sum(map(bool, wrong)), count)
    print(f"{name:38} {count:7} {share:>24} {row.false_keeps:12.3f} {row.runs:5.2f}", flush=True)
    return row


def mean_runs(outcomes: list[Outcome]) -> float:
    return statistics.mean(o.runs + o.parent_runs for o in outcomes)


def gains_table(count: int, seed: int) -> dict[str, list[Outcome]]:
    print(f"\n## 15 % gains, 40 % losses, 45 % nothing: {count} studies; share of the gains found")
    sizes = " ".join(f"{f'{size} tau':>7}" for size in GAINS)
    print(f"{'rule':24} {sizes}   kept a study: nothings, losses   {'runs':>5}")
    results = {}
    for name, make in RULES.items():
        every = [o for one in studies(make, count, seed + 2, 0.15, 0.40) for o in one]
        shares = " ".join(f"{found(every, size):7.1%}" for size in GAINS)
        nothings = sum(o.kept for o in every if o.change.size == 0) / count
        losses = sum(o.kept for o in every if o.change.size is None) / count
        print(
            f"{name:24} {shares} {nothings:24.2f} {losses:7.2f}   {mean_runs(every):5.2f}",
            flush=True,
        )
        results[name] = every
    return results


def found(outcomes: list[Outcome], size: float) -> float:
    right = [o.kept for o in outcomes if o.change.size == size]
    return sum(right) / len(right)


def honesty_table(results: dict[str, list[Outcome]]) -> None:
    print("\n## What was reported of what was kept, against the truth")
    head = f"{'seen/true':>10} {'reported/true':>14} {'in 95 % interval':>24}"
    print(f"{'rule':24} {'kept':>6} {head}")
    for name, every in results.items():
        honesty_row(name, [o for o in every if o.kept])
    for size in (0, *GAINS):
        kept = [o for o in results["nightshift"] if o.kept and o.change.size == size]
        honesty_row(f"  nightshift, {size} tau", kept)


def honesty_row(name: str, kept: list[Outcome]) -> None:
    true = sum(o.change.gain for o in kept)
    if true <= 0:
        return
    inside = [o.low <= o.change.gain <= o.high for o in kept if not math.isnan(o.low)]
    print(
        f"{name:24} {len(kept):6} {sum(o.gain for o in kept) / true:10.3f} "
        f"{sum(o.estimate for o in kept) / true:14.3f} {interval(sum(inside), len(inside)):>24}"
    )


def simplicity_table(count: int, seed: int) -> None:
    """Trials that remove lines and cost nothing, or a little."""
    print(f"\n## Trials that remove lines; the margin is {RULE.equal_within:g} sigma")
    print(f"{'true loss':>12} {'trials':>7} {'kept':>24} {'runs':>5}")
    for loss in (0.0, 0.5, 1.0, 2.0, 4.0):
        outcomes = []
        for number in range(count):
            world = World(f"{seed}/{number}", MEASURED)
            rule = Nightshift(world)
            for _ in range(40):
                change = draw_change(world.rng, MEASURED, 0.0, 0.0)
                change = change._replace(gain=-loss * RULE.equal_within * SIGMA)
                outcomes.append(rule.judge(world.change(change), change, shorter=True))
        kept = interval(sum(o.kept for o in outcomes), len(outcomes))
        runs = mean_runs(outcomes)
        print(f"{loss:5.1f} margins {len(outcomes):7} {kept:>24} {runs:5.2f}", flush=True)


# ---- chart ----


def draw_chart(rows: dict[str, Row], gains: dict[str, list[Outcome]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (name, row), color in zip(rows.items(), COLORS, strict=True):
        shares = [100 * found(gains[name], size) for size in GAINS]
        left.plot(range(len(GAINS)), shares, "o-", color=color, label=name, linewidth=1.8)
        right.plot(row.runs, max(row.false_keeps, 1e-3), "o", color=color, markersize=10)
    left.set_xticks(range(len(GAINS)), [str(size) for size in GAINS])
    left.set(xlabel="true gain, in sigmas of its paired difference", ylabel="found (%)")
    figure.legend(loc="outside lower center", ncols=len(rows), frameon=False)
    right.axhline(RULE.false_keeps, color="#222222", linewidth=0.8, linestyle="--")
    right.set(yscale="log", ylim=(5e-4, 400), xlim=(0.8, 4.2), xlabel="runs a trial")
    right.set_ylabel(f"false keeps in {NUM_TRIALS} null trials")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    given = dict(a.split("=", 1) for a in sys.argv[1:])
    count, seed = int(given.get("studies", 1000)), int(given.get("seed", 0))
    rows = null_table(count, seed)
    gains = gains_table(max(1, count // 10), seed)
    honesty_table(gains)
    simplicity_table(max(1, count // 100), seed)
    OUT.mkdir(parents=True, exist_ok=True)
    draw_chart(rows, gains, OUT / "decide.png")
    print(f"\nchart: {(OUT / 'decide.png').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
