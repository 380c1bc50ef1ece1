"""Shares the trials out among the proposers, as evenly as whole trials allow."""

from agent.journal import Proposal
from agent.proposers import Context, recipes, sampler

PROPOSERS = {
    "sampler": sampler.propose,
    "recipes": recipes.propose,
    "llm": lambda context: context.researcher.propose(context),  # imported only where it is used
}
FALLBACK = ("sampler", "recipes")  # need nothing, so they go on where the model alone was asked


def propose(context: Context) -> Proposal | None:
    """From the source whose turn it is; from the next one when that has nothing to propose."""
    turn = source_of(context.number, context.sources)
    others = [name for name, share in context.sources.items() if share and name != turn]
    if context.researcher:
        others += [name for name in FALLBACK if name not in (turn, *others)]
    for name in [turn, *others]:
        if proposal := PROPOSERS[name](context):
            if context.researcher:
                context.researcher.sign(context.number, proposal)
            return proposal
    return None


def source_of(number: int, sources: dict[str, float]) -> str:
    """Whose turn trial `number` (1, 2, ...) is: each gets credit by its share, the richest pays."""
    total, credit = sum(sources.values()), dict.fromkeys(sources, 0.0)
    turn = ""
    for _ in range(number):
        for name, share in sources.items():
            credit[name] += share / total
        turn = max(credit, key=lambda name: round(credit[name], 9))  # ties: the first named
        credit[turn] -= 1
    return turn
