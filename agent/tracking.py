"""The journal's mirror in MLflow: a study is a parent run, each trial one finished child.

Write-only: the loop never reads a number from MLflow. Every write can be killed and repeated: a
child counts only with its tag `journal` (the digest of its journal line), set last; one without it
is deleted and written again. A tracker that is down is told once and caught up with later.
"""

import json
import sys
import uuid
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from agent.journal import Journal, Run, Trial, counted
from agent.traces import write_traces
from nightshift.fixed.config import digest, flatten
from nightshift.fixed.result import (
    CONFIG_FILE,
    CURVE_FILE,
    LOG_FILE,
    RESULT_FILE,
    SAMPLES_FILE,
    TRAINING_FILE,
    Training,
    read_curve,
    read_training,
    write_json,
)
from nightshift.fixed.tracking import RunLog, Store, TrackingError

IDENTITY_FILE = "tracking.json"  # in the study's folder: its id in MLflow, and where that is
DIFF_FILE = "diff.patch"  # in trials/<NNN>/
SETTINGS_FILE = "settings.json"  # name, sigma, base_commit, branch; written by the loop
RUN_NUMBERS = ("steps", "tokens", "train_s", "tokens_per_s", "peak_memory_gb", "mfu", "num_params")
DECISION_NUMBERS = ("val_bpb", "chat_bpb", "gain", "estimate", "low", "high", "evidence", "drift")
SIGNS = {"keep": "+", "discard": "-"}
ENDS = {"ok": "FINISHED", "stopped": "KILLED"}  # MLflow's words; all others are FAILED


