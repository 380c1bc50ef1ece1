"""An outside agent is the researcher: what the study's process does with its proposals, and what
the agent's side does. Between the two lies the inbox (inbox.py).

The study's process alone applies, runs, judges and records; the agent's side reads, checks and
submits. So whatever happens to the agent, the study goes on, and there is one way to the journal.

`take` is the proposer `outside`; TOOLS are the agent's: those of agent/tools.py, and `status`,
`propose` and `outcome`. `nightshift agent` (shell.py) and `nightshift mcp` (mcp_server.py) offer
the same TOOLS.

Covered: a proposal is checked when it is submitted, and again when its turn comes, for the
incumbent may be another by then; one that does not apply any more is refused and costs no trial.
Not covered: an agent with a shell on this machine can do whatever you can (docs/agents.md).
"""

import fcntl
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from agent import tools
from agent.answer import Answer, Arguments, StudyFiles, check_answer, mistakes, read_answer
from agent.end import End
from agent.inbox import NAME, Full, Inbox
from agent.journal import Journal, Proposal, Trial
from agent.settings import StudyError
from agent.study import Study
from agent.tools import Tool
from agent.workspace import Refused
from nightshift.fixed.config import ConfigError, nearest

POLL_S = 0.2
NO_PROCESS_S = 5.0  # a study that is started again needs so long until it holds its lock
TELL_S = 10.0  # at least so often: clients give up on what is silent
MAX_WAIT_S = 24 * 3600.0
SOURCE = "outside"


# ---- the study's side ----


def take(study: Study, number: int, patient: bool) -> Proposal | None:
    """The next proposal that applies. None after study.outside_wait_s, unless `patient`; an agent
    that let its turn pass is not waited for again before it has proposed something."""
    limit_s = 0.0 if study.given_up else study.plan.study.outside_wait_s
    deadline = time.monotonic() + limit_s
    while True:
        study.stop.check()
        if proposal := next_that_applies(study):
            study.given_up = False
            return proposal
        if not patient and time.monotonic() >= deadline:
            break
        study.view.begin(number, "waiting for a proposal from outside")
        study.note(
            f"waiting for a proposal from outside: nightshift agent {study.name} propose, or the "
            f"MCP server nightshift mcp {study.name}"
        )
        time.sleep(POLL_S)
    if not study.given_up and len([s for s in study.plan.study.sources.values() if s]) > 1:
        study.view.note(f"no proposal from outside in {limit_s:g} s: the other sources go on")
    study.given_up = True
    return None


def next_that_applies(study: Study) -> Proposal | None:
    inbox, files = Inbox(study.folder), StudyFiles(study.repo, study.folder, study.journal)
    for name in inbox.waiting(study.journal):
        try:
            proposal = check_answer(files, read_answer(inbox.read(name)), SOURCE).proposal
            proposal.id = name
            return proposal
        except (Refused, ValueError, OSError) as error:
            inbox.refuse(name, " ".join(str(error).split()))
            study.view.note(f"proposal {name} refused: {error}")
    return None


# ---- the agent's side ----


def open_files(repo: Path, name: str) -> StudyFiles:
    """Raises ConfigError, which names the studies that exist."""
    studies = repo / "outputs/studies"
    known = sorted(path.parent.name for path in studies.glob("*/settings.json"))
    if name not in known:
        there = f" Studies: {', '.join(known)}." if known else ""
        raise ConfigError(
            f"study ({name}): there is no such study.{nearest(name, known)}{there} Start it: "
            f"nightshift study study.name={name} sources=outside"
        )
    folder = studies / name
    return StudyFiles(repo, folder, Journal(folder / "journal.jsonl", repair=False))


