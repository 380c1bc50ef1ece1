"""The nouns of a study, and the append-only journal that is its truth.

One JSON line a trial. The append, synced to disk, is the moment a trial exists: killed before it,
the trial is run again; killed after it, the study goes on with the next. Everything else (git refs,
MLflow, the report) follows the journal and can be made again from it.
"""

import copy
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(kw_only=True)
class Edit:
    """One search-and-replace. `search` occurs exactly once in the file at `path`."""

    path: str
    search: str
    replace: str


@dataclass(kw_only=True)
class Usage:
    """What a language model cost for one trial, by the provider's own count (agent/costs.py)."""

    calls: int = 0  # requests sent, failed ones too
    failed: int = 0  # of these
    lost: int = 0  # cut off by a kill: what they cost is not known
    input_tokens: int = 0
    output_tokens: int = 0
    dollars: float | None = None  # null: the model has no known price
    seconds: float = 0.0
    waited_s: float | None = None  # in which nothing ran because of it; null: all of `seconds`

    @property
    def waited(self) -> float:
        """Seconds."""
        return self.seconds if self.waited_s is None else self.waited_s


@dataclass(kw_only=True)
class Proposal:
    """What to try and why: Hydra values, code edits, or both."""

    title: str
    hypothesis: str  # one sentence
    source: str  # baseline | sampler | recipes | llm | ...
    overrides: dict[str, Any] = field(default_factory=dict)  # {"optim.matrix_lr": 0.03}
    edits: list[Edit] = field(default_factory=list)
    expected_effect: str = ""
    repairs: int | None = None  # a failed trial whose idea this one tries again
    # Whose changes are part of this one, so of `overrides` and `edits` (strategy.py):
    builds_on: list[int] = field(default_factory=list)  # discarded trials, oldest first
    undoes: list[int] = field(default_factory=list)  # kept trials, taken out, newest first
    near: list[int] = field(default_factory=list)  # earlier trials that are much like this one
    differs: str = ""  # from these: what does
    proves: int | None = None  # a trial that was ahead after one run, run until it is proven or not
    repeats: int | None = None  # a trial that it computes again on purpose, on other seeds
    id: str | None = None  # of one that came through the inbox (inbox.py)
    model: str | None = None  # the language model that was asked for this trial, answer or not
    notes: list[int] = field(default_factory=list)  # of notes.jsonl, that it was shown
    events: list[str] = field(default_factory=list)  # refusals, failed calls, why another source
    usage: Usage | None = None

    @property
    def kind(self) -> str:
        """baseline, config or code."""
        return "code" if self.edits else "config" if self.overrides else "baseline"

    @property
    def runs_again(self) -> bool:
        """Does it compute on purpose what an earlier trial did?"""
        return self.repeats is not None or self.proves is not None

    @property
    def heading(self) -> str:
        """The title, and the trials that the change goes beyond: `GELU (on 013, without 021)`."""
        again = [] if self.proves is None else [self.proves]
        named = [("on", self.builds_on), ("without", self.undoes), ("proof of", again)]
        place = [f"{word} {numbers(them)}" for word, them in named if them]
        return f"{self.title} ({', '.join(place)})" if place else self.title


def numbers(trials: Sequence[int]) -> str:
    """`003 and 007`; of many the last, and how many more: `012 and 5 before`."""
    if len(trials) > 2:
        return f"{trials[-1]:03d} and {len(trials) - 1} before"
    return " and ".join(f"{n:03d}" for n in trials)


class Scored:
    """What has a number: `val_bpb` or `chat_bpb`, the one by which its study judges."""

    @property
    def target(self) -> str:
        """The number's name; a trial without a number has val_bpb's."""
        return "val_bpb" if self.chat_bpb is None else "chat_bpb"

    @property
    def score(self) -> float | None:
        return getattr(self, self.target)


