"""Checkpoints are found by name, and each gets the model that it was trained with."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny_checkpoint
import torch

from nightshift import catalogue
from nightshift.fixed import checkpoint
from nightshift.fixed.config import ROOT, ConfigError


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A checkout with a champion, two runs and a study of three trials; one was not kept."""
    root, work = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("work")
    tiny_checkpoint.make(root / "champion", work, val_bpb=1.5)
    tiny_checkpoint.make(root / "outputs/pretrain/old", work, val_bpb=1.6)
    tiny_checkpoint.make(root / "outputs/pretrain/new", work, val_bpb=1.55)
    weights = root / "outputs/pretrain/old/checkpoint" / checkpoint.WEIGHTS_FILE
    os.utime(weights, (1, 1))
    tiny_checkpoint.make_trial(root, work, 0, "keep")
    tiny_checkpoint.make_trial(root, work, 1, "discard", kept=False)
    tiny_checkpoint.make_trial(root, work, 2, "keep")
    with open(root / "outputs/studies/first/journal.jsonl", "a") as file:
        file.write('{"number": 3, "runs": []}\n{"number": 4, "ru')
    return root


def test_every_checkpoint_has_a_name_champion_first_newest_first(root):
    names = [entry.name for entry in catalogue.entries(root)]
    assert names == ["champion", "pretrain/new", "pretrain/old"] + [
        "first/002",
        "first/000",
        "first/001",
    ]
    by_name = {entry.name: entry for entry in catalogue.entries(root)}
    assert by_name["champion"].val_bpb == 1.5
    assert by_name["first/002"].title == "change 2" and by_name["first/002"].decision == "keep"
    assert not by_name["first/001"].is_kept


def test_the_default_is_the_champion_tuned_to_chat_if_it_is(root, tmp_path):
    assert catalogue.default(root).name == "champion"
    shutil.copytree(root / "champion", tmp_path / "champion")
    shutil.copytree(root / "champion", tmp_path / "champion/chat")
    result = {"metrics": {"chat_bpb": 1.25}}
    (tmp_path / "champion/chat/chat_result.json").write_text(json.dumps(result))
    entry = catalogue.default(tmp_path)
    assert (entry.name, entry.chat_bpb) == ("champion/chat", 1.25)


def test_without_any_checkpoint_the_default_says_what_to_run(tmp_path):
    with pytest.raises(ConfigError, match="nightshift pretrain"):
        catalogue.default(tmp_path)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("first/2", "outputs/studies/first/trials/002/seed_1"),
        ("first/002/seed_1", "outputs/studies/first/trials/002/seed_1"),
        ("pretrain/latest", "outputs/pretrain/new"),
        ("champion", "champion"),
    ],
)
def test_names_are_found(root, name, folder):
    assert catalogue.find(name, root).folder == root / folder / "checkpoint"


def test_a_folder_is_found_unless_it_comes_from_a_stranger(root):
    place = str(root / "outputs/pretrain/old")
    assert catalogue.find(place, root).folder == root / "outputs/pretrain/old/checkpoint"
    with pytest.raises(ConfigError, match="no such checkpoint"):
        catalogue.find(place, root, paths=False)
    for name in ("../first/002/seed_1", "first/../../x", "first/002/../seed_1", "//seed_1"):
        with pytest.raises(ConfigError, match="no such checkpoint"):
            catalogue.find(name, root, paths=False)


def test_a_trial_that_was_not_kept_says_how_to_train_it_again(root):
    with pytest.raises(ConfigError) as error:
        catalogue.find("first/1", root)
    assert "study.keep_checkpoints=true" in str(error.value)
    assert "git worktree add ../first-001 refs/trials/first/001" in str(error.value)


def test_a_wrong_name_is_answered_with_the_nearest(root):
    with pytest.raises(ConfigError, match="Nearest: champion"):
        catalogue.find("chapmion", root)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkpoint_is_loaded_with_the_model_of_its_own_commit(tmp_path):
    """A trial that edited the model; its weights fit ours too, and would say something else."""
    ours = (ROOT / catalogue.MODEL_FILE).read_text()
    theirs = ours.replace("F.relu(h).square()", "F.gelu(h)")
    assert theirs != ours
    file = tmp_path / "repo" / catalogue.MODEL_FILE
    file.parent.mkdir(parents=True)
    file.write_text(theirs)
    git(tmp_path / "repo", "init", "-q")
    git(tmp_path / "repo", "add", ".")
    git(tmp_path / "repo", "commit", "-qm", "gelu")
    commit = git(tmp_path / "repo", "rev-parse", "HEAD")
    run = tmp_path / "repo/outputs/pretrain/a"
    gpt = catalogue.model_class(theirs)
    folder = tiny_checkpoint.make(run, tmp_path, gpt=gpt, commit=commit)

    tokens_BT = torch.arange(24).reshape(2, 12)
    expected = _same_weights(gpt, folder)(tokens_BT)
    model, _, _ = catalogue.load(folder, root=tmp_path / "repo")
    assert torch.equal(model(tokens_BT), expected)
    assert not torch.allclose(checkpoint.load(folder)[0](tokens_BT), expected)

    (run / "training.json").write_text(json.dumps({"commit": f"{commit}+"}))  # uncommitted edits
    assert catalogue.model_source(folder, tmp_path / "repo") == ours


def _same_weights(gpt, folder):
    model, tokenizer, config = checkpoint.load(folder)
    other = gpt(config.model, tokenizer.vocab_size)
    other.load_state_dict(model.state_dict())
    return other


def test_code_that_does_not_run_here_is_one_line():
    with pytest.raises(ConfigError, match="does not run in this checkout"):
        catalogue.model_class("from nightshift.fixed.config import Shape\n")
