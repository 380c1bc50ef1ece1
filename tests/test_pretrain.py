"""Real training of a very small model on a very small corpus, through Lightning."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import config, values

from nightshift import pretrain
from nightshift.fixed import checkpoint, recorder
from nightshift.fixed.config import ROOT, ConfigError
from nightshift.fixed.evaluate import evaluate
from nightshift.fixed.result import read_curve, read_training
from nightshift.fixed.tracking import open_store


def run(tmp_path, name, **changes):
    cfg = config(tmp_path, **changes)
    log = open_store(cfg.tracking).start(name, "pretrain")
    return pretrain.train(cfg, tmp_path / name, log), tmp_path / name, cfg


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One finished run that several tests look at."""
    tmp_path = tmp_path_factory.mktemp("shared")
    training, folder, cfg = run(tmp_path, "run", **{"budget.amount": 30.0})
    return training, folder, cfg, tmp_path


def test_training_learns(shared):
    training, folder, _, _ = shared
    curve = read_curve(folder / "curve.jsonl")
    assert training.status == "ok" and training.steps == 30 and training.tokens == 30 * 128
    assert curve[-1]["train/loss"] < curve[0]["train/loss"] - 0.5
    assert curve[-1]["dev_bpb"] > 0 and curve[-1]["step"] == 30
    assert len(json.loads((folder / "samples.json").read_text())) == 3


def test_the_result_is_the_same_each_time_it_is_evaluated_and_with_other_batches(shared):
    _, folder, cfg, _ = shared
    first = evaluate(folder, cfg)
    smaller = cfg.model_copy(update={"evaluate": cfg.evaluate.model_copy(update={"batch_size": 3})})
    assert first.status == "ok" and 0 < first.val_bpb < 8
    assert evaluate(folder, cfg).val_bpb == first.val_bpb
    assert evaluate(folder, smaller).val_bpb == pytest.approx(first.val_bpb, rel=1e-6)


def test_same_seed_same_weights_other_seed_other_weights(shared):
    _, folder, _, tmp_path = shared
    weights = load_file(folder / "checkpoint" / "model.safetensors")
    _, again, _ = run(tmp_path, "again", **{"budget.amount": 30.0})
    _, other, _ = run(tmp_path, "other", **{"budget.amount": 30.0, "seed": 2})
    assert all(
        torch.equal(weights[k], w)
        for k, w in load_file(again / "checkpoint" / "model.safetensors").items()
    )
    assert any(
        not torch.equal(weights[k], w)
        for k, w in load_file(other / "checkpoint" / "model.safetensors").items()
    )


def test_a_run_on_a_clock_is_replayed_step_for_step(tmp_path):
    first, folder, _ = run(tmp_path, "clock", **{"budget.kind": "seconds", "budget.amount": 1.0})
    second, again, _ = run(
        tmp_path,
        "replay",
        **{"budget.kind": "seconds", "budget.amount": 1.0, "budget.replay": str(folder)},
    )
    assert first.steps == second.steps > 3
    assert checkpoint.weights_sha256(folder / "checkpoint") == checkpoint.weights_sha256(
        again / "checkpoint"
    )


def test_the_warm_up_leaves_no_trace(tmp_path, monkeypatch):
    _, with_it, _ = run(tmp_path, "with")
    monkeypatch.setattr(recorder, "NUM_WARM_UP_STEPS", 0)
    _, without, _ = run(tmp_path, "without")
    assert checkpoint.weights_sha256(with_it / "checkpoint") == checkpoint.weights_sha256(
        without / "checkpoint"
    )


@pytest.mark.slow
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path):
    """SIGTERM in the middle of a real process; resumed, it has an undisturbed run's weights."""
    steps = {"budget.amount": 150.0}
    _, whole, _ = run(tmp_path, "whole", **steps)
    cfg = config(tmp_path, **steps)
    checkpoint.write_config(cfg, tmp_path / "conf" / "config.yaml")
    command = [sys.executable, "-m", "nightshift.pretrain", "--config-path", str(tmp_path / "conf")]
    command += ["hydra.output_subdir=null", "hydra/job_logging=none"]
    command += [f"hydra.run.dir={tmp_path / 'cut'}"]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.DEVNULL
    )
    curve = tmp_path / "cut" / "curve.jsonl"
    deadline = time.monotonic() + 60
    while len(read_curve(curve)) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == pretrain.EXIT_INTERRUPTED
    cut = read_training(tmp_path / "cut" / "training.json")
    assert cut.interrupted and 10 <= cut.steps < 150
    resumed = pretrain.continued(
        config(tmp_path, resume=str(tmp_path / "cut"), **steps), ["resume=x"]
    )
    pretrain.train(resumed, tmp_path / "resumed", open_store(cfg.tracking).start("r", "pretrain"))
    assert checkpoint.weights_sha256(
        tmp_path / "resumed" / "checkpoint"
    ) == checkpoint.weights_sha256(whole / "checkpoint")
    points = [p["step"] for p in read_curve(tmp_path / "resumed" / "curve.jsonl")]
    assert points == sorted(set(points)) and points[-1] == 150


