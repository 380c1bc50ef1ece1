"""Text that somebody else wrote, quoted as data: what a model reads of logs, diffs and samples.

Covered: no text can forge the mark that ends it; terminal sequences, control characters and
invisible characters go; length is capped.
Not covered: what a quoted text makes its reader believe.
"""

import hashlib
import re
import unicodedata

KEPT = "\n\t"
REMOVED = ("Cc", "Cf", "Cs")  # control, format (zero width, tags), half surrogates


def as_data(text: str, max_chars: int, mark: str = "") -> str:
    """Text that a run or an agent wrote, capped in the middle, between marks that it cannot hold.

    The mark is a digest of the text, so no text can contain its own; or `mark`, if the text does
    not hold it. Control characters, escape sequences and invisible format characters go.
    """
    text = plain(text)
    if len(text) > max_chars:
        head, tail = max_chars // 4, max_chars - max_chars // 4
        text = (
            f"{text[:head]}\n[... {len(text) - max_chars} characters left out ...]\n{text[-tail:]}"
        )
    if not mark or mark in text:
        mark = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]
    return f"<data {mark}>\n{text}\n</data {mark}>"


def plain(text: str) -> str:
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    return "".join(c for c in text if c in KEPT or unicodedata.category(c) not in REMOVED)
