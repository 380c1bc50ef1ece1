"""MLflow behind one small door: a store, and a log for each run.

One SQLite file by absolute URI, made once under a lock, in WAL mode (three times faster on a busy
disk); any other tracking URI works too. Only MlflowClient is used: no global run, no autologging.
A tracker that fails in mid-run costs one printed line, never the run: its folder has the numbers.

No run stays RUNNING. `Watchdog` is a small process that outlives a killed owner and closes what it
left open; `close_orphans`, at every opening, closes what even the watchdog could not (power, OOM).

mlflow is imported on first use (1.3 s); with tracking=off never.
"""

import base64
import fcntl
import getpass
import hashlib
import http.client
import json
import logging
import math
import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from .config import CONF, ROOT, Config, ConfigError, Tracking, check, flatten

KINDS = ("pretrain", "sft", "sweep", "study", "trial", "promotion", "model")
MAX_PARAM_CHARS = 6000  # MLflow's limits: longer values are refused or cut with a warning
MAX_TAG_CHARS = 8000
NOT_PARAMS = (  # paths, addresses, ids: the same for all runs, or of no meaning elsewhere
    "tracking.",
    "parent_run_id",
    "run_name",
    "resume",
    "base",
    "corpus.path",
    "conversations.path",
    "evaluate.sample_prompts",
    "chat_evaluate.sample_questions",
    "runtime.",
    "sandbox.",
)
VIEW = "nightshift"  # key of the saved view of the runs table
VIEW_COLUMNS = {  # with their widths in pixels
    "metrics.`val_bpb`": 95,
    "metrics.`chat_bpb`": 95,
    "metrics.`gain`": 95,
    "tags.`decision`": 90,
    "tags.`status`": 90,
    "tags.`change`": 90,
    "metrics.`steps`": 80,
    "metrics.`tokens_per_s`": 110,
    "attributes.`Description`": 330,
}


class TrackingError(ConfigError):
    """MLflow cannot be reached or refuses; the message is one line."""


def load_tracking(overrides: Iterable[str] = ()) -> Tracking:
    """conf/tracking/mlflow.yaml, changed by overrides such as tracking.uri=http://host:5000."""
    from omegaconf import OmegaConf

    values = OmegaConf.merge(
        {"tracking": OmegaConf.load(CONF / "tracking/mlflow.yaml")},
        OmegaConf.from_dotlist(list(overrides)),
    )
    values = OmegaConf.to_container(values)
    if unknown := set(values) - {"tracking"}:
        raise ConfigError(
            f"{unknown.pop()}: only tracking.uri=... and tracking.experiment=... can be given here"
        )
    return check(values["tracking"], Tracking)


def store_uri(tracking: Tracking) -> str:
    """The absolute URI; a relative SQLite path starts at the checkout, not where we are."""
    uri = tracking.uri or f"sqlite:///{ROOT / 'outputs/mlflow/mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{ROOT / uri.removeprefix('sqlite:///')}"
    if "://" not in uri or uri.startswith("file:"):
        raise TrackingError(
            f"tracking.uri ({uri}): must be sqlite:////absolute/file.db or "
            "http://host:port; current MLflow has no folder store"
        )
    return uri