def test_a_finished_run_does_not_resume(shared):
    _, folder, cfg, tmp_path = shared
    with pytest.raises(ConfigError, match="only an interrupted run resumes"):
        run(tmp_path, "more", resume=str(folder))


def test_an_exploding_loss_ends_the_run_as_diverged(tmp_path):
    changes = {f"optim.{group}_lr": 10.0 for group in ("embedding", "head", "matrix")}
    changes |= {"model.softcap": None, "budget.amount": 300.0}
    training, folder, _ = run(tmp_path, "bang", **changes)
    assert training.status == "diverged" and "optim.matrix_lr" in training.message
    assert read_training(folder / "training.json").status == "diverged"


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch):
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(pretrain, "fit", no_memory)
    training, _, _ = run(tmp_path, "oom")
    assert training.status == "oom" and "train.micro_batch_size (4)" in training.message


def test_gradient_accumulation_changes_nothing_but_rounding(tmp_path):
    _, whole, _ = run(tmp_path, "whole", **{"train.micro_batch_size": 4, "train.grad_clip": None})
    _, parts, _ = run(tmp_path, "parts", **{"train.micro_batch_size": 1, "train.grad_clip": None})
    a, b = (load_file(f / "checkpoint" / "model.safetensors") for f in (whole, parts))
    assert all(torch.allclose(a[k], b[k], atol=2e-2) for k in a)


def test_a_resumed_run_refuses_another_configuration(tmp_path):
    folder = tmp_path / "r" / "checkpoint"
    checkpoint.write_config(config(tmp_path), folder / "config.yaml")
    with pytest.raises(ConfigError, match="optim.matrix_lr: a resumed run keeps"):
        pretrain.continued(
            config(tmp_path, resume=str(tmp_path / "r")), ["resume=r", "optim.matrix_lr=0.1"]
        )


def test_weights_of_another_model_are_refused(shared):
    _, folder, _, tmp_path = shared
    text = (folder / "checkpoint" / "config.yaml").read_text().replace("mlp: relu2", "mlp: swiglu")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for name in ("model.safetensors", "tokenizer"):
        (wrong / name).symlink_to(folder / "checkpoint" / name)
    (wrong / "config.yaml").write_text(text)
    with pytest.raises((ConfigError, RuntimeError), match="size mismatch|do not fit"):
        checkpoint.load(wrong)


def test_values_of_the_defaults_are_valid(tmp_path):
    assert values(tmp_path)["tracking"]["enabled"] is False


def test_a_run_that_never_began_takes_only_its_own_files_away(tmp_path):
    """hydra.run.dir may be a folder of the user's."""
    theirs = tmp_path / "theirs"
    (theirs / ".hydra").mkdir(parents=True)
    (theirs / "thesis.txt").write_text("years of work")
    (theirs / "config.yaml").write_text("seed: 1")
    pretrain.leave_nothing(theirs)
    assert [path.name for path in theirs.iterdir()] == ["thesis.txt"]
    ours = tmp_path / "ours"
    (ours / ".hydra").mkdir(parents=True)
    pretrain.leave_nothing(ours)
    assert not ours.exists()


def test_a_checkpoint_that_cannot_be_saved_leaves_the_old_one(shared, monkeypatch):
    _, folder, cfg, _ = shared
    before = checkpoint.weights_sha256(folder / "checkpoint")
    model, tokenizer, _ = checkpoint.load(folder / "checkpoint")

    def full(*arguments):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="could not be saved.*No space left"):
        checkpoint.save(folder / "checkpoint", model, cfg, tokenizer)
    assert checkpoint.weights_sha256(folder / "checkpoint") == before
    assert not [path for path in folder.iterdir() if path.name.endswith((".tmp", ".old"))]
