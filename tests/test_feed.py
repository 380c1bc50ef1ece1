"""The feed: what a candidate gets, and what the harness counts, whatever the candidate says."""

import socket
import threading
import time

import numpy as np
import pytest
import torch
from tiny import config

from nightshift.fixed import feed as feeds
from nightshift.fixed.feed import ASK, Broken, EndOfData, Feeder, LocalFeed, RemoteFeed, splits

STEPS = 5


class Still:
    """A child that neither speaks nor ends, and has used as much CPU time as a test says."""

    def __init__(self):
        self.pipe, self.other = socket.socketpair()
        self.used_s = 0.0

    def cpu_s(self):
        return self.used_s

    def wait(self, timeout_s):
        return None


class Pair:
    """A candidate's end and the harness's, which answers in a thread."""

    def __init__(self, cfg):
        self.local = LocalFeed(cfg)
        ours, self.theirs = socket.socketpair()
        self.taken = []
        batches = splits(cfg, self.local.tokens)
        self.feeder = Feeder(ours, cfg, batches, lambda: self.taken.append(1))
        self.remote = RemoteFeed(self.theirs, cfg, self.local.tokenizer, "digest")
        self.broken, self.child = None, Still()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        try:
            self.feeder.run(self.child)
        except Broken as error:
            self.broken = str(error)
            self.feeder.sock.close()

    def end(self):
        self.theirs.close()
        self.thread.join(10)
        return self.broken

    def step(self, index: int, remote=True):
        """One step as the Trainer makes it."""
        self.remote.batch(index)
        progress = self.remote.clock.begin_step()
        self.remote.clock.end_step()
        return progress


@pytest.fixture
def pair(tmp_path):
    made = Pair(config(tmp_path, **{"budget.amount": float(STEPS)}))
    yield made
    made.end()


