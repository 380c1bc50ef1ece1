"""Conversations -> train, dev, val and test, by a hash of the first question.

So the same question with another answer never straddles two splits, and adding conversations moves
none. Training reads train (and dev for its curve), chat_evaluate.py reads val; test waits.

The folder: `<split>.jsonl`, a conversation a line: messages, source, choices; and manifest.json.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nightshift.fixed import chat_sources, corpus, sources, store, tasks
from nightshift.fixed import config as knobs
from nightshift.fixed.config import ROOT, Config, ConfigError
from nightshift.fixed.corpus import SPLITS
from nightshift.fixed.tasks import Chat

FORMAT = 1
TASK_SEED = 0  # of the questions, never of a run


def ensure_chats(config: Config) -> Path:
    key, build = _plan(config)
    return store.ensure("chats", key, build, config)


def stage(config: Config) -> None:
    """Write data/chats."""
    key, build = _plan(config)
    store.build_into("chats", key, build, ROOT / "data" / "chats")


def read_chats(folder: Path, split: str) -> Iterator[Chat]:
    with open(folder / f"{split}.jsonl", encoding="utf-8") as file:
        for line in file:
            yield Chat(**json.loads(line))


def chats_key(config: Config, corpus_digest: str | None) -> str:
    """Names conversations and splits; of a folder it reads the list of files, not the files."""
    settings = config.conversations
    facts: dict[str, Any] = settings.model_dump(exclude={"path"})
    if settings.source == "embedded":
        facts["sha256"] = chat_sources.CHATTERBOT_SHA256
    elif settings.source == "folder":
        with chat_sources.told_as_conversations():
            found = sources.folder_files(chat_sources.as_corpus(config))
        files = [(name, path.stat()) for name, path in found]
        facts["files"] = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return knobs.digest([FORMAT, facts, corpus_digest])


def _plan(config: Config):
    settings, documents = config.conversations, None
    if settings.tasks.total:
        documents = corpus.ensure_corpus(config)
    digest = documents and store.read_manifest(documents)["digest"]
    key = chats_key(config, digest)

    def build(folder: Path) -> None:
        files, skipped = [], Counter()
        train = corpus.read_documents(documents, "train") if documents else ()
        made = tasks.make(settings.tasks.model_dump(), train, TASK_SEED) if documents else []
        found = [*chat_sources.chats(config, files, skipped), *made]
        splits = split(found, settings, skipped)
        facts = {name: write_split(folder / f"{name}.jsonl", splits[name]) for name in SPLITS}
        store.write_manifest(
            folder,
            key,
            digest=knobs.digest([facts[name]["sha256"] for name in SPLITS]),
            config=settings.model_dump(exclude={"path"}),
            splits=facts,
            skipped=dict(skipped),
            sources=files,
        )

    return key, build


def split(
    found: Iterable[Chat], settings: knobs.Conversations, skipped: Counter
) -> dict[str, list[Chat]]:
    """Each split in the order of the hashes; exact repetitions are left out."""
    places: dict[bytes, tuple[bytes, Chat]] = {}
    for chat in found:
        digest = hashlib.sha256(json.dumps(chat.messages, ensure_ascii=False).encode()).digest()
        if digest in places:
            skipped["duplicate"] += 1
        places.setdefault(digest, (question_hash(chat), chat))
    splits: dict[str, list[Chat]] = {name: [] for name in SPLITS}
    for _, (asked, chat) in sorted(places.items(), key=lambda item: item[0]):
        splits[corpus.split_of(asked, settings)].append(chat)
    if empty := [name for name in SPLITS if not splits[name]]:
        counts = ", ".join(f"{name} {len(splits[name])}" for name in SPLITS)
        raise ConfigError(
            f"conversations: too few to split, nothing in {empty[0]} ({counts}; "
            f"{skipped['no turns']} without turns and {skipped['duplicate']} duplicates left out). "
            "Add conversations, or raise conversations.dev_frac, val_frac and test_frac"
        )
    return splits


def question_hash(chat: Chat) -> bytes:
    """Of the first thing that the user says, whatever its case and spaces."""
    asked = next(m["content"] for m in chat.messages if m["role"] == "user")
    return hashlib.sha256(" ".join(asked.casefold().split()).encode()).digest()


def write_split(path: Path, chats: list[Chat]) -> dict[str, Any]:
    with open(path, "w", encoding="utf-8") as file:
        for chat in chats:
            file.write(json.dumps(asdict(chat), ensure_ascii=False) + "\n")
    sources_of = Counter(chat.source for chat in chats)
    return {
        "conversations": len(chats),
        "sources": dict(sources_of.most_common(20)),
        "sha256": store.sha256_file(path),
    }


def main() -> int:
    """Fetch and split the conversations of a run's configuration: run=<folder with config.yaml>."""
    return corpus.fetch(ensure_chats)


if __name__ == "__main__":
    sys.exit(main())
