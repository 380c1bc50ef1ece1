"""Keep, discard or another seed: from tables, and from thousands of imaginary trials."""

import importlib.util
import math
import random
import sys

import numpy as np
import pytest

from agent.decide import (
    Noise,
    Rule,
    Scatter,
    bar_for,
    decide,
    has_drifted,
    is_same,
    level_of,
    measure_noise,
    next_seed,
    pair,
    repeated,
    scatter_of,
    set_bar,
    spent,
    weigh,
)
from agent.journal import Journal, Proposal, Run, Trial
from nightshift.fixed.config import ROOT

SIGMA, TAU = 0.0033, 0.0004  # of a seed; of a paired difference
RULE = Rule(false_keeps=0.05, equal_within=0.1, min_seeds=3, max_seeds=8)
SEEDS = [1, 2, 3, 4]


def runs(*numbers: float | None, status: str = "crash") -> list[Run]:
    return [
        Run(seed=seed, status="ok", val_bpb=x) if x is not None else Run(seed=seed, status=status)
        for seed, x in zip(SEEDS, numbers, strict=False)
    ]


def trial(*numbers: float, number=0, parent=None, differences=(), edits=()) -> Trial:
    proposal = Proposal(title="t", hypothesis="h", source="test", edits=list(edits))
    proposal.overrides = {} if edits else {"a": 1}
    return Trial(
        number=number,
        proposal=proposal,
        parent=parent,
        status="ok",
        decision="keep" if parent is None else "discard",
        reason="",
        runs=runs(*numbers),
        differences=list(differences),
    )


def seen(tau: float, count: int = 40, kind: str = "config", df: int = 2, seed: int = 0):
    """What `count` earlier trials of this tau told."""
    rng = np.random.default_rng(seed)
    return [Scatter(kind, float(tau**2 * rng.chisquare(df)), df) for _ in range(count)]


BAR = set_bar(SIGMA, seen(TAU), "config", rank=41, rule=RULE)
NEW = set_bar(SIGMA, [], "config", rank=1, rule=RULE)  # nothing was learned yet


@pytest.mark.parametrize(
    ("differences", "kind", "words"),
    [
        ((), "more", "no pair"),
        ((-0.01,), "discard", "not better than the incumbent: gain -0.0100 over 1 seed,"),
        ((-0.0001,), "discard", "not better"),  # a clear loser costs one run
        ((0.0011,), "more", "undecided"),  # about three sigma: worth asking
        ((0.012,), "more", "undecided"),  # however large, one seed is no keep
        ((0.012, 0.0118), "more", "undecided"),
        ((0.012, 0.0118, 0.0124), "keep", "better: gain +0.0121 over 3 seeds"),
        ((0.0012, 0.0009, 0.0014), "more", "undecided"),  # three sigma wants more seeds
        ((0.0012, 0.0009, 0.0014, 0.0013, 0.0008, 0.0013), "keep", "better"),
        ((0.0011, -0.0009), "discard", "not shown to be better"),
        ((0.001, 0.0003) * 4, "discard", "not shown to be better: gain +0.0006 over 8"),
        (
            (0.02, -0.02, 0.02),
            "discard",
            "not shown to be better",
        ),  # it scatters as nothing before it
    ],
)
def test_decision_says_why(differences, kind, words):
    decision = decide(differences, BAR)
    assert decision.kind == kind, decision
    assert words in decision.reason


@pytest.mark.parametrize("bar", [BAR, NEW], ids=["learned", "new"])
@pytest.mark.parametrize("loss", [0.001, 0.03, 0.4, 30.0])
def test_the_same_loss_on_every_seed_is_never_kept(bar, loss):
    """Its likelihood underflows; its logarithm must not."""
    for n in range(1, 9):
        assert decide([-loss] * n, bar).kind in ("more", "discard")
        assert weigh([-loss] * n, bar).log_e < 1
    assert decide([-loss] * 3, bar).kind == "discard"


@pytest.mark.parametrize(
    ("differences", "kind"),
    [
        ((0.0001, -0.0001), "more"),  # fewer seeds than a keep needs
        ((0.0, 0.0, 0.0), "keep"),  # the same to the last digit
        ((0.0002, -0.0001, 0.0001), "keep"),
        ((-0.0002, -0.0003, -0.0002), "more"),  # a loss near the margin of 0.00033
        ((-0.0006, -0.0007, -0.0006), "discard"),
    ],
)
def test_equal_and_shorter_is_kept(differences, kind):
    assert decide(differences, BAR, shorter=True).kind == kind
    assert decide(differences, BAR).kind != "keep"


def test_a_clear_loser_costs_one_run_before_the_noise_is_known():
    assert decide([-0.0194], NEW).kind == "discard"
    assert decide([-0.0194], NEW, shorter=True).kind == "discard"
    assert decide([0.0005], NEW).kind == "more"


def test_the_weights_of_the_parent_settle_a_trial_in_one_run_unless_lines_went():
    decision = decide([0.0], BAR, same=True)
    assert decision.kind == "discard" and "the same weights" in decision.reason
    assert decide([0.0], BAR, shorter=True, same=True).kind == "more"
    assert decide([0.0] * 3, BAR, shorter=True, same=True).kind == "keep"


