"""The documents of our lm-eval tasks: made from the dev split of the checkpoint's corpus.

Each function gets `folder`, the checkpoint's, and returns what a task asks for as `test`. The same
corpus gives the same documents: a seed of their own chooses them.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from nightshift.fixed import corpus
from nightshift.fixed.checkpoint import read_config

SEED = 0
NUM_DOCUMENTS = 100
PIECE_CHARS = 600
CONTEXT_SENTENCES = 3


def sentences(folder: str, **_) -> dict[str, Dataset]:
    random_ = random.Random(SEED)
    by_text = [split_sentences(text) for text in _texts(folder)]
    by_text = [found for found in by_text if len(found) > CONTEXT_SENTENCES]
    rows = [_question(by_text, random_) for _ in range(NUM_DOCUMENTS)] if by_text else []
    return {"test": Dataset.from_list(rows)}


def pieces(folder: str, **_) -> dict[str, Dataset]:
    random_ = random.Random(SEED)
    texts = [text[i : i + PIECE_CHARS] for text in _texts(folder) for i in _starts(text)]
    chosen = random_.sample(texts, min(NUM_DOCUMENTS, len(texts)))
    return {"test": Dataset.from_list([{"text": text} for text in chosen])}


def repeats(folder: str, **_) -> dict[str, Dataset]:
    random_ = random.Random(SEED)
    words = sorted({word for text in _texts(folder) for word in re.findall(r"[a-z]{3,8}", text)})
    lines = [" ".join(random_.sample(words, min(3, len(words)))) for _ in range(NUM_DOCUMENTS)]
    return {"test": Dataset.from_list([{"line": line} for line in lines])}


def split_sentences(text: str) -> list[str]:
    found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [sentence for sentence in found if 20 <= len(sentence) <= 200]


def _question(by_text: list[list[str]], random_: random.Random) -> dict:
    mine = random_.choice(by_text)
    start = random_.randrange(len(mine) - CONTEXT_SENTENCES)
    end = start + CONTEXT_SENTENCES
    others = [text for text in by_text if text is not mine] or by_text
    choices = [random_.choice(random_.choice(others)) for _ in range(3)]
    answer = random_.randrange(4)
    choices.insert(answer, mine[end])
    return {"context": " ".join(mine[start:end]), "choices": choices, "answer": answer}


def _starts(text: str) -> range:
    return range(0, len(text), PIECE_CHARS)


def _texts(folder: str) -> Iterator[str]:
    documents = corpus.ensure_corpus(read_config(Path(folder) / "config.yaml"))
    return (text for _, text in corpus.read_documents(documents, "dev"))
