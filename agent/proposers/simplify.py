"""One kept change fewer: what was worth its lines once may not be any more.

A step of what was kept is taken out of the incumbent: its edits backwards, its values as they were
before. A kept trial is one step, and so is each trial that it builds on, for those were ahead on
one seed alone (strategy.py). It is proposed where it still applies and lines go, for then "equal
within noise, and shorter" keeps it (decide.py). The smallest gain first, each step once a study. A
kept change of one step that is the last is left alone: without it the incumbent is its own parent,
which it was shown to beat.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from agent.journal import Edit, Journal, Proposal, Trial, step_of
from agent.proposers import Context, is_valid, misfit
from nightshift.fixed.config import flatten


class Step(NamedTuple):
    number: int  # of the trial that made it
    change: Proposal  # its own alone
    before: dict[str, Any]  # flat values that it was put on
    gain: float


def propose(context: Context) -> Proposal | None:
    trials = context.journal.trials
    tried = {t.proposal.title for t in trials if t.proposal.source == "simplify"}
    before = values_before(context.journal, flatten(context.baseline))
    steps = [s for t in context.journal.lineage[1:] for s in steps_of(t, trials, before[t.number])]
    if steps and len(steps_of(context.journal.incumbent, trials, {})) == 1:
        steps.pop()
    for step in sorted(steps, key=lambda step: (step.gain, step.number)):
        proposal = without(step.number, step.change, step.before)
        if proposal.title not in tried and fits(step.change, proposal, context):
            return proposal
    return None


def steps_of(trial: Trial, trials: Sequence[Trial], values: dict[str, Any]) -> list[Step]:
    """What a kept trial is made of. `values`: flat, of its parent."""
    chain = [*(trials[n] for n in trial.proposal.builds_on), trial]
    steps, known = [], Proposal(title="", hypothesis="", source="")
    for one in chain:
        whole = one.proposal
        new = {k: v for k, v in whole.overrides.items() if known.overrides.get(k, ...) != v}
        own = replace(whole, overrides=new, edits=whole.edits[len(known.edits) :])
        steps.append(Step(one.number, own, values | known.overrides, step_of(one, trials)))
        known = whole
    return steps


def values_before(journal: Journal, baseline: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Number of each kept trial -> the flat values of its parent."""
    before, values = {}, baseline
    for trial in journal.lineage:
        before[trial.number] = values
        values = values | trial.proposal.overrides
    return before


def without(number: int, change: Proposal, before: dict[str, Any]) -> Proposal:
    edits = [Edit(path=e.path, search=e.replace, replace=e.search) for e in change.edits[::-1]]
    return Proposal(
        title=f"without trial {number}: {change.title}",
        hypothesis=f"The incumbent does as well without the change of trial {number}.",
        source="simplify",
        overrides={key: before[key] for key in change.overrides if key in before},
        edits=edits,
    )


def fits(change: Proposal, proposal: Proposal, context: Context) -> bool:
    """Is the change still in the incumbent as it was made, and are lines saved?"""
    values = flatten(context.values)
    if any(values.get(key, ...) != value for key, value in change.overrides.items()):
        return False
    if not saves_lines(proposal, context) or any(not edit.search for edit in proposal.edits):
        return False
    return not misfit(proposal, context.read) and is_valid(values | proposal.overrides)


def saves_lines(proposal: Proposal, context: Context) -> bool:
    """Fewer lines of code, or a value that champion.yaml need not set any more."""
    saved = sum(e.search.count("\n") - e.replace.count("\n") for e in proposal.edits)
    baseline = flatten(context.baseline)
    saved += sum(baseline.get(key, ...) == value for key, value in proposal.overrides.items())
    return saved > 0
