"""A run's files as DVC outputs."""

import csv
import json

import yaml

from nightshift import stage
from nightshift.fixed.config import ROOT
from nightshift.fixed.result import Result, Training, write_json


def finished_run(folder):
    training = Training(status="ok", steps=3, tokens=300, train_s=1.0, code="/home/me/nightshift")
    write_json(folder / "training.json", training)
    write_json(folder / "result.json", Result(status="ok", val_bpb=1.5, training=training))
    points = [
        {"step": 1, "train/loss": 5.0, "tokens": 100, "memory_gb": 1.0},
        {"step": 2, "train/loss": 4.0, "tokens": 200, "dev_bpb": 2.0},
    ]
    (folder / "curve.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "model.safetensors").write_bytes(b"weights")
    return folder


def test_what_goes_to_git_does_not_say_where_the_code_lay(tmp_path):
    run = finished_run(tmp_path)
    stage.publish(
        run, tmp_path / "champion", "checkpoint", "training.json", "result.json", "curve.jsonl"
    )
    for name in ("training.json", "result.json", "metrics.json"):
        assert "/home/me" not in (tmp_path / "champion" / name).read_text()
    assert json.loads((tmp_path / "champion" / "metrics.json").read_text())["val_bpb"] == 1.5


def test_the_curve_is_a_table_that_dvc_can_plot(tmp_path):
    run = finished_run(tmp_path)
    stage.publish(run, tmp_path / "champion", "curve.jsonl")
    with open(tmp_path / "champion" / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["train/loss"] for row in rows] == ["5.0", "4.0"]
    assert [row["dev_bpb"] for row in rows] == ["", "2.0"]


def test_a_new_checkpoint_replaces_the_old_one_whole(tmp_path):
    run = finished_run(tmp_path)
    (tmp_path / "champion" / "checkpoint").mkdir(parents=True)
    (tmp_path / "champion" / "checkpoint" / "stale").write_text("old")
    stage.publish(run, tmp_path / "champion", "checkpoint")
    assert [p.name for p in (tmp_path / "champion" / "checkpoint").iterdir()] == [
        "model.safetensors"
    ]


def test_every_stage_of_dvc_yaml_runs_code_that_exists():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    commands = [s["cmd"].split()[-1] for name, s in stages.items() if name != "compose"]
    assert set(commands) == set(stage.STAGES)
    for one in stages.values():
        for path in one["deps"]:
            assert path.startswith(("data/", "champion/")) or (ROOT / path).exists(), path
