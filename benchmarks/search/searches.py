"""The searches that are compared. Each spends trial-seconds on an evaluator and says what it found.

`evaluate(point, seed) -> Score` is a real short run (runs.py) or the surrogate (landscape.py). A
search yields (seconds spent so far, trials so far, the point that it would deliver).

ours      agent/proposers and agent/strategy.py propose, agent/decide.py judges as in a study: pairs
          on equal seeds, the incumbent's runs paid for
greedy    the same recipes, and steps of values; one seed; what is lower is kept (autoresearch's
          rule). Steps are random ones, or what our sampler proposes
random, TPE, CMA-ES   Optuna's samplers over the whole space, from the baseline on; one seed; the
          lowest number is delivered
Hydra's TPE   the same by Hydra's Optuna sweeper, beside one run of the baseline
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import optuna
from collect import anywhere, place
from hydra_sweeper import sweeper
from runs import Point, Score, Setting

from agent import strategy
from agent.decide import decide, next_seed, pair
from agent.journal import Edit, Journal, Proposal, Run, Trial
from agent.loop import BASELINE
from agent.proposers import Context, mixed, recipes, sampler
from agent.seeds import fill_in
from nightshift.fixed.config import ROOT, flatten, unflatten

Evaluate = Callable[[Point, int], Score]
Found = Iterator[tuple[float, int, Point]]
CRASHED = 10.0  # bpb that a sampler is told of a run without a number
MAX_TRIALS = 2000

optuna.logging.set_verbosity(optuna.logging.ERROR)


# ---- ours ----


class Lab:
    """A study in memory: trial number -> point, and the runs that were paid for."""

    def __init__(
        self, setting: Setting, evaluate: Evaluate, seed: int, ahead: bool = False, **changes: Any
    ):
        self.setting, self.evaluate, self.seed = setting, evaluate, seed
        self.ahead = ahead  # deliver what is ahead after one run, proven or not
        self.study = setting.plan.study.model_copy(update=changes)
        self.rule = self.study.rule
        self.journal = Journal(ROOT / "none")
        self.points: list[Point] = []
        self.spent = 0.0

    def run(self, point: Point, seed: int) -> Run:
        score = self.evaluate(point, seed)
        self.spent += score.seconds
        status = "crash" if score.val_bpb is None else "ok"
        return Run(seed=seed, status=status, val_bpb=score.val_bpb, wall_s=score.seconds)

    def search(self) -> Found:
        self.begin()
        yield self.state()
        while not self.study.end.is_reached(self.journal.trials):
            parent = self.journal.incumbent
            proposal = mixed.propose(self.context())
            if proposal is None:
                return
            point = changed(self.setting, self.points[parent.number], proposal)
            self.try_(point, proposal, parent)
            yield self.state()

    def state(self) -> tuple[float, int, Point]:
        front = strategy.front_of(self.context()) if self.ahead else None
        return self.spent, len(self.journal), self.points[(front or self.journal.incumbent).number]

    def begin(self) -> None:
        trial = self.trial(BASELINE, None)
        trial.runs = [self.run(Point.of({}), seed) for seed in self.study.baseline_seeds]
        trial.val_bpb = sum(run.val_bpb for run in trial.runs) / len(trial.runs)
        trial.decision = "keep"
        self.add(trial, Point.of({}))

    def try_(self, point: Point, proposal: Proposal, parent: Trial) -> None:
        trial = self.trial(proposal, parent.number)
        if point in self.points and proposal.proves is None:  # the novelty gate: no run
            trial.status, trial.reason = "invalid", "known"
            self.add(trial, point)
            return
        shorter = saved_lines(proposal) > 0
        while True:
            settings = self.study
            bar = strategy.bar_of(trial, self.journal, settings.strategy, self.rule, settings.end)
            there = self.journal.runs_of(parent, trial)
            seed = next_seed(trial.runs, self.study.seeds)
            decision = decide(trial.differences, bar, shorter)
            if seed is None or decision.kind != "more":
                break
            if seed not in there:
                trial.parent_runs.append(self.run(self.points[parent.number], seed))
            trial.runs.append(self.run(point, seed))
            trial.status = trial.runs[-1].status
            trial.differences = pair(self.journal.runs_of(parent, trial), trial.runs)
        if trial.status == "ok":
            fill_in(trial, decision)
            trial.val_bpb = sum(run.val_bpb for run in trial.runs) / len(trial.runs)
        self.add(trial, point)

    def trial(self, proposal: Proposal, parent: int | None) -> Trial:
        number = len(self.journal)
        return Trial(
            number=number,
            proposal=proposal,
            parent=parent,
            status="ok",
            decision="discard",
            reason="",
        )

    def add(self, trial: Trial, point: Point) -> None:
        trial.wall_s = sum(run.wall_s for run in trial.made)
        self.journal.trials.append(trial)
        self.points.append(point)

    def context(self) -> Context:
        point = self.points[self.journal.incumbent.number]
        texts = self.setting.texts(point.recipes)
        return Context(
            number=len(self.journal),
            seed=self.seed,
            journal=self.journal,
            values=unflatten(self.setting.baseline | dict(point.values)),
            baseline=unflatten(self.setting.baseline),
            space=self.setting.plan.space,
            sources=self.study.sources,
            strategy=self.study.strategy,
            rule=self.rule,
            end=self.study.end,
            plateau_after=self.study.plateau_after,
            read=lambda path: texts[path] if path in texts else read(path),
        )


_TEXTS: dict[str, str | None] = {}


def read(path: str) -> str | None:
    if path not in _TEXTS:
        file = ROOT / path
        _TEXTS[path] = file.read_text(encoding="utf-8") if file.is_file() else None
    return _TEXTS[path]


def changed(setting: Setting, point: Point, proposal: Proposal) -> Point:
    """The point that a proposal makes of this one. Edits are recipes or their reverse."""
    values = dict(point.values) | proposal.overrides
    values = {k: v for k, v in values.items() if setting.baseline[k] != v}
    recipes, edits = list(point.recipes), list(proposal.edits)
    while edits:
        title, there = _first_recipe(setting, edits)
        recipes.append(title) if there else recipes.remove(title)
        edits = edits[len(setting.recipes[title].edits) :]
    return Point.of(values, recipes)


def _first_recipe(setting: Setting, edits: list[Edit]) -> tuple[str, bool]:
    for title, recipe in setting.recipes.items():
        count = len(recipe.edits)
        if edits[:count] == recipe.edits:
            return title, True
        if edits[:count] == [
            Edit(path=e.path, search=e.replace, replace=e.search) for e in recipe.edits[::-1]
        ]:
            return title, False
    raise ValueError(f"edits of no recipe: {edits[0]}")


def saved_lines(proposal: Proposal) -> int:
    return sum(e.search.count("\n") - e.replace.count("\n") for e in proposal.edits)


def ours(setting: Setting, evaluate: Evaluate, seed: int, **changes: Any) -> Found:
    return Lab(setting, evaluate, seed, **changes).search()


# ---- the rivals ----


def greedy(propose: Callable[[Context], Proposal | None]):
    """One seed; what is lower is kept: autoresearch's rule. The same recipes in the same shares."""

    def search(setting: Setting, evaluate: Evaluate, seed: int) -> Found:
        sources = {name: setting.plan.study.sources[name] for name in ("sampler", "recipes")}
        lab = Lab(setting, evaluate, seed, sources=sources, strategy="greedy", plateau_after=None)
        trial = lab.trial(BASELINE, None)
        trial.runs, trial.decision = [lab.run(Point.of({}), 1)], "keep"
        lab.add(trial, Point.of({}))
        yield lab.state()
        while len(lab.journal) < MAX_TRIALS and (proposal := propose(lab.context())):
            parent = lab.journal.incumbent
            point = changed(setting, lab.points[parent.number], proposal)
            trial = lab.trial(proposal, parent.number)
            if point not in lab.points:
                trial.runs = [lab.run(point, 1)]
                trial.status = trial.runs[0].status
            else:
                trial.status = "invalid"
            if trial.status == "ok":
                trial.gain = trial.estimate = parent.runs[0].val_bpb - trial.runs[0].val_bpb
                trial.decision = "keep" if trial.gain > 0 else "discard"
            lab.add(trial, point)
            yield lab.state()

    return search


