"""Folders that are found by the key of what they hold, and built whole or not at all.

A folder counts if and only if its manifest.json carries the key that is asked for. It is built in
`<folder>.partial`, which is locked while somebody builds (the others wait), and renamed when it is
whole: a kill at any time leaves a partial folder, which the next build empties and uses again.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nightshift.fixed.config import ROOT, Config
from nightshift.fixed.result import write_json

MANIFEST = "manifest.json"


def ensure(stage: str, key: str, build: Callable[[Path], None], config: Config) -> Path:
    """The folder of `stage` with this key: the DVC output, a cached one, or built now.

    `build(folder)` fills an empty folder and ends with `write_manifest(folder, key, ...)`.
    """
    cached = ROOT / config.runtime.cache_dir / stage / key
    places = [ROOT / "data" / stage, cached]
    if config.runtime.shared_cache_dir is not None:
        places.append(ROOT / config.runtime.shared_cache_dir / stage / key)
    for folder in places:
        if has_key(folder, key):
            return folder
    return build_into(stage, key, build, cached)


def build_into(stage: str, key: str, build: Callable[[Path], None], folder: Path) -> Path:
    """Build `folder` unless it has the key already; an older folder there is replaced."""
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _only_builder(partial):
            if has_key(folder, key):
                return folder
            build(partial)
            assert has_key(partial, key), f"the build of {stage} wrote no manifest with key {key}"
            _replace(partial, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"the disk is full while writing {stage} to {folder.parent}. Free some space, "
                "or put runtime.cache_dir on another disk",
            ) from None
        raise
    return folder


def has_key(folder: Path, key: str) -> bool:
    try:
        return read_manifest(folder).get("key") == key
    except (OSError, ValueError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def write_manifest(folder: Path, key: str, **facts: Any) -> None:
    write_json(folder / MANIFEST, {"key": key, **facts})


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def progress(items: Iterable, label: str, size: Callable[[Any], int]) -> Iterator:
    """Pass items through; on a terminal, count what has passed (MB) on one line of stderr."""
    start, shown_at, total, live = time.monotonic(), 0.0, 0, sys.stderr.isatty()
    for item in items:
        yield item
        total, now = total + size(item), time.monotonic()
        if live and now - start > 2 and now - shown_at > 0.5:
            print(f"\r{label}  {total / 1e6:,.0f} MB", end="", file=sys.stderr, flush=True)
            shown_at = now
    if shown_at:
        print(f"\r{label}  {total / 1e6:,.0f} MB", file=sys.stderr)


@contextmanager
def _only_builder(partial: Path):
    """Hold the lock on an empty `partial`; it is gone afterwards, renamed or removed."""
    descriptor = _lock(partial)
    try:
        _empty(partial)
        yield
    finally:
        if _is_same(partial, descriptor):
            shutil.rmtree(partial)
        os.close(descriptor)


def _lock(folder: Path) -> int:
    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # renamed or removed since the line above
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_same(folder, descriptor):  # else its builder finished while we waited
            return descriptor
        os.close(descriptor)


def _is_same(folder: Path, descriptor: int) -> bool:
    return folder.exists() and os.path.samestat(folder.stat(), os.fstat(descriptor))


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()


def _replace(partial: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
