"""Where the next proposal is put: on the incumbent, or on a stem of earlier changes. Pure.

Every trial is judged against the incumbent, by paired evidence, whatever the strategy. What a
strategy chooses is the stem: changes of earlier trials that the next proposal is put on top of. The
whole, stem and proposal, is then one change of the incumbent; so a branch follows the incumbent by
itself as long as its text fits, and journal, lineage and replay know nothing of strategies.

**greedy**: no stem (autoresearch's).

**tree**: best first. Nodes are the discarded trials that ran; a node's value is drawn from its
estimate (Thompson 1933, Biometrika 25:285), less one standard deviation for each child that was no
better; the highest draw above 0, which is the incumbent's, is the stem. A share DRAFTS of the
proposals goes to the incumbent whatever was drawn.

**islands**: ISLANDS of them have a stem each and take turns. An island accepts a trial of its turn
whose estimate is better than its own: that needs no proof, for what is kept does. Every MIGRATION
trials the worst island takes the best one's stem, or begins anew from the incumbent.

**Plateau**, with any strategy: after `study.plateau_after` trials without a keep, moves alternate.
`structural`: sources of code go first, and values move over their whole range. `branch`: the newest
kept change, or the newest two, are taken out, and a new proposal is put in their place.

All of it follows from the journal, the seed and the incumbent's text: nothing is stored, so a study
can be told again. A change that is in the incumbent by now, or whose text fits no more, is no stem.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from agent.decide import Z_INTERVAL
from agent.journal import Trial
from agent.proposers import Context, Stem, edited, is_valid, shares_edit
from agent.proposers.simplify import values_before, without
from nightshift.fixed.config import flatten

# Those that can propose on a stem; others do on the incumbent. CMA-ES sets all values, so of a stem
# of values nothing would be left.
STEM_SOURCES = ("sampler", "recipes")
STRUCTURAL_SOURCES = ("recipes", "llm", "combine")  # propose code
MAX_CHANGES = 3  # of a stem with the proposal on it
DRAFTS = 1 / 3
ISLANDS = 3
MIGRATION = 12
PLATEAU_MOVES = ("structural", "branch")


class Move(NamedTuple):
    kind: str = "usual"  # usual | structural | branch
    stem: Stem = Stem()
    why: str = ""  # for the person and for the trial's events


def next_move(context: Context) -> Move:
    """Which stem the next proposal is put on, and which sources go first."""
    if context.journal.incumbent is None:
        return Move()
    late = trials_on_plateau(context)
    if late is None:
        return Move(stem=usual_stem(context))
    kind, rounds = PLATEAU_MOVES[late % len(PLATEAU_MOVES)], late // len(PLATEAU_MOVES)
    why = f"plateau: {late + context.plateau_after} trials without a keep"
    if kind == "branch" and (stem := ancestor_stem(context, 1 + rounds % 2)):
        return Move("branch", stem, why)
    return Move("structural", usual_stem(context), why)


def trials_on_plateau(context: Context) -> int | None:
    """Trials since it began, 0 at its first move; None: there is none."""
    if context.plateau_after is None:
        return None
    trials = context.journal.trials
    late = len(trials) - 1 - context.journal.incumbent.number - context.plateau_after
    return late if late >= 0 else None


def order(sources: Sequence[str], move: Move) -> list[str]:
    """The sources in the order in which they are asked, given the bandit's order."""
    first = {"structural": STRUCTURAL_SOURCES, "branch": STEM_SOURCES}.get(move.kind, sources)
    return sorted(sources, key=lambda source: source not in first)


def usual_stem(context: Context) -> Stem:
    """What the strategy says where there is no plateau."""
    if context.strategy == "tree":
        return tree_stem(context)
    if context.strategy == "islands":
        held = islands(context)[context.number % ISLANDS]
        return stem_of(held) if held else Stem()
    return Stem()


# ---- nodes ----


def stem_of(trial: Trial) -> Stem:
    """The trial's whole change; what it stood on is part of it."""
    proposal = trial.proposal
    on = (*proposal.builds_on, trial.number)
    return Stem(on, tuple(proposal.undoes), proposal.overrides, tuple(proposal.edits))


