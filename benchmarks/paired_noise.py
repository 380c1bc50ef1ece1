"""How much does a paired difference scatter? Changes of several kinds, each on the same seeds.

A difference is the parent's val_bpb minus the changed one's, on one seed. Its mean over seeds is
the gain; its standard deviation is the noise that the rule of agent/decide.py has to beat. A change
of the sixth digit shows how far rounding alone drives two runs apart.

    python benchmarks/paired_noise.py [seeds=1,2,3,4] [threads=1] [key=value of the pipeline ...]

Writes benchmarks/out/paired_noise.jsonl, one run a line, and goes on where it was stopped.
"""

import json
import statistics
import sys

from agent import workspace
from agent.journal import Proposal
from agent.proposers.recipes import FOLDER, read_recipes
from agent.study import marks_of
from agent.trial import Bench, Stop
from agent.warm import Starter
from nightshift.command import compose
from nightshift.fixed.config import ROOT, Config, check, flatten, unflatten

OUT = ROOT / "benchmarks" / "out"
CONFIG_CHANGES = (
    {"optim.matrix_lr": 0.0200001},
    {"optim.embedding_lr": 0.3000003},
    {"optim.beta2": 0.96},
    {"model.softcap": 16.0},
    {"schedule.warmup_frac": 0.005},
    {"optim.momentum": 0.951},
)
RECIPES = ("head_gate", "leaky_relu2", "small_output_init", "z_loss", "norm_values", "gelu")


def proposals() -> list[Proposal | None]:
    """The parent (None), then the changes."""
    changes = [
        Proposal(title=f"{key} {value}", hypothesis="None.", source="bench", overrides={key: value})
        for change in CONFIG_CHANGES
        for key, value in change.items()
    ]
    names = [path.stem for path in sorted(FOLDER.glob("*.yaml"))]
    recipes = dict(zip(names, read_recipes(), strict=True))
    return [None, *changes, *(recipes[name] for name in RECIPES)]


def main() -> None:
    given = dict(a.split("=", 1) for a in sys.argv[1:])
    seeds = [int(s) for s in given.pop("seeds", "1,2,3,4").split(",")]
    given.setdefault("runtime.num_threads", given.pop("threads", "1"))
    config = check(compose("config", ["preset=laptop", *(f"{k}={v}" for k, v in given.items())]))
    OUT.mkdir(parents=True, exist_ok=True)
    path, starter = OUT / "paired_noise.jsonl", Starter(OUT, True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {(one["title"], one["seed"]): one["val_bpb"] for one in map(json.loads, lines)}
    for seed in seeds:
        for number, proposal in enumerate(proposals()):
            title = proposal.title if proposal else "parent"
            if (title, seed) not in done:
                val_bpb = measure(starter, config, number, proposal, seed)
                done[title, seed] = val_bpb
                line = {"title": title, "seed": seed, "val_bpb": val_bpb}
                line["kind"] = proposal.kind if proposal else "baseline"
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        report(done)
    starter.close()


def measure(starter, config, number: int, proposal: Proposal | None, seed: int) -> float | None:
    folder = OUT / "paired_noise" / f"{number:03d}"
    with workspace.worktree(ROOT, folder / "worktree", "HEAD") as tree:
        if proposal:
            workspace.apply(tree, proposal, proposal.title)
        bench = Bench(
            marks=marks_of(OUT, number),
            study_folder=OUT,
            folder=folder,
            tree=tree,
            config=changed(config, proposal),
            own_cache=ROOT / ".cache",
            shared_cache=ROOT / ".cache",
            starter=starter,
            stop=Stop(),
            show=lambda what: None,
        )
        run = bench.run(f"seed_{seed}", seed, 3600.0)
    if run.status != "ok":
        print(f"{folder.name} seed {seed}: {run.status} {run.message}", flush=True)
    return run.val_bpb


def changed(config: Config, proposal: Proposal | None) -> Config:
    overrides = proposal.overrides if proposal else {}
    return check(unflatten(flatten(config.model_dump()) | overrides))


def report(done: dict[tuple[str, int], float | None]) -> None:
    print(f"{'change':48} {'seeds':>5} {'gain':>8} {'sigma':>8}")
    for title in dict.fromkeys(title for title, _ in done):
        pairs = [
            done["parent", seed] - x
            for (name, seed), x in done.items()
            if name == title != "parent" and x is not None
        ]
        if len(pairs) > 1:
            mean, sigma = statistics.mean(pairs), statistics.stdev(pairs)
            print(f"{title[:48]:48} {len(pairs):5} {mean:+8.5f} {sigma:8.5f}")
    parent = [x for (name, _), x in done.items() if name == "parent"]
    if len(parent) > 1:
        print(
            f"{'one seed of the parent':48} {len(parent):5} {'':8} {statistics.stdev(parent):8.5f}"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
