"""The journal's mirror in MLflow, and the report."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent import report
from agent.journal import Edit, Journal, Proposal, Run, Trial
from agent.tracking import Mirror, run_name
from nightshift.fixed.config import ConfigError, Tracking
from nightshift.fixed.result import Training, write_json
from nightshift.fixed.tracking import Store, open_store

FORK = multiprocessing.get_context("fork")
CONFIG = "seed: {seed}\noptim: {{matrix_lr: 0.02}}\ncorpus: {{source: sotu}}\n"
CURVE = """{"step": 10, "elapsed_s": 1.0, "loss": 7.5}\n{"step": 20, "loss": 6.5}\n"""
BASE_COMMIT = "ba5e" * 10
NUMBERS = dict(steps=200, tokens=1_638_400, train_s=20.01, wall_s=31.5, tokens_per_s=81_920.5,
               peak_memory_gb=0.91, num_params=1_870_336)  # fmt: skip


def trial(number, title, decision, val_bpb, gain=None, status="ok", seeds=(1,), **proposal):
    runs = [Run(seed=seed, status=status, val_bpb=val_bpb and val_bpb + 0.001 * seed,
                message=None if status == "ok" else "RuntimeError: shapes\tdiffer",
                folder=f"trials/{number:03d}/seed_{seed}", **(NUMBERS if status == "ok" else {}))
            for seed in seeds]  # fmt: skip
    return Trial(
        number=number, parent=None if number == 0 else 0, status=status, decision=decision,
        proposal=Proposal(title=title, hypothesis=f"{title} helps | a lot.", source="recipes",
                          **proposal),
        reason="gain against the margin", val_bpb=val_bpb, gain=gain, runs=runs,
        commit="c0ffee" * 6 + "abcd",
        data_digest="0a1b2c3d4e5f" if runs else None,
        started_at=f"2026-05-01T22:0{number}:00+00:00",
        wall_s=40.0)  # fmt: skip


TRIALS = [
    trial(0, "baseline", "keep", 2.2, seeds=(1, 2, 3)),
    trial(1, "matrix lr 0.03", "keep", 2.1812345678, 0.0187654322,
          overrides={"optim.matrix_lr": 0.03}),
    trial(2, "softcap 30", "discard", 2.19, -0.0088, seeds=(1, 2),
          overrides={"model.softcap": 30.0}),
    trial(3, "shared heads", "discard", None, status="crash",
          edits=[Edit(path="m.py", search="a", replace="b")]),
    trial(4, "edit that no longer fits", "discard", None, status="invalid", seeds=()),
    trial(5, "far worse", "discard", 3.9, -1.7),
]  # fmt: skip


def make_study(folder, trials=TRIALS) -> Journal:
    """Files as the loop leaves them."""
    branch = f"study/{folder.name}"
    settings = {"name": folder.name, "sigma": 0.003, "base_commit": BASE_COMMIT, "branch": branch}
    write_json(folder / "settings.json", settings)
    journal = Journal(folder / "journal.jsonl")
    for one in trials:
        for run in one.runs:
            path = folder / run.folder
            path.mkdir(parents=True)
            (path / "config.yaml").write_text(CONFIG.format(seed=run.seed))
            (path / "curve.jsonl").write_text(CURVE)
            machine = {"torch": "2.13", "gpu": None}
            write_json(path / "training.json", Training(status=one.status, machine=machine))
            write_json(path / "samples.json", [{"prompt": "My fellow", "completion": " citizens"}])
            (path / "run.log").write_text("step 10\n")
        journal.append(one)
    (folder / "trials/003/diff.patch").write_text("--- a/m.py\n+++ b/m.py\n")
    return journal


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('mirror')}/mlflow.db"
    return open_store(Tracking(enabled=True, uri=uri, experiment="nightshift"))


@pytest.fixture
def study(tmp_path, store):
    """A study with its parent run open and nothing mirrored yet."""
    folder = tmp_path / "night"
    journal = make_study(folder)
    mirror = Mirror(store, "night", folder)
    mirror.open_study({"study": {"trials": 5}}, BASE_COMMIT)
    yield SimpleNamespace(folder=folder, journal=journal, mirror=mirror, store=store)
    mirror.close_study()


ENTRY = {
    "name": "promotion 1 holds", "digest": "d1", "params": {"model.depth": 8}, "note": "It holds.",
    "tags": {"promotion": 1, "verdict": "holds"}, "metrics": {"gain": 0.02, "test_bpb": None},
}  # fmt: skip


def test_a_promotion_is_one_child_that_a_resumed_study_leaves_alone(study, tmp_path):
    study.mirror.log_trial(study.journal.trials[0])
    (tmp_path / "CARD.md").write_text("# card")
    registered = []

    def promote(works: bool) -> list:
        def register(run_id: str) -> bool:
            registered.append(run_id)
            return works

        study.mirror.log_promotion(ENTRY, [tmp_path / "CARD.md"], register)
        study.mirror.reconcile(study.journal)
        found = study.store.children(study.mirror.run.run_id)
        return [run for run in found if run.data.tags["kind"] == "promotion"]

    (run,) = promote(works=False)
    assert run.info.status == "FAILED", "the registry was down"
    (run,) = promote(works=True)
    assert run.info.status == "FINISHED" and run.data.metrics == {"gain": 0.02}
    assert run.data.params == {"model.depth": "8"} and run.data.tags["verdict"] == "holds"
    assert [a.path for a in study.store.client.list_artifacts(run.info.run_id)] == ["CARD.md"]
    assert [again.info.run_id for again in promote(works=True)] == [run.info.run_id]
    assert len(registered) == 2, "once it is sealed, nothing is registered again"


def children(study) -> dict:
    return {run.data.tags["trial"]: run for run in study.store.children(study.mirror.run.run_id)}


def test_every_trial_is_there_once_with_the_numbers_of_the_journal(study):
    for one in study.journal.trials:
        study.mirror.log_trial(one)
    assert len(study.store.children(study.mirror.run.run_id)) == len(TRIALS)
    found = children(study)
    for one in TRIALS:
        run = found[f"{one.number:03d}"]
        if one.val_bpb is None:
            assert "val_bpb" not in run.data.metrics
        else:
            assert run.data.metrics["val_bpb"] == pytest.approx(one.val_bpb, abs=5e-7)
        assert (run.data.tags["status"], run.data.tags["decision"]) == (one.status, one.decision)
        assert run.info.status == ("FINISHED" if one.status == "ok" else "FAILED")
        assert run.info.end_time - run.info.start_time == 40_000


def test_a_child_carries_what_is_needed_to_understand_it(study):
    for one in study.journal.trials:
        study.mirror.log_trial(one)
    second, third = children(study)["002"], children(study)["003"]
    assert second.info.run_name == "002 - softcap 30"
    assert third.info.run_name == "003 x shared heads"
    assert second.data.params == {"seed": "1", "optim.matrix_lr": "0.02", "corpus.source": "sotu"}
    assert (
        second.data.metrics["val_bpb_seed_2"] == 2.192 and second.data.metrics["train/loss"] == 6.5
    )
    assert second.data.tags["machine.torch"] == "2.13" and second.data.tags["parent_trial"] == "000"
    assert second.inputs.dataset_inputs[0].dataset.name == "sotu"
    note = second.data.tags["mlflow.note.content"]
    assert note.startswith("Discarded, 2.1900 (-0.0088): softcap 30.")
    names = {a.path for a in study.store.client.list_artifacts(third.info.run_id)}
    assert {"config.yaml", "training.json", "curve.jsonl", "run.log", "diff.patch"} <= names


def test_the_completions_of_each_trial_are_a_table(study, tmp_path):
    """Of the name that a pretraining run's have, so that MLflow shows them side by side."""
    for one in study.journal.trials[:2]:
        study.mirror.log_trial(one)
    for number in ("000", "001"):
        run = children(study)[number]
        assert "completions.json" in run.data.tags["mlflow.loggedArtifacts"]
        id, place = run.info.run_id, tmp_path / number
        place.mkdir()
        path = study.store.client.download_artifacts(id, "completions.json", str(place))
        table = json.loads(Path(path).read_text())
        assert table == {"columns": ["prompt", "completion"], "data": [["My fellow", " citizens"]]}


