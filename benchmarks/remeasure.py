"""Was a kept gain real? Each kept trial and its parent, trained again on fresh seeds.

Prints, for each keep of the studies named: the gain that the study saw (on its own seeds), its
estimate with the interval, and the gain on the fresh seeds with its standard error; at the end, how
many intervals held it. Runs nothing inside the study's folder. A study uses seeds from 1 up, so
fresh ones begin above 100.

    python benchmarks/remeasure.py first other-study [seeds=101,102,103] [threads=1]
"""

import shutil
import statistics
import sys
from pathlib import Path

from agent import workspace
from agent.journal import Journal, Trial
from agent.study import marks_of
from agent.trial import Bench, Stop
from agent.warm import Starter
from nightshift.fixed.config import ROOT


def main() -> None:
    names = [a for a in sys.argv[1:] if "=" not in a]
    given = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    seeds = [int(s) for s in given.get("seeds", "101,102,103").split(",")]
    threads = int(given["threads"]) if "threads" in given else None
    out = ROOT / "benchmarks" / "out" / f"remeasure-{'-'.join(names)}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    starter, measured, held = Starter(out, True), {}, []
    for name in names:
        journal = Journal(ROOT / "outputs" / "studies" / name / "journal.jsonl")
        with workspace.worktree(ROOT, out / name / "base", journal.trials[0].commit) as base:
            for trial in journal.lineage:
                if trial.digest not in measured:  # studies share their baseline
                    place = out / name / f"{trial.number:03d}"
                    measured[trial.digest] = fresh_runs(starter, place, base, trial, seeds, threads)
                if trial.parent is not None:
                    parent = journal.trials[trial.parent]
                    before, after = measured[parent.digest], measured[trial.digest]
                    held.append(report(name, trial, before, after))
        if len(journal.lineage) == 1:
            print(f"{name}: kept nothing", flush=True)
    starter.close()
    print(f"{sum(held)} of {len(held)} intervals held the gain on fresh seeds", flush=True)


def fresh_runs(starter, folder: Path, base: Path, trial: Trial, seeds, threads) -> list[float]:
    out = folder.parents[1]
    with workspace.worktree(ROOT, folder / "worktree", trial.commit) as tree:
        config = workspace.resolve(tree)
        runtime = config.runtime.model_copy(update={"num_threads": threads})
        bench = Bench(
            marks=marks_of(out, trial.number),
            study_folder=out,
            folder=folder,
            tree=tree,
            base=base,
            code=workspace.code_of(tree, trial.commit),
            baseline_work=None,
            config=config.model_copy(update={"runtime": runtime}),
            own_cache=folder / "cache",
            shared_cache=ROOT / ".cache",
            starter=starter,
            stop=Stop(),
            show=lambda what: None,
        )
        if problem := bench.prepare(seeds[0], 3600.0):
            sys.exit(f"trial {trial.number}: {problem.message}")
        runs = [bench.run(f"seed_{seed}", seed, config.budget.wall_limit_s) for seed in seeds]
    if bad := [run for run in runs if run.status != "ok"]:
        sys.exit(f"trial {trial.number}: {bad[0].status} {bad[0].message}")
    return [run.val_bpb for run in runs]


def report(name: str, trial: Trial, before: list[float], after: list[float]) -> bool:
    """Does the trial's interval hold the mean of the fresh gains?"""
    gains = [b - a for b, a in zip(before, after, strict=True)]
    mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    estimate, held = "", False
    if trial.estimate is not None:
        held = trial.low <= mean <= trial.high
        estimate = f"estimate {trial.estimate:+.4f} ({trial.low:+.4f} to {trial.high:+.4f})"
    print(
        f"{name} {trial.number:03d}  {trial.proposal.title[:60]:<60}  seen {trial.gain:+.4f}  "
        f"{estimate}  again {mean:+.4f} +- {error:.4f}",
        flush=True,
    )
    return held


if __name__ == "__main__":
    main()
