"""Tools over one study, for whoever proposes: what may be looked at, and whether an answer applies.

One definition for the language model (proposers/llm.py), other agents and the command line: TOOLS
maps a name to its arguments (a pydantic model) and a function of (StudyFiles, arguments); `call`
takes JSON and gives JSON. Nothing here runs a trial or writes to the journal. The answer itself is
`agent.answer.Answer`; `check_proposal` says whether it would apply.

Covered: files come from git at a trial's commit, and only editable ones; every answer is capped;
text that a run wrote (log, message, samples, diff) is quoted as data (agent/quote.py).
Not covered: what a quoted text makes its reader believe. That is why a proposal is checked, run in
a sandbox and judged by numbers, whoever asked for it.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field, ValidationError

from agent import records, workspace
from agent.answer import Answer, Arguments, StudyFiles, check_answer, mistakes, outcome
from agent.quote import as_data
from agent.records import MAX_DIFF_CHARS, trial_of
from agent.settings import StudyError
from agent.workspace import Refused
from nightshift.fixed.config import EDITABLE_GROUPS, Config, flatten

MAX_FILE_CHARS = 20_000  # of one answer; the rest is read with `offset`


# ---- files and keys ----


class ReadFile(Arguments):
    path: str = Field(max_length=200, description="an editable file")
    trial: int | None = Field(
        default=None, ge=0, description="at this trial's commit; the incumbent's if left out"
    )
    offset: int = Field(default=0, ge=0, description="first character")


def read_file(study: StudyFiles, args: ReadFile) -> dict[str, Any]:
    """An editable file as the incumbent, or an earlier trial, has it."""
    if not workspace.is_editable(args.path, study.target):
        raise Refused(f"{args.path} is not editable. Editable: {study.target.editable}.")
    commit = study.head if args.trial is None else trial_of(study, args.trial).commit
    if commit is None:
        raise Refused(f"trial {args.trial} has no commit: it was refused before it had one.")
    text = text_at(study.repo, commit, args.path)
    if text is None:
        raise Refused(f"there is no file {args.path} at that commit.")
    part = text[args.offset : args.offset + MAX_FILE_CHARS]
    answer = {"path": args.path, "trial": args.trial, "text": part, "chars": len(text)}
    end = args.offset + len(part)
    return answer | ({"next_offset": end} if end < len(text) else {})


def text_at(repo: Path, commit: str, path: str) -> str | None:
    """A regular file's text at a commit; None where there is none, or a link."""
    entry = workspace.git(repo, "ls-tree", "--long", commit, "--", path)
    if not entry.startswith("100"):
        return None
    _, _, blob, size, *_ = entry.split()
    content = workspace.git(repo, "cat-file", "blob", blob).encode("utf-8", "surrogateescape")
    if len(content) < int(size):  # `git` above takes a newline from the end
        content += b"\n"
    return content.decode("utf-8", "replace")


class Editable(Arguments):
    pass


def editable(study: StudyFiles, args: Editable) -> dict[str, Any]:
    """What a proposal may change: the files, and every key with its present value and its range."""
    listed = workspace.git(study.repo, "ls-tree", "-r", "--name-only", study.head, "src", "conf")
    values, space = flatten(incumbent_values(study)), study.settings.get("space", {})
    keys = {
        key: {"value": values.get(key), **rule, **searched(space.get(key))}
        for key, rule in key_rules(study.target.groups).items()
    }
    files = [p for p in listed.splitlines() if workspace.is_editable(p, study.target)]
    return {"files": files, "keys": keys}


def incumbent_values(study: StudyFiles) -> dict[str, Any]:
    """The incumbent's resolved configuration, nested."""
    incumbent = study.journal.incumbent
    path = study.folder / f"trials/{incumbent.number if incumbent else 0:03d}/config.yaml"
    if path.exists():
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    return study.settings["config"]


def key_rules(groups: Iterable[str] = EDITABLE_GROUPS) -> dict[str, dict[str, Any]]:
    """'optim.matrix_lr' -> {"type": "number", "above": 0, "max": 10}, from the schema."""
    rules = {}
    for group in groups:
        schema = Config.model_fields[group].annotation.model_json_schema()
        for name, field in schema["properties"].items():
            rules[f"{group}.{name}"] = _rule(field)
    return rules


def _rule(field: dict[str, Any]) -> dict[str, Any]:
    options = field.get("anyOf", [field])
    first = options[0]
    words = {"minimum": "min", "maximum": "max", "exclusiveMinimum": "above"}
    words |= {"exclusiveMaximum": "below", "enum": "one_of"}
    rule = {"type": first.get("type", "any")}
    rule |= {short: first[long] for long, short in words.items() if long in first}
    return rule | ({"or": "null"} if len(options) > 1 else {})


def searched(bounds: dict[str, Any] | None) -> dict[str, Any]:
    """The range that the study's sampler searches, as a hint."""
    if not bounds:
        return {}
    return {"searched": bounds.get("choices") or [bounds.get("low"), bounds.get("high")]}


class Program(Arguments):
    pass


def program(study: StudyFiles, args: Program) -> dict[str, Any]:
    """The research programme: goal, rules and taste, by the person who runs the study."""
    return {"text": program_text(study.repo)}


def program_text(repo: Path) -> str:
    """Read anew at every call, so that an edit takes effect with the next proposal."""
    path = repo / "agent/program.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


# ---- an answer ----


def check_proposal(study: StudyFiles, args: Answer) -> dict[str, Any]:
    """Would this proposal apply to the incumbent? Its diff, or the exact reason; nothing is run."""
    checked = check_answer(study, args, "check")
    return {
        "applies": True,
        "change": checked.proposal.kind,
        "lines": f"+{checked.applied.lines_added} -{checked.applied.lines_removed}",
        "diff": as_data(checked.applied.diff, MAX_DIFF_CHARS),
        "much_like": [
            {"trial": n.trial.number, "same": round(n.share, 2), "outcome": outcome(n.trial)}
            for n in checked.near
        ],
    }


# ---- by name ----


class Tool(NamedTuple):
    arguments: type[Arguments]
    function: Callable[[StudyFiles, Any], dict[str, Any]]

    @property
    def description(self) -> str:
        return " ".join(self.function.__doc__.split())


TOOLS: dict[str, Tool] = {
    "read_file": Tool(ReadFile, read_file),
    "list_trials": Tool(records.ListTrials, records.list_trials),
    "open_trial": Tool(records.OpenTrial, records.open_trial),
    "noise": Tool(records.Noise, records.noise),
    "costs": Tool(records.Costs, records.costs),
    "program": Tool(Program, program),
    "editable": Tool(Editable, editable),
    "check_proposal": Tool(Answer, check_proposal),
}


def call(study: StudyFiles, name: str, arguments: Any) -> dict[str, Any]:
    """JSON in, JSON out; a mistake is {"error": one line} and no exception."""
    if name not in TOOLS:
        return {"error": f"{name}: there is no such tool. Tools: {', '.join(TOOLS)}."}
    tool = TOOLS[name]
    try:
        return tool.function(study, tool.arguments.model_validate(arguments))
    except ValidationError as error:
        return {"error": mistakes(error)}
    except (Refused, StudyError) as error:
        return {"error": str(error)}
    except (ValueError, OSError, RecursionError) as error:  # a file of a run that is no such file
        return {"error": f"{name} cannot read it: {type(error).__name__}"}
