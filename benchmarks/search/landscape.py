"""The surrogate: a Gaussian process through real runs (collect.py), with measured noise.

    val_bpb(point, seed) = level + f(values) + f(recipes) + f(values and recipes) + seed + noise

f(values) has a squared exponential kernel with a length for each key, f(recipes) is linear, the
third is their product (Rasmussen and Williams 2006, ch. 5: hyperparameters by the marginal
likelihood). `seed` is what all points share on a seed; it cancels in pairs. `noise` is a sum over
the changes from the baseline, each with a size of its own (log-uniform within a factor of SPREAD of
what was measured) and, for values, in proportion to the step: so two points differ by the noise of
what differs between them. The same run gives the same number, as on a CPU.

    python benchmarks/search/landscape.py      prints how well it predicts runs that it has not seen
"""

import hashlib
import math
import random
import statistics
from functools import cached_property

import numpy as np
from collect import place
from runs import Point, Runner, Score, Setting
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

STEP, SPREAD = 0.2, 3.0  # a usual step, as a share of the range; of the sizes of noise
WORST = 0.5  # bpb above the baseline: what is further off is as good as lost, and cut to this


class Landscape:
    """`truth(point)`: what many seeds would average to. `landscape(point, seed)`: one run."""

    def __init__(self, setting: Setting, known: dict[tuple[Point, int], Score], parameters=None):
        self.setting = setting
        runs = {
            point: score for (point, seed), score in known.items() if seed == 1 and score.val_bpb
        }
        self.level = runs[Point.of({})].val_bpb
        self.points = list(runs)
        self.x, self.b = self.coded(self.points)
        self.y = np.array([min(s.val_bpb - self.level, WORST) for s in runs.values()])
        self.sigma, self.tau = noise(known)
        self.costs = costs(setting, runs)
        self.memory: dict[Point, float] = {}
        self.parameters = parameters  # of the kernel; None: fitted

    def coded(self, points: list[Point]) -> tuple[np.ndarray, np.ndarray]:
        """Values in [0, 1] (N, K) and recipes as 0 or 1 (N, R)."""
        keys, titles = sorted(self.setting.plan.space), list(self.setting.recipes)
        base = [place(self.setting, key) for key in keys]
        x = np.tile(base, (len(points), 1))
        for row, point in enumerate(points):
            for key, value in point.values:
                x[row, keys.index(key)] = place(self.setting, key, value)
        b = np.array([[title in point.recipes for title in titles] for point in points], float)
        return x, b

    def kernel(self, p: np.ndarray, x, b, x2, b2) -> np.ndarray:
        """p: logarithms of lengths (K), of the three amplitudes and of the noise."""
        lengths = np.exp(p[: x.shape[1]])
        smooth, linear, both = np.exp(2 * p[x.shape[1] : x.shape[1] + 3])
        d = (x / lengths)[:, None, :] - (x2 / lengths)[None, :, :]
        near = np.exp(-0.5 * (d**2).sum(axis=2))
        common = b @ b2.T
        return smooth * near + linear * common + both * near * common + 0.01 * smooth * common**2

    @cached_property
    def fitted(self) -> tuple[np.ndarray, np.ndarray]:
        """The kernel's parameters, and the weights of the points."""
        found = self.fit() if self.parameters is None else self.parameters
        return found, self.solve(found)[1]

    def fit(self) -> np.ndarray:
        keys = self.x.shape[1]
        start = np.array([math.log(0.7)] * keys + [math.log(s) for s in (0.05, 0.01, 0.005, 0.003)])
        bounds = [(math.log(0.1), math.log(20))] * keys + [(math.log(1e-4), math.log(1))] * 4
        options = {"maxiter": 60}
        return minimize(self.loss, start, bounds=bounds, method="L-BFGS-B", options=options).x

    def solve(self, p: np.ndarray) -> tuple:
        gram = self.kernel(p, self.x, self.b, self.x, self.b)
        gram[np.diag_indices_from(gram)] += np.exp(2 * p[-1]) + 1e-8
        factor = cho_factor(gram, lower=True)
        return factor, cho_solve(factor, self.y)

    def loss(self, p: np.ndarray) -> float:
        try:
            factor, weights = self.solve(p)
        except np.linalg.LinAlgError:
            return 1e9
        return float(0.5 * self.y @ weights + np.log(np.diag(factor[0])).sum())

    def truth(self, point: Point) -> float:
        if point not in self.memory:
            p, weights = self.fitted
            x, b = self.coded([point])
            above = (self.kernel(p, x, b, self.x, self.b) @ weights)[0]
            self.memory[point] = self.level + float(min(above, WORST))
        return self.memory[point]

    def __call__(self, point: Point, seed: int) -> Score:
        shared = _normal(f"seed/{seed}") * self.sigma
        return Score(round(self.truth(point) + shared + self.own(point, seed), 6), self.cost(point))

    def own(self, point: Point, seed: int) -> float:
        """What is left of the seed in a difference to the baseline."""
        parts = [self.part(title, seed, 1.0) for title in point.recipes]
        for key, value in point.values:
            step = place(self.setting, key, value) - place(self.setting, key)
            parts.append(self.part(key, seed, step / STEP))
        return sum(parts)

    def part(self, change: str, seed: int, size: float) -> float:
        tau = self.tau * SPREAD ** random.Random(change).uniform(-1, 1)
        return tau * min(max(size, -2.0), 2.0) * _normal(f"{change}/{seed}")

    def cost(self, point: Point) -> float:
        return self.costs[""] * math.prod(self.costs.get(title, 1.0) for title in point.recipes)