def is_running(folder: Path) -> bool:
    """Does a process hold the study's lock? The file alone means nothing: a kill leaves it."""
    try:
        with open(folder / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


class Status(Arguments):
    pass


def status(study: StudyFiles, args: Status) -> dict[str, Any]:
    """Where the study stands: incumbent, trials left, what runs now, which proposals wait."""
    journal, settings = study.journal, study.settings["study"]
    inbox, incumbent = Inbox(study.folder), journal.incumbent
    return {
        "study": study.folder.name,
        "running": is_running(study.folder),
        "now": doing(study),
        "trials": max(0, len(journal) - 1),
        "trials_left": left(study),
        "kept": len([t for t in journal.lineage if t.number]),
        "baseline": summary_of(journal.trials[0]) if incumbent else None,
        "incumbent": summary_of(incumbent) if incumbent else None,
        "sources": settings["sources"],
        "waiting": inbox.waiting(journal),
    }


def end_of(study: StudyFiles) -> End:
    settings = study.settings["study"]
    return End.of(settings["trials"], settings.get("hours"))


def is_over(study: StudyFiles) -> bool:
    return end_of(study).is_reached(study.journal.trials)


def left(study: StudyFiles) -> int | None:
    """Trials that the study may still run, the one that runs now included; None: not counted."""
    trials = end_of(study).trials - max(0, len(study.journal) - 1)
    return 0 if is_over(study) else None if trials == math.inf else max(0, trials)


def doing(study: StudyFiles) -> str:
    """What the study's process does now, from the folders that it makes."""
    if not is_running(study.folder):
        return not_running(study)
    number = len(study.journal)
    half = study.folder / f"trials/{number:03d}"
    if number and not (half / "proposal.json").exists():
        return f"trial {number}: no proposal yet"
    runs = [p for p in [*half.glob("seed_*"), *half.glob("parent/seed_*")] if p.is_dir()]
    newest = max(runs, key=lambda p: p.stat().st_mtime, default=None)
    return f"trial {number}: {newest.relative_to(half) if newest else 'checked and prepared'}"


def not_running(study: StudyFiles) -> str:
    name = study.folder.name
    if is_over(study):
        return (
            f"study {name} has run its {end_of(study)}. The person who runs it can give it more: "
            f"nightshift study study.name={name} {end_of(study).later} and its other settings"
        )
    return (
        f"no process runs study {name}; what was proposed is kept. To go on, the person who runs "
        f"it repeats the command: nightshift study study.name={name} and its other settings"
    )


def summary_of(trial: Trial) -> dict[str, Any]:
    names = ("number", "status", "decision", "reason", "gain", "estimate", "low", "high")
    numbers = {trial.target: trial.score}
    return (
        {name: getattr(trial, name) for name in names} | numbers | {"title": trial.proposal.title}
    )


class Propose(Answer):
    wait: bool = Field(
        default=True,
        description="answer when the trial is decided; false: answer at once with the proposal's "
        "id, and ask `outcome` later",
    )


def propose(
    study: StudyFiles, args: Propose, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Propose one trial on the incumbent. A proposal that does not apply is refused at once with
    the exact reason and costs nothing. Otherwise it gets an id, waits for its turn and is run;
    the answer is the decision with its reason and numbers."""
    if not study.settings["study"]["sources"].get(SOURCE):
        raise Refused(
            f"study {study.folder.name} takes no proposals from outside: its study.sources.outside "
            "is 0. The person who runs it starts one that does: sources=outside"
        )
    if is_over(study) or (args.wait and not is_running(study.folder)):
        raise Refused(not_running(study))
    answer = Answer.model_validate(args.model_dump(exclude={"wait"}))
    check_answer(study, answer, SOURCE)
    values = answer.model_dump(exclude_defaults=True)
    name = Inbox(study.folder).submit(values, study.journal)
    if args.wait:
        return wait_for(study, name, MAX_WAIT_S, tell)
    return outcome_of(study, name)


class Outcome(Arguments):
    id: str = Field(pattern=NAME.pattern + "$", description="of a proposal: p0001")
    wait_s: float = Field(
        default=0, ge=0, le=MAX_WAIT_S, description="seconds to wait for the decision"
    )


def outcome(
    study: StudyFiles, args: Outcome, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """What became of a proposal: waiting, running, done (its trial with decision, reason and
    numbers) or refused. With wait_s, waits so long for the decision."""
    return wait_for(study, args.id, args.wait_s, tell)


def wait_for(
    study: StudyFiles, name: str, limit_s: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Its outcome; before the decision if the time is over or no process runs the study."""
    deadline, alive_at = time.monotonic() + limit_s, time.monotonic()
    told, told_at = None, 0.0
    while True:
        found, now = outcome_of(study, name), time.monotonic()
        alive_at = now if is_running(study.folder) else alive_at
        alone = is_over(study) or now - alive_at > NO_PROCESS_S
        if found["state"] in ("done", "refused") or now >= deadline or alone:
            return found
        if found["now"] != told or now - told_at > TELL_S:
            told, told_at = found["now"], now
            tell(told)
        time.sleep(POLL_S)
        study = again(study)


def again(study: StudyFiles) -> StudyFiles:
    """With the journal as it is now, read only if it has grown."""
    path = study.journal.path
    size = path.stat().st_size if path.exists() else 0
    if size == study.journal.size:
        return study
    return study._replace(journal=Journal(path, repair=False))


def outcome_of(study: StudyFiles, name: str) -> dict[str, Any]:
    inbox = Inbox(study.folder)
    if name not in (known := inbox.ids()):
        last = f"the last is {known[-1]}" if known else "there is none yet"
        raise Refused(f"{name}: there is no such proposal; {last}.")
    for trial in study.journal.trials:
        if trial.proposal.id == name:
            return {"id": name, "state": "done", **decided(study, trial)}
    if reason := inbox.refusal(name):
        return {"id": name, "state": "refused", "error": reason}
    runs = inbox.running(study.journal) == name
    found = {"id": name, "state": "running" if runs else "waiting", "now": doing(study)}
    return found | ({} if runs else {"before_it": inbox.waiting(study.journal).index(name)})


def decided(study: StudyFiles, trial: Trial) -> dict[str, Any]:
    parts = {"trial": trial.number, **summary_of(trial), "near": trial.proposal.near}
    parts.pop("number")
    return parts | {"incumbent": study.journal.incumbent.number, "trials_left": left(study)}


# ---- by name ----


TOOLS: dict[str, Tool] = {
    "status": Tool(Status, status),
    **tools.TOOLS,
    "propose": Tool(Propose, propose),
    "outcome": Tool(Outcome, outcome),
}
WAITING = ("propose", "outcome")  # these take `tell`


def call(
    repo: Path, study_name: str, name: str, arguments: Any, tell: Callable[[str], None]
) -> dict[str, Any]:
    """JSON in, JSON out. Whatever the agent can do wrong is {"error": one line}."""
    if name not in TOOLS:
        return {
            "error": f"{name}: there is no such tool.{nearest(name, TOOLS)} Tools: "
            f"{', '.join(TOOLS)}."
        }
    tool = TOOLS[name]
    try:
        study, args = open_files(repo, study_name), tool.arguments.model_validate(arguments)
        more = {"tell": tell} if name in WAITING else {}
        return tool.function(study, args, **more)
    except ValidationError as error:
        return {"error": mistakes(error)}
    except (Refused, Full, ConfigError, StudyError) as error:
        return {"error": " ".join(str(error).split())}