def test_the_parent_shows_the_best_so_far(study):
    for one in study.journal.trials:
        study.mirror.log_trial(one)
    history = study.store.client.get_metric_history(study.mirror.run.run_id, "best_val_bpb")
    best = [point.value for point in sorted(history, key=lambda point: point.step)]
    assert best == [2.2] + [2.181235] * 5
    parent = study.store.client.get_run(study.mirror.run.run_id)
    assert (parent.data.metrics["trials"], parent.data.metrics["kept"]) == (5, 1)
    assert parent.data.metrics["sigma"] == 0.003 and parent.data.tags["study"] == "night"


def test_logging_a_trial_twice_leaves_one_child(study):
    for _ in range(2):
        study.mirror.log_trial(TRIALS[0])
    assert len(study.store.children(study.mirror.run.run_id)) == 1


def test_a_resumed_study_keeps_its_parent_and_writes_only_what_is_missing(study):
    study.mirror.log_trial(TRIALS[0])
    before = children(study)["000"].info.run_id
    study.mirror.close_study("KILLED")
    again = Mirror(study.store, "night", study.folder)
    assert again.open_study({"study": {"trials": 9}}, BASE_COMMIT) == study.mirror.run.run_id
    again.reconcile(study.journal)
    found = children(study)
    assert found["000"].info.run_id == before and len(found) == len(TRIALS)


