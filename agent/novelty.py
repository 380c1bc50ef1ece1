"""Is a proposal new? The same twice is refused; nearly the same must say what differs. Pure.

The same: resolved configuration and editable code are those of an earlier trial, comments and
layout left out (workspace.state_digest). A proposal that says `repeats: 7` may compute what trial 7
did: it runs seeds that no trial of that state has run, so its evidence is its own.

Nearly the same: every value is within TOLERANCE of an earlier trial's, of the range in conf/space
(on its scale) where the key has one, else of the value; and the code has the same shape, which is
the syntax tree with docstrings left out and the file's own names numbered. Such a proposal needs
`differs`, a sentence that says what is new, and carries the earlier trial's number.

Not covered: the same computation written in another way. It costs a trial, and gains nothing.
"""

import ast
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from agent.journal import Proposal, Trial
from nightshift.fixed.config import EDITABLE_GROUPS, TUNING_GROUPS, digest, flatten

TOLERANCE = 0.01


class State(NamedTuple):
    """What a trial computes, to compare."""

    digest: str
    changed: dict[str, Any]  # editable values that are not the baseline's
    shape: str


def objection(
    trials: Sequence[Trial], proposal: Proposal, state: State, baseline: dict, space: dict
) -> str | None:
    """Why the proposal is not new, with the next move; None if it may run."""
    same = next((t for t in trials if t.digest == state.digest), None)
    if proposal.repeats is not None:
        return _wrong_repeat(trials, proposal.repeats, state)
    if proposal.proves is not None and trials[proposal.proves].digest == state.digest:
        return None
    if same:
        return (
            f"same configuration and code as trial {same.number} ('{same.proposal.title}', "
            f"{result_of(same)}); a trial must differ from every earlier one. Propose another "
            f"value or another edit, or say repeats: {same.number} to run it on other seeds."
        )
    near = near_trial(trials, state, baseline, space)
    if near and not proposal.differs.strip():
        return (
            f"much like trial {near.number} ('{near.proposal.title}', {result_of(near)}): "
            f"values within {TOLERANCE:.0%}, and code that differs in names or docstrings at most. "
            "Say in `differs` what is new about it, or propose something else."
        )
    return None


def _wrong_repeat(trials: Sequence[Trial], number: int, state: State) -> str | None:
    if not 0 <= number < len(trials):
        return f"repeats {number}: there is no such trial; the last is {len(trials) - 1}."
    if trials[number].status == "running":
        return f"repeats {number}: that trial runs now. Propose something else."
    if trials[number].digest != state.digest:
        return (
            f"repeats {number}: on the present incumbent it would not compute what trial {number} "
            "did. Leave `repeats` out: it is a trial of its own."
        )
    incumbent = next((t for t in reversed(trials) if t.decision == "keep"), None)
    if incumbent and incumbent.digest == state.digest:
        return (
            f"repeats {number}: that is the incumbent, which is what each trial is compared with."
        )
    return None


def result_of(trial: Trial) -> str:
    """`keep, gain +0.0123`, `discard, crash`; of the baseline its number."""
    if trial.status != "ok":
        return f"{trial.decision}, {trial.status}"
    if trial.gain is None:
        return f"{trial.target} {trial.score}"
    return f"{trial.decision}, gain {trial.gain:+.4f}"


def near_trial(
    trials: Sequence[Trial], state: State, baseline: dict[str, Any], space: dict[str, Any]
) -> Trial | None:
    """The latest earlier trial that is nearly the same. `baseline`: flat values."""
    for trial in reversed(trials):
        if trial.shape == state.shape and trial.changed is not None:
            if near_values(baseline | trial.changed, baseline | state.changed, space):
                return trial
    return None


def near_values(a: dict[str, Any], b: dict[str, Any], space: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(close(a[key], b[key], space.get(key)) for key in a)


def close(a: Any, b: Any, bounds: Any = None) -> bool:
    """`bounds`: agent.settings.Bounds, or None."""
    if a == b or not (_is_number(a) and _is_number(b)):
        return a == b
    if bounds is not None and bounds.choices is None:
        there = math.log if bounds.log else float
        if not bounds.log or min(a, b) > 0:
            return abs(there(a) - there(b)) <= TOLERANCE * (there(bounds.high) - there(bounds.low))
    if 0.5 < a < 1 and 0.5 < b < 1:  # a momentum: what is missing to 1 matters
        a, b = 1 - a, 1 - b
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def editable_values(config: Any) -> dict[str, Any]:
    """A Config's flat values that a trial may change, whatever the study is judged by."""
    flat, groups = flatten(config.model_dump()), (*EDITABLE_GROUPS, *TUNING_GROUPS)
    return {key: value for key, value in flat.items() if key.split(".")[0] in groups}


def changed_values(config: Any, baseline: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in editable_values(config).items() if baseline.get(k, ...) != v}


# ---- the shape of code ----


def shape_of(sources: Iterable[str]) -> str:
    """Digest of Python files: what is left without comments, layout, docstrings and own names."""
    return digest([_shape(ast.parse(source)) for source in sources])


def _shape(module: ast.Module) -> str:
    own = _own_names(module)
    numbers: dict[tuple[bool, str], str] = {}

    def number(name: str, is_attribute: bool = False) -> str:
        key = (is_attribute, name)
        return numbers.setdefault(key, f"n{len(numbers)}") if key in own else name

    for node in ast.walk(module):
        _drop_docstring(node)
        for field in ("id", "arg", "name", "attr"):
            if isinstance(name := getattr(node, field, None), str):
                setattr(node, field, number(name, field == "attr"))
        if isinstance(node, ast.Global | ast.Nonlocal):
            node.names = [number(name) for name in node.names]
    return ast.dump(module)


def _own_names(module: ast.Module) -> set[tuple[bool, str]]:
    """(is it an attribute, name) of what the file names itself: variables, arguments, functions,
    classes, attributes that it sets. An attribute and a variable may bear one name."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names |= {(False, node.name), (True, node.name)}
        elif isinstance(node, ast.arg):
            names.add((False, node.arg))
        elif isinstance(getattr(node, "ctx", None), ast.Store):
            is_attribute = isinstance(node, ast.Attribute)
            name = node.attr if is_attribute else getattr(node, "id", None)
            names.add((is_attribute, name))
    return {(kind, name) for kind, name in names if name and not name.startswith("__")}


def _drop_docstring(node: ast.AST) -> None:
    body = getattr(node, "body", None)
    if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
        value = body[0].value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            node.body = body[1:]
