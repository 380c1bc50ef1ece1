"""A proposer's answer: its schema, and whether it applies, found out without a run.

Whoever proposes from outside the loop's own code (a language model, another agent, a person)
answers with an `Answer`. `check_answer` makes a Proposal of it or raises Refused with the exact
reason, so that the answer can be mended before it costs a trial. The rules themselves stand where
the loop applies them (agent/workspace.py); here they are tried on a worktree that is thrown away.
"""

import json
import os
import shutil
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from agent import workspace
from agent.journal import Edit, Journal, Proposal, Trial
from agent.novelty import State, changed_values, editable_values
from agent.settings import Bounds
from agent.similar import Near, Similar
from agent.target import TARGETS, VAL, Target
from agent.tracking import read_settings
from agent.workspace import Applied, Refused
from nightshift.fixed.config import Config, check

MAX_REPAIRS = 2  # of one idea: a repair that fails may be repaired once more
MAX_EDITS = 20
MAX_EDIT_CHARS = 20_000
CHECKS_FOLDER = "checks"  # in the study's folder: worktrees of answers that are looked at


class StudyFiles(NamedTuple):
    """A study as it lies on disk: enough for whoever looks at it from outside its process."""

    repo: Path
    folder: Path  # outputs/studies/<name>
    journal: Journal

    @property
    def settings(self) -> dict[str, Any]:
        return read_settings(self.folder)

    @property
    def target(self) -> Target:
        return TARGETS[self.settings.get("study", {}).get("target", VAL.name)]

    @property
    def baseline(self) -> Config:
        return check(self.settings["config"])

    @property
    def space(self) -> dict[str, Bounds]:
        return {key: check(each, Bounds) for key, each in self.settings["space"].items()}

    @property
    def head(self) -> str:
        """The commit that the next proposal is applied to."""
        incumbent = self.journal.incumbent
        return incumbent.commit if incumbent else self.settings["first_commit"]


class Arguments(BaseModel):
    """What a tool takes. Unknown names are refused; "3" is taken for 3, as models write it."""

    model_config = ConfigDict(extra="forbid")


class AnswerEdit(Arguments):
    path: str = Field(max_length=200, description="an editable file, e.g. src/nightshift/model.py")
    search: str = Field(
        min_length=1,
        max_length=MAX_EDIT_CHARS,
        description="text that occurs exactly once in the file as the incumbent has it, copied "
        "with its indentation",
    )
    replace: str = Field(max_length=MAX_EDIT_CHARS, description="what stands there instead")


Words = Annotated[str, StringConstraints(strip_whitespace=True)]


class Answer(Arguments):
    """One proposal: values, edits, or both, applied to the incumbent."""

    title: Words = Field(min_length=1, max_length=120, description="what changes: softcap 15 -> 20")
    hypothesis: Words = Field(
        min_length=1,
        max_length=600,
        description="one sentence: why it should help",
    )
    expected_effect: Words = Field(
        min_length=1,
        max_length=300,
        description="by how much the number should move, and its cost",
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict, max_length=50, description='new values: {"optim.matrix_lr": 0.03}'
    )
    edits: list[AnswerEdit] = Field(
        default_factory=list, max_length=MAX_EDITS, description="applied in this order"
    )
    repairs: int | None = Field(
        default=None, ge=1, description="number of the failed trial whose idea this tries again"
    )
    repeats: int | None = Field(
        default=None,
        ge=0,
        description="only to run an earlier trial again: its number. It runs on seeds that it had "
        "not; without overrides and edits, with that trial's own",
    )
    differs: str = Field(
        default="",
        max_length=400,
        description="only for what is much like an earlier trial: what differs, and why that "
        "should change the outcome",
    )


def read_answer(values: Any, shape: type[Arguments] = Answer) -> Any:
    """Raises Refused: one line for each mistake in the shape of an answer."""
    try:
        return shape.model_validate(values)
    except ValidationError as error:
        raise Refused(mistakes(error)) from None


def mistakes(error: ValidationError) -> str:
    """'edits.0.search: Field required; titel: Extra inputs are not permitted'"""
    lines = [f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors()[:5]]
    return "; ".join(lines)


def to_proposal(answer: Answer, source: str, journal: Journal) -> Proposal:
    """A repeat that gives no change takes that of the trial it repeats."""
    again = answer.repeats
    if again is not None and not (answer.overrides or answer.edits):
        if not again < len(journal):
            raise Refused(
                f"repeats {again}: there is no such trial; the last is {len(journal) - 1}."
            )
        before = journal.trials[again].proposal
        edits = [AnswerEdit(**asdict(edit)) for edit in before.edits]
        answer = answer.model_copy(update={"overrides": before.overrides, "edits": edits})
    return Proposal(
        title=_line(answer.title),
        hypothesis=_line(answer.hypothesis),
        source=source,
        overrides=answer.overrides,
        edits=[Edit(**edit.model_dump()) for edit in answer.edits],
        expected_effect=_line(answer.expected_effect),
        repairs=answer.repairs,
        differs=_line(answer.differs),
        repeats=again,
    )