def test_the_same_batches_and_dev_windows_arrive_as_in_a_process_of_one_s_own(pair):
    for index in range(3):
        for mine, theirs in zip(pair.remote.batch(index), pair.local.batch(index), strict=True):
            assert torch.equal(mine, theirs)
        pair.remote.clock.begin_step()
        pair.remote.clock.end_step()
    for mine, theirs in zip(pair.remote.dev_batches(), pair.local.dev_batches(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_progress_and_steps_are_the_harness_s(pair):
    seen = [pair.step(i) for i in range(STEPS)]
    assert seen == [float(np.float32(i / STEPS)) for i in range(STEPS)], "to the last digit"
    assert pair.remote.clock.spent and pair.remote.clock.tokens == STEPS * 128
    assert pair.feeder.clock.recorded == seen
    with pytest.raises(EndOfData):
        pair.remote.batch(STEPS)


def test_batches_cannot_be_hoarded(pair):
    for _ in range(1 + feeds.LEAD):
        pair.remote.batch(0)
    with pytest.raises(EndOfData):
        pair.remote.batch(0)


def test_the_order_of_batches_is_not_the_candidate_s_choice(pair):
    first, _ = pair.remote.batch(77)
    assert torch.equal(first, pair.local.batch(0)[0])


def test_dev_is_not_shown_before_training_nor_again_and_again(pair):
    assert list(pair.remote.dev_batches()) == []
    pair.step(0)
    assert len(list(pair.remote.dev_batches())) > 0
    assert list(pair.remote.dev_batches()) == [], "runtime.num_dev_points is 1 here"


def test_pauses_are_granted_for_a_tenth_of_the_budget_and_charged_above(tmp_path):
    cfg = config(tmp_path, **{"budget.kind": "seconds", "budget.amount": 1.0})
    pair = Pair(cfg)
    pair.remote.batch(0)
    pair.remote.clock.stop()
    time.sleep(0.08)
    pair.remote.clock.start()
    granted = pair.remote.clock.elapsed_s
    pair.remote.clock.stop()
    time.sleep(0.4)
    pair.remote.clock.start()
    assert granted < 0.08 and pair.remote.clock.elapsed_s > 0.3
    pair.end()


def test_a_pause_that_is_never_ended_ends_with_the_next_batch(tmp_path):
    cfg = config(tmp_path, **{"budget.kind": "seconds", "budget.amount": 5.0})
    pair = Pair(cfg)
    pair.remote.batch(0)
    pair.remote.clock.stop()
    pair.remote.batch(1)
    before = pair.remote.clock.elapsed_s
    time.sleep(0.1)
    assert pair.remote.clock.elapsed_s > before + 0.05
    pair.end()


def test_time_counts_from_the_first_batch_even_if_the_clock_is_never_started(tmp_path):
    cfg = config(tmp_path, **{"budget.kind": "seconds", "budget.amount": 0.2})
    pair = Pair(cfg)
    pair.remote.batch(0)
    time.sleep(0.3)
    assert pair.remote.clock.progress == 1.0
    pair.end()


def test_weights_are_taken_over_once(pair):
    for i in range(STEPS):
        pair.step(i)
    pair.remote.weights_saved(STEPS)
    pair.remote.weights_saved(STEPS)
    assert pair.taken == [1] and pair.end() is None


@pytest.mark.parametrize(
    ("optimizer_steps", "words"),
    [(2 * STEPS, "stepped 10 times in 5 steps"), (0, "never stepped")],
)
def test_optimizer_steps_must_be_those_of_the_budget(pair, optimizer_steps, words):
    for i in range(STEPS):
        pair.step(i)
    with pytest.raises((ConnectionError, OSError)):
        pair.remote.weights_saved(optimizer_steps)
    assert words in pair.end() and pair.taken == []


@pytest.mark.parametrize("when", ["in a pause", "after the last step"])
def test_cpu_time_beside_the_clock_is_bounded(pair, when):
    for i in range(STEPS):
        pair.step(i)
        pair.child.used_s += 1.0
        if when == "in a pause" and i == 2:
            with pair.remote.clock.paused():
                pair.child.used_s += 4.0
    if when == "after the last step":
        pair.child.used_s += 4.0
    with pytest.raises((ConnectionError, OSError)):
        pair.remote.weights_saved(STEPS)
    assert "while the clock stood still" in pair.end() and pair.taken == []


def test_measuring_dev_beside_the_clock_is_fine(pair):
    for i in range(STEPS):
        pair.step(i)
        pair.child.used_s += 1.0
        if i == 2:
            with pair.remote.clock.paused():
                tokens = sum(x.numel() for x, _ in pair.remote.dev_batches())
                pair.child.used_s += 0.6 * 4.0 * tokens / (STEPS * 128)
    pair.remote.weights_saved(STEPS)
    assert pair.taken == [1] and pair.end() is None


def test_weights_that_come_long_after_the_last_step_are_refused(pair, monkeypatch):
    monkeypatch.setattr(Feeder, "grace_s", lambda self: 0.2)
    for i in range(STEPS):
        pair.step(i)
    time.sleep(0.4)
    with pytest.raises((ConnectionError, OSError)):
        pair.remote.weights_saved(STEPS)
        pair.remote.weights_saved(STEPS)
    assert "training went on after its budget" in pair.end()


@pytest.mark.parametrize("noise", [b"x" * ASK.size, bytes(ASK.size), b"\xff" * 100])
def test_noise_on_the_socket_ends_the_run_with_a_reason(pair, noise):
    pair.theirs.sendall(noise)
    assert "spoke out of turn" in pair.end()


def test_half_a_question_harms_nobody(pair):
    pair.theirs.sendall(b"B")
    assert pair.end() is None


def test_both_ends_agree_on_the_shape_of_a_window(tmp_path):
    cfg = config(tmp_path)
    train, _ = splits(cfg, LocalFeed(cfg).tokens)
    inputs, targets = train.batch(0)
    windows = np.frombuffer(Feeder.packed(inputs, targets), "<u2").reshape(len(inputs), -1)
    assert np.array_equal(windows[:, :-1], inputs.numpy())
    assert np.array_equal(windows[:, 1:], targets.numpy())
