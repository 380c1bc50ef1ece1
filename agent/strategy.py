"""Where the next proposal is put: on the incumbent, or on a stem of earlier changes. Pure.

Every trial is judged against the incumbent, by paired evidence, whatever the strategy. What a
strategy chooses is the stem: changes of earlier trials that the next proposal is put on top of. The
whole, stem and proposal, is then one change of the incumbent; so a branch follows the incumbent by
itself as long as its text fits, and journal, lineage and replay know nothing of strategies.

**greedy**: no stem (autoresearch's).

**tree**: best first. What is ahead of the incumbent after one run is not proven at once: that
takes three to ten runs more. The next proposals are put on it, and what is ahead of it on the same
seed is built on in its turn (a child that is not ends after that run). The node furthest ahead is
the front; one on which TIRED proposals brought nothing is left for the next best. The whole of a
front is proven against the incumbent when that is worth its runs (`prove_from`): by then it is a
large gain, which few seeds prove. Only then is it kept. After a keep the tree rests, REST times as
long as all trials until then took: so a study of any length has few proofs, and what it loses is
that what is kept lags behind what is ahead. Before its end it proves what is ahead, while there is
time. Proof is sought when a new front runs, which then goes on, or, when nothing on the front is
better, by a trial of its own that runs the front again (`Proposal.proves`). That trial goes on with
the front's evidence, so it has the front's share of the error budget: each trial's evidence is a
martingale of its own (decide.py), whichever are gone on with. Parts of what was kept were each
ahead on one seed alone: proven is the whole.

**islands**: ISLANDS of them have a stem each and take turns. An island accepts a trial of its turn
whose estimate is better than its own: that needs no proof, for what is kept does. Every MIGRATION
trials the worst island takes the best one's stem, or begins anew from the incumbent.

**Plateau**, with any strategy: after `study.plateau_after` trials without a keep (in a tree: or a
new front), moves alternate. `structural`: sources of code go first, and values move over their
whole range. `branch`: the newest kept change, or the newest two, are taken out, and a new proposal
is put in their place.

All of it follows from the journal, the seed and the incumbent's text: nothing is stored, so a study
can be told again. A change that is in the incumbent by now, or whose text fits no more, is no stem.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from agent.decide import (
    AHEAD,
    Bar,
    Rule,
    bar_for,
    decide,
    least_to_prove,
    seeds_to_prove,
    tested,
    typical_tau,
)
from agent.end import End, seconds_of, usual_s
from agent.journal import Journal, Proposal, Run, Trial, base_of
from agent.proposers import Context, Stem, edited, is_valid, shares_edit
from agent.proposers.simplify import values_before, without
from nightshift.fixed.config import flatten

# Those that can propose on a stem; others do on the incumbent, and are proven at once, for nothing
# would be built on them. CMA-ES sets all values, so of a stem of values nothing would be left.
STEM_SOURCES = ("sampler", "recipes")
BASE_SOURCES = ("combine", "simplify", "cmaes")  # on the incumbent alone: they wait for a stem
STRUCTURAL_SOURCES = ("recipes", "llm", "combine")  # propose code
MAX_CHANGES = 20  # of a stem with the proposal on it
TIRED = 20  # proposals on a node that were no better, then it is left
PROOF = 0.25  # runs of a proof for each trial since the last keep
REST = 2  # times the trials up to the last keep, without a proof after it
LAST_PROOF = 0.33  # of the seconds since the last keep, for the proof before the hours run out
SPARE = 2  # seeds that a proof may take beyond what is expected, when time runs out
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
    trials, last = context.journal.trials, context.journal.incumbent.number
    if context.strategy == "tree":
        ahead = [t.number for t in trials if is_of(t, context.journal) and is_step(t, trials)]
        last = max([last, *ahead])
    late = len(trials) - 1 - last - context.plateau_after
    return late if late >= 0 else None


def is_step(trial: Trial, trials: Sequence[Trial]) -> bool:
    """Is it ahead of what it was put on, on the first seed?"""
    base = base_of(trial, trials)
    least = base.differences[0] if base else 0.0
    return trial.status == "ok" and bool(trial.differences) and trial.differences[0] > least


def order(sources: Sequence[str], move: Move) -> list[str]:
    """The sources in the order in which they are asked, given the bandit's order."""
    first = {"structural": STRUCTURAL_SOURCES, "branch": STEM_SOURCES}.get(move.kind, sources)
    waits = BASE_SOURCES if not move.stem.is_empty else ()
    return sorted(sources, key=lambda source: (source in waits, source not in first))


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
    known = trial.status == "ok" and trial.decision == "discard" and bool(trial.differences)
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
    front = front_of(context)
    return stem_of(front) if front else Stem()


def front_of(context: Context) -> Trial | None:
    """The node furthest ahead on which something is left to try; None: the incumbent is."""
    trials = context.journal.trials
    ahead = {t.number: worth_of(t, trials) for t in trials if is_of(t, context.journal)}
    for number in sorted(ahead, key=lambda number: (-ahead[number], number)):
        node = trials[number]
        if ahead[number] > 0 and not is_tired(node, trials) and fits(node, context):
            return node
    return None


def is_of(trial: Trial, journal: Journal) -> bool:
    """A node whose estimate compares with the others': made at the present incumbent."""
    return is_node(trial) and trial.parent == journal.incumbent.number


def worth_of(node: Trial, trials: Sequence[Trial]) -> float:
    """Its first difference, for that is what children are compared with; 0 if more seeds did not
    bear it out."""
    seen = [node, *proofs_of(node, trials)][-1]
    return node.differences[0] if (seen.gain or 0.0) > 0 else 0.0


def proofs_of(node: Trial, trials: Sequence[Trial]) -> list[Trial]:
    return [t for t in trials if t.proposal.proves == node.number]


