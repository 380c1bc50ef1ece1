"""Was a kept gain real? Each kept trial and its parent, trained again on fresh seeds.

Prints, for each keep of the studies named: the gain that the study saw (on its own seeds) and the
gain on the fresh ones, with the standard error of the difference. Runs nothing inside the study's
folder.

    python benchmarks/remeasure.py first other-study [seeds=11,12,13]
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

from agent import workspace
from agent.journal import Journal, Trial
from agent.trial import Bench, Stop
from agent.warm import Starter
from nightshift.fixed.config import ROOT, check


def main() -> None:
    names = [a for a in sys.argv[1:] if "=" not in a]
    given = next((a for a in sys.argv[1:] if a.startswith("seeds=")), "seeds=11,12,13")
    seeds = [int(s) for s in given.removeprefix("seeds=").split(",")]
    out = ROOT / "benchmarks" / "out" / "remeasure"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    starter = Starter(out, True)
    for name in names:
        study = ROOT / "outputs" / "studies" / name
        config = json.loads((study / "settings.json").read_text())["config"]
        journal, measured = Journal(study / "journal.jsonl"), {}
        for trial in journal.lineage:
            measured[trial.number] = fresh_runs(starter, out, name, trial, seeds, config)
            if trial.parent is not None:
                report(name, trial, measured[trial.parent], measured[trial.number])
        if len(journal.lineage) == 1:
            print(f"{name}: kept nothing", flush=True)
    starter.close()


def fresh_runs(starter, out: Path, name: str, trial: Trial, seeds, given) -> list[float]:
    tree = out / name / f"{trial.number:03d}" / "worktree"
    with workspace.worktree(ROOT, tree, trial.commit):
        config = workspace.resolve(tree)
        runtime = check(given | {k: v for k, v in config.model_dump().items() if k not in given})
        config = config.model_copy(update={"runtime": runtime.runtime})
        folder = tree.parent
        bench = Bench(
            mark=f"remeasure/{name}/{trial.number:03d}",
            study_folder=out,
            folder=folder,
            tree=tree,
            config=config,
            own_cache=folder / "cache",
            shared_cache=ROOT / ".cache",
            starter=starter,
            stop=Stop(),
            show=lambda what: None,
        )
        limit_s = config.budget.wall_limit_s
        runs = [bench.run(f"seed_{seed}", seed, limit_s) for seed in seeds]
        if bad := [run for run in runs if run.status != "ok"]:
            sys.exit(f"{name} trial {trial.number}: {bad[0].status} {bad[0].message}")
        return [run.val_bpb for run in runs]


def report(name: str, trial: Trial, before: list[float], after: list[float]) -> None:
    gains = [b - a for b, a in zip(before, after, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    print(
        f"{name} {trial.number:03d}  {trial.proposal.title[:60]:<60}  "
        f"in the study {trial.gain:+.4f}  again {statistics.mean(gains):+.4f} +- {error:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