@pytest.mark.parametrize(
    "weights, score, same",
    [("a", 1.5, True), ("b", 1.5, False), ("a", 1.4, False), (None, 1.5, False)],
)
def test_a_computation_is_the_same_when_weights_and_score_are(weights, score, same):
    parent = {1: Run(seed=1, status="ok", val_bpb=1.5, weights_sha256="a" if weights else None)}
    run = Run(seed=1, status="ok", val_bpb=score, weights_sha256=weights)
    assert is_same(parent, [run]) is same
    assert is_same({}, [run]) is False


def test_a_trial_with_the_parents_weights_says_nothing_of_the_noise():
    told = [trial(1.5, 1.6, 1.4)] + [trial(1.5, number=1, parent=0, differences=(0.0, 0.0, 0.0))]
    noise = bar_for(told, "config", RULE)
    assert noise.weights == pytest.approx(set_bar(noise.sigma, [], "config", 2, RULE).weights)


def test_reason_of_a_shorter_keep_names_it():
    reason = decide((0.0002, -0.0001, 0.0001), BAR, shorter=True).reason
    assert reason.startswith("equal within noise, and shorter: gain +0.0001 over 3 seeds")


# ---- seeds and pairs ----


def test_pairs_are_formed_by_seed_and_leave_out_what_failed():
    parent = {3: Run(seed=3, status="ok", val_bpb=2.3), 1: Run(seed=1, status="ok", val_bpb=2.1)}
    parent[2] = Run(seed=2, status="timeout")
    assert pair(parent, runs(2.0, 2.0, 2.2, 2.0)) == pytest.approx([0.1, 0.1])
    assert pair(parent, runs(2.0, 2.0, None)) == pytest.approx([0.1])


@pytest.mark.parametrize(
    ("so_far", "unusable", "seed"),
    [
        ((), (), 1),
        ((2.0,), (), 2),
        ((2.0,), (2, 3), 4),  # the parent failed there: no pair can come of it
        ((2.0, None), (), None),  # a failure ends it
        ((2.0, 2.0, 2.0, 2.0), (), None),
    ],
)
def test_next_seed(so_far, unusable, seed):
    assert next_seed(runs(*so_far), SEEDS, unusable) == seed


# ---- noise ----


def test_noise_pools_squares_and_degrees_of_freedom():
    assert measure_noise([[1.0, 2.0, 3.0], [10.0, 10.0]]) == Noise(pytest.approx((2 / 3) ** 0.5), 3)
    assert measure_noise([[1.0]]) == measure_noise([[]]) == Noise(None, 0)


def test_the_lineage_measures_the_noise_of_a_seed_with_what_it_ran_for_its_children():
    baseline, unstable, kept = trial(2.0, 2.1), trial(1.0, 9.0, parent=0, number=1), trial(1.0, 2.0)
    kept.number, kept.parent, kept.parent_runs = 2, 0, [Run(seed=4, status="ok", val_bpb=2.2)]
    kept.runs[1].status = "crash"
    assert repeated([baseline, unstable, kept]) == [[2.0, 2.1, 2.2]]


def test_runs_before_a_drift_measure_nothing():
    baseline, later = trial(2.0, 2.1), trial(1.0, parent=0, number=1)
    later.parent_runs = [Run(seed=s, status="ok", val_bpb=3.0 + s) for s in (1, 2)]
    later.drifted = True
    assert repeated([baseline, later]) == [[4.0, 5.0]]


def typical(bar) -> float:
    return math.exp((bar.weights * np.log(bar.taus)).sum())


def test_noise_of_a_difference_is_learned_from_earlier_trials():
    for tau in (0.0001, 0.0004, 0.003):
        bar = set_bar(SIGMA, seen(tau), "config", 41, RULE)
        assert typical(bar) == pytest.approx(tau, rel=0.25)
        assert bar.weights.sum() == pytest.approx(1) and bar.weights.min() > 0


def test_each_kind_of_change_has_its_own_noise_and_learns_from_the_other_first():
    both = seen(0.0001, kind="config") + seen(0.001, kind="code")
    config, code = (set_bar(SIGMA, both, kind, 81, RULE) for kind in ("config", "code"))
    assert typical(config) < 0.0002 and typical(code) > 0.0007
    first_code = set_bar(SIGMA, seen(0.0001, kind="config"), "code", 41, RULE)
    assert typical(first_code) < 0.0002 < typical(NEW)


def test_without_any_noise_a_gain_is_kept_and_nothing_is_not():
    silent = set_bar(None, [], "config", 1, RULE)
    assert decide([0.5, 0.5, 0.5], silent).kind == "keep"
    assert decide([0.5], silent).kind == "more"
    assert decide([0.0] * 3, silent).kind == "discard"


def test_a_gain_of_hundreds_of_sigmas_is_asked_for_further_seeds():
    assert decide([250 * SIGMA], NEW).kind == "more"
    assert decide([250 * SIGMA] * 3, NEW).kind == "keep"