class Mirror:
    """Writes one study. Methods never raise TrackingError: they tell it once."""

    def __init__(self, store: Store, study_name: str, study_folder: Path):
        self.store = store
        self.name = study_name
        self.folder = Path(study_folder)
        self.run: RunLog = store.attach(None)
        self.trials: dict[int, Trial] = {}  # known here, in order
        self.missed: list[Trial] = []  # not written yet: the tracker was down
        self.opening: tuple[dict[str, Any], str] | None = None
        self.told = False

    def open_study(self, settings: dict[str, Any], base_commit: str) -> str | None:
        """Get or make the parent run, RUNNING and owned by this process; returns its id."""
        self.opening = (settings, base_commit)
        self._try(self._open)
        return self.run.run_id

    def log_trial(self, trial: Trial) -> None:
        """Make sure that the trial has exactly one child, finished and complete."""
        self.trials[trial.number] = trial
        self.missed.append(trial)
        self._catch_up()

    def log_promotion(self, entry: dict[str, Any], files: list[Path], register) -> None:
        """One finished child, of what promotion_report.entry says. `register(run_id)` puts its
        model into the registry; where it returns False, the child is made again next time."""
        self._try(lambda: self._write_promotion(entry, files, register))

    def reconcile(self, journal: Journal) -> None:
        """Mirror the trials that are missing; delete children that the journal does not have."""
        self.trials = {trial.number: trial for trial in journal.trials}
        self.missed = []
        done: set[int] = set()

        def compare():
            wanted = {journal_digest(trial): trial.number for trial in journal.trials}
            for child in self.store.children(self.run.run_id):
                if child.data.tags.get("kind") != "trial":  # a promotion
                    continue
                number = wanted.get(child.data.tags.get("journal"))
                if number is None or number in done:
                    self.store.delete(child.info.run_id)
                else:
                    done.add(number)

        if self.run.run_id:
            self._try(compare)
        self.missed = [trial for trial in journal.trials if trial.number not in done]
        self._catch_up()

    def close_study(self, status: str = "FINISHED") -> None:
        """FINISHED, FAILED, or KILLED for a study that can be resumed."""
        self._catch_up()
        self._try(lambda: (self._summarize(), self.run.close(status)))

    def attach_report(self, folder: Path) -> None:
        """The report's files as artifacts of the parent run."""
        self._try(lambda: [self.run.artifact(p, "report") for p in sorted(folder.iterdir())])

    def tag_replay(self, number: int, word: str) -> None:
        """On the trial's child: what came of making it again."""

        def write():
            for child in self.store.find(study_id=self._study_id(), trial=f"{number:03d}"):
                self.store.attach(child.info.run_id, strict=True).tags({"replay": word})

        self._try(write)

    def attach(self) -> None:
        """The parent run of a study that this process does not run."""
        self._try(self._find)

    def _catch_up(self) -> None:
        while self.missed and self._try(lambda: self._write(self.missed[0])):
            self.missed.pop(0)

    def _try(self, action) -> bool:
        """The one place where a failing tracker is caught; False if it failed."""
        if self.store.client is None:
            return True
        try:
            action()
            return True
        except TrackingError as error:
            if not self.told:
                self.told = True
                print(f"{error} The study goes on; MLflow catches up later.", file=sys.stderr)
            return False

    def _find(self) -> bool:
        found = self.store.find(kind="study", study_id=self._study_id())
        if found:
            self.run = self.store.attach(found[-1].info.run_id, strict=True)
        return bool(found)

    def _study_id(self) -> str:
        """Names this study for ever: one of the same name, here or elsewhere, is another parent."""
        known = read_identity(self.folder)
        where = {"uri": self.store.tracking.uri, "experiment": self.store.tracking.experiment}
        identity = {"study_id": known.get("study_id") or uuid.uuid4().hex, **where}
        if identity != known:
            write_json(self.folder / IDENTITY_FILE, identity)
        return identity["study_id"]

    def _open(self) -> None:
        if self._find():
            self.run.reopen()
            return
        settings, base_commit = self.opening
        tags = {
            "study": self.name,
            "study_id": self._study_id(),
            "folder": self.folder,
            "commit": base_commit,
            "mlflow.source.git.commit": base_commit,
        }
        self.run = self.store.start(self.name, "study", tags=tags, strict=True)
        self.run.params(settings)
        self.run.describe(f"Study {self.name}, started from commit {base_commit[:7]}.")

    def _write(self, trial: Trial) -> None:
        """Create, fill, seal. Killed anywhere before the seal, the child is made again."""
        if self.run.run_id is None:
            self._open()
        for child in self.store.find(study_id=self._study_id(), trial=number(trial)):
            if child.data.tags.get("journal") == journal_digest(trial):
                return
            self.store.delete(child.info.run_id)
        started_ms = _milliseconds(trial.started_at)
        ended_ms = started_ms + int(1000 * (trial.wall_s or 0)) if started_ms else None
        child = self.store.start(
            run_name(trial),
            "trial",
            self.run.run_id,
            tags=self._tags(trial),
            started_ms=started_ms,
            watched=False,
            strict=True,
        )
        self._fill(child, trial, ended_ms)
        child.close(ENDS.get(trial.status, "FAILED"), ended_ms)
        child.tags({"journal": journal_digest(trial)})
        self._progress(trial, ended_ms)

    def _write_promotion(self, entry: dict[str, Any], files: list[Path], register) -> None:
        tags = entry["tags"] | {"study": self.name, "study_id": self._study_id()}
        own = {"study_id": self._study_id(), "promotion": entry["tags"]["promotion"]}
        for child in self.store.find(kind="promotion", **own):
            if child.data.tags.get("journal") == entry["digest"]:
                return
            self.store.delete(child.info.run_id)
        parent = self.run.run_id
        child = self.store.start(
            entry["name"], "promotion", parent, tags=tags, watched=False, strict=True
        )
        child.params(entry["params"])
        child.metrics(entry["metrics"])
        child.describe(entry["note"])
        for file in files:
            child.artifact(file)
        sealed = register(child.run_id)
        child.close("FINISHED" if sealed else "FAILED")
        if sealed:
            child.tags({"journal": entry["digest"]})

    def _tags(self, trial: Trial) -> dict[str, Any]:
        proposal = trial.proposal
        return {
            "study": self.name,
            "study_id": self._study_id(),
            "trial": number(trial),
            "status": trial.status,
            "decision": trial.decision,
            "reason": trial.reason,
            "title": proposal.title,
            "builds_on": _numbers(proposal.builds_on),
            "undoes": _numbers(proposal.undoes),
            "hypothesis": proposal.hypothesis,
            "source": proposal.source,
            "change": proposal.kind,
            "model": proposal.model,
            "repairs": proposal.repairs,
            "parent_trial": None if trial.parent is None else f"{trial.parent:03d}",
            "commit": trial.commit,
            "mlflow.source.git.commit": trial.commit,
            "digest": trial.digest,
            "data_digest": trial.data_digest,
            "seeds": " ".join(map(str, trial.seeds)) or None,
            "lines": f"+{trial.lines_added} -{trial.lines_removed}",
            **protection_tags(trial),
        }

    def _fill(self, child: RunLog, trial: Trial, ended_ms: int | None) -> None:
        first = trial.runs[0] if trial.runs else None
        folder = self.folder / first.folder if first and first.folder else None
        child.params(self._values(trial, folder) or trial.proposal.overrides)
        child.metrics(trial_metrics(trial), at_ms=ended_ms)
        child.describe(trial_note(trial))
        diff = self.folder / "trials" / number(trial) / DIFF_FILE
        if diff.exists():
            child.artifact(diff)
        if folder:
            self._fill_from_run(child, trial, folder)
        if read_settings(self.folder).get("study", {}).get("llm", {}).get("trace"):
            write_traces(child, self.folder, self._study_id(), trial)
        for run in trial.runs[1:]:
            _artifacts(child, self.folder, run, f"seed_{run.seed}")
        for run in trial.parent_runs:
            _artifacts(child, self.folder, run, f"parent_seed_{run.seed}")
        if trial.rung:
            _artifacts(child, self.folder, trial.rung.run, "short")
        if trial.rung and trial.rung.parent_run:
            _artifacts(child, self.folder, trial.rung.parent_run, "parent_short")

    def _values(self, trial: Trial, run: Path | None) -> dict[str, Any] | None:
        """A run's; of a tuning the trial's own, for its runs have the rates multiplied out."""
        values = _config(run)
        if values and values.get("base"):
            return _config(self.folder / "trials" / number(trial)) or values
        return values

    def _fill_from_run(self, child: RunLog, trial: Trial, folder: Path) -> None:
        child.curve(read_curve(folder / CURVE_FILE))
        training = _training(folder)
        if training:
            child.tags({f"machine.{k}": v for k, v in flatten(training.machine).items()})
        if trial.data_digest:
            values = _config(folder) or {}
            group = "conversations" if values.get("base") else "corpus"
            child.dataset(
                values.get(group, {}).get("source", group),
                trial.data_digest,
                profile={"digest": trial.data_digest},
            )
        if (folder / SAMPLES_FILE).exists():
            samples = json.loads((folder / SAMPLES_FILE).read_text(encoding="utf-8"))
            child.table(samples, "completions.json")  # the name that pretrain gives: they compare
        _artifacts(child, self.folder, trial.runs[0], None)

    def _progress(self, trial: Trial, at_ms: int | None) -> None:
        """The parent's curve over trials, and its note."""
        kept = [n for n, t in self.trials.items() if t.decision == "keep" and n <= trial.number]
        if kept:
            best = self.trials[max(kept)]
            number = {f"best_{best.target}": best.score}
            self.run.metrics(number, step=trial.number, at_ms=at_ms)
        self._summarize()

    def _summarize(self) -> None:
        if self.run.run_id is None or not self.trials:
            return
        trials = [trial for _, trial in sorted(self.trials.items())]
        (count, kept), last = counted(trials), trials[-1].number
        sigma = read_settings(self.folder).get("sigma")
        self.run.metrics({"trials": count, "kept": kept, "sigma": sigma}, step=last)
        self.run.describe(study_note(self.name, trials, sigma))


