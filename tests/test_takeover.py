"""What the harness takes over from a candidate's folder, and what it leaves there."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file
from tiny import config

from nightshift.fixed import train
from nightshift.fixed.feed import Broken
from nightshift.fixed.tokenizer import ensure_tokenizer
from nightshift.fixed.train import count_params, open_left, read_claims, take_claims, take_weights


@pytest.fixture
def place(tmp_path):
    scratch = tmp_path / "scratch"
    (scratch / "checkpoint").mkdir(parents=True)
    return scratch


def weights(path, **more):
    save_file({"a": torch.zeros(3, 4), "b": torch.ones(5), **more}, path)


def take(tmp_path, place, **changes):
    cfg = config(tmp_path, **changes)
    return take_weights(cfg, place, tmp_path / "run", ensure_tokenizer(cfg))


def test_weights_are_copied_hashed_and_counted(tmp_path, place):
    weights(place / "checkpoint/model.safetensors")
    (place / "checkpoint/config.yaml").write_text("planted: true")
    taken = take(tmp_path, place)
    kept = tmp_path / "run/checkpoint"
    assert taken["num_params"] == 17 and len(taken["weights_sha256"]) == 64
    assert "planted" not in (kept / "config.yaml").read_text()
    assert (kept / "tokenizer/tokenizer.json").exists()


@pytest.mark.parametrize("kind", ["link", "link to a folder", "fifo", "folder", "nothing"])
def test_what_is_not_a_plain_file_is_refused(tmp_path, place, kind):
    path, secret = place / "checkpoint/model.safetensors", tmp_path / "secret.safetensors"
    weights(secret)
    if kind == "link":
        path.symlink_to(secret)
    if kind == "link to a folder":
        (place / "checkpoint").rmdir()
        (tmp_path / "elsewhere").mkdir()
        weights(tmp_path / "elsewhere/model.safetensors")
        (place / "checkpoint").symlink_to(tmp_path / "elsewhere")
    if kind == "fifo":
        os.mkfifo(path)
    if kind == "folder":
        path.mkdir()
    with pytest.raises(Broken, match="no weights that can be used"):
        take(tmp_path, place)


def test_weights_larger_than_the_disk_limit_are_refused(tmp_path, place):
    weights(place / "checkpoint/model.safetensors", c=torch.zeros(3 << 20))
    with pytest.raises(Broken, match="larger than sandbox.disk_mb"):
        take(tmp_path, place, **{"sandbox.disk_mb": 10})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04K\x01.",  # a pickle
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"{}" + b"hidden payload",
        struct.pack("<Q", 4) + b"[{}]",
        struct.pack("<Q", 30) + b'{"a":{"data_offsets":[0,"x"]}}',
    ],
)
def test_what_is_not_a_safetensors_file_is_refused_without_loading_it(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(Broken, match="not a safetensors file"):
        count_params(path)


def test_claims_that_are_no_object_are_no_claims(tmp_path):
    path = tmp_path / "training.json"
    for text in ("", "[1]", "{", "[" * 100_000):
        path.write_text(text)
        assert read_claims(path) == {}


def test_curve_and_samples_are_rebuilt_from_plain_values(tmp_path, place):
    cfg = config(tmp_path)
    points = [
        {"step": 1, "train/loss": 2.5, "val_bpb": 0.01, "dev_bpb": "great"},
        {"step": 2, "train/loss": float("nan"), "evil": {"a": 1}},
        {"progress": 0.5, "train/loss": 2.0},
        [1, 2],
    ]
    (place / "curve.jsonl").write_text("\n".join(map(json.dumps, points)) + "\n{broken")
    (place / "samples.json").write_text(json.dumps([{"prompt": "mine", "completion": "x" * 9999}]))
    folder = tmp_path / "run"
    folder.mkdir()
    take_claims(cfg, place, folder)
    kept = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert kept == [{"step": 1, "train/loss": 2.5}, {"step": 2}]
    (sample,) = json.loads((folder / "samples.json").read_text())
    assert sample["prompt"] == cfg.evaluate.sample_prompts[0]
    assert len(sample["completion"]) == 8000


def test_a_link_in_place_of_the_curve_is_not_followed(tmp_path, place):
    (tmp_path / "secret").write_text('{"step": 1}')
    (place / "curve.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        open_left(place, "curve.jsonl")


class Delivered:
    delivered = True


class Nothing:
    delivered = False


def report(**changes):
    values = {"exit": 0, "killed": None, "wall_s": 1.0, "cpu_s": 1.0, "peak_memory_mb": 1.0}
    return train.Report(**values | changes)


@pytest.mark.parametrize(
    ("threads", "cpu_s", "refused"),
    [(1, 60, False), (1, 110, True), (2, 110, False), (None, 900, False)],
)
def test_more_threads_than_the_study_gives_are_refused(tmp_path, threads, cpu_s, refused):
    cfg = config(tmp_path, **{"runtime.num_threads": threads})
    found = train.too_many_cpus(cfg, report(wall_s=60.0, cpu_s=float(cpu_s)))
    assert bool(found) == refused and (not found or "1.8 CPUs" in found)


@pytest.mark.parametrize(
    ("broken", "how", "claims", "feeder", "status"),
    [
        (None, report(), {}, Delivered, "ok"),
        (None, report(), {"status": "ok"}, Nothing, "invalid"),
        (None, report(exit=1), {}, Nothing, "crash"),
        (None, report(exit=139), {}, Nothing, "crash"),
        (None, report(killed="memory: 9 MB", exit=137), {}, Nothing, "oom"),
        (None, report(killed="disk: 9 MB", exit=137), {}, Delivered, "invalid"),
        ("it hoarded", report(), {"status": "ok"}, Delivered, "invalid"),
        (None, report(), {"status": "diverged", "message": "loss nan"}, Nothing, "diverged"),
        (None, report(), {"status": "diverged"}, Delivered, "diverged"),
        (None, report(), {"status": "splendid"}, Delivered, "ok"),
        (None, report(exit=1), {}, Delivered, "ok"),  # after its weights: only samples are lost
    ],
)
def test_a_status_is_what_was_seen_and_claims_can_only_make_it_worse(
    broken, how, claims, feeder, status
):
    assert train.verdict(broken, how, claims, feeder)[0] == status