@dataclass(kw_only=True)
class Run(Scored):
    """One seed of a trial: the numbers of its result.json that the journal keeps."""

    seed: int
    status: str
    message: str | None = None
    val_bpb: float | None = None
    chat_bpb: float | None = None
    steps: int | None = None
    tokens: int | None = None
    train_s: float | None = None
    wall_s: float | None = None
    tokens_per_s: float | None = None
    peak_memory_gb: float | None = None
    mfu: float | None = None
    num_params: int | None = None
    folder: str | None = None  # relative to the study's folder
    work: float | None = None  # cost of training over cost of scoring, for a token
    weights_sha256: str | None = None
    protections: dict[str, list[str]] | None = None  # layers of the sandbox


@dataclass(kw_only=True)
class Rung:
    """A short run on the first seed, before the whole one (ladder.py). It has no part in a keep."""

    share: float  # of the budget
    run: Run
    parent_run: Run | None = None  # the parent's, if it was made for this trial
    behind: float | None = None  # its parent, bpb; null: one of the two runs failed


@dataclass(kw_only=True)
class Trial(Scored):
    """One proposal, run and judged."""

    number: int
    proposal: Proposal
    parent: int | None  # trial that it started from
    # What happened: ok stopped crash timeout oom diverged invalid. What we did: keep | discard.
    # `running` and `open` in what the model is shown of a trial that runs; never on disk.
    status: str
    decision: str
    reason: str  # in words, with the numbers
    val_bpb: float | None = None  # mean over the seeds that ran
    chat_bpb: float | None = None  # likewise; a study has one of the two
    gain: float | None = None  # mean of `differences`; > 0 is better
    estimate: float | None = None  # the gain that is left after shrinkage (decide.py)
    low: float | None = None  # the estimate's 95 % interval
    high: float | None = None
    evidence: float | None = None  # e-value of a gain against none, at most 1e9
    differences: list[float] = field(default_factory=list)  # parent minus ours, a seed each
    runs: list[Run] = field(default_factory=list)
    parent_runs: list[Run] = field(default_factory=list)  # of the parent, made for this trial
    drift: float | None = None  # the parent's number made again, minus what it was
    drifted: bool = False  # by too much: the parent's earlier runs no longer compare
    behind: float | None = None  # its parent by so many bpb: too far (early.py, ladder.py)
    rung: Rung | None = None
    commit: str | None = None  # the code and config that ran
    digest: str | None = None  # of resolved config and editable code
    data_digest: str | None = None
    changed: dict[str, Any] | None = None  # editable values that are not the baseline's
    shape: str | None = None  # of the code, names and comments left out (novelty.py)
    lines_added: int = 0
    lines_removed: int = 0
    started_at: str = ""  # UTC, ISO 8601
    wall_s: float | None = None

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def made(self) -> list[Run]:
        """All that ran for this trial."""
        short = [self.rung.run, self.rung.parent_run] if self.rung else []
        return [*filter(None, short), *self.runs, *self.parent_runs]

    @property
    def waited_s(self) -> float:
        """For the language model, with nothing running."""
        return self.proposal.usage.waited if self.proposal.usage else 0.0

    @property
    def cost_s(self) -> float:
        """Seconds of its runs, the parent's included, and those that were waited for the model."""
        return self.waited_s + sum(run.wall_s or 0.0 for run in self.made)

    @property
    def failed(self) -> bool:
        """It did not come to a judgement; one that was stopped early did."""
        return self.status not in ("ok", "stopped", "running")