class Nothing(Landscape):
    """The same noise and costs; every point is worth what the baseline is."""

    def truth(self, point: Point) -> float:
        return self.level


def noise(known: dict[tuple[Point, int], Score]) -> tuple[float, float]:
    """sigma of a seed; tau that one change brings into a paired difference (median over points)."""
    numbers = {key: score.val_bpb for key, score in known.items()}
    rows = {
        point: [numbers[point, seed] for seed in (1, 2, 3)]
        for point in dict.fromkeys(point for point, _ in numbers)
        if all(numbers.get((point, seed)) for seed in (1, 2, 3))
    }
    sigma = math.sqrt(statistics.mean(statistics.variance(row) for row in rows.values()))
    base = rows.pop(Point.of({}))
    taus = [
        statistics.stdev(a - b for a, b in zip(base, row, strict=True))
        / math.sqrt(len(point.values) + len(point.recipes))
        for point, row in rows.items()
    ]
    return sigma, statistics.median(taus)


def costs(setting: Setting, runs: dict[Point, Score]) -> dict[str, float]:
    """'': CPU seconds of the baseline's run; title -> how many times as much a recipe takes."""
    typical = statistics.median(s.seconds for p, s in runs.items() if not p.recipes)
    alone = {p.recipes[0]: s.seconds for p, s in runs.items() if len(p.recipes) == 1}
    return {"": typical} | {title: max(1.0, seconds / typical) for title, seconds in alone.items()}


def _normal(key: str) -> float:
    return random.Random(hashlib.sha256(key.encode()).digest()).gauss(0, 1)


def report(setting: Setting, known: dict[tuple[Point, int], Score]) -> None:
    """Five-fold: each fifth predicted from the other four."""
    runs = [(p, s) for (p, seed), s in known.items() if seed == 1 and s.val_bpb]
    failed = sum(s.val_bpb is None for s in known.values())
    whole = Landscape(setting, known)
    errors, truths = [], []
    for fold in range(5):
        others = {
            (p, 1): s for i, (p, s) in enumerate(runs) if i % 5 != fold or p == Point.of({})
        } | {key: s for key, s in known.items() if key[1] != 1}
        part = Landscape(setting, others, whole.fitted[0])
        for i, (p, s) in enumerate(runs):
            if i % 5 == fold and p != Point.of({}):
                truths.append(min(s.val_bpb, whole.level + WORST))
                errors.append(part.truth(p) - truths[-1])
    spread = statistics.pstdev(truths)
    off = math.sqrt(statistics.mean(e * e for e in errors))
    near = [abs(e) for e, t in zip(errors, truths, strict=True) if t < whole.level + 0.03]
    print(
        f"{len(runs)} points on seed 1 ({len(known)} runs, {failed} failed); baseline "
        f"{whole.level:.4f}, best {min(truths):.4f}, spread {spread:.4f}\n"
        f"unseen points: R2 {1 - (off / spread) ** 2:.3f}, error {off:.4f}; within 0.03 of "
        f"the baseline {statistics.median(near):.4f} (median)\n"
        f"sigma of a seed {whole.sigma:.4f}, of one change in a pair {whole.tau:.4f}; "
        f"{whole.costs['']:.2f} s a run"
    )


if __name__ == "__main__":
    setting = Setting()
    with Runner(setting) as runner:
        known = dict(runner.known)
    report(setting, known)
