"""Tuning by the harness: sandboxed, fed, taken over, scored on conversations that it never had."""

import shutil
import sys
from pathlib import Path

import lightning  # noqa: F401  here, so that the candidates' processes are forked with it
import pytest
from chat_tiny import chat_config, untrained_base

from nightshift import sft
from nightshift.chat_evaluate import likelihood
from nightshift.fixed import chats, checkpoint, prepare, train, tune
from nightshift.fixed.chat_score import ChatScoring
from nightshift.fixed.config import ROOT
from nightshift.fixed.evaluate import evaluate
from nightshift.fixed.result import TRAINING_FILE, read_training, write_json
from nightshift.fixed.tracking import open_store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a tuning of six steps."""
    place = tmp_path_factory.mktemp("tune")
    changes = {"base": str(untrained_base(place)), "sft_budget.amount": 6.0}
    config = sft.for_run(chat_config(place, **changes, **{"evaluate.batch_size": 8}))
    prepare.prepare_chats(config, ROOT, place)
    return config


def tuned(config, folder: Path, tree: Path = ROOT):
    training = train.train(config, tree, folder, tune.conversations(config, tree))
    write_json(folder / TRAINING_FILE, training)
    checkpoint.write_config(config, folder / "config.yaml")
    return training


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return tuned(config, folder), folder


def edited(tmp_path: Path, name: str, *edits: tuple[str, str]) -> Path:
    """A tree with one module edited: what a trial's worktree is."""
    for part in ("src", "conf"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, tmp_path / "tree" / part, ignore=ignore)
    path = tmp_path / "tree/src/nightshift" / name
    text = path.read_text()
    for search, replace in edits:
        assert text.count(search) == 1, search
        text = text.replace(search, replace)
    path.write_text(text)
    return tmp_path / "tree"


def test_a_fed_tuning_has_the_weights_of_one_in_the_open(run, config, tmp_path):
    training, folder = run
    assert training.status == "ok", training.message
    open_run = sft.train(config, tmp_path, open_store(config.tracking).start("t", "sft"))
    assert (training.steps, training.data_digest) == (6, open_run.data_digest)
    found = checkpoint.weights_sha256(folder / "checkpoint")
    assert found == training.weights_sha256 == checkpoint.weights_sha256(tmp_path / "checkpoint")
    assert found != checkpoint.weights_sha256(Path(config.base)), "something was learned"


def test_the_number_is_the_open_evaluation_s_and_bound_to_the_base(run, config):
    _, folder = run
    result = evaluate(folder, config, scoring=ChatScoring)
    assert result.status == "ok" and result.val_bpb is None, result.message
    model, tokenizer, _ = checkpoint.load(folder / "checkpoint")
    val = list(chats.read_chats(chats.ensure_chats(config), "val"))
    plain = likelihood(model.eval(), tokenizer, val, 8)
    assert result.chat_bpb == pytest.approx(plain.bpb, abs=1e-6)
    assert result.chat_bpb_interval == pytest.approx(plain.interval(), abs=1e-5)
    assert (result.num_conversations, result.num_bytes) == (len(val), plain.num_bytes.sum())
    assert result.binding["base_sha256"] == checkpoint.weights_sha256(Path(config.base))
    assert result.probes > 10


FIRST = "        rank, alpha = config.sft.lora_rank, config.sft.lora_alpha\n"
OPTIMIZERS = "    def configure_optimizers(self) -> MuonAdamW:\n"


def test_val_conversations_are_nowhere_that_a_tuning_can_read(config, tmp_path):
    """Neither the split, nor the folder and the package that it was made of."""
    import chatterbot_corpus

    places = [chats.ensure_chats(config) / "val.jsonl", Path(config.conversations.path)]
    places += [Path(chatterbot_corpus.__file__).parent, Path(config.corpus.path)]
    assert all(place.exists() for place in places)
    looks = FIRST + (
        "        import os\n"
        f"        found = [p for p in {list(map(str, places))!r} if os.path.exists(p)]\n"
        "        found += [p for p in found if os.access(p, os.R_OK) and os.stat(p).st_size > 0]\n"
        "        for place in found:\n"
        "            try:\n"
        "                seen = os.listdir(place) if os.path.isdir(place) else open(place).read()\n"
        "            except OSError:\n"
        "                continue\n"
        "            if seen:\n"
        "                raise SystemExit(f'read {place}')\n"
    )
    training = tuned(config, tmp_path / "run", edited(tmp_path, "tuning.py", (FIRST, looks)))
    assert training.status == "ok", "it looked everywhere and found nothing"