def is_tired(node: Trial, trials: Sequence[Trial]) -> bool:
    failed = [t for t in children_of(trials, node) if not is_step(t, trials)]
    return len(failed) >= TIRED


def children_of(trials: Sequence[Trial], node: Trial) -> list[Trial]:
    """Those that were put on it directly."""
    return [t for t in trials if t.proposal.builds_on[-1:] == [node.number]]


# ---- proof ----


def bar_of(trial: Trial, journal: Journal, strategy: str, rule: Rule, end: End) -> Bar:
    """The bar for the next trial. A tree builds on what is ahead after one run and better than what
    it was put on, and has the whole proven when it is time."""
    proposal, trials = trial.proposal, journal.trials
    if proposal.proves is not None:
        rank = len(tested(trials[: proposal.proves])) + 1  # its evidence goes on
        return bar_for(trials, proposal.kind, rule, rank)
    bar = bar_for(trials, proposal.kind, rule)
    if strategy != "tree" or proposal.source not in STEM_SOURCES or proposal.undoes:
        return bar
    on = proposal.builds_on
    least = trials[on[-1]].differences[0] if on else 0.0
    bar = bar._replace(least=least)
    if len(on) + 1 >= MAX_CHANGES:
        return bar  # now or never
    return bar._replace(prove_from=prove_from(trial, journal, end, bar))


def prove_from(node: Trial, journal: Journal, end: End, bar: Bar) -> float:
    """The first difference of a node for which a proof is worth its runs: none (inf), any (-inf),
    or what runs of a share of the trials since the last keep would prove."""
    number, kept = len(journal), journal.incumbent.number
    waited = number - 1 - kept
    near_end = end.trials - number < waited  # nearer than the last keep
    if end.seconds < math.inf and node.differences:
        waited_s = sum(map(seconds_of, journal.trials[kept + 1 :]))
        left_s, proof_s = left_when_run(node, journal, end), time_of_proof(node, journal, bar)
        spare_s = SPARE * slowest_s(node.runs)
        if left_s < proof_s + spare_s + usual_s(journal.trials):  # the next trial would be too late
            dear = proof_s > LAST_PROOF * (waited_s + left_s)
            return math.inf if dear or left_s < proof_s else -math.inf
        near_end = near_end or left_s < waited_s
    if number >= end.trials:
        return -math.inf
    if near_end or waited < REST * kept:
        return math.inf
    runs = PROOF * waited - runs_of_proofs(journal)
    return least_to_prove(bar, runs, typical_tau(bar))


def runs_of_proofs(journal: Journal) -> int:
    """Runs beyond the first of the trials since the last keep, the incumbent's for them too."""
    since = journal.trials[journal.incumbent.number + 1 :]
    tree = [t for t in since if t.proposal.source in STEM_SOURCES]
    return sum(len(t.runs) - 1 + len(t.parent_runs) for t in tree if len(t.runs) > 1)


def left_when_run(node: Trial, journal: Journal, end: End) -> float:
    """Seconds of the study after the node's runs so far, if it is the trial that runs."""
    return end.left_s(journal.trials) - (seconds_of(node) if node.number == len(journal) else 0.0)


def time_of_proof(node: Trial, journal: Journal, bar: Bar) -> float:
    """Seconds: that of an earlier trial begins with its first run again, and the parent
    runs the seeds that it lacks."""
    seeds = seeds_to_prove(node.differences[0], bar, typical_tau(bar))
    runs_now = node.number == len(journal)
    parent = journal.runs_of(journal.trials[node.parent], node if runs_now else None)
    own_s = (seeds - runs_now) * slowest_s(node.runs)
    return own_s + max(0, seeds - len(parent)) * slowest_s(parent.values())


def slowest_s(runs: Iterable[Run]) -> float:
    return max(run.wall_s or 0.0 for run in runs)


def proof_of(context: Context) -> Proposal | None:
    """The front again, once, when what was built on it since is no better."""
    front, journal = front_of(context) if context.strategy == "tree" else None, context.journal
    if not front or len(front.differences) > 1 or proofs_of(front, journal.trials):
        return None
    bar = bar_for(journal.trials, front.proposal.kind, context.rule)
    bar = bar._replace(prove_from=prove_from(front, journal, context.end, bar))
    if decide(front.differences, bar).kind != "more":
        return None
    return replace(
        front.proposal,
        proves=front.number,
        hypothesis=f"Trial {front.number} is ahead after one run; is it so on other seeds?",
        expected_effect="",
        events=[],
        near=[],
    )


def unproven(trials: Sequence[Trial]) -> Trial | None:
    """What is furthest ahead of the incumbent and still waits for its proof."""
    incumbent = max((t.number for t in trials if t.decision == "keep"), default=None)
    waits = [t for t in trials if t.parent == incumbent and t.reason.startswith(AHEAD)]
    waits = [t for t in waits if not proofs_of(t, trials)]
    return max(waits, key=lambda t: t.differences[0], default=None)


# ---- islands ----


def is_better(trial: Trial, than: Trial | None) -> bool:
    """By its estimate; one without a number is not. `than`: None is the incumbent."""
    if trial.status != "ok" or trial.estimate is None:
        return False
    return trial.estimate > (than.estimate if than else 0.0)


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
    undone = [without(t.number, t.proposal, before[t.number]) for t in newest]
    overrides = {key: value for change in undone for key, value in change.overrides.items()}
    edits = tuple(edit for change in undone for edit in change.edits)
    if not newest or any(not edit.search for edit in edits):
        return None
    if edited(edits, context.read)[1] or not is_valid(flatten(context.values) | overrides):
        return None
    return Stem((), tuple(trial.number for trial in newest), overrides, edits)
