"""How often does the rule keep what is no gain, and how often does it miss what is one?

Thousands of synthetic studies of 200 trials go through the real code of agent/decide.py and, for
comparison, through four simpler rules. The truth of each trial is known. A run is

    val_bpb = level + effect of the seed + what the lineage does to the seed + noise of the run

where the first two cancel in a paired difference and the last two are its noise, tau. Per trial tau
is drawn log-uniformly, for config and for code changes from their own range, and is three times as
large in one trial of twenty (the ranges and their source: NOISE).

    python benchmarks/decide_simulation.py [studies=1000] [seed=0]

Prints the tables of benchmarks/README.md, writes benchmarks/out/decide.png.
"""

import math
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from agent.decide import Bar, Rule, decide, level_of, measure_noise, scatter_of, set_bar
from nightshift.fixed.config import ROOT

OUT = ROOT / "benchmarks" / "out"
NUM_TRIALS = 200
SIGMA = 0.0033  # of a seed, LOG 2026-11-23
NOISE = {"config": (0.0001, 0.0005), "code": (0.0002, 0.0007)}  # tau: LOG 2026-11-23
RUN_SHARE = 0.5  # of the smallest tau's variance is of the run; the rest is of the change
HEAVY_SHARE, HEAVY_FACTOR = 0.05, 3.0
BASELINE_SEEDS = (1, 2, 3)
GAINS = (1, 2, 3, 5, 10, 30)  # in units of the trial's own tau
RULE = Rule(false_keeps=0.05, equal_within=0.1, min_seeds=3, max_seeds=12)  # conf/study.yaml


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
    interaction: "Callable[[int], float]"
    run_noise: float
    runs: dict[int, float] = field(default_factory=dict)

    def run(self, seed: int) -> float:
        if seed not in self.runs:
            noise = self.rng.gauss(0, self.run_noise)
            self.runs[seed] = self.level + self.seed_effects(seed) + self.interaction(seed) + noise
        return self.runs[seed]


class World:
    """One study's truth: the incumbent and what a change of it would give."""

    def __init__(self, seed: str):
        self.rng = random.Random(seed)
        self.run_noise = math.sqrt(RUN_SHARE / 2) * NOISE["config"][0]
        self.seed_effects = self._drawn(SIGMA)
        self.incumbent = Line(self.rng, 2.0, self.seed_effects, lambda seed: 0.0, self.run_noise)
        self.baseline = [self.incumbent.run(seed) for seed in BASELINE_SEEDS]

    def _drawn(self, sigma: float) -> Callable[[int], float]:
        return lru_cache(maxsize=None)(lambda seed: self.rng.gauss(0, sigma))

    def change(self, change: Change) -> Line:
        own = self._drawn(math.sqrt(change.tau**2 - 2 * self.run_noise**2))
        inherited = self.incumbent.interaction
        level = self.incumbent.level - change.gain
        both = lambda seed: inherited(seed) + own(seed)  # noqa: E731
        return Line(self.rng, level, self.seed_effects, both, self.run_noise)

    def differences(self, line: Line, seeds) -> list[float]:
        return [self.incumbent.run(seed) - line.run(seed) for seed in seeds]


# ---- truths ----


def draw(rng: random.Random, share_of_gains: float, share_of_losses: float) -> Change:
    kind = rng.choice(("config", "code"))
    low, high = NOISE[kind]
    tau = low * (high / low) ** rng.random()
    if rng.random() < HEAVY_SHARE:
        tau *= HEAVY_FACTOR
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
        self.world, self.rule, self.groups, self.scatters = world, rule, [world.baseline], []
        self.rank, self.bars = 0, {}

    def judge(self, line: Line, change: Change, shorter: bool = False) -> Outcome:
        self.rank += 1
        bar, known = self.bar(change.kind), len(self.world.incumbent.runs)
        for num_seeds in range(1, self.rule.max_seeds + 1):
            seeds = range(1, num_seeds + 1)
            gains = self.world.differences(line, seeds)
            decision = decide(gains, bar, shorter)
            if decision.kind != "more":
                break
        self.learn(change.kind, gains, [line.run(seed) for seed in seeds])
        return Outcome(
            change, decision.kind == "keep", num_seeds, len(self.world.incumbent.runs) - known,
            decision.gain, decision.estimate, decision.low, decision.high,
        )  # fmt: skip

    def bar(self, kind: str) -> Bar:
        """Learned anew only when something was learned: the same numbers, sooner."""
        if kind not in self.bars:
            sigma = measure_noise(self.groups).sigma
            self.bars[kind] = set_bar(sigma, self.scatters, kind, self.rank, self.rule)
        return self.bars[kind]._replace(level=level_of(self.rank, self.rule.false_keeps))

    def learn(self, kind: str, gains: list[float], numbers: list[float]) -> None:
        if len(gains) > 1:
            self.groups.append(numbers)
            self.scatters.append(scatter_of(kind, gains))
            self.bars = {}


