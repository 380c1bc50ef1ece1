"""Keep, discard or run another seed: from numbers alone. Pure: no files, no clock, no chance.

What is judged are paired differences: the parent's number minus the trial's on the same seed, so
that what both owe to the seed cancels. They are modelled as normal with mean theta (the gain) and
standard deviation tau, which is unknown and differs from change to change.

**Noise.** tau has a discrete prior on a grid from 0.01 to 100 sigmas of a seed: log-normal about
TYPICAL, for in 82 real short runs of one to twenty changes it was 0.1 to 0.7 (independent seeds
would give 1.4), and a share ANY of it flat, for a sigma that three lucky seeds made far too small.
It is learned from the scatter of every earlier trial with two pairs or more: first over all, then
for config and for code changes apart, each level shrunk to the one above (empirical Bayes, Robbins
1956; weights by EM with pseudo-counts). Some of the first prior always stays: the next change may
scatter more than all before it.

**Keep.** The evidence is an e-value: the likelihood of the differences given a gain over that given
none, tau integrated out in both. Half of it is for a gain of SOUGHT tau (Rushton 1950, Biometrika
37:326), half for one of any size. If there is no gain it is a nonnegative martingale that starts at
1, so the chance that it ever reaches 1/a is at most a, however often one looks and whatever made
one go on (Ville 1939; Grunwald, de Heide and Koolen 2024, JRSS B 86:1091). A group-sequential
boundary would save a seed, but it fixes the looks in advance, and a study is stopped, resumed and
extended. The n-th trial may spend the share a_n = false_keeps K / ((n + K)(n + K - 1)) of the error
budget. All shares, without end, sum to `false_keeps`, so that bounds the expected number of false
keeps of a study, whether trials depend on each other or not (they share the incumbent's runs). The
bound is as good as the prior of tau; benchmarks/decide_simulation.py also breaks that on purpose.

**Discard.** A trial goes on only while the evidence could still suffice if the gain were OPTIMISM
standard errors better than it looks and held on all seeds up to the cap (stochastic curtailment:
Lan, Simon and Halperin 1982, Commun. Stat. C 1:207). One that lost LOSER sigmas of a seed ends at
once in any case: with independent seeds (tau of 1.4 sigmas) a change that gains nothing at all does
so once in sixty.

**The same weights.** A run that ends with the parent's weights and number is the parent's
computation under another text. One pair settles that, and it says nothing of the noise.

**Simplicity.** A trial that removes more lines than it adds is also kept if its loss is below
`equal_within` sigmas of a seed with 95 % posterior probability. That is no claim of a gain.

**Honest gain.** `estimate` is the posterior mean of theta and `low` to `high` its 95 % interval
(Z_INTERVAL standard deviations), under a symmetric prior: normal, its scale uniform in the
logarithm. Weak gains are shrunk, strong ones hardly; that undoes what selection adds (Efron 2011,
JASA 106:1602).
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from agent.journal import Run, Trial

RATIOS = np.geomspace(0.01, 100.0, 40)  # tau over sigma of a seed, see above
TYPICAL, SPREAD = 0.3, 0.9  # of tau / sigma: geometric mean, standard deviation of the logarithm
ANY = 0.02  # share of the prior that is flat over RATIOS
GAIN_RATIOS = np.geomspace(0.05, 1000.0, 10)  # scale of a gain over sigma of a seed
RESOLUTION = 1e-6  # scores have six digits
PSEUDO_TRIALS = 2.0  # weight of the prior against the trials seen, at each level
EM_ROUNDS = 10
HALF_SPENT_AFTER = 100  # K: trials after which half of the error budget is spent
EQUAL_PROBABILITY = 0.95
Z_INTERVAL = 2.15  # covers 96.5 % of kept gains in simulation; tails are heavy
SOUGHT = 3.0  # a gain of so many tau is what the evidence is sharpest for
OPTIMISM = 1.25  # standard errors that a gain may be better than it looks
LOSER = 3.0  # sigmas of a seed that a change may lose and still get another seed
FAR = 64.0  # tau: a gain beyond that is not waited for
AHEAD = "ahead, proof is for later"  # begins the reason of what waits for a proof
DRIFT_TAUS = 4.0  # a repeated run may move by so many before old numbers are given up


class Noise(NamedTuple):
    """How much the number moves with the seed alone."""

    sigma: float | None  # None: nothing was repeated yet
    df: int  # degrees of freedom: repeated runs minus groups


class Scatter(NamedTuple):
    """What one trial says about tau: the squares of its differences about their own mean."""

    kind: str  # config | code
    sum_squares: float
    df: int


class Rule(NamedTuple):
    """What the study asks for (conf/study.yaml)."""

    false_keeps: float  # expected number of them in the whole study, at most
    equal_within: float  # sigmas of a seed that a shorter trial may lose
    min_seeds: int  # to be kept
    max_seeds: int  # that a trial may run


class Bar(NamedTuple):
    """What one trial has to pass, fixed before its first run."""

    rule: Rule
    sigma: float  # of a seed
    taus: np.ndarray  # the grid, (G,)
    weights: np.ndarray  # probability of each for this kind of change, (G,)
    level: float  # a_n, this trial's share of the error budget
    least: float = -math.inf  # the first difference of what it was put on: not better, it ends
    prove_from: float = -math.inf  # the first difference for which a proof is sought, not less

    @property
    def margin(self) -> float:
        """bpb that a shorter trial may lose."""
        return self.rule.equal_within * self.sigma


class Evidence(NamedTuple):
    log_e: float  # natural logarithm of the e-value for a gain
    estimate: float  # posterior mean of the gain
    sd: float  # posterior standard deviation
    tau: float  # typical (geometric mean) noise of a difference
    not_worse: float  # posterior probability that the loss is below the margin


class Decision(NamedTuple):
    kind: str  # keep | discard | more
    reason: str
    gain: float | None = None  # mean difference; > 0 is better
    estimate: float | None = None  # what is left of it after shrinkage
    low: float | None = None
    high: float | None = None
    evidence: float | None = None  # e-value, at most 1e9


# ---- noise ----


def measure_noise(groups: Sequence[Sequence[float]]) -> Noise:
    """Pooled standard deviation: squares about each group's own mean over degrees of freedom."""
    scatters = [scatter_of("", group) for group in groups]
    df = sum(scatter.df for scatter in scatters)
    squares = sum(scatter.sum_squares for scatter in scatters)
    return Noise(math.sqrt(squares / df) if df else None, df)


