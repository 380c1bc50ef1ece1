"""The store, the run log, and the promise that no run stays RUNNING."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from agent.costs import Ledger
from agent.journal import Proposal, Trial
from agent.tracking import Mirror
from nightshift.fixed.config import ConfigError, Tracking
from nightshift.fixed.tracking import (
    VIEW,
    TrackingError,
    close_orphans,
    load_tracking,
    open_store,
    store_uri,
)

FORK = multiprocessing.get_context("fork")  # mlflow is imported already: no second start to pay


def settings(path, experiment="nightshift") -> Tracking:
    return Tracking(enabled=True, uri=f"sqlite:///{path}/mlflow.db", experiment=experiment)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(settings(tmp_path_factory.mktemp("store")))


def status(store, run_id: str) -> str:
    return store.client.get_run(run_id).info.status


def wait_for_status(store, run_id: str, wanted: str, limit_s: float = 30) -> str:
    deadline = time.monotonic() + limit_s
    while (found := status(store, run_id)) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def test_a_run_holds_what_was_written(store, tmp_path):
    run = store.start("one", "pretrain", tags={"study": "s", "nothing": None})
    run.params({"optim": {"matrix_lr": 0.02}, "corpus": {"path": "/x"}, "tracking": {"uri": "/y"}})
    run.metrics({"val_bpb": 1.23456789, "tokens": 123456789, "mfu": None, "gain": float("nan")})
    run.curve(
        [{"step": 1, "time": 1e9, "train/loss": 4.0}, {"step": 2, "train/loss": None, "lr": 0.1}]
    )
    run.dataset("sotu", "0a1b2c")
    run.table([{"prompt": "a", "completion": "b"}])
    run.describe("Kept, 1.2346: one.")
    (tmp_path / "run.log").write_text("log")
    run.artifact(tmp_path / "run.log")
    run.close()
    found = store.client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"optim.matrix_lr": "0.02"}
    assert found.data.metrics["val_bpb"] == 1.234568
    assert found.data.metrics["tokens"] == 123456789
    assert not {"mfu", "gain"} & set(found.data.metrics)
    assert found.data.metrics["train/loss"] == 4.0 and found.data.metrics["train/lr"] == 0.1
    assert found.data.tags["mlflow.note.content"].startswith("Kept")
    (point,) = store.client.get_metric_history(run.run_id, "train/loss")
    assert (point.step, point.timestamp) == (1, 10**12)
    assert "nothing" not in found.data.tags
    assert found.inputs.dataset_inputs[0].dataset.digest == "0a1b2c"
    names = {artifact.path for artifact in store.client.list_artifacts(run.run_id)}
    assert names == {"run.log", "samples.json"}


def test_a_long_parameter_is_cut_instead_of_refused(store):
    run = store.start("long", "pretrain")
    run.params({"filter": {"mixture": "x" * 20_000}})
    run.close()
    assert len(store.client.get_run(run.run_id).data.params["filter.mixture"]) == 6000


def test_children_are_found_by_their_parent(store):
    parent = store.start("parent", "study")
    child = store.start("child", "trial", parent.run_id, watched=False)
    assert [run.info.run_id for run in store.children(parent.run_id)] == [child.run_id]
    child.close("FAILED")
    parent.close()


def test_a_parent_that_does_not_exist_is_refused(store):
    with pytest.raises(TrackingError, match="not found"):
        store.start("child", "trial", parent_run_id="0" * 32)


def test_the_database_is_in_wal_mode_and_artifacts_are_beside_it(store):
    import sqlite3

    path = store.uri.removeprefix("sqlite:///")
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)
    folder = store.client.get_experiment(store.experiment_id).artifact_location
    assert folder == os.path.join(os.path.dirname(path), "artifacts")


def test_the_saved_view_is_in_the_experiment(store):
    store.start("view", "study").close()
    tags = store.client.get_experiment(store.experiment_id).tags
    assert json.loads(tags[f"mlflow.sharedViewState.{VIEW}"])["state"].startswith("deflate;")


def _open_and_close(path, start, results):
    start.wait()
    run = open_store(settings(path)).start("r", "pretrain")
    run.close()
    results.put(run.run_id)


@pytest.mark.slow
def test_four_processes_may_open_an_empty_store_at_once(tmp_path):
    start, results = FORK.Barrier(4), FORK.Queue()
    workers = [FORK.Process(target=_open_and_close, args=(tmp_path, start, results))
               for _ in range(4)]  # fmt: skip
    for worker in workers:
        worker.start()
    ids = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(60)
    store = open_store(settings(tmp_path))
    assert {run.info.run_id for run in store.find(kind="pretrain")} == ids and len(ids) == 4
    assert len(store.client.search_experiments(filter_string="name = 'nightshift'")) == 1


def _own_runs_for_ever(tracking, results):
    """A watched run with a child, one nobody watches, and a grandchild process that stays."""
    os.setsid()
    store = open_store(tracking)
    watched = store.start("watched", "study")
    child = store.start("child", "trial", watched.run_id, watched=False)
    orphan = store.start("orphan", "pretrain", watched=False)
    finished = store.start("finished", "pretrain")
    finished.close()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                                 close_fds=False, start_new_session=True)  # fmt: skip
    results.put([r.run_id for r in (watched, child, orphan, finished)] + [bystander.pid])
    time.sleep(600)


@pytest.mark.slow
def test_a_killed_owner_leaves_no_run_running(tmp_path):
    """kill -9 of its whole process group, while a process that it started lives on."""
    results = FORK.Queue()
    owner = FORK.Process(target=_own_runs_for_ever, args=(settings(tmp_path), results))
    owner.start()
    watched, child, orphan, finished, bystander = results.get(timeout=60)
    store = open_store(settings(tmp_path))
    assert close_orphans(store) == 0 and status(store, orphan) == "RUNNING"
    os.killpg(owner.pid, signal.SIGKILL)
    owner.join(10)
    try:
        assert wait_for_status(store, watched, "KILLED") == "KILLED"
        assert wait_for_status(store, child, "KILLED") == "KILLED"
    finally:
        os.kill(bystander, signal.SIGKILL)
    assert status(store, finished) == "FINISHED"
    close_orphans(store)  # the watchdog's own opening may have closed it already
    assert status(store, orphan) == "KILLED"


def test_a_reused_pid_does_not_keep_an_orphan_alive(store):
    run = store.start("old", "pretrain", watched=False, tags={"pid": f"{os.getpid()}@12345.0"})
    assert close_orphans(store) == 1
    assert status(store, run.run_id) == "KILLED"


def test_a_reopened_run_is_owned_again(store):
    first = store.start("again", "study")
    first.close("KILLED")
    run = store.attach(first.run_id)
    run.reopen()
    assert status(store, first.run_id) == "RUNNING" and close_orphans(store) == 0
    run.close()
    assert status(store, first.run_id) == "FINISHED"


def test_a_failing_write_is_told_once_and_the_run_goes_on(store, capsys):
    run = store.start("bad", "pretrain")
    run.metrics({"no=such=name": 1.0})
    run.metrics({"loss": 1.0})
    run.close()
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert status(store, run.run_id) == "FINISHED"


def test_a_strict_log_raises_instead(store):
    run = store.start("strict", "pretrain", strict=True)
    with pytest.raises(TrackingError):
        run.metrics({"no=such=name": 1.0})
    run.close()


@pytest.mark.parametrize(
    "uri", ["mlruns", "file:///tmp/mlruns", "http://127.0.0.1:9", "gopher://x"]
)
def test_a_bad_address_is_one_line(uri):
    with pytest.raises(ConfigError) as caught:
        open_store(Tracking(enabled=True, uri=uri, experiment="e"))
    assert uri in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_database_is_one_line(tmp_path):
    (tmp_path / "mlflow.db").write_text("these are not the bytes of a database")
    with pytest.raises(TrackingError, match="not a database"):
        open_store(settings(tmp_path))


def test_a_deleted_experiment_is_one_line(store):
    other = store.tracking.model_copy(update={"experiment": "gone"})
    store.client.delete_experiment(open_store(other).experiment_id)
    with pytest.raises(TrackingError, match="was deleted"):
        open_store(other)


def test_without_tracking_nothing_happens_and_mlflow_is_not_imported():
    code = """if True:
        import sys
        from nightshift.fixed.config import Tracking
        from nightshift.fixed.tracking import open_store
        store = open_store(Tracking(enabled=False, uri=None, experiment="e"))
        run = store.start("x", "pretrain")
        run.params({"a": 1}); run.metrics({"b": 2}); run.tags({"c": 3})
        run.curve([{"step": 1, "d": 4}])
        run.dataset("e", "f"); run.table([{"g": 5}]); run.text("h", "i"); run.describe("j")
        run.reopen(); run.close()
        assert run.run_id is None and store.find(kind="pretrain") == []
        assert "mlflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_come_from_conf_and_a_typo_is_refused(tmp_path):
    assert load_tracking().enabled
    assert store_uri(load_tracking(["tracking.uri=http://host:5000"])) == "http://host:5000"
    for wrong in ("tracking.urri=x", "optim.matrix_lr=1"):
        with pytest.raises(ConfigError):
            load_tracking([wrong])


