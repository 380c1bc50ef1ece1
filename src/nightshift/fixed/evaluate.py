"""Score a checkpoint in bits per byte of the fixed val text: run folder -> result.json.

val_bpb = nats of the text / (ln 2 * its UTF-8 bytes). Every byte is scored once, whatever the
tokenizer, the context length or the batch size; document boundaries have no bytes and are left out
of both sums. Log-probabilities are normalised here, in float32, from the model's logits, so they
always sum to one.

Covered: the metric is computed here, in a process of its own, from text that training never read;
bytes are counted from the text; leaks from the future are looked for; logits that are not finite
are a status, not a number; the weights are hashed before and after.
Not covered yet: the candidate's model code runs in this process, so code that means to cheat could.

    nightshift evaluate run=outputs/pretrain/<run>
"""

import sys
import time
from collections.abc import Callable, Iterator
from math import log
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nightshift.fixed import checkpoint, machine
from nightshift.fixed.config import Config, ConfigError
from nightshift.fixed.corpus import ensure_corpus, read_documents
from nightshift.fixed.result import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    RESULT_FILE,
    TRAINING_FILE,
    Result,
    read_training,
    write_json,
)
from nightshift.fixed.tokenizer import Tokenizer

Logits = Callable[[Tensor], Tensor]  # tokens (B, T) -> logits (B, T, V), in any float dtype

# bf16 sums may be ordered otherwise for another batch; a leak moves logits by whole units.
CAUSALITY_TOLERANCE = 0.02


class Invalid(Exception):
    """The model broke a rule of the metric; the message says which."""


def val_text(corpus: Path, max_bytes: int | None) -> list[str]:
    """Whole val documents in order, until `max_bytes` is reached; at least one."""
    texts, size = [], 0
    for _, text in read_documents(corpus, "val"):
        if texts and max_bytes is not None and size + len(text.encode()) > max_bytes:
            continue
        texts.append(text)
        size += len(text.encode())
    return texts


