"""Documents -> flat files of token ids -> batches.

A split is one stream of uint16, little-endian: bos, document, bos, document, ... Batches are
windows of the stream, without padding. Only train passes the filter; documents lie in an order that
follows from a hash of their content.

The filter is code that trials edit: it says how many copies of each training document are used, and
nothing else. It never writes a token; in a study it runs in a sandbox of its own (prepare.py).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nightshift.fixed import config as knobs
from nightshift.fixed import corpus, store
from nightshift.fixed.config import ROOT, Config, ConfigError
from nightshift.fixed.tokenizer import Tokenizer, ensure_tokenizer

FORMAT = 1
MAX_COPIES = 255
BLOCK_BYTES = 64_000_000  # of text in memory at once; documents are shuffled within a block

# B batch, T time


CopiesOf = Callable[[Path, Config], np.ndarray]  # corpus folder -> uint8 (training documents,)


def ensure_tokens(config: Config, tree: Path = ROOT, copies_of: CopiesOf | None = None) -> Path:
    """`tree`: the checkout whose filter counts; `copies_of` runs it (default: in this process)."""
    key, build = _plan(config, tree, copies_of or copies_here)
    return store.ensure("tokens", key, build, config)


def copies_here(corpus_folder: Path, config: Config) -> np.ndarray:
    """The filter's answer for each training document: copies per epoch, uint8; 0: left out."""
    from nightshift import filtering

    index_of: dict[bytes, int] = {}

    def documents() -> Iterator[tuple[str, str]]:
        for name, text in corpus.read_documents(corpus_folder, "train"):
            index_of[hashlib.sha256(text.encode()).digest()] = len(index_of)
            yield name, text

    chosen = []
    for text, copies in filtering.select(documents(), config.filter):
        index = index_of.get(hashlib.sha256(text.encode()).digest())
        if index is None:
            raise ConfigError(
                "filtering.select returned a text that is no training document: it chooses "
                "documents, it does not write them. Return texts as they come"
            )
        if not 0 <= int(copies) <= MAX_COPIES:
            raise ConfigError(
                f"filtering.select wants {copies} copies of a document; possible: 0 to {MAX_COPIES}"
            )
        chosen.append((index, int(copies)))
    copies = np.zeros(len(index_of), dtype=np.uint8)
    for index, count in chosen:
        copies[index] = count
    return copies


def stage(config: Config) -> None:
    """Write data/tokens."""
    key, build = _plan(config, ROOT, copies_here)
    store.build_into("tokens", key, build, ROOT / "data" / "tokens")


