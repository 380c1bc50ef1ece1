"""Changes of values near the incumbent, by Optuna's TPE and GP samplers over the declared space.

Nothing is stored: a sampler is built anew from the journal for every proposal. Until there are
STARTUP_TRIALS results it is a random step near the incumbent. Then GP_SHARE of the proposals, if
as many results lie near, ask a Gaussian process for the largest improvement to expect, of all keys
at once; the others ask the TPE (Bergstra et al. 2011) for one to three keys and leave the rest, so
that a gain has one cause. All stay within REACH of the incumbent: with a dozen results a free
sampler mostly proposes the far ends of the range, where nothing is known; a kept change moves the
region. On a plateau (strategy.py) it takes wide steps: over the
whole range. Results of an earlier study (study.after) are results, centred (history.py).
"""

import random
from typing import Any

from agent.journal import Proposal
from agent.novelty import close
from agent.proposers import Context, is_valid
from agent.proposers.history import Tried, results
from agent.proposers.ranges import contains, distribution, named, quiet_optuna, rounded, scale
from nightshift.fixed.config import flatten

STARTUP_TRIALS = 10
REACH = 0.35  # how far from the incumbent a proposal may be, as a share of the range
STEP = 0.2  # standard deviation of a random step, likewise
NUM_KEYS = (1, 1, 1, 2, 2, 3)  # how many keys change: mostly one, so that a gain has one cause
GP_SHARE = 0.5  # of the proposals once there are results
GP_RESULTS = 150  # the newest: the cost grows with their cube
ATTEMPTS = 200


def propose(context: Context) -> Proposal | None:
    """None when no attempt gives a valid configuration that was not tried before."""
    rng = random.Random(f"sampler/{context.seed}/{context.number}")
    before = flatten(context.values)
    tried, known = Tried(context), [(r.values, r.score) for r in results(context)]
    space = {k: _near(b, before[k], context.wide) for k, b in context.space.items() if k in before}
    near = [result for result in known if is_inside(result[0], space)][-GP_RESULTS:]
    for _ in range(ATTEMPTS if space else 0):
        keys = rng.sample(sorted(space), min(rng.choice(NUM_KEYS), len(space)))
        if len(known) < STARTUP_TRIALS:
            where = "over the range" if context.wide else "near the incumbent"
            how = f"a random step {where}"
            values = {k: _random_step(space[k], before[k], rng, context.wide) for k in keys}
        elif len(near) >= STARTUP_TRIALS and rng.random() < GP_SHARE:
            how, values = f"Gaussian process over {len(near)} results", _ask_gp(space, near, rng)
        else:
            how, values = f"TPE over {len(known)} results", _ask_tpe(keys, space, known, rng)
        values = {key: rounded(v, context.space[key], before[key]) for key, v in values.items()}
        overrides = {k: v for k, v in values.items() if not close(v, before[k], context.space[k])}
        proposal = _proposal(overrides, before, how)
        if overrides and proposal not in tried and is_valid(before | overrides):
            return proposal
    return None


def _near(bounds, value, wide: bool):
    """The bounds around the incumbent's value; the declared ones if it lies outside."""
    if wide or not contains(bounds, value):
        return bounds
    if bounds.choices:
        place = bounds.choices.index(value)  # choices are in order: the neighbours
        near = bounds.choices[max(0, place - 1) : place + 2]
        return bounds.model_copy(update={"choices": near})
    there, back = scale(bounds)
    reach = REACH * (there(bounds.high) - there(bounds.low))
    low, high = back(there(value) - reach), back(there(value) + reach)
    return bounds.model_copy(update={"low": max(bounds.low, low), "high": min(bounds.high, high)})


def _random_step(bounds, value, rng: random.Random, wide: bool):
    if bounds.choices:
        return rng.choice([choice for choice in bounds.choices if choice != value])
    there, back = scale(bounds)
    low, high = there(bounds.low), there(bounds.high)
    if wide or not contains(bounds, value):
        return back(rng.uniform(low, high))
    step = rng.gauss(0, STEP / REACH * (high - low) / 2)
    if not low <= there(value) + step <= high:  # turn back at the wall
        step = -step
    return back(min(max(there(value) + step, low), high))


def is_inside(values: dict[str, Any], space) -> bool:
    return all(key in values and contains(space[key], values[key]) for key in space)


def _ask_gp(space, known, rng: random.Random) -> dict[str, Any]:
    """All keys at once, where the improvement to expect is largest."""
    with quiet_optuna() as optuna:
        sampler = optuna.samplers.GPSampler(seed=rng.randrange(2**31), n_startup_trials=0)
        study = optuna.create_study(sampler=sampler)
        ranges = {key: distribution(bounds, optuna) for key, bounds in space.items()}
        for values, score in known:
            params = {key: values[key] for key in space}
            study.add_trial(optuna.create_trial(params=params, distributions=ranges, value=score))
        trial = study.ask()
        return {key: _suggest(trial, key, space[key]) for key in space}


def _ask_tpe(keys, space, known, rng: random.Random) -> dict[str, Any]:
    with quiet_optuna() as optuna:
        sampler = optuna.samplers.TPESampler(seed=rng.randrange(2**31), n_startup_trials=0)
        study = optuna.create_study(sampler=sampler)
        ranges = {key: distribution(bounds, optuna) for key, bounds in space.items()}
        for values, score in known:
            inside = {k: values[k] for k in space if k in values and contains(space[k], values[k])}
            study.add_trial(
                optuna.create_trial(
                    params=inside, distributions={k: ranges[k] for k in inside}, value=score
                )
            )
        trial = study.ask()
        return {key: _suggest(trial, key, space[key]) for key in keys}


def _suggest(trial, key, bounds):
    if bounds.choices:
        return trial.suggest_categorical(key, bounds.choices)
    return trial.suggest_float(key, bounds.low, bounds.high, log=bounds.log)


def _proposal(overrides, before, how: str) -> Proposal:
    what = named(overrides, before)
    return Proposal(
        title=what,
        hypothesis=f"{what} suits this budget better ({how}).",
        source="sampler",
        overrides=overrides,
    )