def repeated(trials: Sequence[Trial]) -> list[list[float]]:
    """Groups of scores that differ only in their seed: the baseline's and each kept trial's, with
    what they ran for their children. A discarded trial may scatter for reasons of its own."""
    groups: dict[int, list[Run]] = {t.number: list(t.runs) for t in trials if t.decision == "keep"}
    for trial in trials:
        if trial.parent in groups:
            before = [] if trial.drifted else groups[trial.parent]
            groups[trial.parent] = before + trial.parent_runs
    numbers = [[run.score for run in runs if run.status == "ok"] for runs in groups.values()]
    return [group for group in numbers if len(group) > 1]


def scatter_of(kind: str, numbers: Sequence[float]) -> Scatter:
    mean = sum(numbers) / len(numbers) if numbers else 0.0
    return Scatter(kind, sum((x - mean) ** 2 for x in numbers), max(0, len(numbers) - 1))


def scatters_of(trials: Sequence[Trial]) -> list[Scatter]:
    """Of every trial with a pair, but for those that gave the parent's own weights."""
    judged = [t for t in tested(trials) if any(t.differences)]
    return [scatter_of(t.proposal.kind, t.differences) for t in judged]


def learn_taus(sigma: float, scatters: Iterable[Scatter], kind: str) -> tuple:
    """The grid of tau and its weights for a change of this kind: (G,), (G,)."""
    taus = sigma * RATIOS
    seen = [scatter for scatter in scatters if scatter.df]
    overall = _learn(prior_of_taus(), _likelihoods(taus, seen))
    return taus, _learn(overall, _likelihoods(taus, [s for s in seen if s.kind == kind]))


