"""How much alike two proposals are: 1 if they change the same things to the same values.

A proposal is taken apart into units: one for each key that it sets, one for each file that it
edits. Units that only one of the two has count 0. Two values of a key are alike by their ratio,
down to 0 at a factor of two; other values are the same or not. Two edits of a file are alike by the
words of the lines that they remove and add (Jaccard), indentation and comments left out.

Not covered: the same idea in other words of code. It is run, and the digest of the code tells the
loop if it computes the same.
"""

import math
import re
from typing import Any, NamedTuple

from agent.journal import Proposal, Trial

SAME = 0.85  # from here on a proposal has to say what differs
MAX_NEAR = 3

Units = dict[str, Any]  # 'optim.matrix_lr' -> value; 'src/nightshift/model.py' -> set of words


class Near(NamedTuple):
    trial: Trial
    share: float


class Similar:
    """Remembers the units of trials, so that a long journal is taken apart once."""

    def __init__(self):
        self.units: list[Units] = []

    def nearest(self, trials: list[Trial], proposal: Proposal) -> list[Near]:
        """The earlier trials that are at least SAME like this, the most alike first."""
        self.units += [units_of(trial.proposal) for trial in trials[len(self.units) :]]
        mine = units_of(proposal)
        near = [
            Near(trial, share)
            for trial, theirs in zip(trials, self.units, strict=False)
            if theirs.keys() & mine.keys() and (share := alike(mine, theirs)) >= SAME
        ]
        return sorted(near, key=lambda one: -one.share)[:MAX_NEAR]


def units_of(proposal: Proposal) -> Units:
    units: Units = dict(proposal.overrides)
    for edit in proposal.edits:
        words = units.setdefault(edit.path, set())
        words |= {("-", word) for word in _words(edit.search, edit.replace)}
        words |= {("+", word) for word in _words(edit.replace, edit.search)}
    return units


def alike(one: Units, other: Units) -> float:
    """From 0 to 1."""
    names = one.keys() | other.keys()
    common = one.keys() & other.keys()
    return sum(_same(one[name], other[name]) for name in common) / len(names) if names else 0.0


def _same(one: Any, other: Any) -> float:
    if isinstance(one, set) and isinstance(other, set):
        return len(one & other) / len(one | other) if one | other else 1.0
    if _is_number(one) and _is_number(other) and one * other > 0:
        return max(0.0, 1 - abs(math.log2(one / other)))
    return float(one == other)


def _words(text: str, without: str) -> set[str]:
    """The words of the lines of `text` that `without` does not have, with the line's own count."""
    known = {_plain(line) for line in without.splitlines()}
    lines = [_plain(line) for line in text.splitlines()]
    return {word for line in lines if line and line not in known for word in line.split()}


def _plain(line: str) -> str:
    """'  x = a*b  # why' -> 'x = a * b'"""
    return " ".join(re.findall(r"\w+(?:\.\w+)*|[^\w\s]", re.sub(r"#.*", "", line)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