class Journal:
    """Trials in order; trial n is line n. `repair=False` leaves the file as it is."""

    def __init__(self, path: Path, repair: bool = True):
        self.path = path
        self.repair = repair
        self.trials: list[Trial] = []
        self.size = 0  # bytes that were read
        if path.exists():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        self.size = len(data)
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data) and self.repair:  # a kill in mid-append: that trial never existed
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.decode("utf-8").splitlines()):
            trial = trial_from_json(json.loads(line))
            if trial.number != number:
                raise ValueError(
                    f"{self.path}: line {number + 1} holds trial {trial.number}; "
                    "the journal was edited"
                )
            self.trials.append(trial)

    def append(self, trial: Trial) -> None:
        if trial.number != len(self.trials):
            raise ValueError(f"trial {trial.number} cannot follow {len(self.trials)} trials")
        line = json.dumps(asdict(trial), ensure_ascii=False, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(line.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        self.trials.append(trial)

    def __len__(self) -> int:
        return len(self.trials)

    @property
    def incumbent(self) -> Trial | None:
        """The last kept trial: the parent of the next."""
        return next((t for t in reversed(self.trials) if t.decision == "keep"), None)

    def runs_of(self, trial: Trial, child: Trial | None = None) -> dict[int, Run]:
        """The runs of a trial by their seed, its own and those made later for its children: the
        newest ok one of each seed. Those before a drift no longer count. `child`: one that is not
        in the journal yet."""
        runs = list(trial.runs)
        for later in [*self.trials, *([child] if child else [])]:
            if later.parent == trial.number:
                runs = ([] if later.drifted else runs) + later.parent_runs
        return {run.seed: run for run in sorted(runs, key=lambda run: run.status == "ok")}

    def rung_of(self, trial: Trial, share: float, child: Trial) -> Run | None:
        """A trial's short run with this share, its own or the one made later for a child. One from
        before a drift no longer counts. `child`: one that is not in the journal yet."""
        found = trial.rung.run if trial.rung and trial.rung.share == share else None
        for later in [t for t in [*self.trials, child] if t.parent == trial.number]:
            found = None if later.drifted else found
            if later.rung and later.rung.share == share:
                found = later.rung.parent_run or found
        return found

    def before(self, trial: Trial) -> "Journal":
        """The journal as it was when this trial was judged."""
        earlier = copy.copy(self)
        earlier.trials = self.trials[: trial.number]
        return earlier

    def while_running(self, trial: Trial) -> "Journal":
        """A copy in which this trial stands last, its outcome open: for who proposes meanwhile."""
        known = replace(
            trial, status="running", decision="open", runs=[], parent_runs=[], differences=[],
            reason="it runs now; its outcome is not known yet",
        )  # fmt: skip
        copied = copy.copy(self)
        copied.trials = [*self.trials, known]
        return copied

    @property
    def lineage(self) -> list[Trial]:
        """Kept trials from the baseline to the incumbent."""
        return [t for t in self.trials if t.decision == "keep"]


def counted(trials: Iterable[Trial]) -> tuple[int, int]:
    """How many trials and how many of them kept; the baseline is no trial of anything."""
    mine = [trial for trial in trials if trial.parent is not None]
    return len(mine), sum(trial.decision == "keep" for trial in mine)


def base_of(trial: Trial, trials: Sequence[Trial]) -> Trial | None:
    """The trial that its own change was put on; None: its parent."""
    on = [] if trial.proposal.undoes else trial.proposal.builds_on
    return trials[on[-1]] if on else None


def step_of(trial: Trial, trials: Sequence[Trial]) -> float:
    """The gain over that, bpb. Two that were put on one incumbent compare on the first seed."""
    base = base_of(trial, trials)
    if base is None:
        return trial.estimate or 0.0
    if trial.differences and base.differences:
        return trial.differences[0] - base.differences[0]
    return 0.0


def proposal_from_json(values: dict[str, Any]) -> Proposal:
    usage = Usage(**values["usage"]) if values.get("usage") else None
    return Proposal(**{**values, "edits": [Edit(**e) for e in values["edits"]], "usage": usage})


def rung_from_json(values: dict[str, Any]) -> Rung:
    parent = values["parent_run"]
    runs = {"run": Run(**values["run"]), "parent_run": Run(**parent) if parent else None}
    return Rung(**{**values, **runs})


def trial_from_json(values: dict[str, Any]) -> Trial:
    return Trial(
        **{
            **values,
            "proposal": proposal_from_json(values["proposal"]),
            "runs": [Run(**r) for r in values["runs"]],
            "parent_runs": [Run(**r) for r in values.get("parent_runs", [])],
            "rung": rung_from_json(values["rung"]) if values.get("rung") else None,
        }
    )
