"""Keep or discard, from numbers alone. Pure: no files, no clock, no chance.

The noise of a run, sigma, is measured: it is the standard deviation of runs that differ only in
their seed, pooled over every group of such runs in the study. A trial first runs one seed; only
one that beats the incumbent there runs the other seeds, and only a mean gain that chance rarely
gives is kept. Seeds are paired: run s of a trial is compared with run s of its parent.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from agent.journal import Run, Trial


class Noise(NamedTuple):
    """How much val_bpb moves with the seed alone."""

    sigma: float | None  # None: nothing was repeated yet
    df: int  # degrees of freedom: repeated runs minus groups


class Decision(NamedTuple):
    kind: str  # keep | discard
    reason: str
    gain: float | None  # parent's val_bpb minus ours over the same seeds; > 0 is better


def measure_noise(groups: Sequence[Sequence[float]]) -> Noise:
    """Pooled standard deviation: squares about each group's own mean over degrees of freedom."""
    squares, df = 0.0, 0
    for group in groups:
        mean = sum(group) / len(group) if group else 0.0
        squares += sum((x - mean) ** 2 for x in group)
        df += max(0, len(group) - 1)
    return Noise(math.sqrt(squares / df) if df else None, df)


def repeated(trials: Sequence[Trial]) -> list[list[float]]:
    """The groups of val_bpb that differ only in their seed."""
    groups = [[run.val_bpb for run in t.runs if run.status == "ok"] for t in trials]
    return [group for group in groups if len(group) > 1]


def next_seed(parent: Trial | None, runs: Sequence[Run], seeds: Sequence[int]) -> int | None:
    """The seed to run next, or None when there is nothing more to learn. Baseline: no parent."""
    if len(runs) == len(seeds) or any(run.status != "ok" for run in runs):
        return None
    if parent is not None and len(runs) == 1 and mean_gain(parent, runs) <= 0:
        return None
    return seeds[len(runs)]


def decide(parent: Trial, runs: Sequence[Run], noise: Noise, z: float) -> Decision:
    """Keep if the mean gain reaches `needed_gain`. `noise` includes this trial's own runs."""
    for run in runs:
        if run.status != "ok":
            return Decision("discard", f"{run.status} on seed {run.seed}: {run.message}", None)
    gain = mean_gain(parent, runs)
    if len(runs) == 1:
        where = f"on seed {runs[0].seed}"
        return Decision("discard", f"gain {gain:+.4f} {where}: not better than the incumbent", gain)
    needed = needed_gain(noise, len(runs), z)
    kind = "keep" if gain > 0 and gain >= needed else "discard"
    numbers = f"gain {gain:+.4f} over {len(runs)} seeds, needs {needed:.4f}"
    return Decision(kind, f"{numbers} (sigma {noise.sigma:.4f}, {noise.df} df)", gain)


def mean_gain(parent: Trial, runs: Sequence[Run]) -> float:
    before = {run.seed: run.val_bpb for run in parent.runs}
    return sum(before[run.seed] - run.val_bpb for run in runs) / len(runs)


def needed_gain(noise: Noise, num_seeds: int, z: float) -> float:
    """z standard errors of a difference of two means, widened because sigma itself is an estimate.

    The widening turns the normal quantile z into Student's t of the same probability (Wallace 1959,
    Ann. Math. Stat. 30:1124, within 2 % from 4 degrees of freedom up): at z = 2 it is 2.89 with
    4 degrees of freedom and 2.25 with 14. Without it one null proposal in seventeen would be kept
    while the baseline is the only measure of the noise.
    """
    correction = (8 * noise.df + 3) / (8 * noise.df + 1)
    t = math.sqrt(noise.df * math.expm1((z * correction) ** 2 / noise.df))
    return t * noise.sigma * math.sqrt(2 / num_seeds)