def database_path(uri: str) -> Path | None:
    """The file behind a SQLite URI; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def open_store(tracking: Tracking) -> "Store":
    """Open, and create if need be, the database and the experiment. Raises TrackingError."""
    if not tracking.enabled:
        return Store(tracking, "", None, None)
    uri = store_uri(tracking)
    _prepare_mlflow()
    with reported(uri):
        database = database_path(uri)
        if database is None:
            _reach(uri)
            store = Store(tracking, uri, *_open(uri, tracking.experiment, artifacts=None))
        else:
            with _locked(database.parent):
                _use_wal(database)
                artifacts = str(database.parent / "artifacts")
                store = Store(tracking, uri, *_open(uri, tracking.experiment, artifacts))
    close_orphans(store)
    return store


@contextmanager
def reported(uri: str):
    """Whatever the tracker raises becomes one TrackingError line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except TrackingError:
        raise
    except (
        MlflowException,
        SQLAlchemyError,
        sqlite3.Error,
        http.client.HTTPException,
        OSError,
        ValueError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise TrackingError(
            f"tracking.uri ({uri}): {reason}. Check it, or run with tracking=off."
        ) from None


def _prepare_mlflow() -> None:
    for key, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default waits minutes for a dead server
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }.items():
        os.environ.setdefault(key, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _reach(uri: str) -> None:
    """A server that is down is said now, not after MLflow's retries."""
    if uri.startswith("http"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answers: authentication is MLflow's business


@contextmanager
def _locked(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _use_wal(database: Path) -> None:
    connection = sqlite3.connect(database, timeout=20)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.close()


def _open(uri: str, experiment: str, artifacts: str | None):
    """(client, experiment id)."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            client.create_experiment(experiment, artifact_location=artifacts)
        except MlflowException as error:  # a server has no lock: another process was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(experiment)
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment ({experiment}): it was deleted in MLflow; "
            "restore it there or choose another name"
        )
    return client, found.experiment_id


def saved_view() -> str:
    """Our columns for the runs table. MLflow 3's own format, undocumented, read off its page."""
    state = {
        "selectedColumns": list(VIEW_COLUMNS),
        "columnOrder": ["attributes.`Run Name`", *VIEW_COLUMNS, "runDateAndNestInfo", "duration"],
        "columnWidths": VIEW_COLUMNS | {"attributes.`Run Name`": 260},
        "orderByKey": "attributes.start_time",  # any other order shows a flat list
        "orderByAsc": False,
        "searchFilter": "",
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now = int(time.time() * 1000)
    return json.dumps(
        {"name": VIEW, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    )


class Store:
    """One MLflow experiment. With tracking=off it has no client and every method does nothing."""

    def __init__(self, tracking: Tracking, uri: str, client, experiment_id: str | None):
        self.tracking = tracking
        self.uri = uri
        self.client = client
        self.experiment_id = experiment_id

    def start(
        self,
        name: str,
        kind: str,
        parent_run_id: str | None = None,
        tags: dict[str, Any] | None = None,
        started_ms: int | None = None,
        watched: bool = True,
        strict: bool = False,
    ) -> "RunLog":
        """A new RUNNING run. `watched=False` is for one whose parent this process watches.

        `strict`: a failed write raises TrackingError; otherwise it is told once, the run goes on.
        """
        assert kind in KINDS, kind
        if self.client is None:
            return RunLog(self, None)
        tags = {
            "kind": kind,
            "mlflow.user": getpass.getuser(),
            "mlflow.source.name": f"nightshift {kind}",
            "mlflow.source.type": "LOCAL",
            **_owner_tags(),
            **(tags or {}),
        }
        with reported(self.uri):
            if parent_run_id:
                self.client.get_run(parent_run_id)  # a typing error would hide the run for ever
                tags["mlflow.parentRunId"] = parent_run_id
            run = self.client.create_run(
                self.experiment_id,
                start_time=started_ms or int(time.time() * 1000),
                tags=_texts(tags),
                run_name=name,
            )
        log = RunLog(self, run.info.run_id, strict)
        if kind in ("study", "sweep"):
            self._save_view()
        if watched:
            watch(self.uri, log.run_id)
        return log

    def _save_view(self) -> None:
        """A comfort: a refusal is not worth a word."""
        with suppress(TrackingError), reported(self.uri):
            key = f"mlflow.sharedViewState.{VIEW}"
            self.client.set_experiment_tag(self.experiment_id, key, saved_view())

    def attach(self, run_id: str | None, strict: bool = False) -> "RunLog":
        """A log for a run that exists; it is neither reopened nor watched."""
        if self.client is None or run_id is None:
            return RunLog(self, None)
        with reported(self.uri):
            return RunLog(self, self.client.get_run(run_id).info.run_id, strict)

    def find(self, **tags: str) -> list:
        """The MLflow runs with these tags, newest first."""
        return self.search(" and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items()))

    def children(self, run_id: str) -> list:
        return self.search(f"tags.`mlflow.parentRunId` = '{run_id}'")

    def search(self, condition: str) -> list:
        if self.client is None:
            return []
        runs, token = [], None
        with reported(self.uri):
            while True:
                page = self.client.search_runs(
                    [self.experiment_id], condition, max_results=1000, page_token=token
                )
                runs += page
                token = page.token
                if not token:
                    return runs

    def delete(self, run_id: str) -> None:
        with reported(self.uri):
            self.client.delete_run(run_id)


class RunLog:
    """Writes into one run. Numbers are rounded: the table of MLflow shows every digit."""

    def __init__(self, store: Store, run_id: str | None, strict: bool = False):
        self.store = store
        self.run_id = run_id
        self.strict = strict
        self.lost = False  # a write failed: only `close` is still tried

    def params(self, config: Config | dict[str, Any]) -> None:
        """The resolved config, flat, without paths, addresses and ids. Can be written once."""
        if self.run_id is None:
            return
        from mlflow.entities import Param

        values = config.model_dump() if isinstance(config, Config) else config
        flat = {k: v for k, v in flatten(values).items() if not k.startswith(NOT_PARAMS)}
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in flat.items()}
        params = [Param(k, _cut(v, MAX_PARAM_CHARS)) for k, v in texts.items()]
        for start in range(0, len(params), 100):
            self._write("log_batch", params=params[start : start + 100])

    def metrics(self, values: dict[str, Any], step: int = 0, at_ms: int | None = None) -> None:
        """Final numbers. None and non-finite values are left out, never written as 0."""
        self._log_points([(name, value, step, at_ms) for name, value in values.items()])

    def curve(self, points: list[dict[str, Any]]) -> None:
        """Points of a curve file (fixed/result.py): `step`, `time` and numbers.

        A name without a section gets train/, which sets it apart from a final number.
        """
        rows = []
        for point in points:
            at_ms = int(1000 * point["time"]) if "time" in point else None
            for name, value in point.items():
                if name not in ("step", "time"):
                    full_name = name if "/" in name else f"train/{name}"
                    rows.append((full_name, value, point["step"], at_ms))
        self._log_points(rows)

    def tags(self, values: dict[str, Any]) -> None:
        if self.run_id is None:
            return
        from mlflow.entities import RunTag

        self._write("log_batch", tags=[RunTag(k, v) for k, v in _texts(values).items()])

    def dataset(
        self, name: str, digest: str, source: str = "", profile: dict[str, Any] | None = None
    ) -> None:
        """The data that a run learned from, as an MLflow dataset input."""
        if self.run_id is None:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        context = [InputTag("mlflow.data.context", "training")]
        data = Dataset(
            name=name,
            digest=digest[:36],
            source_type="local",
            source=source or name,
            profile=json.dumps(profile or {}),
        )
        self._write("log_inputs", datasets=[DatasetInput(data, context)])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._write("log_artifact", str(path), folder)

    def text(self, text: str, name: str) -> None:
        self._write("log_text", text, name)

    def table(self, samples: list[dict[str, Any]], name: str = "samples.json") -> None:
        """Rows that MLflow's evaluation view shows for several runs side by side."""
        if samples:
            columns = {key: [row.get(key) for row in samples] for key in samples[0]}
            self._write("log_table", columns, name)

    def trace(self, name: str, identity: str, facts: dict[str, Any]) -> None:
        """One call of a language model. `identity` names it: written again, it is the same one.

        `facts`: inputs, outputs, message (null: it went well), started_s, seconds, usage, tags.
        """
        if self.run_id is None or self.lost:
            return
        from mlflow.tracing.client import TracingClient

        span, info = _trace_of(name, identity, facts, self.store.experiment_id, self.run_id)
        with reported(self.store.uri):
            client = TracingClient(self.store.uri)
            client.start_trace(info)
            client.log_spans(self.store.experiment_id, [span])

    def describe(self, markdown: str) -> None:
        """The run's note. A table column shows its first 40 characters: begin with a sentence."""
        self.tags({"mlflow.note.content": markdown})

    def rename(self, name: str) -> None:
        self._write("update_run", name=name)

    def reopen(self) -> None:
        """RUNNING again, owned and watched by this process."""
        self.tags(_owner_tags())  # first: a RUNNING run with a dead owner is an orphan
        self._write("update_run", status="RUNNING")
        if self.run_id:
            watch(self.store.uri, self.run_id)

    def close(self, status: str = "FINISHED", ended_ms: int | None = None) -> None:
        """FINISHED, FAILED or KILLED. Tried even when earlier writes failed."""
        assert status in ("FINISHED", "FAILED", "KILLED"), status
        self.lost = False
        self._write("set_terminated", status=status, end_time=ended_ms or int(time.time() * 1000))
        if self.run_id and not self.lost:
            unwatch(self.store.uri, self.run_id)

    def _log_points(self, points: list[tuple[str, Any, int, int | None]]) -> None:
        if self.run_id is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, rounded(name, value), at_ms or now, step)
            for name, value, step, at_ms in points
            if _is_number(value)
        ]
        for start in range(0, len(metrics), 1000):
            self._write("log_batch", metrics=metrics[start : start + 1000])

    def _write(self, method: str, *args, **keywords) -> None:
        if self.run_id is None or self.lost:
            return
        try:
            with reported(self.store.uri):
                getattr(self.store.client, method)(self.run_id, *args, **keywords)
        except TrackingError as error:
            if self.strict:
                raise
            self.lost = True
            print(f"{error} The run goes on; its numbers are in its folder.", file=sys.stderr)


def _trace_of(name: str, identity: str, facts: dict[str, Any], experiment_id: str, run_id: str):
    """(span, trace info). MLflow's own tracer knows no past and no run but the active one."""
    from mlflow.entities import Span, TraceInfo, TraceLocation, TraceState

    key = hashlib.sha256(identity.encode()).digest()[:16]
    trace_id, usage = f"tr-{key.hex()}", facts["usage"]
    usage = usage | {"total_tokens": usage["input_tokens"] + usage["output_tokens"]}
    started_ns, failed = int(facts["started_s"] * 1e9), facts["message"]
    attributes = {
        "mlflow.traceRequestId": trace_id,
        "mlflow.spanType": "CHAT_MODEL",
        "mlflow.spanInputs": facts["inputs"],
        "mlflow.spanOutputs": facts["outputs"],
        "mlflow.chat.tokenUsage": usage,
    }
    span = Span.from_dict(
        {
            "trace_id": base64.b64encode(key).decode(),
            "span_id": base64.b64encode(key[:8]).decode(),
            "parent_span_id": None,
            "name": name,
            "start_time_unix_nano": started_ns,
            "end_time_unix_nano": started_ns + int(facts["seconds"] * 1e9),
            "events": [],
            "status": {
                "code": f"STATUS_CODE_{'ERROR' if failed else 'OK'}",
                "message": failed or "",
            },
            "attributes": {key: json.dumps(value) for key, value in attributes.items()},
        }
    )
    info = TraceInfo(
        trace_id=trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=started_ns // 1_000_000,
        state=TraceState.ERROR if failed else TraceState.OK,
        execution_duration=int(facts["seconds"] * 1000),
        request_preview=_cut(json.dumps(facts["inputs"]), 200),
        response_preview=_cut(failed or json.dumps(facts["outputs"]), 200),
        trace_metadata={
            "mlflow.sourceRun": run_id,
            "mlflow.trace.tokenUsage": json.dumps(usage),
        },
        tags={"mlflow.traceName": name, **_texts(facts["tags"])},
    )
    return span, info


def rounded(name: str, value: float) -> float:
    """6 decimals for bits per byte, 6 digits for the rest; whole numbers stay exact."""
    if isinstance(value, int):
        return value
    return round(value, 6) if "bpb" in name or name == "gain" else float(f"{value:.6g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _texts(tags: dict[str, Any]) -> dict[str, str]:
    return {k: _cut(str(v), MAX_TAG_CHARS) for k, v in tags.items() if v is not None}


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


# -- runs never stay RUNNING ---------------------------------------------------------------------

# Standard library only until there is work: 10 MB, and nothing at all to do after a clean exit.
_WATCH = """
import sys
left = set()
for line in sys.stdin:
    (left.add if line[0] == "+" else left.discard)(line[1:].strip())
if left:
    from nightshift.fixed.tracking import close_killed
    close_killed(sys.argv[1], left)
"""


class Watchdog:
    """A process that reads a pipe held open by its owner alone, and acts when it closes.

    It has its own session, so it survives a kill of the owner's process group, and it holds none of
    the owner's files. One for each process and URI, whatever the number of runs.
    """

    def __init__(self, uri: str):
        read_end, self.write_end = os.pipe()  # close-on-exec: no other child inherits it
        path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _WATCH, uri],
            stdin=read_end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            start_new_session=True,
        )
        os.close(read_end)

    def tell(self, line: str) -> None:
        try:
            os.write(self.write_end, f"{line}\n".encode())
        except BrokenPipeError:  # someone killed it: close_orphans remains
            pass


_watchdogs: dict[str, Watchdog] = {}


def watch(uri: str, run_id: str) -> None:
    """From now on the death of this process sets the run to KILLED."""
    if not _watchdogs:
        os.register_at_fork(after_in_child=_forget_watchdogs)
    if uri not in _watchdogs:
        _watchdogs[uri] = Watchdog(uri)
    _watchdogs[uri].tell(f"+{run_id}")


def unwatch(uri: str, run_id: str) -> None:
    if uri in _watchdogs:
        _watchdogs[uri].tell(f"-{run_id}")


def _forget_watchdogs() -> None:
    """In a forked child: its copy of the pipe would hide the owner's death."""
    for watchdog in _watchdogs.values():
        os.close(watchdog.write_end)
        watchdog.process.returncode = 0  # not this process's child: never wait for it
    _watchdogs.clear()


def close_killed(uri: str, run_ids: Iterable[str]) -> None:
    """Set those of the runs, and of their children, that are still RUNNING to KILLED."""
    from mlflow import MlflowClient

    _prepare_mlflow()
    client = MlflowClient(uri)
    for run_id in run_ids:
        run = client.get_run(run_id)
        children = client.search_runs(
            [run.info.experiment_id],
            f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'",
        )
        for found in [run, *children]:
            if found.info.status == "RUNNING":
                client.set_terminated(found.info.run_id, "KILLED")


def close_orphans(store: Store) -> int:
    """Set RUNNING runs of this host whose owner is gone to KILLED; returns how many."""
    host = socket.gethostname()
    running = store.search(f"attributes.status = 'RUNNING' and tags.host = '{host}'")
    orphans = [run for run in running if not _is_alive(run.data.tags.get("pid", ""))]
    for run in orphans:
        store.attach(run.info.run_id).close("KILLED")
    return len(orphans)


def _owner_tags() -> dict[str, str]:
    """`pid` is number@start time: numbers are used again."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": f"{process.pid}@{process.create_time():.1f}"}


def _is_alive(owner: str) -> bool:
    pid, _, started = owner.partition("@")
    try:
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - float(started)) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError):
        return False
