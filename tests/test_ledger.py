"""Test is read once for each winner."""

import json
import subprocess
import threading

import pytest
import torch
from safetensors.torch import save_file
from tiny import config

from nightshift.fixed.config import ConfigError
from nightshift.fixed.ledger import main_checkout, read_test_once
from nightshift.fixed.result import TRAINING_FILE, Result, Training, write_json


def winner(folder, value=1.0, code="code"):
    (folder / "checkpoint").mkdir(parents=True)
    save_file({"a": torch.full((3,), value)}, folder / "checkpoint/model.safetensors")
    write_json(folder / TRAINING_FILE, Training(status="ok", editable_code=code))
    return folder


def number():
    return Result(status="ok", val_bpb=1.25, split="test")


def test_a_second_reading_is_refused_and_told_the_first_one_s_number(tmp_path):
    cfg, ledger = config(tmp_path), tmp_path / "ledger.jsonl"
    run = winner(tmp_path / "run")
    assert read_test_once(run, cfg, number, ledger).val_bpb == 1.25
    with pytest.raises(ConfigError, match=r"test_bpb 1.25\); a second reading is refused"):
        read_test_once(run, cfg, number, ledger)
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [line.get("reading", line.get("of")) for line in lines] == [0, 0]


def test_another_run_of_the_same_code_and_configuration_is_the_same_winner(tmp_path):
    cfg, ledger = config(tmp_path), tmp_path / "ledger.jsonl"
    read_test_once(winner(tmp_path / "a", 1.0), cfg, number, ledger)
    with pytest.raises(ConfigError, match="second reading"):
        read_test_once(winner(tmp_path / "b", 2.0), cfg, number, ledger)
    read_test_once(winner(tmp_path / "c", 3.0, code="other"), cfg, number, ledger)


def test_a_copy_of_the_weights_is_the_same_winner(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    read_test_once(winner(tmp_path / "a"), config(tmp_path), number, ledger)
    other = config(tmp_path, **{"seed": 7})
    with pytest.raises(ConfigError, match="second reading"):
        read_test_once(winner(tmp_path / "b", code="x"), other, number, ledger)


def test_a_reading_that_was_killed_counts(tmp_path):
    cfg, ledger = config(tmp_path), tmp_path / "ledger.jsonl"
    run = winner(tmp_path / "run")

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_test_once(run, cfg, killed, ledger)
    with pytest.raises(ConfigError, match="no number: it did not finish"):
        read_test_once(run, cfg, number, ledger)


def test_of_two_at_once_one_reads(tmp_path):
    cfg, ledger = config(tmp_path), tmp_path / "ledger.jsonl"
    run, outcomes = winner(tmp_path / "run"), []

    def read():
        try:
            outcomes.append(read_test_once(run, cfg, number, ledger).val_bpb)
        except ConfigError:
            outcomes.append(None)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=str) == [1.25, None, None, None]


def test_the_ledger_of_a_worktree_is_that_of_its_main_checkout(tmp_path):
    """A study scores from a worktree that goes away; what was read there stays read."""
    main, tree = tmp_path / "main", tmp_path / "tree"
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (
        ["init", "-q", str(main)],
        ["-C", str(main), *identity, "commit", "-q", "--allow-empty", "-m", "start"],
        ["-C", str(main), "worktree", "add", "-q", "--detach", str(tree)],
    ):
        subprocess.run(["git", *command], check=True)
    assert main_checkout(tree) == main_checkout(main) == main
    assert main_checkout(tmp_path) == tmp_path, "no repository"
