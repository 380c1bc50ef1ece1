"""One kept change fewer: what was worth its lines once may not be any more.

The change of a kept trial is taken out of the incumbent: its edits backwards, its values as they
were before. It is proposed where it still applies and lines go, for then "equal within noise, and
shorter" keeps it (decide.py). The smallest estimate first, each change once a study. The last kept
change is left alone: without it the incumbent is its own parent, which it was shown to beat.
"""

from typing import Any

from agent.journal import Edit, Journal, Proposal, Trial
from agent.proposers import Context, is_valid, misfit
from nightshift.fixed.config import flatten


def propose(context: Context) -> Proposal | None:
    trials = context.journal.trials
    tried = {t.proposal.title for t in trials if t.proposal.source == "simplify"}
    before = values_before(context.journal, flatten(context.baseline))
    kept = context.journal.lineage[1:-1]
    for trial in sorted(kept, key=lambda t: (t.estimate or 0.0, t.number)):
        proposal = without(trial, before[trial.number])
        if proposal.title not in tried and fits(trial, proposal, context):
            return proposal
    return None


def values_before(journal: Journal, baseline: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Number of each kept trial -> the flat values of its parent."""
    before, values = {}, baseline
    for trial in journal.lineage:
        before[trial.number] = values
        values = values | trial.proposal.overrides
    return before


def without(trial: Trial, before: dict[str, Any]) -> Proposal:
    proposal = trial.proposal
    edits = [Edit(path=e.path, search=e.replace, replace=e.search) for e in proposal.edits[::-1]]
    return Proposal(
        title=f"without trial {trial.number}: {proposal.title}",
        hypothesis=f"The incumbent does as well without the change of trial {trial.number}.",
        source="simplify",
        overrides={key: before[key] for key in proposal.overrides if key in before},
        edits=edits,
    )


def fits(trial: Trial, proposal: Proposal, context: Context) -> bool:
    """Is the change still in the incumbent as it was made, and are lines saved?"""
    values, change = flatten(context.values), trial.proposal
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
