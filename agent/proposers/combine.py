"""Two changes at once: near misses together, or beside what was kept since they ran.

A near miss was discarded although its estimate is above 0. Two small gains that could not be shown
alone may be shown together (pairs of near misses); one may have been too small beside the incumbent
of its time (alone again, after another change was kept: kept changes are in the incumbent already).
The most promising first, by the sum of the estimates; each combination once for an incumbent.
"""

from itertools import combinations

from agent.journal import Journal, Proposal, Trial
from agent.proposers import Context, is_valid, misfit, shares_edit
from nightshift.fixed.config import flatten

MOST = 8  # near misses that are combined: the best ones


def propose(context: Context) -> Proposal | None:
    incumbent = context.journal.incumbent
    tried = {
        (trial.proposal.title, trial.parent)
        for trial in context.journal.trials
        if trial.proposal.source == "combine"
    }
    for parts in candidates(context.journal):
        proposal = together(parts, incumbent)
        if (proposal.title, incumbent.number) not in tried and fits(parts, proposal, context):
            return proposal
    return None


def candidates(journal: Journal) -> list[tuple[Trial, ...]]:
    """One or two near misses each, the largest sum of estimates first."""
    misses = [t for t in journal.trials if is_near_miss(t)]
    misses = sorted(misses, key=lambda t: (-t.estimate, t.number))[:MOST]
    alone = [(t,) for t in misses if t.parent != journal.incumbent.number]
    pairs = [tuple(sorted(pair, key=lambda t: t.number)) for pair in combinations(misses, 2)]
    return sorted(alone + pairs, key=lambda parts: -sum(t.estimate for t in parts))


def is_near_miss(trial: Trial) -> bool:
    """Combinations are not combined again."""
    discarded = trial.decision == "discard" and trial.status == "ok"
    return discarded and (trial.estimate or 0.0) > 0 and trial.proposal.source != "combine"


def together(parts: tuple[Trial, ...], incumbent: Trial) -> Proposal:
    first, last = parts[0], parts[-1]
    other = f"trial {last.number}" if len(parts) > 1 else f"what was kept since, {incumbent.number}"
    titles = "; ".join(t.proposal.title for t in parts)
    gains = " and ".join(f"{t.estimate:+.4f}" for t in parts)
    return Proposal(
        title=f"trial {first.number} with {other}: {titles}",
        hypothesis=f"A near miss (estimate {gains}) may add up with {other}.",
        source="combine",
        overrides={k: v for t in parts for k, v in t.proposal.overrides.items()},
        edits=[edit for t in parts for edit in t.proposal.edits],
    )


def fits(parts: tuple[Trial, ...], proposal: Proposal, context: Context) -> bool:
    """Does each part still change something, and none what another one changes?"""
    values, lineage = flatten(context.values), context.journal.lineage
    kept = [
        (t.proposal, later.proposal) for t in parts for later in lineage if later.number > t.number
    ]
    if any(shares_edit(a.proposal, b.proposal) for a, b in combinations(parts, 2)):
        return False  # one was put on top of the other (strategy.py)
    if any(shares_edit(mine, later) for mine, later in kept):
        return False
    keys = [key for t in parts for key in t.proposal.overrides]
    if len(set(keys)) < len(keys) or any(k not in values for k in keys):
        return False
    if any(values[key] == value for key, value in proposal.overrides.items()):
        return False
    return not misfit(proposal, context.read) and is_valid(values | proposal.overrides)
