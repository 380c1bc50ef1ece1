"""Where proposals come from. A proposer is a function `propose(context) -> Proposal | None`.

None means that it has nothing to propose for this trial. A proposer is deterministic: the same
context gives the same proposal, so that a study can be told again from its seed and journal. The
language model (llm.py) is not; what it said is in the study's conversations/.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent.journal import Journal


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
    note: Callable[[str], None] = field(default=lambda text: None)  # one line for the person
    researcher: Any = None  # agent.proposers.llm.Researcher, in a study that has one