def test_a_second_study_of_the_same_name_has_a_parent_of_its_own(study, tmp_path):
    other = Mirror(study.store, "night", tmp_path / "elsewhere")
    assert other.open_study({}, BASE_COMMIT) != study.mirror.run.run_id
    other.close_study()


class StuckMirror(Mirror):
    """Stops for ever in the middle of a trial, as if the machine had."""

    def _fill(self, child, trial, ended_ms):
        super()._fill(child, trial, ended_ms)
        self.stuck.put(child.run_id)
        time.sleep(600)


def _log_and_hang(tracking, folder, stuck):
    mirror = StuckMirror(open_store(tracking), "night", folder)
    mirror.stuck = stuck
    mirror.open_study({}, BASE_COMMIT)
    mirror.log_trial(TRIALS[0])


def test_a_kill_in_mid_trial_leaves_exactly_one_whole_child(tmp_path):
    folder = tmp_path / "night"
    journal = make_study(folder, TRIALS[:4])
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking, stuck = Tracking(enabled=True, uri=uri, experiment="e"), FORK.Queue()
    owner = FORK.Process(target=_log_and_hang, args=(tracking, folder, stuck))
    owner.start()
    half_written = stuck.get(timeout=60)
    os.kill(owner.pid, signal.SIGKILL)
    owner.join(10)
    store = open_store(tracking)
    mirror = Mirror(store, "night", folder)
    mirror.open_study({}, BASE_COMMIT)
    mirror.reconcile(journal)
    mirror.close_study()
    found = store.children(mirror.run.run_id)
    assert sorted(run.data.tags["trial"] for run in found) == ["000", "001", "002", "003"]
    assert half_written not in {run.info.run_id for run in found}
    assert store.search("attributes.status = 'RUNNING'") == []
    assert len(store.find(kind="study")) == 1