@pytest.mark.slow
def test_the_ui_takes_the_next_free_port_and_ends_with_all_its_processes(store):
    import re
    import socket

    import psutil

    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    ui = subprocess.Popen(
        [sys.executable, "-m", "nightshift.ui", "--port", str(port), f"tracking.uri={store.uri}"],
        stdout=subprocess.PIPE, text=True)  # fmt: skip
    address = next(m.group() for line in ui.stdout if (m := re.search(r"http://[\d.:]+", line)))
    assert address != f"http://127.0.0.1:{port}"
    assert urllib.request.urlopen(f"{address}/health").status == 200
    remote = open_store(Tracking(enabled=True, uri=address, experiment="over http"))
    run = remote.start("r", "pretrain")
    run.text("hello", "note.txt")
    run.close()
    assert status(store, run.run_id) == "FINISHED"
    processes = psutil.Process(ui.pid).children(recursive=True)
    ui.send_signal(signal.SIGINT)
    assert ui.wait(30) == 0
    assert not any(p.is_running() and p.status() != "zombie" for p in processes)


# ---- calls of a language model ----


def a_study_with_calls(folder, trace: bool):
    """Two calls for trial 1: one that failed, one with an answer."""
    ledger = Ledger(folder)
    most = {"input_tokens": 9, "output_tokens": 9, "dollars": None}
    ledger.end(ledger.begin(1, "proposal", "openai:m", most), "timeout", message="timeout: slow")
    counted = {"input_tokens": 7, "output_tokens": 3, "dollars": 0.5, "seconds": 1.5}
    ledger.end(ledger.begin(1, "proposal", "openai:m", most), "ok", **counted)
    (folder / "conversations").mkdir()
    lines = [{"role": "human", "text": "Propose."}, {"role": "ai", "text": "", "call": 1}]
    lines[1]["calls"] = [{"name": "propose", "arguments": {"title": "t"}}]
    talk = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "conversations/001.jsonl").write_text(talk)
    (folder / "settings.json").write_text(json.dumps({"study": {"llm": {"trace": trace}}}))
    proposal = Proposal(title="t", hypothesis="h", source="llm", usage=ledger.usage(1))
    return Trial(number=1, proposal=proposal, parent=0, status="ok", decision="discard", reason="")