def is_node(trial: Trial) -> bool:
    """Discarded, with an estimate, and not too long to be built on."""
    known = trial.status == "ok" and trial.decision == "discard" and trial.estimate is not None
    return known and len(trial.proposal.builds_on) + 2 <= MAX_CHANGES


def fits(trial: Trial, context: Context) -> bool:
    """Can its change be made at the present incumbent, and does it still say something?"""
    stem, values = stem_of(trial), flatten(context.values)
    if any(key not in values for key in stem.overrides) or _is_in(trial, context):
        return False
    return edited(stem.edits, context.read)[1] is None and is_valid(values | stem.overrides)


def _is_in(trial: Trial, context: Context) -> bool:
    """Is the change, or a part of its code, in the incumbent by now?"""
    values, change = flatten(context.values), trial.proposal
    later = [t.proposal for t in context.journal.lineage if t.number > trial.number]
    if any(shares_edit(change, proposal) for proposal in later):
        return True
    return not change.edits and all(values[key] == v for key, v in change.overrides.items())


# ---- tree ----


def tree_stem(context: Context) -> Stem:
    rng = random.Random(f"tree/{context.seed}/{context.number}")
    if rng.random() < DRAFTS:
        return Stem()
    for trial in _drawn(context.journal.trials, rng):
        if fits(trial, context):
            return stem_of(trial)
    return Stem()


def _drawn(trials: Sequence[Trial], rng: random.Random) -> Iterator[Trial]:
    """The nodes whose draw is above the incumbent's 0, the highest first."""
    values = {}
    for trial in filter(is_node, trials):
        sd = (trial.high - trial.low) / (2 * Z_INTERVAL)
        failed = sum(not is_better(child, trial) for child in children_of(trials, trial))
        values[trial.number] = rng.gauss(trial.estimate, sd) - failed * sd
    for number in sorted(values, key=lambda number: (-values[number], number)):
        if values[number] > 0:
            yield trials[number]


def children_of(trials: Sequence[Trial], node: Trial) -> list[Trial]:
    """Those that were put on it directly."""
    return [t for t in trials if t.proposal.builds_on[-1:] == [node.number]]


def is_better(trial: Trial, than: Trial | None) -> bool:
    """By its estimate; one without a number is not. `than`: None is the incumbent."""
    if trial.status != "ok" or trial.estimate is None:
        return False
    return trial.estimate > (than.estimate if than else 0.0)


# ---- islands ----


def islands(context: Context) -> list[Trial | None]:
    """What each island has reached, told from the journal; None: the incumbent."""
    held: list[Trial | None] = [None] * ISLANDS
    for number in range(1, context.number + 1):
        if number % MIGRATION == 0:
            _migrate(held, random.Random(f"islands/{context.seed}/{number}"))
        if number < len(context.journal):
            trial, place = context.journal.trials[number], number % ISLANDS
            if is_node(trial) and is_better(trial, held[place]) and fits(trial, context):
                held[place] = trial
    return held


def _migrate(held: list[Trial | None], rng: random.Random) -> None:
    """The worst island goes on from the best one, or from the incumbent."""
    reached = [trial.estimate if trial else 0.0 for trial in held]
    best, worst = reached.index(max(reached)), reached.index(min(reached))
    if best != worst:
        held[worst] = rng.choice([held[best], None])


# ---- an earlier ancestor ----


def ancestor_stem(context: Context, depth: int) -> Stem | None:
    """The incumbent without its newest `depth` kept changes; None where they do not come out."""
    newest = context.journal.lineage[1:][-depth:][::-1]
    before = values_before(context.journal, flatten(context.baseline))
    undone = [without(trial, before[trial.number]) for trial in newest]
    overrides = {key: value for change in undone for key, value in change.overrides.items()}
    edits = tuple(edit for change in undone for edit in change.edits)
    if not newest or any(not edit.search for edit in edits):
        return None
    if edited(edits, context.read)[1] or not is_valid(flatten(context.values) | overrides):
        return None
    return Stem((), tuple(trial.number for trial in newest), overrides, edits)
