"""Text from a package, a folder or the hub -> documents -> train, dev, val and test shards.

A document's split follows from the sha256 of its text alone: adding documents never moves one, and
exact duplicates (the first is kept) cannot straddle two. Text is kept as it is, CRLF included.

The folder: `<split>-<number>.parquet` with the columns `name` and `text`, and manifest.json.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from nightshift.fixed import config as knobs
from nightshift.fixed import sources, store
from nightshift.fixed.config import ROOT, Config, ConfigError
from nightshift.fixed.result import CONFIG_FILE
from nightshift.fixed.sources import Document

SPLITS = ("train", "dev", "val", "test")
FORMAT = 1

SHARD_BYTES = 100_000_000  # of text; then the next shard begins
GROUP_BYTES = 2_000_000  # of text in a row group: what a reader holds in memory


def ensure_corpus(config: Config) -> Path:
    key, build = _plan(config)
    return store.ensure("corpus", key, build, config)


def stage(config: Config) -> None:
    """Write data/corpus."""
    key, build = _plan(config)
    store.build_into("corpus", key, build, ROOT / "data" / "corpus")


def corpus_key(config: Config) -> str:
    """Names documents and splits; of a folder it reads the list of files, not the files."""
    settings = config.corpus
    facts = settings.model_dump(
        include={"source", "max_documents", "dev_frac", "val_frac", "test_frac"}
    )
    if settings.source == "sotu":
        facts["sha256"] = sources.SOTU_SHA256
    elif settings.source == "folder":
        files = [(name, path.stat()) for name, path in sources.folder_files(settings)]
        facts["files"] = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
        facts["text_column"] = settings.text_column
    else:
        facts |= settings.model_dump(
            include={"repo", "revision", "files", "num_shards", "text_column"}
        )
    return knobs.digest([FORMAT, facts])


def read_documents(folder: Path, split: str) -> Iterator[Document]:
    """(name, text) of a split, in the stored order."""
    for shard in store.read_manifest(folder)["splits"][split]["shards"]:
        for batch in pq.ParquetFile(folder / shard["file"]).iter_batches(batch_size=256):
            yield from zip(batch["name"].to_pylist(), batch["text"].to_pylist(), strict=True)


def split_of(digest: bytes, settings: knobs.Corpus) -> str:
    """The split of the document whose text has this sha256."""
    position = int.from_bytes(digest[:8], "big") / 2**64
    for split in ("test", "val", "dev"):
        position -= getattr(settings, f"{split}_frac")
        if position < 0:
            return split
    return "train"


def _plan(config: Config):
    key = corpus_key(config)

    def build(folder: Path) -> None:
        files: list[dict[str, Any]] = []  # that were read, for the manifest
        documents = sources.documents(config, files)
        if config.corpus.source != "sotu":
            documents = store.progress(documents, "corpus", lambda document: len(document[1]))
        write_corpus(folder, key, documents, config.corpus, files)

    return key, build


def write_corpus(
    folder: Path,
    key: str,
    documents: Iterable[Document],
    settings: knobs.Corpus,
    files: list[dict[str, Any]],
) -> None:
    """`files` goes into the manifest last: it fills while the documents are read."""
    writers = {split: _SplitWriter(folder, split) for split in SPLITS}
    skipped, seen, last_duplicate = Counter(empty=0, duplicate=0), set(), None
    for name, text in documents:
        if not text.strip():
            skipped["empty"] += 1
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest[:16] in seen:
            skipped["duplicate"] += 1
            last_duplicate = name
            continue
        seen.add(digest[:16])
        writers[split_of(digest, settings)].add(name, text, digest)
        if len(seen) == settings.max_documents:
            break
    splits = {split: writer.close() for split, writer in writers.items()}
    _check_splits(splits, skipped, last_duplicate, settings)
    store.write_manifest(
        folder,
        key,
        digest=knobs.digest([splits[split]["digest"] for split in SPLITS]),
        config=settings.model_dump(),
        splits=splits,
        skipped=dict(skipped),
        sources=files,
    )


class _SplitWriter:
    """Streams the documents of one split into numbered shards."""

    SCHEMA = pa.schema([("name", pa.string()), ("text", pa.string())])

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.content = hashlib.sha256()
        self.num_documents = self.num_bytes = 0
        self.shards: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.texts: list[str] = []
        self.group_bytes = 0
        self.writer: pq.ParquetWriter | None = None

    def add(self, name: str, text: str, digest: bytes) -> None:
        size = len(text.encode())
        self.names.append(name)
        self.texts.append(text)
        self.content.update(digest + name.encode() + b"\0")
        self.num_documents += 1
        self.num_bytes += size
        self.group_bytes += size
        if self.group_bytes >= GROUP_BYTES:
            self._write_group()

    def close(self) -> dict[str, Any]:
        if self.texts:
            self._write_group()
        self._end_shard()
        return {
            "documents": self.num_documents,
            "bytes": self.num_bytes,
            "digest": self.content.hexdigest(),
            "shards": self.shards,
        }

    def _write_group(self) -> None:
        if self.writer is None:
            file = f"{self.split}-{len(self.shards):05d}.parquet"
            self.shards.append({"file": file, "rows": 0, "bytes": 0})
            self.writer = pq.ParquetWriter(self.folder / file, self.SCHEMA, compression="zstd")
        shard = self.shards[-1]
        self.writer.write_table(pa.table([self.names, self.texts], schema=self.SCHEMA))
        shard["rows"] += len(self.texts)
        shard["bytes"] += self.group_bytes
        self.names, self.texts, self.group_bytes = [], [], 0
        if shard["bytes"] >= SHARD_BYTES:
            self._end_shard()

    def _end_shard(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
            self.shards[-1]["sha256"] = store.sha256_file(self.folder / self.shards[-1]["file"])


def _check_splits(
    splits: dict[str, Any], skipped: Counter, last_duplicate: str | None, settings: knobs.Corpus
) -> None:
    if all(splits[split]["documents"] for split in SPLITS):
        return
    counts = ", ".join(f"{split} {splits[split]['documents']}" for split in SPLITS)
    left_out = f"{skipped['empty']} empty ones and {skipped['duplicate']} duplicates left out"
    if last_duplicate is not None:
        left_out += f", the last in {last_duplicate}"
    raise ConfigError(
        f"the corpus is too small to split: documents in {counts} ({left_out}). "
        "Add other documents, or raise corpus.dev_frac, val_frac and test_frac, "
        f"now {settings.dev_frac:g}, {settings.val_frac:g} and {settings.test_frac:g}"
    )


def main() -> int:
    """Fetch and split the corpus of a run's configuration: run=<folder with config.yaml>."""
    return fetch(ensure_corpus)


def fetch(ensure: Callable[[Config], Path]) -> int:
    """`ensure` for the configuration that the command line names; the exit status."""
    folder = Path(sys.argv[1].removeprefix("run="))
    try:
        values = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        ensure(knobs.check(values))
        return 0
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
