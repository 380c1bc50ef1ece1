"""Changes of a few values near the incumbent, by Optuna's TPE over the declared space.

Nothing is stored: the sampler is built anew from the journal for every proposal. It changes one to
three keys and leaves the others at the incumbent's values, so a keep says what helped. Until it has
STARTUP_TRIALS results it takes a random step near the incumbent, then it asks the TPE
(Bergstra et al. 2011), whose model improves with every trial. Both stay within REACH of the
incumbent: with a dozen results a free TPE mostly proposes the far ends of the range, where nothing
is known; a kept change moves the region. On a plateau (strategy.py) it takes wide steps: over the
whole range. Results of an earlier study (study.after) are results, centred (history.py).
"""

import random
from typing import Any

from agent.journal import Proposal
from agent.novelty import close
from agent.proposers import Context, is_valid
from agent.proposers.history import Tried, results
from agent.proposers.ranges import changes, contains, distribution, quiet_optuna, rounded, scale
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
    for _ in range(ATTEMPTS if space else 0):
        keys = rng.sample(sorted(space), min(rng.choice(NUM_KEYS), len(space)))
        values = _values(keys, space, before, known, rng, context.wide)
        values = {key: rounded(v, context.space[key], before[key]) for key, v in values.items()}
        overrides = {k: v for k, v in values.items() if not close(v, before[k], context.space[k])}
        proposal = _proposal(overrides, before, len(known), context.wide)
        if overrides and proposal not in tried and is_valid(before | overrides):
            return proposal
    return None


def _values(keys, space, before, known, rng: random.Random, wide: bool) -> dict[str, Any]:
    if len(known) < STARTUP_TRIALS:
        return {key: _random_step(space[key], before[key], rng, wide) for key in keys}
    whole = [(values, score) for values, score in known if is_inside(values, space)]
    if len(whole) >= STARTUP_TRIALS and rng.random() < GP_SHARE:
        return _ask_gp(space, whole[-GP_RESULTS:], rng)
    return _ask_tpe(keys, space, known, rng)


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


def _proposal(overrides, before, num_results: int, wide: bool) -> Proposal:
    what = ", ".join(changes(overrides, before))
    how = f"TPE over {num_results} results"
    if num_results < STARTUP_TRIALS:
        how = "a random step over the range" if wide else "a random step near the incumbent"
    return Proposal(
        title=what,
        hypothesis=f"{what} suits this budget better ({how}).",
        source="sampler",
        overrides=overrides,
    )
