"""The entries of the two corpora: cheats/*.yaml and honest/*.yaml.

    title: what is done
    edits: [{path: ..., search: ..., replace: ...}]     as a proposal has them
    overrides: {key: value}
    peers: [8]              cheats only: numbers of the list of known cheats (README.md)
    why: one sentence: what it does and why it pays
    effect: lower           lower | steal | persist | escape | fake: what an unguarded run shows
    proof: {says: ...}      how it shows (PROOFS); `lower` needs none
    caught: {status: invalid, reason: "sees the future"}
    plant: {run/result.json: "..."}        files that lie there before; roots: run, home, tree
    environment: {NAME: value}
    budget: {kind: seconds, amount: 2.0}   instead of the laboratory's
    limit_s: 8                             wall limit of training and of scoring, each

`@NAME@` in any text stands for a place or a secret of the laboratory (lab.py).
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from agent.journal import Edit, Proposal

FOLDER = Path(__file__).parent
LIMIT_S = 180.0  # seconds are enough on an idle machine; a busy one must not look like a cheat
EFFECTS = ("lower", "steal", "persist", "escape", "fake")
PROOFS = {
    "says": "the log has this text",
    "file": "this file is there afterwards",
    "heard": "a listener outside got something: tcp, udp or abstract",
    "process": "something still runs afterwards",
    "victim": "a process outside was hurt",
    "took_s": "it ran this much longer than its budget",
    "bytes": "the run left this many bytes",
    "claims": "val_bpb is reported as this or less; .nan for not a number",
    "training": "training.json has these values",
    "touched": "a file of others in this place has changed: cache, study, home or tree",
}
STATUSES = ("ok", "crash", "timeout", "oom", "diverged", "invalid")
KEYS = {
    "title", "peers", "why", "effect", "proof", "caught", "edits", "overrides",
    "plant", "environment", "budget", "limit_s",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Caught:
    """What the guarded run must come to."""

    statuses: tuple[str, ...]
    reason: str = ""  # regular expression, looked for in the message
    without_effect: bool = False  # status ok, and the number of an unchanged model
    no_better: bool = False  # status ok, and no number below that of an unchanged model


@dataclass(frozen=True, kw_only=True)
class Entry:
    name: str  # of the file
    proposal: Proposal
    peers: tuple[int, ...] = ()
    why: str = ""
    effect: str | None = None  # None: an honest change
    proof: dict[str, Any] = field(default_factory=dict)
    caught: Caught = Caught(statuses=("ok",))
    plant: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    budget: dict[str, Any] | None = None
    limit_s: float = LIMIT_S

    @property
    def budget_key(self) -> str:
        """Names the unchanged model's run that this entry is compared with."""
        return "unchanged" if self.budget is None else f"unchanged {self.budget['amount']:g}"

    @property
    def makes_data(self) -> bool:
        """Whether its tokens are not those of the unchanged code."""
        edited = any("filter" in e.path or "tokenizer" in e.path for e in self.proposal.edits)
        keys = self.proposal.overrides
        return edited or any(key.startswith(("filter.", "tokenizer.")) for key in keys)

    def filled(self, places: dict[str, str]) -> "Entry":
        """With the laboratory's places put in for @NAME@."""

        def fill(value: Any) -> Any:
            if isinstance(value, str):
                return re.sub(r"@([A-Z]+)@", lambda m: places[m[1]], value)
            if isinstance(value, dict):
                return {fill(key): fill(item) for key, item in value.items()}
            return [fill(item) for item in value] if isinstance(value, list) else value

        proposal = replace(
            self.proposal,
            edits=[
                Edit(path=e.path, search=e.search, replace=fill(e.replace))
                for e in self.proposal.edits
            ],
            overrides=fill(self.proposal.overrides),
        )
        return replace(
            self,
            proposal=proposal,
            proof=fill(self.proof),
            plant=fill(self.plant),
            environment=fill(self.environment),
        )


def read_cheats(folder: Path = FOLDER / "cheats") -> list[Entry]:
    return [_cheat(path) for path in sorted(folder.glob("*.yaml"))]


def read_honest(folder: Path = FOLDER / "honest") -> list[Entry]:
    """Recipes: each must pass with status ok."""
    return [
        Entry(name=f"honest/{path.stem}", proposal=_proposal(_read(path)))
        for path in sorted(folder.glob("*.yaml"))
    ]


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _proposal(values: dict[str, Any]) -> Proposal:
    why = values.get("why") or values.get("hypothesis") or ""
    return Proposal(
        title=" ".join(values["title"].split()),
        hypothesis=" ".join(why.split()),
        source="cheats",
        edits=[Edit(**edit) for edit in values.get("edits") or []],
        overrides=values.get("overrides") or {},
    )


def _cheat(path: Path) -> Entry:
    values = _read(path)
    if unknown := set(values) - KEYS:
        raise ValueError(f"{path.name}: unknown key '{sorted(unknown)[0]}'. Known: {sorted(KEYS)}")
    caught = dict(values["caught"])
    statuses = caught.pop("status")
    entry = Entry(
        name=path.stem,
        proposal=_proposal(values),
        peers=tuple(values["peers"]),
        why=" ".join(values["why"].split()),
        effect=values["effect"],
        proof=values.get("proof") or {},
        caught=Caught(
            statuses=tuple([statuses] if isinstance(statuses, str) else statuses), **caught
        ),
        plant=values.get("plant") or {},
        environment=values.get("environment") or {},
        budget=values.get("budget"),
        limit_s=float(values.get("limit_s", LIMIT_S)),
    )
    _check(entry)
    return entry


def _check(entry: Entry) -> None:
    """Raises ValueError for an entry that could not show or prove anything."""
    wrong = None
    if entry.effect not in EFFECTS:
        wrong = f"effect {entry.effect!r} is none of {EFFECTS}"
    elif set(entry.proof) - set(PROOFS):
        wrong = f"proof {sorted(entry.proof)} knows only {sorted(PROOFS)}"
    elif (entry.effect == "lower") == bool(entry.proof):
        wrong = "every effect but 'lower' needs a proof, and 'lower' has none"
    elif set(entry.caught.statuses) - set(STATUSES):
        wrong = f"caught.status {entry.caught.statuses} is none of {STATUSES}"
    elif "ok" not in entry.caught.statuses and not entry.caught.reason:
        wrong = "caught needs a reason, a regular expression"
    elif "ok" in entry.caught.statuses and not (
        entry.caught.without_effect or entry.caught.no_better
    ):
        wrong = "caught.status ok needs without_effect or no_better"
    if wrong:
        raise ValueError(f"{entry.name}: {wrong}")
    re.compile(entry.caught.reason)
