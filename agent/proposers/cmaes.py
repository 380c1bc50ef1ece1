"""All numeric values at once, by CMA-ES (Hansen and Ostermeier 2001) through Optuna.

Where the sampler changes few values, this moves every numeric key of conf/space together, along
directions that it learns. It begins where the study is: mean and covariance of its first generation
are those of the best results of all other sources, and of earlier studies (warm start: Nomura et
al. 2021, AAAI 35:9188). Its own results are told to it in generations of POPULATION.

Nothing is stored: optimizer and generations are told anew from the journal for every proposal. What
runs is what was drawn, rounded; that is also what the optimizer is told.
"""

import math
import random
from typing import Any

from agent.journal import Proposal
from agent.novelty import close
from agent.proposers import Context, is_valid
from agent.proposers.history import Result, Tried, results
from agent.proposers.ranges import contains, distribution, named, quiet_optuna, rounded
from nightshift.fixed.config import flatten

SOURCE = "cmaes"
POPULATION = 6  # trials of a generation: a study has some dozens of them at most
MIN_SOURCE = 10  # Optuna begins from the best tenth; fewer results are given several times
ATTEMPTS = 20


def propose(context: Context) -> Proposal | None:
    """None where fewer than two keys are numeric, and before there is a result inside the space."""
    before = flatten(context.values)
    space = {k: b for k, b in context.space.items() if k in before and not b.choices}
    known = [r for r in results(context) if is_inside(r, space)]
    own = [r for r in known if r.source == SOURCE]
    others = [r for r in known if r.source != SOURCE]
    if len(space) < 2 or not others:
        return None
    rng, tried = random.Random(f"cmaes/{context.seed}/{context.number}"), Tried(context)
    for _ in range(ATTEMPTS):
        drawn = ask(space, others, own, rng.randrange(2**31))
        values = {key: rounded(v, space[key], before[key]) for key, v in drawn.items()}
        overrides = {k: v for k, v in values.items() if not close(v, before[k], space[k])}
        proposal = _proposal(overrides, before, len(own) // POPULATION, len(others))
        if overrides and proposal not in tried and is_valid(before | overrides):
            return proposal
    return None


def is_inside(result: Result, space: dict[str, Any]) -> bool:
    return all(key in result.values and contains(space[key], result.values[key]) for key in space)


def ask(space, others: list[Result], own: list[Result], seed: int) -> dict[str, float]:
    """The next draw, after `own` were told in their order."""
    with quiet_optuna() as optuna:
        ranges = {key: distribution(bounds, optuna) for key, bounds in space.items()}

        def trial_of(result: Result, notes: dict[str, Any] | None = None):
            params = {key: float(result.values[key]) for key in space}
            return optuna.create_trial(
                params=params, distributions=ranges, value=result.score, system_attrs=notes
            )

        source = [trial_of(r) for r in others] * math.ceil(MIN_SOURCE / len(others))
        sampler = optuna.samplers.CmaEsSampler(
            seed=seed, popsize=POPULATION, source_trials=source, n_startup_trials=0
        )
        study = optuna.create_study(sampler=sampler)
        study.add_trial(source[0])  # of no generation, so it is not told: it declares the space
        for result in own:  # asked anew; the sampler's notes go to what ran
            asked = study.ask(ranges)
            notes = study.get_trials(deepcopy=False)[-1].system_attrs
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
            study.add_trial(trial_of(result, notes))
        return study.ask(ranges).params


def _proposal(overrides, before, generation: int, num_others: int) -> Proposal:
    return Proposal(
        title=named(overrides, before),
        hypothesis=(
            f"These values suit this budget better together (CMA-ES, generation {generation}, "
            f"begun from {num_others} results of others)."
        ),
        source=SOURCE,
        overrides=overrides,
    )
