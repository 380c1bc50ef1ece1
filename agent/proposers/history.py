"""What a study has tried and what came of it, for proposers of values.

A **state** is what a trial ran: its values, and its code as the edits since the baseline. An edit
and its reverse cancel, so a branch that takes the newest change out is where its parent was.

A **result** is a trial of values with its score, centred: less the baseline's score on the first
seed, and less what kept code brought before it. So numbers before and after a change of code
compare, and those of an earlier study (Context.memory) do, whose level is another: what is taken
over is how its values ranked about its own baseline. That is prior information, not a measurement;
a larger budget may move the best values, and the own results outvote it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from agent.journal import Edit, Proposal, Trial, base_of, step_of
from agent.novelty import near_values
from agent.proposers import Context
from nightshift.fixed.config import flatten


class State(NamedTuple):
    values: dict[str, Any]  # flat
    code: list[Edit]  # since the baseline, in order


class Result(NamedTuple):
    values: dict[str, Any]  # flat
    score: float  # centred; lower is better
    source: str  # of the trial; "memory" for one of an earlier study


def states(trials: Sequence[Trial], baseline: dict[str, Any]) -> list[State]:
    """One a trial. `baseline`: flat values. They follow from the lineage, failures included."""
    found: list[State] = []
    for trial in trials:
        before = State(baseline, []) if trial.parent is None else found[trial.parent]
        found.append(after(before, trial.proposal))
    return found


def after(state: State, proposal: Proposal) -> State:
    code = list(state.code)
    for edit in proposal.edits:
        if code and code[-1] == Edit(path=edit.path, search=edit.replace, replace=edit.search):
            code.pop()
        else:
            code.append(edit)
    return State(state.values | proposal.overrides, code)


class Tried:
    """Was a change of the incumbent run before, by whatever way it came about?"""

    def __init__(self, context: Context):
        trials = context.journal.trials
        self.context, known = context, states(trials, flatten(context.baseline))
        incumbent = context.journal.incumbent
        self.here = known[incumbent.number] if incumbent else State({}, [])
        self.known = known

    def __contains__(self, proposal: Proposal) -> bool:
        """`proposal`: made on the context's stem, if it has one."""
        whole = self.context.off(proposal)
        if whole is None:
            return True  # it takes the stem back
        state = after(self.here, whole)
        return any(
            known.code == state.code and near_values(known.values, state.values, self.context.space)
            for known in self.known
        )


def results(context: Context) -> list[Result]:
    """Of earlier studies first, then of this one, as they came."""
    own = _results(context.journal.trials, flatten(context.baseline))
    found: list[Result] = []
    for trials in _studies(context.memory):
        baseline = trials[0].changed or {}
        if trials[0].target == context.target.name and context.space.keys() <= baseline.keys():
            found += [r._replace(source="memory") for r in _results(trials, baseline)]
    return found + own


def _studies(memory: Iterable[Trial]) -> list[list[Trial]]:
    """A baseline begins each."""
    studies: list[list[Trial]] = []
    for trial in memory:
        if trial.parent is None:
            studies.append([])
        if studies:
            studies[-1].append(trial)
    return studies


def _results(trials: Sequence[Trial], baseline: dict[str, Any]) -> list[Result]:
    """A change of code says nothing of values; what another trial ran too says nothing new."""
    found, brought = [], []  # brought: by code, up to and with each trial
    for trial, state in zip(trials, states(trials, baseline), strict=True):
        gained, is_code = 0.0, False
        if trial.parent is not None:
            base = base_of(trial, trials)
            gained = brought[base.number if base else trial.parent]
            is_code = len(trial.proposal.edits) > (len(base.proposal.edits) if base else 0)
        brought.append(gained + (step_of(trial, trials) if is_code else 0.0))
        if is_code or trial.proposal.runs_again:
            continue
        if trial.status == "ok":
            score = trial.runs[0].score - trials[0].runs[0].score + gained
        elif trial.status == "stopped":  # a loser, by so much
            score = trials[trial.parent].score + trial.behind - trials[0].score + gained
        else:
            continue
        found.append(Result(state.values, score, trial.proposal.source))
    return found