def prior_of_taus() -> np.ndarray:
    """Weights of RATIOS before a study has seen a pair: (G,)."""
    usual = np.exp(-0.5 * (np.log(RATIOS / TYPICAL) / SPREAD) ** 2)
    return (1 - ANY) * usual / usual.sum() + ANY / len(RATIOS)


def _likelihoods(taus: np.ndarray, scatters: Sequence[Scatter]) -> np.ndarray:
    """(trials, G), each row scaled to a maximum of 1."""
    squares = np.array([s.sum_squares for s in scatters]).reshape(-1, 1)
    df = np.array([s.df for s in scatters]).reshape(-1, 1)
    logs = -df * np.log(taus) - squares / (2 * taus**2)
    return np.exp(logs - logs.max(axis=1, keepdims=True))


def _learn(prior: np.ndarray, likelihoods: np.ndarray) -> np.ndarray:
    weights = prior
    for _ in range(EM_ROUNDS if len(likelihoods) else 0):
        shares = likelihoods * weights
        shares /= shares.sum(axis=1, keepdims=True)
        weights = PSEUDO_TRIALS * prior + shares.sum(axis=0)
        weights /= weights.sum()
    return weights


# ---- the bar ----


def level_of(rank: int, false_keeps: float) -> float:
    """The share of the error budget for the rank-th trial, rank = 1, 2, ...; all sum to it."""
    k = HALF_SPENT_AFTER
    return false_keeps * k / ((rank + k) * (rank + k - 1))