def number(trial: Trial) -> str:
    return f"{trial.number:03d}"


def _numbers(trials: list[int]) -> str | None:
    return " ".join(f"{n:03d}" for n in trials) or None


def run_name(trial: Trial) -> str:
    """Number and verdict first: MLflow's table cuts the name of a child after 12 characters."""
    sign = "x" if trial.failed else SIGNS[trial.decision]
    return f"{number(trial)} {sign} {trial.proposal.heading}"


def journal_digest(trial: Trial) -> str:
    return digest(asdict(trial))


def protection_tags(trial: Trial) -> dict[str, str]:
    """Layers of the sandbox that the trial's runs had, and the protections that had none."""
    seen = [run.protections for run in trial.runs if run.protections]
    if not seen:
        return {}
    first = seen[0]
    held = [f"{name}: {'+'.join(layers)}" for name, layers in first.items() if layers]
    missing = sorted({name for layers in seen for name in layers if not layers[name]})
    return {"protections": ", ".join(held), "protections.off": ", ".join(missing) or "none"}


def trial_metrics(trial: Trial) -> dict[str, Any]:
    """The trial's numbers; those of one run are its first run's."""
    metrics: dict[str, Any] = {name: getattr(trial, name) for name in DECISION_NUMBERS}
    if trial.runs:
        first = trial.runs[0]
        metrics |= {name: getattr(first, name) for name in RUN_NUMBERS}
    metrics |= {f"{run.target}_seed_{run.seed}": run.score for run in trial.runs}
    if rung := trial.rung:
        metrics |= {f"short_{rung.run.target}": rung.run.score, "short_behind": rung.behind}
    if usage := trial.proposal.usage:
        names = ("calls", "input_tokens", "output_tokens", "dollars", "seconds")
        metrics |= {f"model_{name}": getattr(usage, name) for name in names}
    return metrics | {
        "wall_s": trial.wall_s,
        "num_seeds": len(trial.runs),
        "num_parent_runs": len(trial.parent_runs),
    }


