"""Score a tuned checkpoint on hidden conversations: run folder -> result.json with chat_bpb.

As evaluate.py, which does all but what is here: the scorer holds the val conversations and renders
them, two sandboxed processes hold the model and see token ids. The base that a run began from is
part of what its number belongs to.

Covered, beside what evaluate.py covers: val conversations are read after the model's processes were
forked, and were built in a process that ended.
Not covered: that something was learned. Weights that tuning left as they were get the base's
number, and a trial that is not better is discarded. Exact answers and multiple choice are not asked
here (chat_evaluate.py does, in the open). `test` is not read.

    python -m nightshift.fixed.chat_score run=<folder with config.yaml> tree=<worktree>
"""

import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np

from nightshift.fixed import chat_ruler, checkpoint, machine
from nightshift.fixed.chats import read_chats
from nightshift.fixed.config import Config, ConfigError
from nightshift.fixed.evaluate import Scoring, evaluate
from nightshift.fixed.prepare import chats_apart, read_arguments, require
from nightshift.fixed.result import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    RESULT_FILE,
    TUNING_MODULES,
    Result,
    Training,
    write_json,
)
from nightshift.fixed.ruler import MIN_PROBES, check_probes
from nightshift.fixed.store import read_manifest
from nightshift.fixed.tokenizer import Tokenizer


class ChatScoring(Scoring):
    """One evaluation on conversations."""

    editable = TUNING_MODULES

    def __init__(self, run: Path, config: Config, tree: Path, split: str):
        self.run, self.config, self.tree, self.split = run, config, tree, split
        self.deadline = time.monotonic() + config.evaluate.limit_s
        self.trained_with = checkpoint.read_config(run / CHECKPOINT_FOLDER / CONFIG_FILE)
        self.base, self.chats = Path(config.base), chats_apart(config)
        self.tokenizer = Tokenizer.load(self.base / "tokenizer")

    def result(self, training: Training | None, weights: str) -> Result:
        trees = self.code(training)
        first, second = self.serve(), self.serve()  # before the conversations are read
        try:
            for server in (first, second):
                require(server.child, self.config)
                server.ready()
            machine.prepare(self.config.runtime, machine.pick_device(self.config.runtime))
            chats = list(islice(read_chats(self.chats, self.split), self.limit))
            groups = chat_ruler.cut_chats(chats, self.tokenizer, self.trained_with.model.seq_len)
            nats, batch_sizes, forward, forward_cpu_s = self.score_all(first, groups)
            self.check_speed(training, forward)
            probes = self.probe(second, nats, groups, batch_sizes)
            protections = first.child.layers
        finally:
            first.close()
            second.close()
        scored = chat_ruler.scored(nats, groups, chats)
        digest = read_manifest(self.chats)["digest"]
        binding = self.binding(training, weights, digest, trees, protections)
        return Result(
            status="ok",
            chat_bpb=round(scored.bpb, 9),
            chat_bpb_interval=round(scored.interval(), 6),
            num_conversations=len(chats),
            num_bytes=int(scored.num_bytes.sum()),
            num_tokens=sum(int(group.scored.sum()) for group in groups),
            forward_tokens_per_s=round(forward, 1),
            forward_cpu_s=round(forward_cpu_s, 3),
            probes=probes,
            split=self.split,
            weights_sha256=weights,
            training=training,
            binding=binding | {"base_sha256": checkpoint.weights_sha256(self.base)},
        )

    @property
    def limit(self) -> int | None:
        return self.config.chat_evaluate.max_conversations

    def score_all(self, server, groups) -> tuple[list[np.ndarray], list[int], float, float]:
        """`score` for each width; rates over all of them."""
        nats, batch_sizes, shown, waited_s, used_s = [], [], 0, 0.0, 0.0
        for group in groups:
            found, batch_size, forward, forward_cpu_s = self.score(server, group)
            rows, width = group.inputs.shape
            tokens = -(-rows // batch_size) * batch_size * width
            nats.append(found)
            batch_sizes.append(batch_size)
            shown, waited_s = shown + tokens, waited_s + tokens / forward
            used_s += forward_cpu_s * tokens
        return nats, batch_sizes, shown / waited_s, used_s / shown

    def probe(self, server, nats, groups, batch_sizes) -> int:
        """Probes of each width by its share of the targets; returns how many were made."""
        total = sum(int(group.scored.sum()) for group in groups)
        made = 0
        for found, group, batch_size in zip(nats, groups, batch_sizes, strict=True):
            share = int(group.scored.sum()) / total
            count = max(MIN_PROBES, round(self.config.evaluate.probes * share))
            made += check_probes(server.logits, found, group, batch_size, count)
        return made


def main() -> int:
    try:
        run, tree, config = read_arguments("nightshift.fixed.chat_score")
        result = evaluate(run, config, tree, scoring=ChatScoring)
        write_json(run / RESULT_FILE, result)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if result.status != "ok":
        print(f"{result.status}: {result.message}")
        return 1
    said = f"chat_bpb {result.chat_bpb:.6f} +- {result.chat_bpb_interval:.4f}"
    print(f"{said} over {result.num_conversations} conversations in {result.eval_s:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
