"""Whose turn is it? A bandit over the sources: the more gain for the cost, the more turns.

Each source has earned the estimates of its kept trials (shrunken, decide.py), counted in the mean
one of the study, and spent the seconds of its trials' runs, counted in the mean trial. Both fade:
what happened a hundred trials ago says little about what is left to find. What a source earns for
its cost has a Gamma posterior, with PRIOR_EARNED times its share (study.sources) over PRIOR_SPENT
trials before anything is known; the highest draw has the turn (Thompson 1933, Biometrika 25:285;
fading as in Raj and Kalyani 2017, arXiv 1707.09727).

However a source does, it keeps FLOOR of its share: one that is a whole turn behind that is asked
first. A source that has nothing to propose passes its turn to the next.

Where the proposal is put, on the incumbent or on a stem, and who is asked first on a plateau is for
strategy.py to say. A source that finds nothing on a stem is asked again on the incumbent.

Where the model thinks ahead, whose turn it is is known while the trial before runs. So its outcome
has no say in it, whether the model was asked by then or not.

A pure function of the sources, the seed and the journal: a study can be told again.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from agent import strategy
from agent.journal import Proposal, Trial, step_of
from agent.proposers import Context, cmaes, combine, recipes, sampler, simplify

PROPOSERS = {
    "sampler": sampler.propose,
    "cmaes": cmaes.propose,
    "recipes": recipes.propose,
    "combine": combine.propose,
    "simplify": simplify.propose,
    "llm": lambda context: context.researcher.propose(context),  # imported only where it is used
    "outside": lambda context: context.outside(False),
}
FALLBACK = ("sampler", "recipes")  # need nothing, so they go on where the model alone was asked
FLOOR = 0.25  # of its share, that a source keeps
FADE = 0.98  # weight of a trial against the next: half after 34
PRIOR_EARNED, PRIOR_SPENT = 1.0, 4.0  # of a source of mean share, in mean keeps and mean trials
LEAST_COST = 0.25  # of the mean trial: a trial that fails at once still takes a turn


def propose(context: Context) -> Proposal | None:
    """From the source whose turn it is; from the next one when that has nothing."""
    order, move = turn(context)
    thought = context.researcher and context.researcher.thought
    if thought:
        order.sort(key=lambda name: name != "llm")  # for which it was its turn
    if move.why:
        context.note(
            f"plateau: {context.plateau_after} trials without a keep since trial "
            f"{context.journal.incumbent.number}; structural moves and earlier ancestors take turns"
        )
    proof = None if thought or move.why else strategy.proof_of(context)
    proposal = proof or next(filter(None, (ask(name, context, move) for name in order)), None)
    if proposal is None and context.sources.get("outside"):
        proposal = context.outside(True)  # for as long as it takes: nobody else has anything
    if proposal and context.researcher:
        context.researcher.sign(context.number, proposal)
    if proposal and move.why:
        proposal.events = [*proposal.events, move.why]
    return proposal


def turn(context: Context) -> tuple[list[str], strategy.Move]:
    """The sources in the order in which they are asked, and where the proposal is put."""
    trials, unknown = context.journal.trials, 1 if context.ahead else 0
    names = ranking(trials, context.sources, context.seed, context.number, unknown)
    if context.researcher:
        names += [name for name in FALLBACK if name not in names]
    move = strategy.next_move(context)
    return strategy.order(names, move), move


def ask(name: str, context: Context, move: strategy.Move) -> Proposal | None:
    """One source: on the stem, if it can use one, else on the incumbent."""
    propose_there = PROPOSERS[name]
    context = replace(context, wide=move.kind == "structural")
    if name in strategy.STEM_SOURCES and not move.stem.is_empty:
        there = context.on(move.stem)
        proposal = propose_there(there)
        if whole := proposal and there.off(proposal):
            return whole
    return propose_there(context)


def ranking(
    trials: Sequence[Trial], sources: dict[str, float], seed: int, number: int, unknown: int = 0
) -> list[str]:
    """The sources with a share, in the order in which they are asked for trial `number`.

    `unknown`: of the last trials, how many have no say but that they had a turn.
    """
    shares = {name: share / sum(sources.values()) for name, share in sources.items() if share}
    turns = [trial.proposal.source for trial in trials]
    owed = {name: FLOOR * share * number - turns.count(name) for name, share in shares.items()}
    drawn = draws(trials[: len(trials) - unknown], shares, seed, number)
    return sorted(shares, key=lambda name: (-max(owed[name], 1 - 1e-9), -drawn[name]))


def draws(
    trials: Sequence[Trial], shares: dict[str, float], seed: int, number: int
) -> dict[str, float]:
    """What each source earns for its cost, drawn from what is known of it."""
    rng, accounts = random.Random(f"mixed/{seed}/{number}"), account(trials)
    drawn = {}
    for name in sorted(shares):
        earned, spent = accounts.get(name, (0.0, 0.0))
        prior = PRIOR_EARNED * shares[name] * len(shares)
        drawn[name] = rng.gammavariate(prior + earned, 1.0) / (PRIOR_SPENT + spent)
    return drawn


def account(trials: Sequence[Trial]) -> dict[str, tuple[float, float]]:
    """Source -> (earned in mean keeps, spent in mean trials), faded."""
    judged = [trial for trial in trials if trial.parent is not None]
    gains = gains_of(trials)
    unit = _mean([gain for gain in gains.values() if gain]) or 1.0
    typical_s = _mean([t.cost_s for t in judged if t.cost_s]) or 1.0
    accounts: dict[str, tuple[float, float]] = {}
    for age, trial in enumerate(reversed(judged)):
        earned, spent = accounts.get(trial.proposal.source, (0.0, 0.0))
        cost = max(trial.cost_s / typical_s, LEAST_COST)
        weight = FADE**age
        accounts[trial.proposal.source] = (
            earned + weight * gains.get(trial.number, 0.0) / unit,
            spent + weight * cost,
        )
    return accounts


def gains_of(trials: Sequence[Trial]) -> dict[int, float]:
    """Number of a trial -> what it brought, in bpb: that of a kept trial, and of each that it
    builds on, over what it was put on. Simpler and equal is worth nothing."""
    used = {n for t in trials for n in t.proposal.builds_on}
    used |= {t.number for t in trials if t.decision == "keep" and t.parent is not None}
    brought = [t for t in trials if t.number in used and t.proposal.proves is None]
    return {t.number: max(step_of(t, trials), 0.0) for t in brought}


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