class Checked(NamedTuple):
    proposal: Proposal
    applied: Applied  # to a worktree that is gone
    near: list[Near]


def check_answer(
    study: StudyFiles, answer: Answer, source: str, similar: Similar | None = None
) -> Checked:
    """The proposal, if it applies to the incumbent. Raises Refused with the exact reason.

    `similar`: one that is kept between calls spares taking a long journal apart each time.
    """
    return check_anew(study, to_proposal(answer, source, study.journal), similar)


def check_anew(study: StudyFiles, proposal: Proposal, similar: Similar | None = None) -> Checked:
    """`check_answer` of what may have been checked before, when the incumbent was another."""
    if not (proposal.overrides or proposal.edits):
        raise Refused("it changes nothing. Give overrides, edits, or both.")
    must_be_writable(proposal)
    must_be_repairable(study.journal, proposal)
    applied = try_on(study, proposal)
    near = (similar or Similar()).nearest(study.journal.trials, proposal)
    declared = proposal.repairs is not None or proposal.repeats is not None
    if near and not proposal.differs and not declared:
        raise Refused(must_differ(near))
    proposal.near = [one.trial.number for one in near]
    return Checked(proposal, applied, near)


def must_be_writable(proposal: Proposal) -> None:
    """The journal takes JSON in UTF-8: no NaN, no half of a surrogate pair. Raises Refused."""
    try:
        json.dumps(asdict(proposal), ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, TypeError) as error:
        raise Refused(f"it cannot be written down: {error}. Give plain text and numbers.") from None


def try_on(study: StudyFiles, proposal: Proposal) -> Applied:
    """Apply it to a worktree of the incumbent that is removed again. Raises Refused."""
    checks = study.folder / CHECKS_FOLDER
    place = checks / f"{os.getpid()}-{threading.get_ident()}"
    try:
        with workspace.worktree(study.repo, place, study.head) as tree:
            applied = workspace.apply(tree, proposal, f"check: {proposal.title}", study.target)
            baseline = editable_values(study.baseline)
            changed = changed_values(applied.config, baseline)
            state = State(applied.digest, changed, applied.shape)
            workspace.must_be_new(study.journal, proposal, state, baseline, study.space)
            return applied
    finally:
        if checks.is_dir() and not any(checks.iterdir()):
            shutil.rmtree(checks, ignore_errors=True)


def must_be_repairable(journal: Journal, proposal: Proposal) -> None:
    """Only what failed is repaired, and not for ever. Raises Refused."""
    if (number := proposal.repairs) is None:
        return
    if not 0 < number < len(journal):
        raise Refused(f"repairs {number}: there is no such trial; the last is {len(journal) - 1}.")
    if not journal.trials[number].failed:
        ran = "runs now" if journal.trials[number].status == "running" else "ran"
        raise Refused(
            f"repairs {number}: that trial {ran}; only one that failed is repaired. Leave repairs "
            "out and propose the change as a new idea."
        )
    if repairs_so_far(journal, number) >= MAX_REPAIRS:
        raise Refused(
            f"repairs {number}: that idea was repaired {MAX_REPAIRS} times, the limit. Propose "
            "something else."
        )


def repairs_so_far(journal: Journal, number: int) -> int:
    """How many trials tried to repair the idea that trial `number` belongs to."""
    first = _first_of_idea(journal, number)
    others = [t for t in journal.trials if t.proposal.repairs is not None]
    return sum(_first_of_idea(journal, t.number) == first for t in others)


def _first_of_idea(journal: Journal, number: int) -> int:
    while (before := journal.trials[number].proposal.repairs) is not None and before < number:
        number = before
    return number


def must_differ(near: list[Near]) -> str:
    one = near[0]
    return (
        f"much like trial {one.trial.number} ('{one.trial.proposal.title}', {outcome(one.trial)}): "
        f"{one.share:.0%} the same. Say in `differs` what differs and why that should change the "
        "outcome, or propose something else."
    )


def outcome(trial: Trial) -> str:
    """'discard, gain -0.0012' or 'crash'."""
    if trial.status != "ok":
        return trial.status
    return trial.decision if trial.gain is None else f"{trial.decision}, gain {trial.gain:+.4f}"


def _line(text: str) -> str:
    """One line without control characters: it becomes a commit message and a table's cell."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