def token_stream(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """bos, document, bos, document, ... int64; each document checked to come back byte for byte."""
    parts = []
    for text in texts:
        tokens = tokenizer.encode(text)
        if tokenizer.decode_bytes(tokens) != text.encode():
            raise Invalid("the tokenizer does not reproduce the val text byte for byte")
        parts.append(np.array([tokenizer.bos, *tokens], dtype=np.int64))
    return np.concatenate(parts)


def windows(stream: np.ndarray, seq_len: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets), each (B, T): every token of the stream but the first is a target once.
    The last window is filled up with targets of -1."""
    num_targets = len(stream) - 1
    count = -(-num_targets // seq_len)
    inputs = np.zeros(count * seq_len, dtype=np.int64)
    targets = np.full(count * seq_len, -1, dtype=np.int64)
    inputs[:num_targets], targets[:num_targets] = stream[:-1], stream[1:]
    for first in range(0, count, batch_size):
        rows = slice(first * seq_len, (first + batch_size) * seq_len)
        yield (
            torch.from_numpy(inputs[rows]).view(-1, seq_len),
            torch.from_numpy(targets[rows]).view(-1, seq_len),
        )


def nats_of_targets(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """-log p of each target in float32, (B, T); 0 where the target is -1."""
    logits = logits_BTV.float()
    if not torch.isfinite(logits).all():
        raise Invalid("the model's logits are not all finite")
    chosen = logits.gather(-1, targets_BT.clamp(min=0)[..., None]).squeeze(-1)
    return (torch.logsumexp(logits, dim=-1) - chosen) * (targets_BT >= 0)


@torch.inference_mode()
def score(
    logits_of: Logits,
    texts: list[str],
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    device: torch.device,
) -> tuple[float, int, int]:
    """(bits per byte, bytes, tokens scored). Out of memory halves the batch, not the result."""
    stream = token_stream(texts, tokenizer)
    bytes_of_token = torch.from_numpy(tokenizer.token_bytes().astype(np.int64)).to(device)
    nats, num_bytes, num_tokens = 0.0, 0, 0
    try:
        for inputs, targets in windows(stream, seq_len, batch_size):
            inputs, targets = inputs.to(device), targets.to(device)
            sizes = bytes_of_token[targets.clamp(min=0)] * (targets >= 0)
            loss = nats_of_targets(logits_of(inputs), targets) * (
                sizes > 0
            )  # special tokens have no bytes
            nats += float(loss.double().sum())
            num_bytes += int(sizes.sum())
            num_tokens += int((sizes > 0).sum())
    except torch.OutOfMemoryError:
        if batch_size == 1:
            raise
        torch.cuda.empty_cache()
        return score(logits_of, texts, tokenizer, seq_len, batch_size // 2, device)
    true_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes != true_bytes:
        raise Invalid(f"{num_bytes} bytes were scored, the val text has {true_bytes}")
    return nats / log(2) / true_bytes, true_bytes, num_tokens


@torch.inference_mode()
def check_causality(
    logits_of: Logits,
    stream: np.ndarray,
    seq_len: int,
    vocab_size: int,
    num_windows: int,
    seed: int,
    device: torch.device,
) -> None:
    """Replaces what follows a random cut; logits up to the cut must not move."""
    random = np.random.default_rng(seed)
    length = min(seq_len, len(stream) - 1)
    for _ in range(num_windows):
        start = random.integers(0, len(stream) - length)
        cut = int(random.integers(1, length)) if length > 1 else 1
        whole = torch.from_numpy(stream[start : start + length].copy())[None]
        altered = whole.clone()
        altered[0, cut:] = torch.from_numpy(random.integers(0, vocab_size, length - cut))
        before, after = (logits_of(t.to(device))[0, :cut].float() for t in (whole, altered))
        moved = float((before - after).abs().max())
        if not moved <= CAUSALITY_TOLERANCE:
            raise Invalid(
                f"logits before position {cut} moved by {moved:.3g} when later tokens were "
                "changed: the model sees the future"
            )


def evaluate(run: Path, config: Config) -> Result:
    """The result of a run's checkpoint; a broken rule is the status `invalid`, never a number."""
    started_at = time.monotonic()
    training = read_training(run / TRAINING_FILE) if (run / TRAINING_FILE).is_file() else None
    if training is not None and training.status != "ok":
        return Result(status=training.status, message=training.message, training=training)
    device = machine.pick_device(config.runtime)
    machine.prepare(config.runtime, device)
    folder = run / CHECKPOINT_FOLDER
    weights_before = checkpoint.weights_sha256(folder)
    model, tokenizer, trained_with = checkpoint.load(folder, device)
    model.dtype = machine.pick_dtype(device, trained_with.train)
    model.eval()
    texts = val_text(ensure_corpus(config), config.evaluate.max_bytes)
    seq_len = trained_with.model.seq_len
    try:
        stream = token_stream(texts, tokenizer)
        check_causality(
            model,
            stream,
            seq_len,
            tokenizer.vocab_size,
            config.evaluate.causality_windows,
            config.seed,
            device,
        )
        val_bpb, num_bytes, num_tokens = score(
            model, texts, tokenizer, seq_len, config.evaluate.batch_size, device
        )
        if checkpoint.weights_sha256(folder) != weights_before:
            raise Invalid("the weights on disk changed while they were evaluated")
    except Invalid as error:
        return Result(status="invalid", message=str(error), training=training)
    return Result(
        status="ok",
        val_bpb=round(val_bpb, 6),
        num_bytes=num_bytes,
        num_tokens=num_tokens,
        eval_s=round(time.monotonic() - started_at, 3),
        weights_sha256=weights_before,
        training=training,
    )


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or not arguments[0].startswith("run="):
        print(
            "usage: nightshift evaluate run=<folder of a run>, e.g. run=outputs/pretrain/latest",
            file=sys.stderr,
        )
        return 2
    run = Path(arguments[0].removeprefix("run="))
    try:
        settings = run / CONFIG_FILE
        config = checkpoint.read_config(
            settings if settings.is_file() else run / CHECKPOINT_FOLDER / CONFIG_FILE
        )
        result = evaluate(run, config)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    write_json(run / RESULT_FILE, result)
    print(
        f"val_bpb {result.val_bpb:.6f} over {result.num_bytes:,} bytes in {result.eval_s:.1f} s"
        if result.status == "ok"
        else f"{result.status}: {result.message}"
    )
    return 0 if result.status == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
