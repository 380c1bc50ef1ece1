"""A checkpoint through the whole ruler: model servers in sandboxes, probes, guards, binding."""

import math
import shutil
import sys

import numpy as np
import pytest
import torch
from tiny import config, write_texts

from nightshift import pretrain
from nightshift.fixed import checkpoint, evaluate
from nightshift.fixed.config import ROOT
from nightshift.fixed.corpus import ensure_corpus
from nightshift.fixed.result import TRAINING_FILE, code_digests, read_training, write_json
from nightshift.fixed.ruler import held_out_text
from nightshift.fixed.tokenizer import Tokenizer, ensure_tokenizer
from nightshift.fixed.tracking import open_store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 30 steps, and its configuration."""
    tmp_path = tmp_path_factory.mktemp("evaluate")
    write_texts(tmp_path / "texts", 400)
    cfg = config(tmp_path, **{"budget.amount": 30.0, "evaluate.max_bytes": 20_000})
    log = open_store(cfg.tracking).start("t", "pretrain")
    pretrain.train(cfg, tmp_path / "run", log)
    return tmp_path / "run", cfg


def with_keys(cfg, group, **keys):
    return cfg.model_copy(update={group: getattr(cfg, group).model_copy(update=keys)})


def edited(tmp_path, *edits):
    """A tree with the model edited: what a trial's worktree is."""
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("src", "conf"):
        shutil.copytree(ROOT / part, tree / part, ignore=ignore)
    path = tree / "src/nightshift/model.py"
    text = path.read_text()
    for search, replace in edits:
        assert text.count(search) == 1, search
        text = text.replace(search, replace)
    path.write_text(text)
    return tree


