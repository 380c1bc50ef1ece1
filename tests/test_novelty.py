"""What is the same, what is nearly the same, and what has to be said then. No files, no runs."""

from types import SimpleNamespace

import pytest

from agent.journal import Proposal, Run, Trial
from agent.novelty import State, close, near_trial, objection, shape_of
from agent.seeds import seeds_for
from agent.settings import Bounds
from nightshift.fixed.config import check

BASELINE = {"optim.matrix_lr": 0.02, "optim.momentum": 0.95, "model.depth": 4}
SPACE = {"optim.matrix_lr": check({"low": 0.005, "high": 0.08, "log": True}, Bounds)}


def a_trial(number: int, changed: dict, shape: str = "s", **more) -> Trial:
    given = {
        "number": number,
        "proposal": Proposal(title="t", hypothesis="", source="test", overrides=changed),
        "parent": 0 if number else None,
        "status": "ok",
        "decision": "discard" if number else "keep",
        "reason": "",
        "gain": -0.0012 if number else None,
        "digest": str(sorted(changed.items())) + shape,
        "changed": changed,
        "shape": shape,
    }
    return Trial(**given | more)


def state(shape: str = "s", **changed) -> State:
    changed = {key.replace("__", "."): value for key, value in changed.items()}
    return State(str(sorted(changed.items())) + shape, changed, shape)


TRIALS = [a_trial(0, {}), a_trial(1, {"optim.matrix_lr": 0.04}), a_trial(2, {"model.depth": 6})]


def said(one: State, trials=TRIALS, **more) -> str | None:
    proposal = Proposal(title="new", hypothesis="", source="test", **more)
    return objection(trials, proposal, one, BASELINE, SPACE)


def test_the_same_never_runs_twice_whatever_is_said_of_it():
    same = state(optim__matrix_lr=0.04)
    words = "same configuration and code as trial 1 ('t', discard, gain -0.0012)"
    assert words in said(same) and words in said(same, differs="It is Tuesday.")
    crashed = [*TRIALS[:1], a_trial(1, {"optim.matrix_lr": 0.04}, status="crash")]
    assert "trial 1 ('t', discard, crash)" in said(same, crashed)


def test_nearly_the_same_needs_what_differs_and_gets_the_earlier_result():
    near = state(optim__matrix_lr=0.0404)
    assert "much like trial 1 ('t', discard, gain -0.0012)" in said(near)
    assert said(near, differs=" \n") and said(near, differs="To see the noise.") is None
    assert "much like trial 0" in said(state(optim__matrix_lr=0.0201)), "the incumbent counts too"
    assert said(state(optim__matrix_lr=0.042)) is None
    assert said(state(optim__matrix_lr=0.0404, model__depth=5)) is None
    assert said(state("other code", optim__matrix_lr=0.0404)) is None


def test_a_trial_of_an_old_journal_is_compared_by_its_digest_alone():
    old = a_trial(1, {"optim.matrix_lr": 0.04})
    old.changed = old.shape = None
    trials = [TRIALS[0], old]
    assert "same configuration and code as trial 1" in said(state(optim__matrix_lr=0.04), trials)
    assert near_trial(trials, state(optim__matrix_lr=0.0404), BASELINE, SPACE) is None


@pytest.mark.parametrize(
    ("a", "b", "bounds", "expected"),
    [
        (0.02, 0.0201, None, True),
        (0.02, 0.0203, None, False),
        (0.02, 0.0204, SPACE["optim.matrix_lr"], True),  # 1 % of the range in logarithms: 2.8 %
        (0.02, 0.021, SPACE["optim.matrix_lr"], False),
        (0.95, 0.953, None, False),  # a momentum: 0.05 -> 0.047
        (0.95, 0.9504, None, True),
        (0.0, 0.001, None, False),
        (4, 5, None, False),
        (True, 1, None, True),  # equal in Python; no key takes both
        ("L", "S", None, False),
        ([0.9, 0.95], [0.9, 0.95], None, True),
        (None, 0.1, None, False),
        (-1.0, -1.001, SPACE["optim.matrix_lr"], True),  # outside of a logarithmic range
    ],
)
def test_values_are_close_within_a_hundredth(a, b, bounds, expected):
    assert close(a, b, bounds) is close(b, a, bounds) is expected


CODE = """
import torch
SCALE = 2.0
class Block:
    def __init__(self, width):
        self.width = width
    def forward(self, x, y):
        return torch.tanh(x) * self.width * SCALE - y
"""


@pytest.mark.parametrize(
    "other",
    [
        CODE.replace("SCALE", "FACTOR"),
        CODE.replace("self, x, y", "self, a, b").replace("(x)", "(a)").replace("- y", "- b"),
        CODE.replace("        return", "        # why\n        return").replace("class", "\nclass"),
        CODE.replace("    def __init__", '    """A block."""\n\n    def __init__'),
        CODE.replace("self.width", "self.w"),
    ],
)  # fmt: skip
def test_names_comments_and_layout_do_not_change_the_shape_of_code(other):
    assert other != CODE and shape_of([other]) == shape_of([CODE])


@pytest.mark.parametrize(
    "other",
    [
        CODE.replace("2.0", "2.5"),
        CODE.replace("tanh", "relu"),  # a name of somebody else
        CODE.replace("tanh(x)", "tanh(y)"),
        CODE.replace("* self.width", "+ self.width"),
        CODE.replace("import torch", "import numpy as torch"),
    ],
)
def test_what_is_computed_does_change_it(other):
    assert shape_of([other]) != shape_of([CODE])


def test_a_proof_computes_what_its_trial_did():
    assert said(state(optim__matrix_lr=0.04), proves=1) is None
    assert "same configuration and code as trial 1" in said(state(optim__matrix_lr=0.04), proves=2)


def test_a_repeat_has_to_be_one():
    same = state(optim__matrix_lr=0.04)
    assert said(same, repeats=1) is None
    assert "there is no such trial; the last is 2" in said(same, repeats=3)
    assert "would not compute what trial 2 did" in said(same, repeats=2)
    assert "that is the incumbent" in said(state(), repeats=0)


def test_a_repeat_runs_what_its_state_has_not_run():
    plan = SimpleNamespace(
        study=SimpleNamespace(seeds=[5, 2, 1], baseline_seeds=[5, 2], max_seeds=3)
    )
    trials = [a_trial(1, {}, runs=[Run(seed=s, status="ok") for s in (5, 2)])]
    study = SimpleNamespace(plan=plan, journal=SimpleNamespace(trials=trials))
    again = a_trial(2, {})
    assert seeds_for(study, again) == [5, 2, 1]
    again.proposal.repeats = 1
    assert seeds_for(study, again) == [1, 3, 4]
