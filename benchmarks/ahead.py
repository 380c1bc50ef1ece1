"""What does thinking ahead save? The same study with and without study.llm.ahead, in turns.

A scripted model answers each call after `call_s`: it looks once, then proposes one value. The
studies are real ones, of a clone of what is in git now; a seed is a budget of `tokens`.

    python benchmarks/ahead.py [trials=6] [call_s=3] [pairs=2] [tokens=30000]

Prints for each study the wall time of its trials and where it went; `idle` is what of it no trial
ran, the proposal of trial 1 left out, which both wait for.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from nightshift.fixed.config import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from scripted_llm import Reply, ScriptedServer, propose, use  # noqa: E402

VALUES = [
    ("optim.matrix_lr", 0.03),
    ("optim.embedding_lr", 0.1),
    ("optim.scalar_lr", 0.05),
    ("optim.beta2", 0.7),
    ("schedule.warmdown_frac", 0.8),
    ("model.softcap", 25.0),
    ("optim.momentum", 0.9),
    ("train.grad_clip", 0.3),
]


class Script:
    def __init__(self, call_s: float):
        self.call_s, self.said = call_s, Counter()

    def __call__(self, request) -> Reply:
        number = int(re.search(r"Propose trial (\d+)\.", request["messages"][1]["content"])[1])
        self.said[number] += 1
        key, value = VALUES[(number - 1) % len(VALUES)]
        change = propose(title=f"{key} -> {value}", overrides={key: value})
        looks = use(("noise", {}), ("costs", {}))
        return replace(looks if self.said[number] == 1 else change, wait_s=self.call_s)


def main(trials: float = 6, call_s: float = 3, pairs: float = 2, tokens: float = 30_000) -> None:
    print(f"{trials:g} trials, two calls of {call_s:g} s for each, {tokens:,.0f} tokens a seed")
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        for pair in range(int(pairs)):
            for ahead in (False, True) if pair % 2 == 0 else (True, False):
                measure(clone, pair, ahead, trials, call_s, tokens)


def measure(
    clone: Path, pair: int, ahead: bool, trials: float, call_s: float, tokens: float
) -> None:
    name = f"{'ahead' if ahead else 'waits'}-{pair}"
    with ScriptedServer([Script(call_s)]) as server:
        command = [
            *(sys.executable, "-m", "nightshift.cli", "study", f"study.name={name}"),
            *("study.sources={llm: 1, sampler: 0, recipes: 0, combine: 0, simplify: 0}",),
            *("study.llm.model=openai:scripted", f"study.llm.base_url={server.url}"),
            *(f"study.trials={trials:g}", f"study.llm.ahead={str(ahead).lower()}", "tracking=off"),
            *("budget.kind=tokens", f"budget.amount={tokens}", "evaluate.max_bytes=20000"),
            *("study.baseline_seeds=[1,2]", "study.max_seeds=2", "runtime.num_dev_points=1"),
        ]
        given = {"cwd": clone, "env": os.environ | {"PYTHONPATH": f"{clone / 'src'}:{clone}"}}
        subprocess.run(command, **given, check=True, stdout=subprocess.DEVNULL)
    lines = (clone / f"outputs/studies/{name}/journal.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines][1:]
    begun = [datetime.fromisoformat(trial["started_at"]).timestamp() for trial in told]
    wall_s = begun[-1] + told[-1]["wall_s"] - begun[0]
    usages = [trial["proposal"]["usage"] for trial in told[1:]]
    waited = [u["seconds"] if u["waited_s"] is None else u["waited_s"] for u in usages]
    counted = tuple(
        sum(trial["proposal"]["usage"][f"{kind}_tokens"] for trial in told)
        for kind in ("input", "output")
    )
    print(
        f"{name}: {wall_s:.0f} s; runs {sum(t['wall_s'] for t in told):.0f} s, idle "
        f"{wall_s - sum(t['wall_s'] for t in told):.1f} s, waited for the model "
        f"{sum(waited):.1f} s of the {sum(u['seconds'] for u in usages):.1f}"
        f" s that it took; tokens right: {counted == server.tokens}",
        flush=True,
    )


if __name__ == "__main__":
    main(**{key: float(value) for key, value in (given.split("=") for given in sys.argv[1:])})
