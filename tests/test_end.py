"""When a study ends: by number, or by its hours."""

import math

import pytest
from standin import bonus, journal_of, make_project, overrides, script

from agent.end import End, seconds_of, usual_s
from agent.journal import Proposal, Run, Trial, Usage
from agent.loop import main
from agent.settings import read_plan
from nightshift.fixed.config import CONF, ConfigError


def trial(number: int, wall_s: float | None = 10.0, usage: Usage | None = None) -> Trial:
    proposal = Proposal(title="t", hypothesis="h", source="test", usage=usage)
    return Trial(
        number=number, proposal=proposal, parent=None if number == 0 else 0, wall_s=wall_s,
        status="ok", decision="discard", reason="", runs=[Run(seed=1, status="ok", wall_s=4.0)],
    )  # fmt: skip


TEN_SECONDS_EACH = [trial(0), trial(1), trial(2)]


@pytest.mark.parametrize(
    ("end", "is_reached"),
    [
        (End(trials=2), True),
        (End(trials=3), False),
        (End(seconds=30.0), True),
        (End(seconds=30.1), False),
        (End(trials=3, seconds=30.0), True),
        (End(trials=2, seconds=1e9), True),
        (End(), False),
    ],
)
def test_whatever_comes_first_ends_a_study(end, is_reached):
    assert end.is_reached(TEN_SECONDS_EACH) == is_reached
    assert not end.is_reached([]), "the baseline is always run"


def test_hours_are_those_of_trials_and_of_waiting_for_the_model():
    assert seconds_of(trial(1, usage=Usage(seconds=5.0))) == 15.0
    assert seconds_of(trial(1, wall_s=None)) == 4.0, "of one that runs: its runs so far"
    assert usual_s([trial(0, 99.0), trial(1, 1.0), trial(2, 2.0), trial(3, 30.0)]) == 2.0
    assert End.of(None, 0.5) == End(math.inf, 1800.0)
    assert str(End.of(6, 8)) == "6 trials or 8 hours"
    assert End.of(6, None).later == "study.trials=12" and End.of(None, 8).later == "study.hours=16"


@pytest.mark.slow
def test_a_study_of_hours_ends_with_the_trial_in_which_they_run_out_and_goes_on_with_more(tmp_path):
    project = make_project(tmp_path / "project")
    given = [*overrides(0)[1:], "study.trials=null"]
    script(project, [bonus(0.0, 0.5), bonus(0.5, 0.6)])
    assert main([*given, "study.hours=1e-9"], project) == 0
    assert len(journal_of(project)) == 1, "the baseline took them all"
    so_far = sum(map(seconds_of, journal_of(project).trials)) / 3600
    assert main([*given, f"study.hours={so_far + 1e-6}"], project) == 0
    assert [t.decision for t in journal_of(project).trials] == ["keep", "keep"]


@pytest.mark.parametrize("hours", ["null", "0", "-1"])
def test_a_study_that_would_never_end_or_has_no_time_is_refused(hours):
    with pytest.raises(ConfigError) as error:
        read_plan(CONF, ["study.trials=null", f"study.hours={hours}"])
    assert "study.hours" in str(error.value)
