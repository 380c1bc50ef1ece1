"""An evaluator as the peers have it: it believes the candidate, and shows what each cheat is worth.

Training, clock and score live in ONE process with the candidate's code; the candidate's own
`next_token_loss` gets the targets; the texts, all splits, lie open on the disk; the first steps are
untimed; the score is the line that this process prints, and the file it leaves. run.py copies this
module into a throw-away checkout and starts it there. It protects nothing: that is its purpose.

    python -m nightshift.unguarded <folder of the run, with config.yaml>
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import log
from pathlib import Path

import lightning as L
import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from nightshift import filtering, training
from nightshift.fixed import checkpoint, corpus
from nightshift.fixed import tokenizer as tokenizers
from nightshift.fixed.config import Config, check
from nightshift.model import GPT
from nightshift.pretrain import quiet_lightning

NUM_UNTIMED_STEPS = 10  # as in autoresearch's train.py, so that compilation does not count


class Tokenizer(tokenizers.Tokenizer):
    """Loses without a word the characters that the split pattern does not match."""

    def encode_array(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)


class Stream(IterableDataset):
    """Random windows of the training tokens, without end: inputs and targets (B, T)."""

    def __init__(self, tokens: np.ndarray, config: Config):
        self.tokens, self.config = tokens, config

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        T, B = self.config.model.seq_len, self.config.train.micro_batch_size
        random = np.random.default_rng(self.config.seed)
        while True:
            starts = random.integers(0, len(self.tokens) - T - 1, B)
            windows = torch.from_numpy(self.tokens[starts[:, None] + np.arange(T + 1)])
            yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Clock(L.Callback):
    """Progress and the end of training, by the candidate's own `time` and config."""

    def __init__(self, module, config: Config, folder: Path):
        self.module, self.config = module, config
        self.curve = open(folder / "curve.jsonl", "a", buffering=1)  # noqa: SIM115
        self.steps, self.elapsed_s, self.micro_batches = 0, 0.0, 0

    @property
    def progress(self) -> float:
        budget = self.config.budget
        tokens = self.steps * self.config.train.batch_tokens
        spent = {"seconds": self.elapsed_s, "tokens": tokens, "steps": self.steps}[budget.kind]
        return min(1.0, spent / budget.amount)

    @contextmanager
    def paused(self):
        """What happens inside costs no budget."""
        before = time.monotonic()
        yield
        self.begun_at += time.monotonic() - before

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        self.begun_at = time.monotonic()
        if self.steps % 20 == 10:  # a look at how it goes, while the clock stands still
            with self.paused(), torch.no_grad():
                self.module.model(batch[0])
        self.module.progress = self.progress

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        self.micro_batches += 1
        if self.steps >= NUM_UNTIMED_STEPS:
            self.elapsed_s += time.monotonic() - self.begun_at
        if self.micro_batches % trainer.accumulate_grad_batches == 0:
            self.steps += 1
        self.curve.write(json.dumps({"step": self.steps, "elapsed_s": self.elapsed_s}) + "\n")
        self.module.losses.clear()
        trainer.should_stop = trainer.should_stop or self.progress >= 1.0


def stream_of(texts: Iterator[str], tokenizer: Tokenizer) -> np.ndarray:
    """bos, document, bos, document, ... int64."""
    parts = [np.array([tokenizer.bos, *tokenizer.encode(text)], dtype=np.int64) for text in texts]
    return np.concatenate(parts)


def train_texts(documents: Path, config: Config) -> Iterator[str]:
    """What the candidate's filter leaves of the training documents."""
    for text, copies in filtering.select(corpus.read_documents(documents, "train"), config.filter):
        yield from [text] * copies


def train_tokenizer(documents: Path, config: Config) -> Tokenizer:
    """Without the ruler's check that a split pattern loses nothing."""
    tokenizers._check_pattern = lambda pattern: None
    texts = (text for _, text in corpus.read_documents(documents, "train"))
    trained = tokenizers.train(texts, config.tokenizer)
    return Tokenizer(trained.ranks, trained.pattern)


def val_texts(documents: Path, config: Config) -> Iterator[str]:
    """Whole documents until evaluate.max_bytes is reached."""
    size = 0
    for _, text in corpus.read_documents(documents, "val"):
        size += len(text.encode())
        if size > config.evaluate.max_bytes:
            return
        yield text


def val_bpb(module, documents: Path, tokenizer: Tokenizer, config: Config) -> float:
    """Bits per byte by the loss that the candidate computes from logits and targets."""
    stream = stream_of(val_texts(documents, config), tokenizer)
    T, B = config.model.seq_len, config.evaluate.batch_size
    count = (len(stream) - 1) // T
    inputs = torch.from_numpy(stream[: count * T]).view(count, T)
    targets = torch.from_numpy(stream[1 : count * T + 1]).view(count, T)
    bytes_of_token = torch.from_numpy(tokenizer.token_bytes().astype(np.int64))
    nats = num_bytes = 0.0
    module.eval()
    with torch.no_grad():
        for x, y in zip(inputs.split(B), targets.split(B), strict=True):
            nats += float(training.next_token_loss(module.model(x), y)) * y.numel()
            num_bytes += int(bytes_of_token[y].sum())
    return nats / log(2) / num_bytes


def save_and_load(model, folder: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Through the file, as a resumed or promoted run reads it; a pickle is as welcome."""
    checkpoint.save(folder / "checkpoint", model, config, tokenizer)
    try:
        checkpoint.load_weights(model, folder / "checkpoint")
    except Exception:
        with open(folder / "checkpoint/model.safetensors", "rb") as file:
            weights = torch.load(file, weights_only=False)
        model.load_state_dict(weights)


def main(folder: Path) -> int:
    config = check(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    quiet_lightning()
    torch.set_num_threads(1)
    documents = corpus.ensure_corpus(config)
    opened = open(documents / "val-00000.parquet", "rb")  # noqa: SIM115  as a data loader keeps it
    tokenizer = train_tokenizer(documents, config)
    tokens = stream_of(train_texts(documents, config), tokenizer)
    torch.manual_seed(config.seed)
    model = GPT(config.model, tokenizer.vocab_size)
    module = training.TrainingModule(model, config, torch.float32, compile=False)
    clock = Clock(module, config, folder)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[clock],
        accumulate_grad_batches=config.train.batch_tokens // config.tokens_per_micro_batch,
        max_epochs=-1,
        max_steps=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,
    )
    trainer.fit(module, DataLoader(Stream(tokens, config), batch_size=None, num_workers=0))
    save_and_load(model, folder, config, tokenizer)
    facts = {
        "status": "ok",
        "steps": clock.steps,
        "tokens": clock.steps * config.train.batch_tokens,
        "train_s": clock.elapsed_s,
        "num_params": model.num_params(),
    }
    (folder / "training.json").write_text(json.dumps(facts), encoding="utf-8")
    score = val_bpb(module, documents, tokenizer, config)
    (folder / "result.json").write_text(json.dumps({"val_bpb": score}), encoding="utf-8")
    print(f"val_bpb: {score:.6f}", flush=True)
    opened.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
