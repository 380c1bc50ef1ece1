"""One large file over HTTP: a download that broke or was killed goes on where it ended.

huggingface_hub 2.4 resumes a broken connection, but begins a file anew after a kill, and a shard of
a corpus has up to 2 GB. Here the bytes so far are in `<file>.partial`, and the next call asks for
the rest (RFC 9110, Range). The file gets its name when it is whole and its hash is right.
"""

import fcntl
import http.client
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from nightshift.fixed import store

BLOCK_BYTES = 1 << 20
NUM_TRIES = 5  # in a row without a byte
TIMEOUT_S = 30
REPORT_S = 10  # a line of progress
BROKEN = (urllib.error.URLError, http.client.HTTPException, OSError)


def from_hub(repo: str, commit: str, name: str, place: Path) -> Path:
    """A file of a dataset on the Hugging Face hub. Raises ConnectionError and the hub's errors."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if place.is_file():
        return place
    url = hf_hub_url(repo, name, repo_type="dataset", revision=commit)
    headers = build_hf_headers()
    facts = get_hf_file_metadata(url, headers=headers)
    if urlsplit(facts.location).netloc != urlsplit(url).netloc:  # the token is for the hub alone
        headers = {key: value for key, value in headers.items() if key.lower() != "authorization"}
    is_sha256 = facts.etag and re.fullmatch(r"[0-9a-f]{64}", facts.etag)
    return download(facts.location, place, facts.size, facts.etag if is_sha256 else None, headers)


def download(
    url: str, place: Path, size: int | None, sha256: str | None, headers: dict[str, str]
) -> Path:
    """Raises ConnectionError; what has arrived stays for the next call."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.partial")
    with open(partial, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process downloads it: wait
        if place.is_file():
            return place
        _fill(file, url, size, headers, place.name)
        file.flush()
        if sha256 is not None and store.sha256_file(partial) != sha256:
            _empty(file)
            raise ConnectionError(f"{place.name} arrived damaged: its hash is not {sha256[:12]}...")
        partial.rename(place)
    return place


def _fill(file, url: str, size: int | None, headers: dict[str, str], name: str) -> None:
    """Asks for the rest until it is there; gives up after NUM_TRIES without a new byte."""
    tries, reported_at = 0, time.monotonic()
    while size is None or file.tell() < size:
        before = file.tell()
        try:
            with _rest(url, before, headers) as answer:
                if answer.status != 206:  # it does not know Range, or nothing is there yet
                    _empty(file)
                    size = size or _length(answer)
                while block := answer.read(BLOCK_BYTES):
                    file.write(block)
                    if time.monotonic() - reported_at > REPORT_S:
                        reported_at = time.monotonic()
                        _report(name, file.tell(), size)
            if size is None:
                return
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise ConnectionError(f"{name}: HTTP {error.code}") from None
            if error.code == 416:  # there is no such rest: another file than before
                _empty(file)
            problem = f"HTTP {error.code}"
        except BROKEN as error:
            if isinstance(error, OSError) and error.errno in (28, 122):  # no space left
                raise
            problem = str(error) or type(error).__name__
        tries = 0 if file.tell() > before else tries + 1
        if tries >= NUM_TRIES:
            raise ConnectionError(f"{name} stopped at byte {file.tell()}: {problem}")
        if tries:
            time.sleep(min(2**tries, 10) / 10)


def _empty(file) -> None:
    file.truncate(0)
    file.seek(0)


def _rest(url: str, start: int, headers: dict[str, str]):
    wanted = headers | ({"Range": f"bytes={start}-"} if start else {})
    return urllib.request.urlopen(urllib.request.Request(url, headers=wanted), timeout=TIMEOUT_S)


def _length(answer) -> int | None:
    length = answer.headers.get("Content-Length")
    return int(length) if length else None


def _report(name: str, done: int, size: int | None) -> None:
    total = f" of {size / 1e6:.0f}" if size else ""
    print(f"{name}: {done / 1e6:.0f}{total} MB", file=sys.stderr, flush=True)