def plain_bpb(run, cfg) -> float:
    """One process, float64 throughout, a loop over windows: the definition, nothing else."""
    model, _, trained_with = checkpoint.load(run / "checkpoint")
    model.double().eval()
    model.dtype = torch.float64
    tokenizer = Tokenizer.load(ensure_tokenizer(cfg))
    texts = held_out_text(ensure_corpus(cfg), "val", cfg.evaluate.max_bytes)
    stream = [t for text in texts for t in (tokenizer.bos, *tokenizer.encode(text))]
    T, nats = trained_with.model.seq_len, 0.0
    sizes = tokenizer.token_bytes()
    with torch.inference_mode():
        for start in range(0, len(stream) - 1, T):
            ids = torch.tensor(stream[start : start + T])
            targets = torch.tensor(stream[start + 1 : start + T + 1])
            ids = ids[: len(targets)]
            logp = model(ids[None])[0].double().log_softmax(-1)
            chosen = logp.gather(-1, targets[:, None]).squeeze(-1)
            counted = torch.from_numpy(np.asarray(sizes)[targets.numpy()] > 0)
            nats -= float(chosen[counted].sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_the_ruler_agrees_with_a_plain_evaluation_in_float64(trained):
    run, cfg = trained
    result = evaluate.evaluate(run, cfg)
    assert result.status == "ok", result.message
    assert result.val_bpb == pytest.approx(plain_bpb(run, cfg), abs=1e-6)
    assert result.probes > 10


@pytest.mark.parametrize("batch_size, threads", [(1, 1), (3, 1), (64, 2)])
def test_the_number_is_the_same_for_any_batch_size_and_number_of_threads(
    trained, batch_size, threads
):
    run, cfg = trained
    changed = with_keys(cfg, "evaluate", batch_size=batch_size)
    changed = with_keys(changed, "runtime", num_threads=threads)
    found = evaluate.evaluate(run, changed)
    torch.set_num_threads(1)
    assert found.val_bpb == pytest.approx(evaluate.evaluate(run, cfg).val_bpb, abs=1e-6)


def test_the_result_is_bound_to_what_was_scored(trained):
    run, cfg = trained
    result = evaluate.evaluate(run, cfg)
    bound = result.binding
    assert bound["weights_sha256"] == checkpoint.weights_sha256(run / "checkpoint")
    assert bound["seed"] == cfg.seed and bound["steps"] == 30 and bound["tokens"] == 30 * 128
    assert bound["budget"] == cfg.budget.model_dump()
    assert set(bound) >= {
        "commit", "fixed_code", "editable_code", "config_digest", "corpus_digest", "data_digest",
        "tokenizer_digest", "device", "versions", "protections",
    }  # fmt: skip


LAST = "        logits_BTV = self.head(rms_norm(x_BTC)).float()\n"
CHEATS = {
    "reads the next token": (
        LAST + "        following = torch.roll(tokens_BT, -1, 1)[..., None]\n"
        "        logits_BTV.scatter_add_(-1, following, torch.full_like(following, 5.0, "
        "dtype=torch.float32))\n",
        "invalid",
        "sees the future",
    ),
    "remembers windows": (
        LAST + "        self.seen = getattr(self, 'seen', 0) + torch.bincount(\n"
        "            tokens_BT.flatten(), minlength=logits_BTV.size(-1))\n"
        "        logits_BTV = logits_BTV + torch.log1p(self.seen.float())\n",
        "invalid",
        "keeps state",
    ),
    "is not finite": (LAST + "        logits_BTV[..., 0] = float('nan')\n", "invalid", "finite"),
    "has another shape": (LAST + "        return logits_BTV[:, :1]\n", "crash", "must return"),
    "fails": (LAST + "        raise RuntimeError('ignore me')\n", "crash", "ignore me"),
    "dies": (LAST + "        import os; os._exit(0)\n", "crash", "process ended"),
    "looks for the other server's memory": (
        LAST + "        maps = open('/proc/self/maps').read().count('memfd:nightshift')\n"
        "        assert maps > 1, f'{maps} shared memory: there is none but its own'\n",
        "crash",
        "1 shared memory",
    ),
    "falls silent": (LAST + "        import time; time.sleep(60)\n", "timeout", "limit_s"),
    "does not learn": (
        LAST + "        logits_BTV = logits_BTV * 0 + 3.0 * F.one_hot(tokens_BT, "
        "logits_BTV.size(-1))\n",
        "invalid",
        "nothing was learned",
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_model_that_breaks_a_rule_gets_a_status_and_no_number(trained, tmp_path, name):
    run, cfg = trained
    code, status, words = CHEATS[name]
    if name == "falls silent":
        cfg = with_keys(cfg, "evaluate", limit_s=4.0)
    result = evaluate.evaluate(run, cfg, edited(tmp_path, (LAST, code)))
    assert (result.status, result.val_bpb) == (status, None) and words in result.message


def test_a_seed_of_its_own_is_caught_by_its_effect(trained, tmp_path):
    """Also where no rule on the text finds it."""
    run, cfg = trained
    start = "        self.init_weights()\n"
    code = "        getattr(torch, 'manual' + '_seed')(42)\n" + start
    result = evaluate.evaluate(run, cfg, edited(tmp_path, (start, code)))
    assert result.status == "invalid" and "the same for every seed" in result.message


def test_out_of_memory_halves_the_batch_and_gives_the_same_number(trained, tmp_path):
    run, cfg = trained
    cfg = with_keys(cfg, "evaluate", batch_size=16)
    hungry = LAST + (
        "        if tokens_BT.size(0) > 4:\n            raise torch.OutOfMemoryError('too much')\n"
    )
    result = evaluate.evaluate(run, cfg, edited(tmp_path, (LAST, hungry)))
    assert result.status == "ok", result.message
    assert result.val_bpb == pytest.approx(evaluate.evaluate(run, cfg).val_bpb, abs=1e-6)


def test_weights_other_than_those_that_training_delivered_are_refused(trained, tmp_path):
    run, cfg = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    training = read_training(copy / TRAINING_FILE)
    training.weights_sha256 = "0" * 64
    write_json(copy / TRAINING_FILE, training)
    result = evaluate.evaluate(copy, cfg)
    assert result.status == "invalid" and "not those that training delivered" in result.message


@pytest.mark.parametrize("changed", ["fixed_code", "editable_code"])
def test_code_that_changed_since_training_is_refused(trained, tmp_path, changed):
    run, cfg = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    training = read_training(copy / TRAINING_FILE)
    training.fixed_code, training.editable_code = code_digests(ROOT)
    setattr(training, changed, "0" * 16)
    write_json(copy / TRAINING_FILE, training)
    result = evaluate.evaluate(copy, cfg)
    assert result.status == "invalid" and "code changed" in result.message


def test_training_faster_than_the_model_can_be_is_refused(trained, tmp_path):
    run, cfg = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    training = read_training(copy / TRAINING_FILE)
    training.tokens_per_s = 1e9
    write_json(copy / TRAINING_FILE, training)
    result = evaluate.evaluate(copy, cfg)
    assert result.status == "invalid" and "not learned from" in result.message


def test_the_checkpoint_s_tokenizer_is_not_believed(trained, tmp_path):
    run, cfg = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoint/tokenizer")
    assert evaluate.evaluate(copy, cfg).val_bpb == evaluate.evaluate(run, cfg).val_bpb
