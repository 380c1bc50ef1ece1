"""Byte-level BPE: trained with rustbpe on the train split, used through tiktoken.

Stored as data, never as a pickle: `ranks.tiktoken` (a line for each token: its bytes in base64 and
its id) and `tokenizer.json` (split pattern, special tokens, size). Ids: bytes, merges, specials.

Every string that UTF-8 can encode comes back exactly: `encode` counts the bytes of its tokens and
raises when the split pattern lost some. Strings that look like special tokens are ordinary text.
"""

import base64
import binascii
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import regex
import rustbpe
import tiktoken

from nightshift.fixed import config as knobs
from nightshift.fixed import corpus, store
from nightshift.fixed.config import ROOT, Config, ConfigError
from nightshift.fixed.result import write_json

SPECIAL_TOKENS = (
    "<|bos|>",  # before every document
    "<|system_start|>",
    "<|system_end|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|tool_start|>",
    "<|tool_end|>",
)
assert len(SPECIAL_TOKENS) == knobs.NUM_SPECIAL_TOKENS

FORMAT = 1
RANKS_FILE = "ranks.tiktoken"
SETTINGS_FILE = "tokenizer.json"

# The split pattern sees at most this much at once: on a run of a million spaces its backtracking
# overflows the regex engine's stack (of 100,000 it does not).
CHUNK_CHARS = 32_768
TRAIN_CHUNK_CHARS = 2_048  # a merge walks whole words: no endless ones
PROBE = (  # letters, marks, digits, punctuation, white space, control characters, emoji
    "Ab cd'll \u00c4\u00df\u6f22\u5b57 \u0e44\u0e17\u0e22 e\u0301 123 45,6.7 !? -- \u00ab\u00bb"
    "\t\r\n\n  x\n \u00a0\u2028\x00\x7f\ufffd \U0001f642\U0001f469\u200d\U0001f467"
)


