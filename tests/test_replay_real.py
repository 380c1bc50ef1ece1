"""Replays of real studies: real training, real ruler, real MLflow. `make test-all` runs it."""

import json
import subprocess

import pytest
import tiny
from test_end_to_end import clone, run  # noqa: F401  `clone` is a fixture

from agent.replays import read_replays

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small(clone, tmp_path_factory):  # noqa: F811
    """The arguments of a study whose runs take a second."""
    texts = tiny.write_texts(tmp_path_factory.mktemp("texts") / "texts")
    flat = tiny.TINY | {"corpus.path": str(texts), "tracking.enabled": True}
    return [f"{key}={json.dumps(value)}" for key, value in flat.items()]


def study(clone, small, name, *more):  # noqa: F811
    seeds = ["study.baseline_seeds=[1,2]", "study.max_seeds=2", "study.drift_every=0"]
    run(clone, "nightshift.cli", "study", f"study.name={name}", *seeds, *small, *more)
    return clone / "outputs/studies" / name


def test_each_trial_under_a_budget_in_steps_is_identical_and_mlflow_says_so(clone, small):  # noqa: F811
    from nightshift.fixed.config import Tracking
    from nightshift.fixed.tracking import open_store

    folder = study(clone, small, "steps", "study.trials=3")
    before = (folder / "journal.jsonl").read_bytes()
    run(clone, "nightshift.cli", "replay", "--all", "steps")
    assert (folder / "journal.jsonl").read_bytes() == before
    assert [(r.trial, r.outcome) for r in read_replays(folder)] == [
        (number, "identical") for number in range(4)
    ]
    uri = f"sqlite:///{clone}/outputs/mlflow/mlflow.db"
    store = open_store(Tracking(enabled=True, uri=uri, experiment="nightshift"))
    parent = store.find(kind="study", study="steps")[0]
    children = {c.data.tags["trial"]: c for c in store.children(parent.info.run_id)}
    assert {c.data.tags["replay"] for c in children.values()} == {"identical (1 of 1 runs)"}
    # One named by its MLflow run, after the data were deleted: built again, and the same.
    subprocess.run(["rm", "-r", str(clone / ".cache")], check=True)
    run(clone, "nightshift.cli", "replay", children["001"].info.run_id, "again=true")
    assert {(r.trial, r.outcome) for r in read_replays(folder)[4:]} == {(1, "identical")}
    said = run(clone, "nightshift.cli", "replay", parent.info.run_id, ok=False)
    assert "Run: nightshift replay --all steps" in said
    assert "there is no such run in" in run(clone, "nightshift.cli", "replay", "0" * 32, ok=False)


def test_a_run_on_the_clock_is_identical_step_for_step_and_a_changed_number_is_not(clone, small):  # noqa: F811
    seconds = ["budget.kind=seconds", "budget.amount=2", "budget.wall_limit_s=60"]
    folder = study(clone, small, "clock", "study.trials=2", *seconds)
    run(clone, "nightshift.cli", "replay", "--all", "clock")
    made = read_replays(folder)
    assert [r.outcome for r in made] == ["identical"] * 3
    assert all(r.steps_then == r.steps_now > 10 for r in made)
    again = run(clone, "nightshift.cli", "replay", "clock/0", "clock=again", "seeds=first")
    last = read_replays(folder)[-1]
    assert last.outcome == "within noise" and last.low <= last.val_bpb_now <= last.high
    assert "on the clock, inside the stated interval: 1 of 1" in again

    journal = folder / "journal.jsonl"
    lines = journal.read_text().splitlines()
    changed = json.loads(lines[1])
    changed["runs"][0]["val_bpb"] -= 0.001
    journal.write_text("\n".join([lines[0], json.dumps(changed), lines[2]]) + "\n")
    said = run(clone, "nightshift.cli", "replay", "clock/1", "seeds=first", ok=False)
    assert "not reproduced" in said and "the journal says val_bpb" in said
    assert "the same weights, but val_bpb" in said


def test_a_threads_difference_is_named(clone, small):  # noqa: F811
    """Two threads add in another order: what comes out says where it was made."""
    folder = study(clone, small, "threads", "study.trials=0")
    path = folder / "settings.json"
    settings = json.loads(path.read_text())
    settings["config"]["runtime"]["num_threads"] = 2
    path.write_text(json.dumps(settings))
    run(clone, "nightshift.cli", "replay", "threads/0", "seeds=first")
    (made,) = read_replays(folder)
    assert made.differs == {"threads": [1, 2]} and "threads was 1, is 2" in made.why
