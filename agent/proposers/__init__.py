"""Where proposals come from. A proposer is a function `propose(context) -> Proposal | None`.

None means that it has nothing to propose for this trial. A proposer is deterministic: the same
context gives the same proposal, so that a study can be told again from its seed and journal. The
language model (llm.py) is not; what it said is in the study's conversations/.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent.journal import Journal, Proposal, Trial
from agent.target import VAL, Target
from nightshift.fixed.config import ConfigError, check, unflatten


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a proposer may look at."""

    number: int  # of the trial to propose
    seed: int  # study.seed
    journal: Journal  # every earlier trial, failures included
    values: dict[str, Any]  # the incumbent's resolved configuration, nested
    baseline: dict[str, Any]  # the baseline's
    space: dict[str, Any]  # 'optim.matrix_lr' -> agent.settings.Bounds
    sources: dict[str, float]  # share of each proposer (mixed.py)
    read: Callable[
        [str], str | None
    ]  # path in the repository -> the incumbent's text, None: no file
    target: Target = VAL  # what the study is judged by
    # Trials of earlier studies (study.after): what was thought of, not numbers to compare with.
    memory: list[Trial] = field(default_factory=list)
    note: Callable[[str], None] = field(default=lambda text: None)  # one line for the person
    researcher: Any = None  # agent.proposers.llm.Researcher, in a study that has one
    # (patient) -> the next proposal of the inbox; not patient: None after study.outside_wait_s
    outside: Callable[[bool], Proposal | None] = field(default=lambda patient: None)


def misfit(proposal: Proposal, read: Callable[[str], str | None]) -> str | None:
    """Why the edits do not apply to the incumbent's text; None if they do."""
    texts: dict[str, str] = {}
    for edit in proposal.edits:
        text = texts.get(edit.path) or read(edit.path)
        if text is None:
            return f"there is no {edit.path} at the incumbent"
        if (count := text.count(edit.search)) != 1:
            return f"its search text occurs {count} times in {edit.path} at the incumbent"
        texts[edit.path] = text.replace(edit.search, edit.replace)  # the next edit sees this one
    return None


def is_valid(flat: dict[str, Any]) -> bool:
    """Do these flat values make a configuration?"""
    try:
        check(unflatten(flat))
        return True
    except ConfigError:
        return False
