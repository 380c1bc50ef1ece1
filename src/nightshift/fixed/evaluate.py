"""Score a checkpoint: run folder -> result.json with val_bpb, or with the reason why not.

The scorer holds the text and runs its own checkout's code (in a study: the base commit's). The
model runs in two sandboxed processes that are handed token ids and fill a buffer with logits
(fixed/logits.py): the first is shown every window once, the second only the probes. Both are forked
before the text is read, so that it is in the memory of neither. fixed/ruler.py has the arithmetic.

Covered, beside what ruler.py and logits.py cover: the tokenizer is the harness's own, never the
checkpoint's; the weights are those that training delivered, hashed before and after; they were
learned (untrained ones, on another seed's initialisation too, do worse; the initialisation depends
on the seed); training was not faster than the model can be; `test` is read once (fixed/ledger.py).
Not covered: a predictor that is no learner, but pretends to fail with untrained weights; a seed of
one's own for a part of the weights that is small beside the rest.

    nightshift evaluate run=outputs/pretrain/<run> [split=test]
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from nightshift.fixed import candidate, checkpoint, ledger, machine
from nightshift.fixed.config import ROOT, Config, ConfigError, config_digest
from nightshift.fixed.logits import Failed, ModelServer, OutOfMemory, load_model, rows_that_fit
from nightshift.fixed.prepare import corpus_apart, require
from nightshift.fixed.result import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    EDITABLE_MODULES,
    RESULT_FILE,
    TEST_RESULT_FILE,
    TRAINING_FILE,
    Result,
    Training,
    code_digests,
    read_training,
    write_json,
)
from nightshift.fixed.ruler import (
    Invalid,
    Windows,
    bits_per_byte,
    check_probes,
    cut,
    held_out_text,
    nats_of_rows,
    score,
)
from nightshift.fixed.store import read_manifest
from nightshift.fixed.tokenizer import Tokenizer, ensure_tokenizer

ALIKE = 0.95  # correlation of the initial weights of two seeds; independent ones have none
LEARNED_NATS = 0.01  # a token, better than untrained weights
MIN_STEPS_TO_LEARN = 10  # of training; a preflight learns nothing yet
FASTER_THAN_FORWARD = 6.0  # training in bf16 against scoring in float32; forward and backward
SPLITS = ("val", "test")


def evaluate(
    run: Path,
    config: Config,
    tree: Path = ROOT,
    split: str = "val",
    scoring: "type[Scoring] | None" = None,
) -> Result:
    """The result of a run's checkpoint with the code of `tree`; `scoring`: of text, or of chats."""
    started = time.monotonic()
    training = read_training(run / TRAINING_FILE) if (run / TRAINING_FILE).is_file() else None
    if training is not None and training.status != "ok":
        return Result(status=training.status, message=training.message, training=training)
    folder = run / CHECKPOINT_FOLDER
    try:
        weights = checkpoint.weights_sha256(folder)
        if training and training.weights_sha256 not in (None, weights):
            raise Invalid("the weights on disk are not those that training delivered")
        scored = (scoring or Scoring)(run, config, tree, split).result(training, weights)
        if checkpoint.weights_sha256(folder) != weights:
            raise Invalid("the weights on disk changed while they were scored")
    except Invalid as error:
        return Result(status="invalid", message=str(error), training=training, split=split)
    except Failed as error:
        return Result(status=error.status, message=str(error), training=training, split=split)
    except (OutOfMemory, MemoryError) as error:
        message = f"out of memory while scoring, one window at a time: {error}"
        return Result(status="oom", message=message, training=training, split=split)
    scored.eval_s = round(time.monotonic() - started, 3)
    return scored