RULES = {
    "greedy, one seed": Greedy,
    "mean of 3 seeds": FixedSeeds,
    "2 sigma of 3 pairs": TwoSigma,
    "2 sigma of a seed (old)": SeedSigma,
    "nightshift": Nightshift,
}


# ---- studies ----


def study(make, seed: str, share_of_gains: float, share_of_losses: float) -> list[Outcome]:
    """The outcomes of one study's trials. What is kept is the next incumbent."""
    world, rng = World(seed), random.Random(f"{seed} changes")
    rule, outcomes = make(world), []
    for _ in range(NUM_TRIALS):
        change = draw(rng, share_of_gains, share_of_losses)
        line = world.change(change)
        outcomes.append(rule.judge(line, change))
        if outcomes[-1].kept:
            world.incumbent = line
    return outcomes


def studies(make, count: int, seed: int, gains: float, losses: float) -> list[list[Outcome]]:
    return [study(make, f"{seed}/{number}", gains, losses) for number in range(count)]


def interval(successes: int, count: int) -> str:
    """A share with its 95 % interval (Wilson 1927)."""
    if not count:
        return "-"
    p, z2 = successes / count, 1.96**2
    center = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (p * (1 - p) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return f"{p:6.1%} ({max(0.0, center - half):.1%} to {center + half:.1%})"


def null_table(count: int, seed: int) -> dict[str, list[list[Outcome]]]:
    print(f"## {NUM_TRIALS} trials that change nothing: {count} studies", flush=True)
    print(f"{'rule':24} {'studies with a false keep':>28} {'false keeps':>12} {'runs a trial':>13}")
    results = {}
    for name, make in RULES.items():
        few = count if make is Nightshift else min(count, 200)
        results[name] = studies(make, few, seed, 0.0, 0.0)
        wrong = [sum(o.kept for o in one) for one in results[name]]
        runs = [o.runs + o.parent_runs for one in results[name] for o in one]
        print(
            f"{name:24} {interval(sum(map(bool, wrong)), few):>28} {sum(wrong) / few:12.3f} "
            f"{statistics.mean(runs):13.2f}",
            flush=True,
        )
    return results


def gains_table(count: int, seed: int) -> dict[str, list[list[Outcome]]]:
    print(f"\n## 15 % gains of 1 to 30 tau, 40 % losses, the rest nothing: {count} studies")
    head = " ".join(f"{f'{size} tau':>7}" for size in GAINS)
    print(f"{'rule: share found of':24} {head} {'false':>7} {'losses':>7} {'runs a trial':>13}")
    results = {}
    for name, make in RULES.items():
        results[name] = studies(make, count, seed + 1, 0.15, 0.40)
        every = [o for one in results[name] for o in one]
        shares = " ".join(f"{found(every, size):7.1%}" for size in GAINS)
        false = sum(o.kept for o in every if o.change.size == 0) / count
        losses = sum(o.kept for o in every if o.change.size is None) / count
        runs = statistics.mean(o.runs + o.parent_runs for o in every)
        print(f"{name:24} {shares} {false:7.2f} {losses:7.2f} {runs:13.2f}", flush=True)
    return results


def found(outcomes: list[Outcome], size: float) -> float:
    right = [o.kept for o in outcomes if o.change.size == size]
    return sum(right) / len(right)


def honesty_table(results: dict[str, list[list[Outcome]]]) -> None:
    print("\n## What was reported of what was kept, against the truth")
    print(
        f"{'rule':24} {'kept':>6} {'seen / true':>12} {'reported / true':>16} {'in interval':>26}"
    )
    for name, every in results.items():
        kept = [o for one in every for o in one if o.kept]
        true = sum(o.change.gain for o in kept)
        inside = [o.low <= o.change.gain <= o.high for o in kept if not math.isnan(o.low)]
        print(
            f"{name:24} {len(kept):6} {sum(o.gain for o in kept) / true:12.3f} "
            f"{sum(o.estimate for o in kept) / true:16.3f} "
            f"{interval(sum(inside), len(inside)):>26}",
            flush=True,
        )
    for size in GAINS:
        kept = [o for o in every_kept(results["nightshift"]) if o.change.size == size]
        if kept:
            bias = [(o.estimate - o.change.gain) / o.change.tau for o in kept]
            inside = sum(o.low <= o.change.gain <= o.high for o in kept)
            print(
                f"  nightshift, {size:2} tau: {len(kept):5} kept, bias {statistics.mean(bias):+.3f} "
                f"tau, in interval {interval(inside, len(kept))}, "
                f"{statistics.mean(o.runs for o in kept):.1f} seeds"
            )


def every_kept(results: list[list[Outcome]]) -> list[Outcome]:
    return [o for one in results for o in one if o.kept]


def main() -> None:
    given = dict(a.split("=", 1) for a in sys.argv[1:])
    count, seed = int(given.get("studies", 1000)), int(given.get("seed", 0))
    nulls = null_table(count, seed)
    gains = gains_table(max(1, count // 10), seed)
    honesty_table(gains)


if __name__ == "__main__":
    main()
