"""Real tuning of a very small base on very small chats."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from chat_tiny import base_run, chat_config
from safetensors.torch import load_file

from nightshift import lora, sft
from nightshift.fixed import checkpoint
from nightshift.fixed.config import ROOT, ConfigError
from nightshift.fixed.conversation import prompt
from nightshift.fixed.result import read_curve, read_training
from nightshift.fixed.tracking import open_store
from nightshift.generate import Engine, Sampling


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    base_run(folder)
    return folder


def run(place, name, **changes):
    changes = {"base": str(place / "base")} | changes
    cfg = sft.for_run(chat_config(place, **changes))
    log = open_store(cfg.tracking).start(name, "sft")
    return sft.train(cfg, place / name, log), place / name


def weights(folder):
    return load_file(folder / "checkpoint" / "model.safetensors")


@pytest.fixture(scope="module")
def tuned(place):
    return run(place, "tuned", **{"sft_budget.amount": 100.0})


def test_tuning_learns_to_answer_and_to_stop(tuned, place):
    training, folder = tuned
    curve = read_curve(folder / "curve.jsonl")
    assert training.status == "ok" and training.steps == 100
    assert curve[-1]["train/loss"] < curve[0]["train/loss"] - 1 and curve[-1]["dev_bpb"] > 0
    model, tokenizer, cfg = checkpoint.load(folder / "checkpoint")
    asked = prompt([{"role": "user", "content": "Is 7 here?"}], tokenizer)
    said = Engine(model, tokenizer).generate([asked], Sampling(temperature=0, max_tokens=40))[0]
    assert said.finish == "stop" and said.text
    assert cfg.budget.amount == 100 and cfg.train.batch_tokens == 256


def test_same_seed_same_weights(place):
    _, first = run(place, "first")
    _, again = run(place, "again")
    _, other = run(place, "other", seed=5)
    assert all(torch.equal(weights(first)[k], w) for k, w in weights(again).items())
    assert any(not torch.equal(weights(first)[k], w) for k, w in weights(other).items())


def test_it_begins_at_the_base(place):
    training, folder = run(place, "slow", **{"sft.lr_scale": 1e-9, "sft_budget.amount": 2.0})
    for name, weight in weights(place / "base").items():
        torch.testing.assert_close(weights(folder)[name], weight, atol=1e-6, rtol=0)


def test_the_base_s_model_tokenizer_and_corpus_cannot_be_given_anew(place):
    cfg = chat_config(place, base=str(place / "base"))
    with pytest.raises(ConfigError, match="model.depth=3: model, tokenizer, corpus, filter are"):
        sft.for_run(cfg, ["model.depth=3"])


def test_a_base_is_needed(place):
    with pytest.raises(ConfigError, match="base=outputs/pretrain/<run>"):
        sft.for_run(chat_config(place))
    with pytest.raises(ConfigError, match="no such file"):
        sft.for_run(chat_config(place, base=str(place / "nothing")))


def test_batches_that_do_not_fit_the_base_are_told_in_the_words_of_sft(place):
    with pytest.raises(ConfigError, match=r"^sft\.batch_tokens|batch_tokens \(100\).*multiple"):
        sft.for_run(chat_config(place, base=str(place / "base"), **{"sft.batch_tokens": 100}))


def test_the_configuration_of_a_run_made_again_is_itself(place):
    once = sft.for_run(chat_config(place, base=str(place / "base"), **{"sft.lr_scale": 0.3}))
    assert sft.for_run(once) == once
    assert once.optim.matrix_lr == pytest.approx(0.3 * 0.02) and once.sft.lr_scale == 1.0


def test_a_base_inside_the_checkout_is_named_from_there():
    assert sft.portable(ROOT / "champion" / "checkpoint") == "champion/checkpoint"


def test_low_rank_updates_are_merged_into_a_checkpoint_like_any_other(place):
    changes = {"sft.lora_rank": 2, "sft.lora_lr": 0.01, "sft_budget.amount": 80.0}
    training, folder = run(place, "lora", **changes)
    losses = [point["train/loss"] for point in read_curve(folder / "curve.jsonl")]
    assert training.status == "ok" and sum(losses[-10:]) < sum(losses[:10])
    before, after = weights(place / "base"), weights(folder)
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("blocks.") for name in moved)
    for name in moved:
        ranks = torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4)
        assert int(ranks) <= 2, name
    checkpoint.load(folder / "checkpoint")


def test_a_fresh_low_rank_update_changes_nothing(place):
    model, _, _ = checkpoint.load(place / "base" / "checkpoint")
    tokens = torch.randint(0, 300, (2, 20))
    before = model(tokens)
    updates = lora.add(model, rank=4, alpha=8)
    assert torch.equal(model(tokens), before)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in updates}
    lora.merge(model)
    assert torch.equal(model(tokens), before) and all(p.requires_grad for p in model.parameters())


def test_text_against_forgetting_keeps_the_base_s_text_better(place):
    from nightshift.chat_evaluate import dev_texts, text_bpb

    def bpb(folder, cfg):
        model, tokenizer, _ = checkpoint.load(folder / "checkpoint")
        return text_bpb(model, tokenizer, dev_texts(cfg), 8)

    cfg = chat_config(place, base=str(place / "base"))
    _, plain = run(place, "plain", **{"sft_budget.amount": 60.0})
    _, mixed = run(place, "mixed", **{"sft_budget.amount": 60.0, "sft.text_frac": 0.5})
    assert bpb(mixed, cfg) < bpb(plain, cfg)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_interrupted_run_resumes_bit_for_bit(kind, place):
    """SIGTERM in the middle of a real process; resumed, it has an undisturbed run's weights."""
    changes = {"sft_budget.amount": 150.0, "base": str(place / "base")}
    changes |= {"sft.batch_tokens": 64, "sft.micro_batch_size": 1}
    changes |= {"sft.lora_rank": 2} if kind == "lora" else {}
    _, whole = run(place, f"whole-{kind}", **changes)
    cfg = sft.for_run(chat_config(place, **changes))
    conf, cut = place / f"conf-{kind}", place / f"cut-{kind}"
    checkpoint.write_config(cfg, conf / "config.yaml")
    command = [sys.executable, "-m", "nightshift.sft", "--config-path", str(conf)]
    command += ["hydra.output_subdir=null", "hydra/job_logging=none", f"hydra.run.dir={cut}"]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300  # a busy machine takes long to begin
    while len(read_curve(cut / "curve.jsonl")) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 130
    stopped = read_training(cut / "training.json")
    assert stopped.interrupted and 10 <= stopped.steps < 150
    resumed = sft.for_run(chat_config(place, **changes, resume=str(cut)), ["resume=x"])
    log = open_store(cfg.tracking).start("r", "sft")
    sft.train(resumed, place / f"resumed-{kind}", log)
    ended = weights(place / f"resumed-{kind}")
    assert all(torch.equal(weights(whole)[k], w) for k, w in ended.items())


@pytest.mark.slow
def test_the_command_tunes_scores_and_says_so(place):
    """Through Hydra, MLflow off, with the evaluation in a process of its own."""
    changes = {"base": str(place / "base"), "sft_budget.amount": 40.0}
    checkpoint.write_config(chat_config(place, **changes), place / "cli" / "config.yaml")
    command = [sys.executable, "-m", "nightshift.cli", "sft", "hydra.output_subdir=null"]
    command += ["--config-path", str(place / "cli"), "hydra/job_logging=none"]
    command += [f"hydra.run.dir={place / 'run'}"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "chat_bpb:" in done.stdout and "gain on base:" in done.stdout
    result = json.loads((place / "run" / "chat_result.json").read_text())
    assert result["metrics"]["chat_bpb_gain"] > result["metrics"]["chat_bpb_gain_interval"]


def test_the_command_without_a_base_says_what_is_needed():
    command = [sys.executable, "-m", "nightshift.cli", "sft"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "base=outputs/pretrain/<run>" in done.stderr
