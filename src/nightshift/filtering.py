"""Which training documents are used, and how often.

Pure functions of one document. dev, val and test never pass through here.
"""

import hashlib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from nightshift.fixed.config import Filter, MixtureRule


def select(documents: Iterable[tuple[str, str]], filter: Filter) -> Iterator[tuple[str, int]]:
    """(name, text) of each training document -> (text, copies per epoch), none for the rejected."""
    for name, text in documents:
        copies = num_copies(text, mixture_weight(name, filter.mixture)) if keep(text, filter) else 0
        if copies:
            yield text, copies


def keep(text: str, filter: Filter) -> bool:
    return (
        len(text) >= filter.min_chars
        and (filter.max_chars is None or len(text) <= filter.max_chars)
        and repeated_line_frac(text) <= filter.max_repeated_line_frac
        and letter_frac(text) >= filter.min_letter_frac
    )


def repeated_line_frac(text: str) -> float:
    """Share of the non-empty lines that repeat an earlier line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def letter_frac(text: str) -> float:
    """Share of letters and white space among all characters."""
    return sum(c.isalpha() or c.isspace() for c in text) / len(text) if text else 0.0


def mixture_weight(name: str, mixture: list[MixtureRule]) -> float:
    """Weight of the first rule whose glob matches the name; 1 without one."""
    return next((rule.weight for rule in mixture if fnmatchcase(name, rule.match)), 1.0)


def num_copies(text: str, weight: float) -> int:
    """Whole copies, and one more for the documents whose hash falls within the fraction."""
    whole = int(weight)
    return whole + (content_frac(text) < weight - whole)


def content_frac(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48
