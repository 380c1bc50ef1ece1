"""What out-of-process scoring and its guards cost, against plain scoring in one process.

Both start warm, as in a study: `ruler` is nightshift.fixed.evaluate (two sandboxed model servers,
probes, untrained weights, hashes), `plain` loads the checkpoint and sums log-probabilities in one
process, in float32, with the same batches. Paired, in random order; the share is of a trial.

    python benchmarks/ruler_cost.py run=outputs/pretrain/<run> [pairs=7] [trial_s=60]
"""

import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]


def plain(run: Path) -> float:
    """val_bpb without guards, in this process."""
    import numpy as np
    import torch

    from nightshift.fixed import checkpoint, machine, ruler
    from nightshift.fixed.corpus import ensure_corpus
    from nightshift.fixed.tokenizer import Tokenizer, ensure_tokenizer

    config = checkpoint.read_config(run / "config.yaml")
    machine.prepare(config.runtime, torch.device("cpu"))
    model, _, trained_with = checkpoint.load(run / "checkpoint")
    model.dtype = torch.float32
    model.eval()
    texts = ruler.held_out_text(ensure_corpus(config), "val", config.evaluate.max_bytes)
    tokenizer = Tokenizer.load(ensure_tokenizer(config))
    windows = ruler.cut(texts, tokenizer, trained_with.model.seq_len)
    nats = 0.0
    with torch.inference_mode():
        for first in range(0, len(windows.inputs), config.evaluate.batch_size):
            rows = slice(first, first + config.evaluate.batch_size)
            targets = torch.from_numpy(windows.targets[rows])
            logp = ruler.nats_of_targets(model(torch.from_numpy(windows.inputs[rows])), targets)
            nats += float((logp.numpy() * windows.scored[rows]).sum(dtype=np.float64))
    return nats / np.log(2) / windows.num_bytes


def timed(starter, module: str, run: Path, src: Path, log: Path) -> float:
    from agent.warm import MARK, STUDY_MARK

    started = time.monotonic()
    marks = {MARK: "bench/000", STUDY_MARK: str(log.parent)}
    number = starter.start(
        module,
        [f"run={run}", f"tree={ROOT}"],
        src=src,
        env=marks | {"PATH": "/usr/bin:/bin"},
        log=log,
    )
    while (code := starter.wait(number, 0.5)) is None:
        pass
    if code:
        sys.exit(f"{module} failed: {log.read_text()[-500:]}")
    return time.monotonic() - started


def main() -> None:
    given = dict(a.split("=", 1) for a in sys.argv[1:])
    run = Path(given["run"]).resolve()
    from agent.warm import Starter

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        starter = Starter(Path(folder), warm=True)
        sides = {"ruler": ("nightshift.fixed.evaluate", ROOT / "src"),
                 "plain": ("ruler_cost", ROOT / "benchmarks")}  # fmt: skip
        for module, src in sides.values():  # the first of each reads files from the disk
            timed(starter, module, run, src, log)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for pair in range(int(given.get("pairs", 7))):
            for name in random.sample(list(sides), 2):
                seconds[name].append(timed(starter, sides[name][0], run, sides[name][1], log))
            print(
                f"pair {pair + 1}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items())
            )
        starter.close()
    ratios = [a / b for a, b in zip(seconds["ruler"], seconds["plain"], strict=True)]
    trial_s = float(given.get("trial_s", 60))
    median = {name: statistics.median(s) for name, s in seconds.items()}
    print(json.dumps({name: round(value, 2) for name, value in median.items()}))
    guards_s = median["ruler"] - median["plain"]
    print(
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"the ruler is {median['ruler'] / (trial_s + median['ruler']):.1%} of a trial of "
        f"{trial_s:g} s, its guards {guards_s / (trial_s + median['ruler']):.1%}"
    )


if __name__ == "__main__":
    if any(a.startswith("tree=") for a in sys.argv[1:]):  # started by `timed`
        plain(Path(sys.argv[1].removeprefix("run=")))
    else:
        main()
