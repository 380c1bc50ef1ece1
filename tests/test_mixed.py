"""The bandit over the sources, on studies that are made up."""

import random

import pytest

from agent.journal import Proposal, Run, Trial
from agent.proposers.mixed import FLOOR, account, ranking

EVEN = {"good": 1.0, "fair": 1.0, "poor": 1.0, "barren": 1.0}


def a_trial(number: int, source: str, gain: float, run_s: float = 60.0) -> Trial:
    """Kept if it gains."""
    return Trial(
        number=number,
        proposal=Proposal(title="", hypothesis="", source=source, overrides={"a": number}),
        parent=0,
        status="ok",
        decision="keep" if gain > 0 else "discard",
        reason="",
        estimate=gain,
        runs=[Run(seed=1, status="ok", wall_s=run_s)],
    )


def simulate(chances: dict, trials: int, seed: int, shares=EVEN, run_s=None) -> list[Trial]:
    """Each source keeps a trial with its chance; gains are of the size that studies show."""
    rng, journal = random.Random(seed), []
    for number in range(1, trials + 1):
        source = ranking(journal, shares, seed, number)[0]
        gain = rng.uniform(0.002, 0.01) if rng.random() < chances[source] else -0.001
        journal.append(a_trial(number, source, gain, (run_s or {}).get(source, 60.0)))
    return journal


def turns(journal: list[Trial]) -> dict[str, int]:
    sources = [trial.proposal.source for trial in journal]
    return {source: sources.count(source) for source in EVEN}


def mean_turns(chances: dict, trials: int = 200, studies: int = 12, **more) -> dict[str, float]:
    """Mean share of the turns, by source."""
    told = [turns(simulate(chances, trials, seed, **more)) for seed in range(studies)]
    return {s: sum(t[s] for t in told) / studies / trials for s in EVEN}


def test_the_good_source_gets_most_turns_and_each_keeps_its_floor():
    chances = {"good": 0.2, "fair": 0.06, "poor": 0.02, "barren": 0.0}
    share = mean_turns(chances)
    print("".join(f"\n{s:8} keeps {chances[s]:4.0%}  turns {share[s]:4.0%}" for s in EVEN))
    assert share["good"] > 0.45
    assert share["good"] > share["fair"] > share["poor"] > share["barren"]
    for seed in range(12):
        assert min(turns(simulate(chances, 200, seed)).values()) >= int(FLOOR / 4 * 200) - 1


def test_the_floor_holds_at_every_moment_not_only_at_the_end():
    chances = {"good": 0.5, "fair": 0.0, "poor": 0.0, "barren": 0.0}
    journal = simulate(chances, 200, seed=3)
    for n in range(1, 201):
        assert min(turns(journal[:n]).values()) >= int(FLOOR / 4 * n) - 1, n


def test_of_two_that_gain_alike_the_cheaper_gets_more_turns():
    chances = dict.fromkeys(EVEN, 0.0) | {"good": 0.1, "fair": 0.1}
    share = mean_turns(chances, run_s={"good": 30.0, "fair": 120.0})
    assert share["good"] > 1.5 * share["fair"]


def test_shares_are_where_it_starts_and_no_share_is_no_turn():
    shares = {"good": 3.0, "fair": 1.0, "poor": 0.0}
    first = [ranking([], shares, seed, 1) for seed in range(400)]
    assert {tuple(sorted(order)) for order in first} == {("fair", "good")}
    assert sum(order[0] == "good" for order in first) / 400 == pytest.approx(0.85, abs=0.08)


def test_a_source_that_runs_dry_loses_its_turns():
    chances = dict.fromkeys(EVEN, 0.0)
    rng = random.Random(0)
    before = [a_trial(n, "good", 0.005 if rng.random() < 0.5 else -1, 60) for n in range(1, 31)]
    later = [a_trial(n, "good", -1, 60) for n in range(31, 91)]
    new = [a_trial(n, "fair", 0.005 if n % 5 == 0 else -1, 60) for n in range(91, 111)]
    firsts = [ranking([*before, *later, *new], EVEN, seed, 111) for seed in range(300)]
    drawn = [[s for s in order if s in ("good", "fair")][0] for order in firsts]
    assert drawn.count("fair") > 2 * drawn.count("good") and chances


def test_invalid_trials_are_not_free():
    """A source whose proposals fail at once costs no seconds, but turns."""
    journal = [a_trial(1, "good", -1, 60.0), a_trial(2, "fair", -1, 60.0)]
    journal[1].runs = []
    earned, spent = account(journal)["fair"]
    assert earned == 0.0 and 0 < spent < account(journal)["good"][1]


def test_the_report_says_what_each_source_brought():
    from agent.report import _sources

    rows = _sources(
        [a_trial(1, "good", 0.004), a_trial(2, "good", -1.0), a_trial(3, "fair", 0.002)]
    )
    assert "| good | 2 | 1 | +0.0040 | 120 |" in rows and "| fair | 1 | 1 | +0.0020 | 60 |" in rows


def test_the_same_journal_and_seed_give_the_same_turn():
    journal = simulate(dict.fromkeys(EVEN, 0.1), 40, seed=1)
    orders = [ranking(journal, EVEN, 5, 41) for _ in range(3)]
    assert orders[0] == orders[1] == orders[2] and sorted(orders[0]) == sorted(EVEN)
    assert len({tuple(ranking(journal, EVEN, seed, 41)) for seed in range(20)}) > 3


def test_a_turn_that_is_known_before_the_last_trial_ends_does_not_depend_on_its_outcome():
    journal = simulate(dict.fromkeys(EVEN, 0.1), 40, seed=1)
    kept, lost = a_trial(41, "good", 0.5), a_trial(41, "good", -1, run_s=1e4)
    for seed in range(30):
        orders = [ranking([*journal, last], EVEN, seed, 42, 1) for last in (kept, lost)]
        assert orders[0] == orders[1]
    now = [[ranking([*journal, last], EVEN, s, 42)[0] for s in range(30)] for last in (kept, lost)]
    assert now[0] != now[1], "else the above says nothing"
