"""Where proposals come from. A proposer is a function `propose(context) -> Proposal | None`.

None means that it has nothing to propose for this trial. A proposer is deterministic: the same
context gives the same proposal, so that a study can be told again from its seed and journal. The
language model (llm.py) is not; what it said is in the study's conversations/.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Optional

from agent.decide import Rule
from agent.end import End
from agent.journal import Edit, Journal, Proposal, Trial
from agent.target import VAL, Target
from nightshift.fixed.config import ConfigError, check, flatten, unflatten


class Stem(NamedTuple):
    """Changes of earlier trials, applied to the incumbent, that a proposal is put on top of."""

    builds_on: tuple[int, ...] = ()  # discarded trials whose changes are put in, oldest first
    undoes: tuple[int, ...] = ()  # kept trials whose changes are taken out, newest first
    overrides: dict[str, Any] = {}
    edits: tuple[Edit, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.builds_on or self.undoes)


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
    strategy: str = "greedy"  # where proposals are put (strategy.py)
    rule: Rule = Rule(0.05, 0.1, 3, 12)  # by which trials are judged (decide.py)
    end: End = End()  # of the study
    plateau_after: int | None = None  # trials without a keep that make a plateau; None: no number
    target: Target = VAL  # what the study is judged by
    # Trials of earlier studies (study.after): what was thought of, not numbers to compare with.
    memory: list[Trial] = field(default_factory=list)
    note: Callable[[str], None] = field(default=lambda text: None)  # one line for the person
    researcher: Any = None  # agent.proposers.llm.Researcher, in a study that has one
    ahead: bool = False  # turns are known while the trial before runs (mixed.py)
    # (patient) -> the next proposal of the inbox; not patient: None after study.outside_wait_s
    outside: Callable[[bool], Proposal | None] = field(default=lambda patient: None)
    wide: bool = False  # steps over the whole range: small ones have brought nothing for long
    stem: Stem = Stem()  # what `values` and `read` have beyond the incumbent's
    root: Optional["Context"] = None  # the incumbent's own, where there is a stem

    def on(self, stem: Stem) -> "Context":
        """The same, as it is after the stem, which fits (strategy.py). Tells the person nothing."""
        if stem.is_empty:
            return self
        texts, _ = edited(stem.edits, self.read)
        return replace(
            self,
            values=unflatten(flatten(self.values) | stem.overrides),
            read=lambda path: texts[path] if path in texts else self.read(path),
            note=lambda text: None,
            stem=stem,
            root=self,
        )

    def off(self, proposal: Proposal) -> Proposal | None:
        """A proposal made on the stem, as a change of the incumbent; None if nothing is left."""
        if self.root is None:
            return proposal
        incumbent = flatten(self.root.values)
        overrides = self.stem.overrides | proposal.overrides
        whole = replace(
            proposal,
            overrides={k: v for k, v in overrides.items() if incumbent.get(k, ...) != v},
            edits=[*self.stem.edits, *proposal.edits],
            builds_on=list(self.stem.builds_on),
            undoes=list(self.stem.undoes),
        )
        return whole if whole.overrides or whole.edits else None


def edited(
    edits: Iterable[Edit], read: Callable[[str], str | None]
) -> tuple[dict[str, str], str | None]:
    """The texts after the edits, by path; and why the first that does not apply does not."""
    texts: dict[str, str] = {}
    for edit in edits:
        text = texts[edit.path] if edit.path in texts else read(edit.path)
        if text is None:
            return texts, f"there is no {edit.path} at the incumbent"
        if (count := text.count(edit.search)) != 1:
            return texts, f"its search text occurs {count} times in {edit.path} at the incumbent"
        texts[edit.path] = text.replace(edit.search, edit.replace)  # the next edit sees this one
    return texts, None


def misfit(proposal: Proposal, read: Callable[[str], str | None]) -> str | None:
    """Why the edits do not apply to the incumbent's text; None if they do."""
    return edited(proposal.edits, read)[1]


def shares_edit(a: Proposal, b: Proposal) -> bool:
    """Is an edit in both? Made twice, one that inserts beside what it searches would fit again."""
    return any(edit in b.edits for edit in a.edits)


def is_valid(flat: dict[str, Any]) -> bool:
    """Do these flat values make a configuration?"""
    try:
        check(unflatten(flat))
        return True
    except ConfigError:
        return False