def test_a_tracker_that_is_down_is_told_once_and_caught_up_with(study, capsys, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    gone = Tracking(enabled=True, uri="http://127.0.0.1:9", experiment="nightshift")
    down = Store(gone, gone.uri, MlflowClient(gone.uri), study.store.experiment_id)
    study.mirror.store = down
    study.mirror.log_trial(TRIALS[0])
    study.mirror.log_trial(TRIALS[1])
    assert len(capsys.readouterr().err.splitlines()) == 1
    study.mirror.store = study.store
    study.mirror.log_trial(TRIALS[2])
    assert sorted(children(study)) == ["000", "001", "002"]


def test_names_begin_with_number_and_verdict():
    names = [run_name(one)[:5] for one in TRIALS]
    assert names == ["000 +", "001 +", "002 -", "003 x", "004 x", "005 -"]


def test_the_report_is_written_and_attached(study, monkeypatch, capsys):
    monkeypatch.setattr(report, "STUDIES", study.folder.parent)
    assert report.main(["night"]) == 0
    folder = study.folder / "report"
    assert (folder / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "progress.svg").read_text()
    attached = study.store.client.list_artifacts(study.mirror.run.run_id, "report")
    assert {a.path for a in attached} == {f"report/{path.name}" for path in folder.iterdir()}
    assert capsys.readouterr().err == ""


def test_the_table_begins_with_the_columns_of_autoresearch_and_has_no_invented_zero(tmp_path):
    lines = report.results_tsv(make_study(tmp_path / "s")).splitlines()
    assert lines[0].split("\t")[:5] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert {len(line.split("\t")) for line in lines} == {len(report.COLUMNS)}
    assert lines[2].split("\t")[:5] == ["c0ffeec", "2.181235", "0.910000", "keep", "matrix lr 0.03"]
    assert lines[4].split("\t")[1:4] == ["", "", "crash"]


def test_the_summary_says_what_failed_why_and_how_to_reproduce(tmp_path):
    journal = make_study(tmp_path / "s")
    text = report.summary(journal, {"sigma": 0.003, "base_commit": BASE_COMMIT}, "s")
    assert "Baseline 2.2000 -> best 2.1812" in text and "sigma 0.0030" in text
    assert "003 shared heads: crash. RuntimeError: shapes differ" in text
    assert "git checkout study/s && dvc repro" in text


def judged(number, gain, half, **more) -> Trial:
    one = trial(number, f"change {number}", "keep", 2.0, gain, seeds=(1, 2, 3))
    one.estimate, one.low, one.high, one.evidence = gain, gain - half, gain + half, 1e4
    one.differences = [gain - 0.0004, gain, gain + 0.0004]
    for name, value in more.items():
        setattr(one, name, value)
    return one


def test_the_summary_says_what_the_gains_are_worth_and_what_was_deleted(tmp_path):
    journal = make_study(
        tmp_path / "s",
        [
            TRIALS[0],
            judged(1, 0.01, 0.0003, lines_added=2, lines_removed=9),
            judged(2, 0.02, 0.0004, drift=0.3, drifted=True),
            trial(3, "crashes", "discard", None, status="crash"),
        ],
    )
    text = report.summary(journal, {"sigma": 0.003, "study": {"false_keeps": 0.05}}, "s")
    assert "Estimated sum of the kept gains: +0.0300 (+0.0295 to +0.0305, 95 %)." in text
    assert "Noise of a paired difference: sigma 0.0004, 4 df." in text
    assert "False keeps to expect so far: at most 0.001." in text
    assert "Before trial 002 the machine drifted: +0.3000." in text
    assert "## What was deleted\n\n- 001 change 1: 7 lines fewer\n" in text
    assert "| +0.0100 | +0.0100 (+0.0097 to +0.0103) | 3 |" in text


def test_a_child_carries_estimate_interval_and_the_parents_runs(study):
    one = judged(6, 0.0123, 0.0002)
    one.parent_runs = [Run(seed=4, status="ok", val_bpb=2.1, folder="trials/006/parent/seed_4")]
    folder = study.folder / "trials/006/parent/seed_4"
    folder.mkdir(parents=True)
    (folder / "run.log").write_text("step 10\n")
    study.mirror.log_trial(one)
    run = children(study)["006"]
    metrics = run.data.metrics
    assert (metrics["estimate"], metrics["low"], metrics["high"]) == (0.0123, 0.0121, 0.0125)
    assert metrics["num_parent_runs"] == 1
    artifacts = study.store.client.list_artifacts(run.info.run_id, "parent_seed_4")
    assert [a.path for a in artifacts] == ["parent_seed_4/run.log"]


def test_a_journal_of_the_first_rule_can_still_be_read(tmp_path):
    make_study(tmp_path / "s")
    path = tmp_path / "s/journal.jsonl"
    lines = []
    for line in path.read_text().splitlines():
        values = json.loads(line)
        for name in ("estimate", "low", "high", "evidence", "differences", "parent_runs", "drift"):
            del values[name]
        lines.append(json.dumps(values))
    path.write_text("\n".join(lines) + "\n")
    journal = Journal(path)
    assert journal.trials == TRIALS
    assert "+0.0188" in report.summary(journal, {}, "s")


def test_a_study_with_nothing_kept_and_no_noise_still_has_a_report(tmp_path):
    journal = Journal(tmp_path / "s/journal.jsonl")
    with pytest.raises(ConfigError, match="no trial yet"):
        report.write_report(tmp_path / "s", journal, {})
    journal.append(trial(0, "baseline", "discard", None, status="crash"))
    assert (report.write_report(tmp_path / "s", journal, {}) / "progress.png").exists()


def test_an_unknown_study_is_one_line_with_those_that_exist(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "STUDIES", tmp_path)
    assert report.main(["first"]) == 1
    assert "nightshift study" in capsys.readouterr().err
    make_study(tmp_path / "night")
    assert report.main(["nigth"]) == 1
    assert capsys.readouterr().err.strip().endswith("Nearest: night. Studies: night")


def test_a_study_without_tracking_writes_no_identity(tmp_path):
    off = open_store(Tracking(enabled=False, uri=None, experiment="e"))
    mirror = Mirror(off, "night", tmp_path)
    assert mirror.open_study({}, BASE_COMMIT) is None
    mirror.log_trial(TRIALS[0])
    mirror.close_study()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_journal_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "STUDIES", tmp_path)
    make_study(tmp_path / "night", TRIALS[:4])
    path = tmp_path / "night/journal.jsonl"
    path.write_text(path.read_text().split("\n", 1)[1])
    assert report.main(["night"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert json.loads((tmp_path / "night/settings.json").read_text())["name"] == "night"
