"""Prompt size and time of one proposal at 10, 100 and 1,000 trials: do they stay flat?

    python benchmarks/prompt_size.py            # two minutes on 2 cores

A clone of this checkout, a journal made up of trials of every kind (kept, near misses, failures,
code and values, long texts), the real client against a scripted server on loopback: the model reads
a file, sends a proposal that does not apply, then one that does. Measured is everything between two
trials: prompt, calls, tools, both checks in a worktree, the search for what is alike.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from scripted_llm import ScriptedServer, propose, use  # noqa: E402

from agent import study, workspace  # noqa: E402
from agent.answer import StudyFiles  # noqa: E402
from agent.journal import Edit, Journal, Proposal, Run, Trial  # noqa: E402
from agent.proposers import Context  # noqa: E402
from agent.proposers.llm import Researcher  # noqa: E402
from agent.settings import LlmSettings, read_plan  # noqa: E402
from agent.trial import Stop  # noqa: E402
from nightshift.fixed.config import check  # noqa: E402
from nightshift.fixed.result import write_json  # noqa: E402

SIZES = (10, 100, 1000)
REPEATS = 9  # of which the median
KEYS = (
    "optim.matrix_lr",
    "optim.beta2",
    "schedule.warmdown_frac",
    "model.softcap",
    "optim.head_lr",
)
MODEL = "src/nightshift/model.py"


def made_up(number: int, rng: random.Random, commit: str) -> Trial:
    words = " ".join(rng.choice(("longer", "rate", "norm", "skip", "window")) for _ in range(25))
    change = {"overrides": {rng.choice(KEYS): round(rng.uniform(0.1, 0.9), 4)}}
    if number % 2:
        code = "\n".join(f"    x{n} = {rng.random():.4f} * x" for n in range(rng.randint(2, 20)))
        change = {"edits": [Edit(path=MODEL, search=f"# {number}", replace=code)]}
    failed, kept = rng.random() < 0.15, number % 12 == 0
    gain = None if failed else rng.gauss(0.01 if kept else -0.002, 0.002)
    reason = (
        f"crash on seed 1: RuntimeError: shape '[{number}, 64]' is invalid" if failed else words
    )
    title = f"trial {number}: {words[:50]}"
    return Trial(
        number=number, parent=0, status="crash" if failed else "ok",
        proposal=Proposal(title=title, hypothesis=words, source="llm", **change),
        decision="keep" if kept and not failed else "discard", reason=reason, gain=gain,
        estimate=gain, val_bpb=None if failed else 1.6 - 0.0001 * number, commit=commit,
        runs=[] if failed else [Run(seed=1, status="ok", val_bpb=1.6, wall_s=60.0)],
        digest=f"{number:012d}", differences=[] if failed else [gain], wall_s=70.0,
    )  # fmt: skip


def make_study(repo: Path, url: str) -> tuple[dict, list[Trial]]:
    """Settings with a first commit, and the baseline."""
    arguments = ["study.name=size", "tracking=off", f"study.llm.base_url={url}"]
    arguments += ["study.sources={llm: 1}", "study.llm.model=openai:m", "study.llm.lessons_every=0"]
    plan = read_plan(repo / "conf", arguments)
    folder = repo / "outputs/studies/size"
    folder.mkdir(parents=True)
    settings = study.begin(repo, folder, plan, workspace.base_commit(repo))
    baseline = Proposal(title="baseline", hypothesis="as it stands", source="baseline")
    runs = [Run(seed=s, status="ok", val_bpb=1.6 + s / 1000, wall_s=60.0) for s in (1, 2, 3)]
    first = Trial(number=0, proposal=baseline, parent=None, status="ok", decision="keep", reason="",
                  val_bpb=1.6, runs=runs, commit=settings["first_commit"], digest="0")  # fmt: skip
    return settings, [first]


def researcher_at(repo: Path, settings: dict, trials: list[Trial]) -> Researcher:
    """One that finds so many trials, in a study's folder of its own."""
    folder = repo / f"outputs/studies/size_{len(trials)}"
    files = StudyFiles(repo, folder, Journal(folder / "journal.jsonl"))
    files.journal.trials.extend(trials)
    write_json(folder / "settings.json", settings)
    config = folder / f"trials/{files.journal.incumbent.number:03d}/config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump(settings["config"]))
    return Researcher(check(settings["study"]["llm"], LlmSettings), files, Stop())


def measure(researcher: Researcher, server: ScriptedServer) -> dict[str, float]:
    """One proposal. CPU is that of this process, server included, and of the git it starts."""
    tokens, asked = server.input_tokens, len(server.requests)
    started, cpu = time.perf_counter(), sum(os.times()[:4])
    journal = researcher.files.journal
    context = Context(number=len(journal), seed=0, journal=journal, values={}, baseline={},
                      space={}, sources={"llm": 1}, read=lambda path: None)  # fmt: skip
    assert researcher.propose(context) is not None
    return {
        "chars": len(json.dumps(server.requests[asked])),
        "tokens": server.input_tokens - tokens,
        "cpu_s": sum(os.times()[:4]) - cpu,
        "wall_s": time.perf_counter() - started,
    }


def main() -> None:
    look = use(("read_file", {"path": MODEL}), ("list_trials", {"sort": "gain"}))
    wrong = propose(overrides={"optim.no_such_key": 1})
    right = propose(overrides={"optim.scalar_lr": 0.011}, differs="it is another key")
    with tempfile.TemporaryDirectory() as place, ScriptedServer([look]) as server:
        server.entries = [look, wrong, right] * 1000
        repo = Path(place) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(repo)], check=True)
        settings, trials = make_study(repo, server.url)
        rng = random.Random(0)
        for number in range(1, max(SIZES)):
            trials.append(made_up(number, rng, settings["first_commit"]))
        researchers = {size: researcher_at(repo, settings, trials[:size]) for size in SIZES}
        seen: dict[int, list] = {size: [] for size in SIZES}
        for repeat in range(REPEATS + 1):
            for size in SIZES:  # in turn, so that a busy machine is busy for all
                facts = measure(researchers[size], server)
                if repeat:  # the first one also imports and fills what is remembered
                    seen[size].append(facts)
    show(seen)


def show(seen: dict[int, list[dict[str, float]]]) -> None:
    names = ("chars", "tokens", "cpu_s", "wall_s")
    print(f"{'trials':>6} " + " ".join(f"{name:>10}" for name in names))
    medians = {
        s: {n: statistics.median(f[n] for f in facts) for n in names} for s, facts in seen.items()
    }
    for size, row in medians.items():
        print(f"{size:>6} " + " ".join(f"{row[name]:>10,.6g}" for name in names))
    for name in names:
        values = [row[name] for row in medians.values()]
        print(f"{name}: largest over smallest {max(values) / min(values):.2f}")


if __name__ == "__main__":
    main()