CHEATS = {
    "steps twice on each batch": (
        OPTIMIZERS,
        "    def on_train_batch_end(self, outputs, batch, batch_index):\n"
        "        self.training_step(batch, batch_index).backward()\n"
        "        self.trainer.optimizers[0].step()\n\n" + OPTIMIZERS,
        "stepped 12 times in 6 steps",
    ),
    "steps on batches that it never was given": (
        OPTIMIZERS,
        "    def on_train_end(self):\n"
        "        optimizer = self.trainer.optimizers[0]\n"
        "        for _ in range(3):\n"
        "            tokens = torch.randint(0, 256, (4, 64))\n"
        "            self.training_step((tokens, tokens), 0).backward()\n"
        "            optimizer.step()\n\n" + OPTIMIZERS,
        "stepped 9 times in 6 steps",
    ),
    "adds a tensor to the base": (
        OPTIMIZERS,
        "    def on_train_end(self):\n"
        "        self.model.notes = torch.nn.Parameter(torch.zeros(3))\n\n" + OPTIMIZERS,
        "tuning left notes of shape [3], the base has it of shape None",
    ),
    "changes a shape of the base": (
        OPTIMIZERS,
        "    def on_train_end(self):\n"
        "        weight = self.model.head.weight\n"
        "        self.model.head.weight = torch.nn.Parameter(weight[:-1].clone())\n\n" + OPTIMIZERS,
        "tuning left head.weight of shape",
    ),
}


SLOW = "changes a shape of the base"  # like the one before it


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n == SLOW else []) for n in CHEATS]
)
def test_a_tuning_that_breaks_a_rule_is_invalid_and_leaves_no_number(config, tmp_path, name):
    search, replace, words = CHEATS[name]
    tree = edited(tmp_path, "tuning.py", (search, replace))
    training = tuned(config, tmp_path / "run", tree)
    assert training.status == "invalid" and words in training.message
    result = evaluate(tmp_path / "run", config, tree, scoring=ChatScoring)
    assert (result.status, result.chat_bpb) == ("invalid", None)


LAST = "        logits_BTV = self.head(rms_norm(x_BTC)).float()\n"
PEEK = LAST + (
    "        following = torch.roll(tokens_BT, -1, 1)[..., None]\n"
    "        logits_BTV.scatter_add_(-1, following, torch.full(following.shape, 5.0))\n"
)
REMEMBER = LAST + (
    "        self.seen = getattr(self, 'seen', 0) + torch.bincount(\n"
    "            tokens_BT.flatten(), minlength=logits_BTV.size(-1))\n"
    "        logits_BTV = logits_BTV + torch.log1p(self.seen.float())\n"
)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (PEEK, "sees the future"),
        pytest.param(REMEMBER, "keeps state between windows", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_peeks_into_a_conversation_is_caught_by_the_probes(
    run, config, tmp_path, code, words
):
    """If an edit of model.py came through at all: a study of chat_bpb refuses it before."""
    copy, tree = tmp_path / "copy", edited(tmp_path, "model.py", (LAST, code))
    shutil.copytree(run[1], copy)
    refused = evaluate(copy, config, tree, scoring=ChatScoring)
    assert refused.status == "invalid" and "code changed" in refused.message
    training = read_training(copy / TRAINING_FILE)
    training.fixed_code = training.editable_code = None
    write_json(copy / TRAINING_FILE, training)
    caught = evaluate(copy, config, tree, scoring=ChatScoring)
    assert (caught.status, caught.chat_bpb) == ("invalid", None) and words in caught.message