class Batches:
    """Windows of a token stream, in an order that follows from the seed.

    An epoch is a permutation of the windows that begin at offset + i * T, i < num_windows, with an
    offset of its own. Any batch can be had at any time: resuming needs only its index.
    """

    def __init__(self, folder: Path, split: str, seq_len: int, micro_batch_size: int, seed: int):
        self.tokens = np.memmap(Path(folder) / f"{split}.bin", dtype="<u2", mode="r")
        self.seq_len, self.micro_batch_size, self.seed = seq_len, micro_batch_size, seed
        spare = len(self.tokens) - 1 - seq_len
        if spare < 0:
            raise ConfigError(
                f"model.seq_len ({seq_len}): the {split} split has only {len(self.tokens)} tokens, "
                f"{seq_len + 1} are needed. Lower model.seq_len, use more text or a milder filter"
            )
        self.num_windows = max(1, (spare + 1) // seq_len)
        self.num_offsets = len(self.tokens) - self.num_windows * seq_len
        self._starts_of_epoch = lru_cache(maxsize=2)(self._shuffled_starts)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Micro-batch `index` of an endless sequence: x, y int64 (B, T), y one ahead of x."""
        samples = index * self.micro_batch_size + np.arange(self.micro_batch_size)
        epochs, positions = np.divmod(samples, self.num_windows)
        starts = np.empty_like(samples)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            starts[chosen] = self._starts_of_epoch(int(epoch))[positions[chosen]]
        return self._gather(starts)

    def in_order(self, max_tokens: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches over the whole stream once, first to last; the last one may be smaller.

        With `max_tokens`, windows spread evenly over the stream. The tail is left out.
        """
        total = (len(self.tokens) - 1) // self.seq_len
        count = total if max_tokens is None else min(total, max(1, max_tokens // self.seq_len))
        starts = np.arange(count) * total // count * self.seq_len
        for first in range(0, count, self.micro_batch_size):
            yield self._gather(starts[first : first + self.micro_batch_size])

    def _shuffled_starts(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        offset = random.integers(self.num_offsets)
        return random.permutation(self.num_windows) * self.seq_len + offset

    def _gather(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        windows = self.tokens[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int64)
        windows = torch.from_numpy(windows)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def tokens_key(config: Config, corpus_digest: str, tokenizer_digest: str, tree: Path = ROOT) -> str:
    code = (tree / "src/nightshift/filtering.py").read_text(
        encoding="utf-8"
    )  # edited: other tokens
    return knobs.digest([FORMAT, corpus_digest, tokenizer_digest, config.filter.model_dump(), code])


def _plan(config: Config, tree: Path, copies_of: CopiesOf):
    documents, vocabulary = corpus.ensure_corpus(config), ensure_tokenizer(config)
    corpus_digest = store.read_manifest(documents)["digest"]
    tokenizer_digest = store.read_manifest(vocabulary)["digest"]
    key = tokens_key(config, corpus_digest, tokenizer_digest, tree)

    def build(folder: Path) -> None:
        tokenizer = Tokenizer.load(vocabulary)
        copies = copies_of(documents, config).tolist()
        texts = (text for _, text in corpus.read_documents(documents, "train"))
        train = ((text, n) for text, n in zip(texts, copies, strict=True) if n)
        dev = ((text, 1) for _, text in corpus.read_documents(documents, "dev"))
        splits = {
            "train": write_stream(
                folder / "train.bin", train, tokenizer, config.runtime.num_threads
            ),
            "dev": write_stream(folder / "dev.bin", dev, tokenizer, config.runtime.num_threads),
        }
        if not splits["train"]["documents"]:
            raise ConfigError(
                "filter: no training document passes it. Relax conf/filter or filtering.py"
            )
        store.write_manifest(
            folder,
            key,
            digest=knobs.digest([splits[split]["sha256"] for split in splits]),
            corpus_digest=corpus_digest,
            tokenizer_digest=tokenizer_digest,
            config=config.filter.model_dump(),
            splits=splits,
        )

    return key, build


def write_stream(
    path: Path, documents: Iterable[tuple[str, int]], tokenizer: Tokenizer, num_threads: int | None
) -> dict[str, int | str]:
    """Write the stream; returns its counts. `documents` are (text, copies)."""
    counts = {"documents": 0, "bytes": 0, "tokens": 0}
    bos = np.array([tokenizer.bos], dtype="<u2")
    with open(path, "wb") as file:
        for block in _blocks(store.progress(documents, path.stem, lambda pair: len(pair[0]))):
            arrays = tokenizer.encode_batch([text for text, _ in block], num_threads)
            for which in _order(block):
                for part in (bos, arrays[which]):
                    file.write(part.astype("<u2").tobytes())
                    counts["tokens"] += len(part)
                counts["documents"] += 1
                counts["bytes"] += len(block[which][0].encode())
    return {**counts, "sha256": store.sha256_file(path)}


def _blocks(documents: Iterable[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    block, size = [], 0
    for text, copies in documents:
        block.append((text, copies))
        size += len(text)
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _order(block: list[tuple[str, int]]) -> list[int]:
    """Index of each copy of each document of the block, shuffled by a hash of text and copy."""
    places = []
    for index, (text, copies) in enumerate(block):
        content = hashlib.sha256(text.encode())
        for copy in range(copies):
            state = content.copy()
            state.update(b"\0%d" % copy)
            places.append((state.digest(), index))
    return [index for _, index in sorted(places)]
