"""Does a short run before the first whole one pay?

Reads studies that ran with study.ladder and an early_stop so small that nothing was ended: every
trial has both its short run and a whole one. At each trial the limit of agent/ladder.py is set from
what came before it alone, in the order of time and in random orders, as benchmarks/early_stop.py
does for curves, and compared with what the trial then did. Nothing is trained.

    python benchmarks/ladder.py outputs/studies/first outputs/studies/second ...

Saved is the time of an ended trial's whole runs, spent that of all short runs, the parents' too;
both as shares of the time that the trials would have taken without a ladder. `at once`: were every
hopeless trial known by its short run from the first trial on. Writes benchmarks/out/ladder.json.
"""

import json
import random
import statistics
import sys
from pathlib import Path

from early_stop import ORDERS, OUT, Case, cut_of, in_words, replay

from agent import early
from agent.journal import Journal, Trial

RATES = (0.05, 0.1, 0.2)


def trials_of(folder: Path) -> list[tuple[Trial, Case]]:
    """Those of a study that had a short run, each with its case."""
    journal = Journal(folder / "journal.jsonl", repair=False)
    ran = [trial for trial in journal.trials if trial.rung]
    return [(trial, case_of(folder, journal, trial)) for trial in ran]


def case_of(folder: Path, journal: Journal, trial: Trial) -> Case:
    past = None
    if trial.rung.behind is not None and trial.differences:
        past = early.Past((trial.rung.behind,), trial.differences[0])
    name, kept = f"{folder.name}/{trial.number}", trial.decision == "keep"
    saved = (sum(run.wall_s or 0.0 for run in trial.runs),)
    return Case(name, kept, past, cut_of(journal, trial), trial.wall_s or 0.0, saved)


def spent_s(trial: Trial) -> float:
    """By short runs."""
    runs = (trial.rung.run, trial.rung.parent_run)
    return sum(run.wall_s or 0.0 for run in runs if run)


def spearman(pairs: list[tuple[float, float]]) -> float:
    """Rank agreement; no two of the values are equal."""
    ranks = [[sorted(side).index(value) for value in side] for side in zip(*pairs, strict=True)]
    return statistics.correlation(*ranks)


def over_orders(cases: list[Case], rate: float) -> dict[str, float]:
    """Means over random orders; `saved_s` is of all trials, before the limit is known too."""
    rng = random.Random(0)
    tallies = [replay(rng.sample(cases, len(cases)), rate) for _ in range(ORDERS)]
    total = {key: sum(tally[key] for tally in tallies) for key in tallies[0]}
    return {
        "ended": total["stopped"] / ORDERS,
        "checked": total["checked"] / ORDERS,
        "false": total["false"] / max(1, total["with_hope"]),
        "stated": total["stated"] / max(1, total["with_hope"]),
        "saved_s": total["saved_s"] / ORDERS,
    }


def main() -> None:
    if not sys.argv[1:]:
        sys.exit(__doc__)
    found = [pair for folder in sys.argv[1:] for pair in trials_of(Path(folder))]
    found.sort(key=lambda pair: pair[0].started_at)
    trials, cases = [trial for trial, _ in found], [case for _, case in found]
    pairs = [case for case in cases if case.past and any(case.past.behind)]
    hopeless = [case for case in pairs if case.hopeless]
    spent = sum(map(spent_s, trials))
    without = sum(case.wall_s for case in cases) - spent
    short = statistics.median(t.rung.run.wall_s for t in trials if t.rung.run.status == "ok")
    whole = statistics.median(run.wall_s for t in trials for run in t.runs if run.status == "ok")
    numbers = {
        "trials": len(cases),
        "pairs": len(pairs),
        "hopeless": len(hopeless),
        "spearman": spearman([(-case.past.behind[0], case.past.gain) for case in pairs]),
        "spearman_hope": spearman(
            [(-case.past.behind[0], case.past.gain) for case in pairs if not case.hopeless]
        ),
        "short_s": short,
        "whole_s": whole,
        "without_s": without,
        "spent": spent / without,
        "saved_at_once": sum(case.saved_s[0] for case in hopeless) / without,
        "rates": {},
    }
    print(f"{len(cases)} trials, {len(pairs)} with a short and a whole difference")
    for rate in RATES:
        print(f"early_stop={rate}, in the order of time: {in_words(replay(cases, rate))}")
        orders = over_orders(cases, rate)
        net = (orders.pop("saved_s") - spent) / without
        numbers["rates"][rate] = orders | {"net": net}
    print(json.dumps(numbers, indent=1))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "ladder.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