def trial_note(trial: Trial) -> str:
    """Markdown; a plain sentence first, because the runs table shows its source."""
    verdict = {"keep": "Kept", "discard": "Discarded"}[trial.decision]
    result = trial.status if trial.score is None else f"{trial.score:.4f}"
    gain = "" if trial.gain is None else f" ({trial.gain:+.4f})"
    changes = [f"- `{key}={value}`" for key, value in trial.proposal.overrides.items()]
    changes += [
        f"- edit of `{path}`" for path in dict.fromkeys(e.path for e in trial.proposal.edits)
    ]
    paragraphs = [
        f"{verdict}, {result}{gain}: {trial.proposal.heading}.",
        f"**Hypothesis.** {trial.proposal.hypothesis}",
        f"**Decision.** {trial.reason}",
        "\n".join(f"- {event}" for event in trial.proposal.events),
        "\n".join(changes),
    ]
    return "\n\n".join(filter(None, paragraphs))


def study_note(name: str, trials: list[Trial], sigma: float | None) -> str:
    kept = [trial for trial in trials if trial.decision == "keep"]
    counts = "{} trials, {} kept".format(*counted(trials))
    lines = [f"Study {name}: {counts}."]
    if kept:
        lines = [f"{kept[0].score:.4f} -> {kept[-1].score:.4f} bits per byte, {counts}."]
    if sigma is not None:
        lines += ["", f"Noise: one seed's sigma is {sigma:.4f}."]
    name = kept[0].target if kept else "val_bpb"
    lines += ["", f"| trial | {name} | gain | what |", "|---|---|---|---|"]
    for t in kept:
        gain = "" if t.gain is None else f"{t.gain:+.4f}"
        lines.append(f"| {number(t)} | {t.score:.4f} | {gain} | {t.proposal.heading} |")
    return "\n".join(lines)


def read_settings(study_folder: Path) -> dict[str, Any]:
    """The study's settings.json; {} before the loop has written it."""
    path = study_folder / SETTINGS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_identity(study_folder: Path) -> dict[str, Any]:
    """study_id, and the uri and experiment of its MLflow; {} for a study never tracked."""
    path = study_folder / IDENTITY_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _milliseconds(iso: str) -> int | None:
    return int(1000 * datetime.fromisoformat(iso).timestamp()) if iso else None


def _config(folder: Path | None) -> dict[str, Any] | None:
    if folder is None or not (folder / CONFIG_FILE).exists():
        return None
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(folder / CONFIG_FILE))


def _training(folder: Path) -> Training | None:
    path = folder / TRAINING_FILE
    return read_training(path) if path.exists() else None


def _artifacts(child: RunLog, study_folder: Path, run: Run, into: str | None) -> None:
    if run.folder is None:
        return
    for name in (CONFIG_FILE, RESULT_FILE, TRAINING_FILE, CURVE_FILE, LOG_FILE):
        path = study_folder / run.folder / name
        if path.exists():
            child.artifact(path, into)
