"""A short run before the first whole one: with a share of the budget, so with the whole schedule.

The trial and its parent run on the first seed with study.ladder of the budget; the parent once, for
the journal remembers. A trial that is further behind there than any earlier one with hope ever was
ends. Limit, stated false-stop rate (study.early_stop) and checks are those of early.py, with the
short run's difference in bpb in place of the curve's: until there is enough history the short runs
are paid for nothing. What ends a trial early, curve or short run, shares one count of checks, and
one that is checked is left alone to its end.

A short run that fails says nothing: the whole run tells. Nothing here can keep a trial, for its
numbers stand apart from those of whole runs (Trial.rung). A repeat has no short run: the state that
it repeats had one, or was worth none.
"""

from agent.early import Limit, Past
from agent.journal import Journal
from nightshift.fixed.config import Config


def shortened(config: Config, share: float) -> Config:
    """The same run with a share of its budget, and without samples."""
    budget = {"amount": share * config.budget.amount}
    changes = {
        "budget": config.budget.model_copy(update=budget),
        "evaluate": config.evaluate.model_copy(update={"sample_prompts": []}),
    }
    return config.model_copy(update=changes)


def history_of(journal: Journal, share: float) -> list[Past]:
    """Of each trial with a short run of this share whose first whole run has a pair."""
    return [
        Past((trial.rung.behind,), trial.differences[0])
        for trial in journal.trials
        if trial.rung and trial.rung.share == share
        if trial.rung.behind is not None and trial.differences
    ]


def why(behind: float, share: float, known: Limit) -> str:
    return (
        f"short run: with {share:.0%} of the budget it was {behind:.4f} behind its parent; none of "
        f"{known.trials} earlier trials that were worth another seed was behind by more than "
        f"{known.behind:.4f} (false stops: {known.rate:.1%} of such trials)"
    )
