"""The clock, with a hand that the test moves."""

import numpy as np
import pytest

from nightshift.fixed.budget import PROGRESS_FILE, Clock
from nightshift.fixed.config import Budget, ConfigError


class Hand:
    """now() of a clock that stands still until it is told."""

    def __init__(self):
        self.time_s = 0.0

    def __call__(self) -> float:
        return self.time_s


def clock(kind="seconds", amount=10.0, replay=None):
    hand = Hand()
    limit = {"wall_limit_s": 100.0, "replay": replay and str(replay)}
    made = Clock(Budget(kind=kind, amount=amount, **limit), tokens_per_step=100, now=hand)
    made.start()
    return made, hand


def test_progress_follows_the_kind_of_budget():
    seconds, hand = clock("seconds", 10.0)
    hand.time_s = 2.5
    assert seconds.progress == 0.25
    steps, _ = clock("steps", 4)
    tokens, _ = clock("tokens", 400)
    for one in (steps, tokens):
        one.end_step()
        assert one.progress == 0.25 and not one.spent
        for _ in range(3):
            one.end_step()
        assert one.spent


def test_a_paused_clock_does_not_run():
    made, hand = clock()
    hand.time_s = 1.0
    with made.paused():
        hand.time_s = 100.0
    assert made.elapsed_s == 1.0
    hand.time_s = 101.0
    assert made.elapsed_s == 2.0


def test_a_replay_takes_every_step_even_one_that_began_at_the_very_end(tmp_path):
    np.asarray([0.0, 0.5, 1.0], dtype="<f4").tofile(tmp_path / PROGRESS_FILE)
    made, _ = clock(replay=tmp_path)
    seen = []
    while not made.spent:
        seen.append(made.begin_step())
        made.end_step()
    assert seen == [0.0, 0.5, 1.0]


def test_a_replay_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no recorded run there"):
        clock(replay=tmp_path)


def test_what_is_recorded_is_what_was_used(tmp_path):
    made, hand = clock()
    used = []
    for hand.time_s in (0.0, 1.1, 3.3):
        used.append(made.begin_step())
        made.end_step()
    made.save(tmp_path)
    assert np.fromfile(tmp_path / PROGRESS_FILE, dtype="<f4").tolist() == used