@pytest.mark.parametrize("trace", [True, False])
def test_each_call_of_a_model_is_a_trace_of_its_trials_run_and_only_once(store, tmp_path, trace):
    trial = a_study_with_calls(tmp_path, trace)
    for _ in range(2):  # the second time as after a kill before the seal
        mirror = Mirror(store, f"calls {trace}", tmp_path)
        mirror.open_study({}, "0" * 40)
        mirror.log_trial(trial)
        child = store.find(study=f"calls {trace}", trial="001")[0].info.run_id
        trial.reason += " again"  # another line of the journal: the child is made again
    place = {"locations": [store.experiment_id]}
    found = [t for t in store.client.search_traces(**place) if t.info.tags["trial"] == "001"]
    mirror.close_study()
    if not trace:
        found = [t for t in found if t.info.trace_metadata["mlflow.sourceRun"] == child]
        assert found == []
        return
    states = sorted((t.info.state.name, t.info.tags.get("dollars")) for t in found)
    assert states == [("ERROR", None), ("OK", "0.5")]
    assert {t.info.trace_metadata["mlflow.sourceRun"] for t in found} == {child}
    (answered,) = [t.data.spans[0] for t in found if t.info.state.name == "OK"]
    assert answered.inputs["messages"][0]["content"] == "Propose."
    assert answered.outputs["tool_calls"][0]["arguments"] == {"title": "t"}
    assert answered.attributes["mlflow.chat.tokenUsage"]["total_tokens"] == 10