class Tokenizer:
    def __init__(self, ranks: dict[bytes, int], pattern: str):
        _check_ranks(ranks)
        _check_pattern(pattern)
        self.ranks, self.pattern = ranks, pattern
        self.special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.bos = self.special["<|bos|>"]
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self._encoding = tiktoken.Encoding(
            "nightshift", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special
        )
        self._num_bytes = self.token_bytes()

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """uint16 (tokens,). Raises ValueError for text that cannot come back exactly."""
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text (U+{ord(text[error.start]):04X}) is half of "
                "a surrogate pair and has no UTF-8 bytes. Decode the text with errors='replace'"
            ) from None
        try:
            parts = [
                self._encoding.encode_to_numpy(chunk, disallowed_special=())
                for chunk in _chunks(text, CHUNK_CHARS)
            ]
        except ValueError as error:  # the regex engine gave up
            raise ConfigError(f"tokenizer.split_pattern ({self.pattern!r}): {error}") from None
        ids = np.concatenate(parts).astype(np.uint16)
        if self._num_bytes[ids].sum() != num_bytes:
            raise ConfigError(_what_is_lost(self.pattern, text))
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int | None) -> list[np.ndarray]:
        """A uint16 array for each text; tiktoken works outside the interpreter lock."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode_array, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self._encoding.decode_bytes(np.asarray(ids).tolist())

    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): raw bytes of each token, 0 for the special ones."""
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self.ranks.items():
            counts[rank] = len(token)
        return counts

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        by_rank = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in by_rank]
        (folder / RANKS_FILE).write_text("".join(lines), encoding="ascii")
        settings = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "pattern": self.pattern,
            "special_tokens": self.special,
        }
        write_json(folder / SETTINGS_FILE, settings)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Raises ValueError, one line, for anything that `save` did not write."""
        folder = Path(folder)
        if not (folder / SETTINGS_FILE).exists():
            raise ValueError(
                f"no tokenizer at {folder}: {SETTINGS_FILE} is missing. Run: dvc repro tokenizer"
            )
        try:
            settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
            tokenizer = cls(_read_ranks(folder / RANKS_FILE), settings["pattern"])
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(
                f"the tokenizer in {folder} is damaged: {error}. Build it again"
            ) from None
        found = (settings.get("format"), settings.get("vocab_size"), settings.get("special_tokens"))
        if found != (FORMAT, tokenizer.vocab_size, tokenizer.special):
            raise ValueError(
                f"the tokenizer in {folder} is damaged: format, vocab_size or special_tokens in "
                f"{SETTINGS_FILE} do not fit its {len(tokenizer.ranks)} ranks. Build it again"
            )
        return tokenizer

    def digest(self) -> str:
        """Names what the tokenizer does."""
        state = hashlib.sha256(self.pattern.encode())
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            state.update(b"%d %d " % (rank, len(token)) + token)
        return state.hexdigest()


def train(texts: Iterable[str], settings: knobs.Tokenizer) -> Tokenizer:
    """Learn the merges from at most the first `train_bytes` of the texts."""
    _check_pattern(settings.split_pattern)
    num_ranks = settings.vocab_size - len(SPECIAL_TOKENS)
    trainer = rustbpe.Tokenizer()
    pieces = _first_bytes(texts, settings.train_bytes)
    trainer.train_from_iterator(pieces, vocab_size=num_ranks, pattern=settings.split_pattern)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < num_ranks:  # simple text: the model only gets a smaller table
        print(
            f"tokenizer: {len(ranks) + len(SPECIAL_TOKENS)} of {settings.vocab_size} tokens; "
            "the text cut by split_pattern gives no more merges",
            file=sys.stderr,
        )
    return Tokenizer(ranks, settings.split_pattern)


def tokenizer_key(config: Config, corpus_digest: str) -> str:
    return knobs.digest([FORMAT, SPECIAL_TOKENS, config.tokenizer.model_dump(), corpus_digest])


def ensure_tokenizer(config: Config) -> Path:
    key, build = _plan(config)
    return store.ensure("tokenizer", key, build, config)


def stage(config: Config) -> None:
    """Write data/tokenizer."""
    key, build = _plan(config)
    store.build_into("tokenizer", key, build, ROOT / "data" / "tokenizer")


def _plan(config: Config):
    documents = corpus.ensure_corpus(config)
    corpus_digest = store.read_manifest(documents)["digest"]
    key = tokenizer_key(config, corpus_digest)

    def build(folder: Path) -> None:
        texts = (text for _, text in corpus.read_documents(documents, "train"))
        tokenizer = train(texts, config.tokenizer)
        tokenizer.save(folder)
        store.write_manifest(
            folder,
            key,
            digest=tokenizer.digest(),
            corpus_digest=corpus_digest,
            config=config.tokenizer.model_dump(),
        )

    return key, build


def _chunks(text: str, size: int) -> Iterator[str]:
    """Pieces of at most `size` characters, cut before a space where there is one."""
    start = 0
    while len(text) - start > size:
        cut = text.rfind(" ", start + size // 2, start + size)
        cut = cut if cut > 0 else start + size
        yield text[start:cut]
        start = cut
    yield text[start:]


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    total = 0
    for text in texts:
        for chunk in _chunks(text, TRAIN_CHUNK_CHARS):
            yield chunk
            total += len(chunk.encode())
            if total >= limit:
                return


def _check_pattern(pattern: str) -> None:
    """The pattern compiles, matches no empty string (tiktoken panics) and loses no character."""
    single_bytes = {bytes([i]): i for i in range(256)}
    try:
        engine = tiktoken.Encoding(
            "probe", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={}
        )
        pieces = [match.group() for match in regex.finditer(pattern, PROBE)]
    except (ValueError, regex.error) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"tokenizer.split_pattern ({pattern!r}): no valid pattern: {reason}"
        ) from None
    if "" in pieces:
        raise ConfigError(
            f"tokenizer.split_pattern ({pattern!r}) matches an empty string; use + for *"
        )
    if "".join(pieces) != PROBE or len(engine.encode_ordinary(PROBE)) != len(PROBE.encode()):
        raise ConfigError(_what_is_lost(pattern, PROBE))


def _what_is_lost(pattern: str, text: str) -> str:
    """A sentence with the first character that the pattern does not match."""
    end = 0
    for match in regex.finditer(pattern, text):
        if match.start() > end:
            break
        end = match.end()
    lost = text[end : end + 1]
    return (
        f"tokenizer.split_pattern ({pattern!r}) loses characters, the first is {lost!r}: every "
        r"character must match. End the pattern with |[\s\S]"
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), start=1):
        try:
            token, rank = line.split(" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number} of {path.name} is not 'base64 rank'") from None
        if len(ranks) != number:
            raise ValueError(f"line {number} of {path.name} repeats a token")
    return ranks


def _check_ranks(ranks: dict[bytes, int]) -> None:
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the {len(ranks)} ranks are not 0 to {len(ranks) - 1}, each once")
    missing = [i for i in range(256) if bytes([i]) not in ranks]
    if missing:
        raise ValueError(f"the token for byte 0x{missing[0]:02x} is missing")
    if b"" in ranks:
        raise ValueError("there is a token without bytes")
