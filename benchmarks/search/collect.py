"""Real runs of random points, for the surrogate (landscape.py).

    python benchmarks/search/collect.py [runs=360]

First each recipe alone. Then half the points near the baseline (one to three values, up to two
recipes), half anywhere (any number of values, from all of their range, and of recipes). All on seed
1; every eighth on seeds 2 and 3 too, for the noise. An interrupted collection goes on.
"""

import math
import random
import sys

from runs import Point, Runner, Setting
from tqdm import tqdm


def points(setting: Setting, count: int) -> list[Point]:
    rng = random.Random("collect")
    found = [Point.of({}), *(Point.of({}, [title]) for title in setting.recipes)]
    while len(found) < count:
        near = rng.random() < 0.5
        point = near_point(setting, rng) if near else any_point(setting, rng)
        if setting.texts(point.recipes) is not None and point not in found:
            found.append(point)
    return found


def near_point(setting: Setting, rng: random.Random) -> Point:
    keys = rng.sample(sorted(setting.plan.space), rng.choice((0, 1, 1, 2, 3)))
    values = {key: step(setting, key, rng) for key in keys}
    return Point.of(values, rng.sample(list(setting.recipes), rng.choice((0, 0, 1, 2))))


def any_point(setting: Setting, rng: random.Random) -> Point:
    share, share_of_recipes = rng.random(), 0.4 * rng.random()
    keys = [key for key in sorted(setting.plan.space) if rng.random() < share]
    recipes = [title for title in setting.recipes if rng.random() < share_of_recipes]
    rng.shuffle(recipes)
    return Point.of({key: anywhere(setting, key, rng.random()) for key in keys}, recipes)


def step(setting: Setting, key: str, rng: random.Random) -> float:
    return anywhere(setting, key, min(max(place(setting, key) + rng.gauss(0, 0.2), 0.0), 1.0))


def place(setting: Setting, key: str, value: float | None = None) -> float:
    """Where a value (the baseline's) lies in its range, from 0 to 1, on its scale."""
    bounds, value = setting.plan.space[key], setting.baseline[key] if value is None else value
    low, high = bounds.low, bounds.high
    if bounds.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def anywhere(setting: Setting, key: str, share: float) -> float:
    bounds = setting.plan.space[key]
    if bounds.log:
        value = math.exp(math.log(bounds.low) + share * math.log(bounds.high / bounds.low))
    else:
        value = bounds.low + share * (bounds.high - bounds.low)
    return min(max(float(f"{value:.3g}"), bounds.low), bounds.high)


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    setting = Setting()
    with Runner(setting) as run:
        for number, point in enumerate(tqdm(points(setting, int(given.get("runs", 360))))):
            for seed in (1, 2, 3) if number % 8 == 0 else (1,):
                run(point, seed)


if __name__ == "__main__":
    main()