class Scoring:
    """One evaluation: the two servers, the text, the guards."""

    editable = EDITABLE_MODULES

    def __init__(self, run: Path, config: Config, tree: Path, split: str):
        self.run, self.config, self.tree, self.split = run, config, tree, split
        self.deadline = time.monotonic() + config.evaluate.limit_s
        self.trained_with = checkpoint.read_config(run / CHECKPOINT_FOLDER / CONFIG_FILE)
        self.corpus = corpus_apart(config)
        self.tokenizer = Tokenizer.load(ensure_tokenizer(config))

    def result(self, training: Training | None, weights: str) -> Result:
        trees = self.code(training)
        first, second = self.serve(), self.serve()  # before the text is read
        try:
            for server in (first, second):
                require(server.child, self.config)
                server.ready()
            machine.prepare(self.config.runtime, machine.pick_device(self.config.runtime))
            windows = self.windows()
            nats, batch_size, forward, forward_cpu_s = self.score(first, windows)
            val_bpb = bits_per_byte(nats, windows)
            self.check_speed(training, forward)
            probes = check_probes(
                second.logits, nats, windows, batch_size, self.config.evaluate.probes
            )
            self.check_learned(second, training, nats, windows, batch_size)
            protections = first.child.layers
        finally:
            first.close()
            second.close()
        digest = read_manifest(self.corpus)["digest"]
        return Result(
            status="ok",
            val_bpb=round(val_bpb, 9),
            num_bytes=windows.num_bytes,
            num_tokens=int(windows.scored.sum()),
            forward_tokens_per_s=round(forward, 1),
            forward_cpu_s=round(forward_cpu_s, 3),
            probes=probes,
            split=self.split,
            weights_sha256=weights,
            training=training,
            binding=self.binding(training, weights, digest, trees, protections),
        )

    def code(self, training: Training | None) -> tuple[str, str]:
        """The digests of the code that is scored: that which trained."""
        trees = code_digests(self.tree, self.editable)
        trained = (training.fixed_code, training.editable_code) if training else (None, None)
        if trained not in ((None, None), trees):  # null: a run of one's own, outside a study
            raise Invalid("the code changed between training and scoring")
        return trees

    def serve(self) -> ModelServer:
        """A process with the trained model, ready to answer."""
        folder, values = self.run / CHECKPOINT_FOLDER, self.trained_with.model_dump()
        values["runtime"] = self.config.runtime.model_dump()
        vocab_size, tree = self.tokenizer.vocab_size, self.tree
        seq_len = self.trained_with.model.seq_len
        self.rows = rows_that_fit(self.config.evaluate.batch_size, seq_len, vocab_size)
        box = candidate.view(self.config, tree, readable=(folder / checkpoint.WEIGHTS_FILE,))
        shape = self.rows, seq_len, vocab_size
        return ModelServer(
            box, lambda: load_model(tree, folder, values, vocab_size), shape, self.deadline
        )

    def windows(self) -> Windows:
        texts = held_out_text(self.corpus, self.split, self.config.evaluate.max_bytes)
        return cut(texts, self.tokenizer, self.trained_with.model.seq_len)

    def score(self, server: ModelServer, windows: Windows) -> tuple[np.ndarray, int, float, float]:
        """(nats, batch size, tokens per second, CPU seconds for a million tokens).

        Out of memory halves the batch, not the result.
        """
        batch_size = self.rows
        while True:
            server.waited_s, before_s = 0.0, server.child.cpu_s()
            try:
                nats = score(server.logits, windows, batch_size)
            except OutOfMemory:
                if batch_size == 1:
                    raise
                batch_size //= 2
                continue
            shown = -(-len(windows.inputs) // batch_size) * batch_size * windows.inputs.shape[1]
            used_s = server.child.cpu_s() - before_s
            return nats, batch_size, shown / server.waited_s, used_s / shown * 1e6

    def check_speed(self, training: Training | None, forward: float) -> None:
        """Training goes forward and back: it cannot be many times as fast as forward alone."""
        rate = training.tokens_per_s if training else None
        if rate and rate > FASTER_THAN_FORWARD * forward:
            raise Invalid(
                f"training passed {rate:,.0f} tokens a second, but the model alone makes "
                f"{forward:,.0f} in scoring: the tokens were not learned from"
            )

    def check_learned(
        self,
        server: ModelServer,
        training: Training | None,
        nats: np.ndarray,
        windows: Windows,
        batch_size: int,
    ) -> None:
        """Untrained weights must do worse, and must depend on the seed."""
        if training is None or (training.steps or 0) < MIN_STEPS_TO_LEARN:
            return
        seed = training.seed or 0
        server.untrained(seed + 1)
        alike = server.untrained(seed)
        if not alike < ALIKE:
            raise Invalid(
                "the initial weights are (nearly) the same for every seed "
                f"(correlation {alike:.3f}): the code fixes its own seed. Seeds belong to the "
                "harness; use torch's default generator as it comes"
            )
        rows = slice(0, min(batch_size, len(windows.inputs)))
        inputs, targets = windows.inputs[rows], windows.targets[rows]
        untrained = nats_of_rows(server.logits, inputs, targets, batch_size)
        counted = windows.scored[rows]
        gained = float((untrained - nats[rows])[counted].mean())
        if gained < LEARNED_NATS:
            raise Invalid(
                f"nothing was learned: untrained weights do as well ({gained:+.4f} nats a token; "
                f"at least {LEARNED_NATS} must be gained in training)"
            )

    def binding(self, training, weights, corpus, trees, protections) -> dict[str, Any]:
        """What the number belongs to; agent/trial.py compares it with what it started."""
        t, device = training, machine.pick_device(self.config.runtime)
        versions = machine.facts(device)
        return {
            "commit": t and t.commit,
            "fixed_code": trees[0],
            "editable_code": trees[1],
            "config_digest": config_digest(self.trained_with),
            "corpus_digest": corpus,
            "data_digest": t and t.data_digest,
            "tokenizer_digest": self.tokenizer.digest()[:16],
            "weights_sha256": weights,
            "seed": t and t.seed,
            "steps": t and t.steps,
            "tokens": t and t.tokens,
            "budget": self.trained_with.budget.model_dump(),
            "device": device.type,
            "versions": {key: versions[key] for key in ("python", "torch", "lightning")},
            "protections": protections,
        }


def read_test(run: Path, config: Config, tree: Path) -> Result:
    result = evaluate(run, config, tree, "test")
    write_json(run / TEST_RESULT_FILE, result)  # before the ledger's line: a kill loses no number
    return result


def usage() -> int:
    print(
        "usage: nightshift evaluate run=<folder of a run> [split=test], "
        "e.g. run=outputs/pretrain/latest",
        file=sys.stderr,
    )
    return 2


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not all("=" in argument for argument in arguments):
        return usage()
    given = dict(argument.split("=", 1) for argument in arguments)
    if "run" not in given or set(given) - {"run", "tree", "split"}:
        return usage()
    run, split = Path(given["run"]), given.get("split", "val")
    if split not in SPLITS:
        print(f"split ({split}): must be {' or '.join(SPLITS)}", file=sys.stderr)
        return 2
    try:
        settings = run / CONFIG_FILE
        config = checkpoint.read_config(
            settings if settings.is_file() else run / CHECKPOINT_FOLDER / CONFIG_FILE
        )
        tree = Path(given.get("tree", ROOT))
        if split == "test":
            result = ledger.read_test_once(run, config, lambda: read_test(run, config, tree))
        else:
            result = evaluate(run, config, tree)
            write_json(run / RESULT_FILE, result)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{split}_bpb {result.val_bpb:.6f} over {result.num_bytes:,} bytes in {result.eval_s:.1f} s"
        if result.status == "ok"
        else f"{result.status}: {result.message}"
    )
    return 0 if result.status == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
