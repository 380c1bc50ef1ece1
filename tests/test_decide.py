"""Keep or discard: from tables, and from ten thousand imaginary trials."""

import random

import pytest

from agent.decide import Noise, decide, mean_gain, measure_noise, needed_gain, next_seed, repeated
from agent.journal import Proposal, Run, Trial

SEEDS = [1, 2, 3]


def trial(*numbers: float, number: int = 0) -> Trial:
    proposal = Proposal(title="t", hypothesis="h", source="test")
    return Trial(
        number=number,
        proposal=proposal,
        parent=None,
        status="ok",
        decision="keep",
        reason="",
        runs=runs(*numbers),
    )


def runs(*numbers: float | None, status: str = "crash") -> list[Run]:
    return [
        Run(seed=seed, status="ok", val_bpb=x)
        if x is not None
        else Run(seed=seed, status=status, message="boom")
        for seed, x in zip(SEEDS, numbers, strict=False)
    ]


PARENT = trial(2.000, 2.004, 1.996)  # sigma 0.004


@pytest.mark.parametrize(
    ("parent", "so_far", "seed"),
    [
        (None, (), 1),  # the baseline runs every seed
        (None, (2.0, 2.1), 3),
        (None, (2.0, 2.1, 2.2), None),
        (None, (2.0, None), None),  # a failure ends it
        (PARENT, (), 1),
        (PARENT, (2.0,), None),  # not better on the same seed
        (PARENT, (2.1,), None),
        (PARENT, (1.9999,), 2),  # better: the others are asked
        (PARENT, (1.9, 2.5), 3),  # and all of them, whatever the second says
        (PARENT, (1.9, None), None),
        (PARENT, (1.9, 1.9, 1.9), None),
    ],
)
def test_next_seed(parent, so_far, seed):
    assert next_seed(parent, runs(*so_far), SEEDS) == seed


@pytest.mark.parametrize(
    ("so_far", "kind", "words"),
    [
        ((None,), "discard", "crash on seed 1: boom"),
        ((1.9, None), "discard", "crash on seed 2: boom"),
        ((2.01,), "discard", "gain -0.0100 on seed 1"),
        ((2.0,), "discard", "gain +0.0000 on seed 1"),
        ((1.9, 1.9, 1.9), "keep", "gain +0.1000 over 3 seeds"),
        ((1.999, 2.004, 1.996), "discard", "needs 0.0094"),  # inside the noise
        ((1.9, 2.2, 2.2), "discard", "gain -0.1000"),
    ],
)
def test_decision_says_why(so_far, kind, words):
    decision = decide(PARENT, runs(*so_far), Noise(0.004, 4), 2.0)
    assert decision.kind == kind
    assert words in decision.reason


def test_gain_pairs_runs_by_seed_not_by_order():
    shuffled = list(reversed(runs(1.9, 1.9, 1.9)))
    assert mean_gain(PARENT, shuffled[:1]) == pytest.approx(0.096)


def test_noise_pools_squares_and_degrees_of_freedom():
    assert measure_noise([[1.0, 2.0, 3.0], [10.0, 10.0]]) == Noise(pytest.approx((2 / 3) ** 0.5), 3)
    assert measure_noise([[1.0]]) == Noise(None, 0)
    assert measure_noise([]) == Noise(None, 0)


def test_only_repeated_runs_that_are_ok_measure_noise():
    broken = trial(1.0, 2.0)
    broken.runs[1].status = "crash"
    assert repeated([PARENT, broken, trial(5.0)]) == [[2.000, 2.004, 1.996]]


def test_widening_agrees_with_student_t():
    """Two-sided tail of 2 normal sigmas; quantiles of Student's t from tables."""
    for df, t in ((4, 2.869), (6, 2.517), (10, 2.284), (30, 2.087)):
        assert needed_gain(Noise(1.0, df), 2, z=2.0) == pytest.approx(t, rel=0.01)


def test_without_noise_only_a_gain_is_kept():
    assert decide(PARENT, runs(1.9, 1.904, 1.896), Noise(0.0, 4), 2.0).kind == "keep"
    assert decide(PARENT, runs(2.0, 2.004, 1.996), Noise(0.0, 4), 2.0).kind == "discard"


def kept_share(gain_in_sigmas: float, count: int = 4000) -> float:
    """The loop's own rule on fresh baselines and proposals of a known gain."""
    rng, kept = random.Random(7), 0
    for _ in range(count):
        parent = trial(*(rng.gauss(0, 1) for _ in SEEDS))
        candidate = runs(*(rng.gauss(-gain_in_sigmas, 1) for _ in SEEDS))
        if next_seed(parent, candidate[:1], SEEDS) is not None:
            groups = repeated([parent]) + [[run.val_bpb for run in candidate]]
            kept += decide(parent, candidate, measure_noise(groups), 2.0).kind == "keep"
    return kept / count


def test_proposals_that_change_nothing_are_kept_in_fewer_than_one_of_twenty():
    assert kept_share(0.0) < 0.035


def test_real_gains_are_mostly_kept_even_when_only_the_baseline_measures_the_noise():
    assert kept_share(3.0) > 0.65
    assert kept_share(5.0) > 0.95