def tested(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that spent of the error budget: those with a run to compare."""
    return [t for t in trials if t.parent is not None and any(r.status == "ok" for r in t.runs)]


def spent(trials: Sequence[Trial], false_keeps: float) -> float:
    """The false keeps to expect in these trials, at most."""
    return sum(level_of(rank, false_keeps) for rank in range(1, 1 + len(tested(trials))))


def bar_for(trials: Sequence[Trial], kind: str, rule: Rule, rank: int | None = None) -> Bar:
    """The bar for the next trial, of this kind of change, after these. `rank`: whose share of the
    error budget it has, if not its own."""
    sigma = measure_noise(repeated(trials)).sigma
    return set_bar(sigma, scatters_of(trials), kind, rank or len(tested(trials)) + 1, rule)


def set_bar(
    sigma: float | None, scatters: Iterable[Scatter], kind: str, rank: int, rule: Rule
) -> Bar:
    """`rank`: 1 for the first trial that is tested, 2 for the second, ..."""
    sigma = max(sigma or 0.0, RESOLUTION)
    taus, weights = learn_taus(sigma, scatters, kind)
    return Bar(rule, sigma, taus, weights, level_of(rank, rule.false_keeps))


# ---- one trial ----


def pair(parent_runs: dict[int, Run], runs: Sequence[Run]) -> list[float]:
    """The differences, in the order of `runs`, on the seeds on which both are ok."""
    return [
        parent_runs[run.seed].score - run.score
        for run in runs
        if run.status == "ok" and run.seed in parent_runs and parent_runs[run.seed].status == "ok"
    ]


def is_same(parent_runs: dict[int, Run], runs: Sequence[Run]) -> bool:
    """Did a run give the weights and the score that the parent has on its seed?"""
    for run in runs:
        parent = parent_runs.get(run.seed)
        weights = run.weights_sha256
        if parent and weights and weights == parent.weights_sha256 and run.score == parent.score:
            return True
    return False


def next_seed(
    runs: Sequence[Run], seeds: Sequence[int], unusable: Collection[int] = ()
) -> int | None:
    """The first seed without a run; None after a failed run or when no seed is left."""
    if any(run.status != "ok" for run in runs):
        return None
    done = {run.seed for run in runs} | set(unusable)
    return next((seed for seed in seeds if seed not in done), None)


def decide(
    differences: Sequence[float], bar: Bar, shorter: bool = False, same: bool = False
) -> Decision:
    """Keep, discard or more, of a trial all of whose runs are ok. `shorter`: lines were removed.
    `same`: a run gave the parent's weights."""
    n = len(differences)
    if n == 0:
        return Decision("more", "no pair of runs yet")
    if same and not shorter:
        reason = "it computes what the incumbent computes: the same weights on the same seed"
        return Decision("discard", reason, 0.0, 0.0, 0.0, 0.0)
    seen = weigh(differences, bar)
    gain, log_needed = sum(differences) / n, -math.log(bar.level)
    if n >= bar.rule.min_seeds and seen.log_e >= log_needed:
        return _decision("keep", "better", gain, n, seen, bar)
    if n >= bar.rule.min_seeds and shorter and seen.not_worse >= EQUAL_PROBABILITY:
        return _decision("keep", "equal within noise, and shorter", gain, n, seen, bar)
    behind = n == 1 and gain <= bar.least
    lost = gain < -LOSER * bar.sigma or behind
    waits = n == 1 and gain < bar.prove_from
    provable = can_reach(seen, bar) or seen.log_e >= log_needed
    better_yet = not lost and not waits and provable
    equal_yet = shorter and not lost and not waits and seen.estimate + seen.sd > -bar.margin
    if n < bar.rule.max_seeds and (better_yet or equal_yet):
        return _decision("more", "undecided", gain, n, seen, bar)
    what = "not better than the incumbent" if gain <= 0 else "not shown to be better"
    if gain > 0 and behind:
        what = f"no better than what it builds on ({bar.least:+.4f})"
    elif gain > 0 and waits and provable:
        what = AHEAD
    return _decision("discard", what, gain, n, seen, bar)


def has_drifted(change: float, bar: Bar) -> bool:
    """Did the same run, made again, move by more than pairs made at different times scatter?"""
    return abs(change) > DRIFT_TAUS * typical_tau(bar)


def weigh(differences: Sequence[float], bar: Bar) -> Evidence:
    """Sums over tau (rows) and the scale of the gain (columns)."""
    n, (_, squares, _) = len(differences), scatter_of("", differences)
    mean = sum(differences) / n
    tau = bar.taus[:, None]
    log_ratio, center, sd = _posteriors(n, mean, tau, bar.sigma)
    log_null = np.log(bar.weights) - n * np.log(bar.taus)
    log_null -= (squares + n * mean**2) / (2 * bar.taus**2)
    joint = log_null[:, None] + log_ratio
    share = np.exp(joint - joint.max())
    share /= share.sum()
    estimate = (share * center).sum()
    return Evidence(
        log_e=_log_sum(log_null + _log_gain(n, mean, bar.taus, bar.sigma)) - _log_sum(log_null),
        estimate=float(estimate),
        sd=math.sqrt((share * (sd**2 + (center - estimate) ** 2)).sum()),
        tau=math.exp((share * np.log(tau)).sum()),
        not_worse=float((share * _normal_cdf((center + bar.margin) / sd)).sum()),
    )


def can_reach(seen: Evidence, bar: Bar) -> bool:
    """Would the level be reached at the cap if the gain were one standard error better?"""
    best, tau = seen.estimate + OPTIMISM * seen.sd, np.array([seen.tau])
    log_e = _log_gain(bar.rule.max_seeds, best, tau, bar.sigma)[0]
    return best > 0 and log_e >= -math.log(bar.level)


def least_to_prove(bar: Bar, num_seeds: float, tau: float) -> float:
    """The gain that so many seeds would prove if its differences scattered by tau; FAR tau at most,
    and inf for fewer seeds than a keep needs."""
    n = int(min(num_seeds, bar.rule.max_seeds))
    if n < bar.rule.min_seeds:
        return math.inf
    z = np.linspace(-1, 1, n)
    scatter, (low, high) = tau * z / z.std(ddof=1), (0.0, tau * FAR)
    while high - low > 0.01 * tau:
        middle = (low + high) / 2
        enough = weigh((middle + scatter).tolist(), bar).log_e >= -math.log(bar.level)
        low, high = (low, middle) if enough else (middle, high)
    return high


def seeds_to_prove(gain: float, bar: Bar, tau: float) -> int:
    """So many seeds would prove a gain whose differences scatter by tau; the cap if none would."""
    cap = bar.rule.max_seeds
    fits = (n for n in range(bar.rule.min_seeds, cap) if least_to_prove(bar, n, tau) <= gain)
    return next(fits, cap)


def typical_tau(bar: Bar) -> float:
    return math.exp(float((bar.weights * np.log(bar.taus)).sum()))


def _log_gain(n: int, mean: float, tau: np.ndarray, sigma: float) -> np.ndarray:
    """log likelihood ratio, gain to no gain, for each tau: half for a gain of SOUGHT tau, half for
    one of any size."""
    log_ratio, center, sd = _posteriors(n, mean, tau[:, None], sigma)
    # All of the prior is on gains: twice the posterior share of gains under the symmetric one.
    logs = log_ratio + _log_normal_cdf(center / sd) + math.log(2 / len(GAIN_RATIOS))
    top = logs.max(axis=1)
    any_size = top + np.log(np.exp(logs - top[:, None]).sum(axis=1))
    sought = n * (SOUGHT * mean / tau - SOUGHT**2 / 2)
    return np.logaddexp(any_size, sought) - math.log(2)


def _posteriors(n: int, mean: float, tau: np.ndarray, sigma: float) -> tuple:
    """For each tau and scale of the gain: log Bayes factor against 0, posterior mean and sd."""
    error, scale = tau**2 / n, (sigma * GAIN_RATIOS[None, :]) ** 2
    total = error + scale
    log_ratio = 0.5 * np.log(error / total) + 0.5 * mean**2 * (1 / error - 1 / total)
    return log_ratio, mean * scale / total, np.sqrt(error * scale / total)


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    values = [0.5 * math.erfc(x) for x in (z * -math.sqrt(0.5)).ravel().tolist()]
    return np.array(values).reshape(z.shape)


def _log_normal_cdf(z: np.ndarray) -> np.ndarray:
    """Below -30 the tail's first term, for there the function itself underflows."""
    low = np.minimum(z, -30.0)
    tail = -0.5 * low**2 - np.log(-low) - 0.5 * math.log(2 * math.pi)
    return np.where(z < -30.0, tail, np.log(_normal_cdf(np.maximum(z, -30.0))))


def _log_sum(logs: np.ndarray) -> float:
    top = logs.max()
    return float(top + np.log(np.exp(logs - top).sum()))


def _decision(kind: str, what: str, gain: float, n: int, seen: Evidence, bar: Bar) -> Decision:
    evidence = math.exp(min(seen.log_e, math.log(1e9)))
    low, high = seen.estimate - Z_INTERVAL * seen.sd, seen.estimate + Z_INTERVAL * seen.sd
    seeds = "1 seed" if n == 1 else f"{n} seeds"
    reason = (
        f"{what}: gain {gain:+.4f} over {seeds}, estimate {seen.estimate:+.4f} "
        f"({low:+.4f} to {high:+.4f}); evidence {_short(evidence)}, needs {_short(1 / bar.level)}"
    )
    return Decision(kind, reason, gain, seen.estimate, low, high, evidence)


def _short(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"