def stepping(context: Context) -> Proposal | None:
    """Recipes and the sampler take the same turns; the sampler knows no result: random steps."""
    names = mixed.ranking(context.journal.trials, context.sources, context.seed, context.number)
    recipe = recipes.propose(context) if names[0] == "recipes" else None
    return recipe or sampler.propose(replace(context, journal=Journal(ROOT / "none")))


def sampled(
    make: Callable[[int, dict], optuna.samplers.BaseSampler], with_recipes: bool
) -> Callable[[Setting, Evaluate, int], Found]:
    """A search by one of Optuna's samplers. `make(seed, place of the baseline)`."""

    def search(setting: Setting, evaluate: Evaluate, seed: int) -> Found:
        keys, titles = sorted(setting.plan.space), list(setting.recipes) if with_recipes else []
        start = {key: place(setting, key) for key in keys} | dict.fromkeys(titles, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(sampler=make(seed, start))
        study.enqueue_trial(start)
        spent, best, found = 0.0, None, Point.of({})
        for number in range(1, MAX_TRIALS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trial = study.ask()
                shares = {key: trial.suggest_float(key, 0.0, 1.0) for key in keys}
                switches = [title for title in titles if trial.suggest_int(title, 0, 1)]
            point = asked_for(setting, shares, switches)
            score = evaluate(point, 1)
            spent += score.seconds
            study.tell(trial, CRASHED if score.val_bpb is None else score.val_bpb)
            if score.val_bpb is not None and (best is None or score.val_bpb < best):
                best, found = score.val_bpb, point
            yield spent, number, found

    return search


def swept(with_recipes: bool) -> Callable[[Setting, Evaluate, int], Found]:
    """A search by Hydra's Optuna sweeper with its TPE."""

    def search(setting: Setting, evaluate: Evaluate, seed: int) -> Found:
        found = Point.of({})
        score = evaluate(found, 1)
        spent, best = score.seconds, score.val_bpb
        yield spent, 1, found
        titles = list(setting.recipes) if with_recipes else []
        switches = {f"recipes.r{number}": title for number, title in enumerate(titles)}
        with sweeper(intervals(setting) | dict.fromkeys(switches, "choice(0,1)"), seed) as jobs:
            for number, (asked, tell) in enumerate(jobs, start=2):
                asked = flatten(asked)
                shares = {key: place(setting, key, asked[key]) for key in setting.plan.space}
                chosen = [title for key, title in switches.items() if asked[key]]
                point = asked_for(setting, shares, chosen)
                score = evaluate(point, 1)
                spent += score.seconds
                if score.val_bpb is not None and score.val_bpb < best:
                    best, found = score.val_bpb, point
                yield spent, number, found
                tell(CRASHED if score.val_bpb is None else score.val_bpb)

    return search


def intervals(setting: Setting) -> dict[str, str]:
    """The space in Hydra's syntax of a sweep."""
    ranges = {k: f"interval({b.low},{b.high})" for k, b in sorted(setting.plan.space.items())}
    return {k: f"tag(log,{r})" if setting.plan.space[k].log else r for k, r in ranges.items()}


def asked_for(setting: Setting, shares: dict[str, float], switches: list[str]) -> Point:
    """Recipes that do not fit beside the ones before them are left out."""
    values = {key: anywhere(setting, key, share) for key, share in shares.items()}
    at = {key for key, share in shares.items() if abs(share - place(setting, key)) < 1e-9}
    values = {key: value for key, value in values.items() if key not in at}
    recipes: list[str] = []
    for title in switches:
        if setting.texts([*recipes, title]) is not None:
            recipes.append(title)
    return Point.of(values, recipes)


def tpe(seed: int, start: dict) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=10)


def cmaes(seed: int, start: dict) -> optuna.samplers.BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=seed, x0=start, sigma0=0.2)


def anyhow(seed: int, start: dict) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


RIVALS = {
    "random, values": sampled(anyhow, False),
    "random, values and recipes": sampled(anyhow, True),
    "Hydra's TPE, values": swept(False),
    "Hydra's TPE, values and recipes": swept(True),
    "TPE, values and recipes": sampled(tpe, True),
    "CMA-ES, values": sampled(cmaes, False),
    "CMA-ES, values and recipes": sampled(cmaes, True),
    "greedy, one seed": greedy(stepping),
    "greedy, one seed, our sampler": greedy(mixed.propose),
}
