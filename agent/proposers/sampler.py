"""Changes of a few values near the incumbent, by Optuna's TPE over the declared space.

Nothing is stored: the sampler is built anew from the journal for every proposal. It changes one to
three keys and leaves the others at the incumbent's values, so a keep says what helped. Until it has
STARTUP_TRIALS results it takes a random step near the incumbent, then it asks the TPE
(Bergstra et al. 2011), whose model improves with every trial. Both stay within REACH of the
incumbent: with a dozen results a free TPE mostly proposes the far ends of the range, where nothing
is known; a kept change moves the region.
"""

import math
import random
import warnings
from typing import Any

from agent.journal import Journal, Proposal
from agent.novelty import close, near_values
from agent.proposers import Context, is_valid
from nightshift.fixed.config import flatten

STARTUP_TRIALS = 10
REACH = 0.35  # how far from the incumbent a proposal may be, as a share of the range
STEP = 0.2  # standard deviation of a random step, likewise
NUM_KEYS = (1, 1, 1, 2, 2, 3)  # how many keys change: mostly one, so that a gain has one cause
ATTEMPTS = 200


def propose(context: Context) -> Proposal | None:
    """None when no attempt gives a valid configuration that was not tried from this incumbent."""
    rng = random.Random(f"sampler/{context.seed}/{context.number}")
    incumbent = flatten(context.values)
    tried = _tried(context.journal)
    results = _results(context)
    space = {k: _near(b, incumbent[k]) for k, b in context.space.items() if k in incumbent}
    for _ in range(ATTEMPTS if space else 0):
        keys = rng.sample(sorted(space), min(rng.choice(NUM_KEYS), len(space)))
        values = _values(keys, space, incumbent, results, rng)
        rounded = {k: _rounded(v, context.space[k], incumbent[k]) for k, v in values.items()}
        overrides = {
            key: v for key, v in rounded.items() if not close(v, incumbent[key], context.space[key])
        }
        known = any(near_values(overrides, values, context.space) for values in tried)
        if overrides and not known and is_valid(incumbent | overrides):
            return _proposal(overrides, incumbent, len(results))
    return None


def _values(keys, space, incumbent, results, rng: random.Random) -> dict[str, Any]:
    if len(results) < STARTUP_TRIALS:
        return {key: _random_step(space[key], incumbent[key], rng) for key in keys}
    return _ask_tpe(keys, space, results, rng)


def _near(bounds, value):
    """The bounds around the incumbent's value; the declared ones if it lies outside."""
    if not _contains(bounds, value):
        return bounds
    if bounds.choices:
        place = bounds.choices.index(value)  # choices are in order: the neighbours
        near = bounds.choices[max(0, place - 1) : place + 2]
        return bounds.model_copy(update={"choices": near})
    there, back = _scale(bounds)
    reach = REACH * (there(bounds.high) - there(bounds.low))
    low, high = back(there(value) - reach), back(there(value) + reach)
    return bounds.model_copy(update={"low": max(bounds.low, low), "high": min(bounds.high, high)})


def _scale(bounds):
    """To the scale on which equal steps count equally, and back."""
    return (math.log, math.exp) if bounds.log else (float, float)


def _random_step(bounds, value, rng: random.Random):
    if bounds.choices:
        return rng.choice([choice for choice in bounds.choices if choice != value])
    there, back = _scale(bounds)
    low, high = there(bounds.low), there(bounds.high)
    if not _contains(bounds, value):
        return back(rng.uniform(low, high))
    step = rng.gauss(0, STEP / REACH * (high - low) / 2)
    if not low <= there(value) + step <= high:  # turn back at the wall
        step = -step
    return back(min(max(there(value) + step, low), high))


def _ask_tpe(keys, space, results, rng: random.Random) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(seed=rng.randrange(2**31), n_startup_trials=0)
        study = optuna.create_study(sampler=sampler)
        ranges = {key: _distribution(bounds, optuna) for key, bounds in space.items()}
        for values, score in results:
            inside = {k: values[k] for k in space if k in values and _contains(space[k], values[k])}
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


def _distribution(bounds, optuna):
    if bounds.choices:
        return optuna.distributions.CategoricalDistribution(bounds.choices)
    return optuna.distributions.FloatDistribution(bounds.low, bounds.high, log=bounds.log)


def _contains(bounds, value) -> bool:
    if bounds.choices:
        return value in bounds.choices
    return isinstance(value, int | float) and bounds.low <= value <= bounds.high


def _rounded(value, bounds, incumbent):
    """Two digits on a logarithmic scale, three otherwise; a whole number where it was one."""
    if bounds.choices:
        return value
    if isinstance(incumbent, int):
        return round(value)
    value = float(f"{value:.2g}" if bounds.log else f"{value:.3g}")
    return min(max(value, bounds.low), bounds.high)


def _tried(journal: Journal) -> list[dict[str, Any]]:
    """Override sets that were run from the present incumbent."""
    parent = journal.incumbent.number if journal.incumbent else None
    return [t.proposal.overrides for t in journal.trials if t.parent == parent]


def _results(context: Context) -> list[tuple[dict[str, Any], float]]:
    """(values, score of the first seed) of the baseline and of every trial of values alone.

    The values follow from the lineage: overrides add up from the baseline to a trial.
    """
    values: list[dict[str, Any]] = []
    results = []
    for trial in context.journal.trials:
        before = flatten(context.baseline) if trial.parent is None else values[trial.parent]
        values.append(before | trial.proposal.overrides)
        first_seed = trial.proposal.repeats is None  # a repeat starts with another
        if trial.status == "ok" and trial.proposal.kind != "code" and first_seed:
            results.append((values[-1], trial.runs[0].score))
        elif trial.status == "stopped" and trial.proposal.kind != "code" and first_seed:
            parent = context.journal.trials[trial.parent]  # a loser, by about so much
            results.append((values[-1], parent.score + trial.behind))
    return results


def _proposal(overrides, incumbent, num_results: int) -> Proposal:
    changes = [f"{k.split('.')[-1]} {incumbent[k]} -> {v}" for k, v in overrides.items()]
    how = f"TPE over {num_results} results"
    if num_results < STARTUP_TRIALS:
        how = "a random step near the incumbent"
    return Proposal(
        title=", ".join(changes),
        hypothesis=f"{', '.join(changes)} suits this budget better ({how}).",
        source="sampler",
        overrides=overrides,
    )