def test_bar_is_learned_from_the_journal():
    baseline = trial(2.000, 2.004, 1.996)
    failed = trial(None, parent=0)
    tested = [trial(1.9, parent=0, differences=(d, -d)) for d in np.linspace(0.0001, 0.0005, 20)]
    bar = bar_for([baseline, failed, *tested], "config", RULE)
    scatters = [scatter_of("config", t.differences) for t in tested]
    assert bar.sigma == pytest.approx(0.004) and bar.margin == pytest.approx(0.0004)
    assert bar.level == level_of(21, 0.05), "what failed spends nothing"
    same = set_bar(0.004, scatters, "config", 21, RULE)
    assert bar.weights == pytest.approx(same.weights)
    assert spent([baseline, failed, *tested], 0.05) == pytest.approx(0.05 * 20 / 120)


# ---- the promises ----


def test_shares_of_the_error_budget_sum_to_it():
    shares = [level_of(rank, 0.05) for rank in range(1, 100_001)]
    assert sum(shares) == pytest.approx(0.05 * 100_000 / 100_100)
    assert shares == sorted(shares, reverse=True)


def test_evidence_reaches_twenty_in_fewer_than_one_null_trial_of_twenty():
    """Ville: at most 1/20 if one looks after every seed. Noise as learned, and none known."""
    rng = random.Random(3)
    for bar, tau in ((BAR, lambda: TAU), (NEW, lambda: rng.choices(NEW.taus, NEW.weights)[0])):
        hits = 0
        for _ in range(1000):
            sigma = tau()
            differences = [rng.gauss(0, sigma) for _ in range(8)]
            hits += any(weigh(differences[:n], bar).log_e > math.log(20) for n in range(1, 9))
        assert hits < 50 + 2 * 7


def test_a_sigma_that_came_out_far_too_small_keeps_no_noise():
    """Three seeds can lie close together by chance, and pairing can be in vain."""
    rng, kept = random.Random(4), 0
    bar = set_bar(SIGMA / 8, [], "config", 1, RULE)
    for _ in range(300):
        differences = [rng.gauss(0, 1.4 * SIGMA) for _ in range(8)]
        kept += any(decide(differences[:n], bar).kind == "keep" for n in range(3, 9))
    assert kept == 0  # 0.15 expected at the most


def test_weak_gains_are_shrunk_and_strong_ones_are_not():
    weak, strong = decide([0.0003], BAR), decide([0.0121, 0.0119, 0.012], BAR)
    assert 0 < weak.estimate < 0.7 * weak.gain and weak.low < 0 < weak.high
    assert strong.estimate == pytest.approx(strong.gain, rel=0.01) and strong.low > 0.011


def test_drift_is_a_change_beyond_what_pairs_scatter():
    assert not has_drifted(2 * TAU, BAR) and has_drifted(-8 * TAU, BAR)


@pytest.fixture(scope="module")
def simulation():
    path = ROOT / "benchmarks/decide_simulation.py"
    spec = importlib.util.spec_from_file_location("decide_simulation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_simulated_studies_without_gains_keep_nothing_and_cost_little(simulation):
    outcomes = [
        o for one in simulation.studies(simulation.Nightshift, 20, 5, 0.0, 0.0) for o in one
    ]
    assert sum(o.kept for o in outcomes) <= 2  # 0.67 expected at the most
    assert sum(o.runs + o.parent_runs for o in outcomes) < 1.8 * len(outcomes)


def test_simulated_gains_of_three_sigma_are_found_and_told_as_they_are(simulation):
    outcomes = [
        o for one in simulation.studies(simulation.Nightshift, 20, 6, 0.3, 0.4) for o in one
    ]
    three = [o.kept for o in outcomes if o.change.size == 3]
    kept = [o for o in outcomes if o.kept]
    assert sum(three) > 0.8 * len(three) > 100
    assert sum(o.estimate for o in kept) == pytest.approx(
        sum(o.change.gain for o in kept), rel=0.03
    )
    assert sum(o.low <= o.change.gain <= o.high for o in kept) > 0.9 * len(kept)
    assert not [o for o in kept if o.change.gain < 0]


def test_the_parents_runs_are_found_whoever_asked_for_them(tmp_path):
    """The newest ok run of a seed stands; a repeat that failed hides nothing."""
    journal, parent = Journal(tmp_path / "journal.jsonl"), trial(2.0, 2.1)
    child, other = trial(parent=0, number=1), trial(parent=7, number=2)
    child.parent_runs = [Run(seed=3, status="ok", val_bpb=2.2), Run(seed=1, status="timeout")]
    other.parent_runs = [Run(seed=9, status="ok", val_bpb=9.0)]
    journal.trials = [parent, child, other]
    assert {s: r.val_bpb for s, r in journal.runs_of(parent).items()} == {1: 2.0, 2: 2.1, 3: 2.2}
    asks = trial(parent=0, number=3)
    asks.parent_runs, asks.drifted = [Run(seed=2, status="ok", val_bpb=2.5)], True
    assert {s: r.val_bpb for s, r in journal.runs_of(parent, asks).items()} == {2: 2.5}
