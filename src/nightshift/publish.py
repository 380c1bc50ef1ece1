"""A run -> the DVC outputs of this checkout, as if `dvc repro` had made them; no stage runs.

Puts the run's data, checkpoint, curve and numbers where dvc.yaml has them, and lets DVC hash them
(`dvc commit`): afterwards `dvc repro` has nothing to do. In a git worktree the main checkout's DVC
cache is used, so that the files are there for every clone that shares it.

    python -m nightshift.publish run=outputs/pretrain/<run>
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from nightshift.fixed.batches import ensure_tokens
from nightshift.fixed.chats import ensure_chats
from nightshift.fixed.checkpoint import read_config, write_config
from nightshift.fixed.config import ROOT, Config, ConfigError, check
from nightshift.fixed.corpus import ensure_corpus
from nightshift.fixed.ledger import main_checkout
from nightshift.fixed.result import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    CURVE_FILE,
    RESULT_FILE,
    TRAINING_FILE,
)
from nightshift.fixed.tokenizer import ensure_tokenizer
from nightshift.sft import base_folder
from nightshift.stage import CHAMPION, CHAT, chat_evaluate, publish

# What a pretraining run stands for. The chat stages come after it: `dvc repro` runs them.
STAGES = ("compose", "corpus", "tokenizer", "tokens", "pretrain", "evaluate")
CHAT_STAGES = ("chats", "sft", "chat_evaluate")  # what a tuning stands for besides
# Values that the stages up to `pretrain` read: a base that was made with others is not theirs.
OF_A_BASE = (
    "seed", "corpus", "filter", "tokenizer", "model", "optim", "schedule", "train", "budget",
)  # fmt: skip


def publish_run(run: Path) -> None:
    share_cache()
    config = read_config(run / CONFIG_FILE)
    place_data(config)
    if config.base is None:
        publish(run, CHAMPION, CHECKPOINT_FOLDER, TRAINING_FILE, RESULT_FILE, CURVE_FILE)
        dvc("commit", "--force", *STAGES)
        return
    place_base(base_folder(config))
    place_tuned(run, config)
    dvc("commit", "--force", *STAGES, *CHAT_STAGES)


def place_base(checkpoint: Path) -> None:
    """What tuning began from, as the champion. One that the stages before `sft` would not make is
    frozen, so that `dvc repro` leaves it as it is."""
    if checkpoint.resolve() != CHAMPION / CHECKPOINT_FOLDER:
        run, names = checkpoint.parent, (TRAINING_FILE, RESULT_FILE, CURVE_FILE)
        there = [name for name in names if (run / name).is_file()]
        publish(run, CHAMPION, CHECKPOINT_FOLDER, *there)
    made = read_config(CHAMPION / CHECKPOINT_FOLDER / CONFIG_FILE)
    asked = check(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    if any(getattr(made, name) != getattr(asked, name) for name in OF_A_BASE):
        dvc("freeze", *STAGES[1:])


def place_tuned(run: Path, config: Config) -> None:
    """The chat checkpoint, and what `chat_evaluate` says of it. Its numbers are made here and now:
    the run was scored by chat_bpb alone. model.py is the base's, so no edit runs."""
    place("chats", ensure_chats(config))
    publish(run, CHAT, CHECKPOINT_FOLDER, TRAINING_FILE, CURVE_FILE)
    checkpoint = CHAMPION / CHECKPOINT_FOLDER
    moved = config.model_copy(update={"base": checkpoint.relative_to(ROOT).as_posix()})
    write_config(moved, CHAT / CHECKPOINT_FOLDER / CONFIG_FILE)
    silent = config.tracking.model_copy(update={"enabled": False})
    chat_evaluate(config.model_copy(update={"tracking": silent}))


def dvc(action: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", action, "--quiet", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise ConfigError(f"dvc {action} failed in {ROOT}: {last}")


def place_data(config: Config) -> None:
    for name, folder in (
        ("corpus", ensure_corpus(config)),
        ("tokenizer", ensure_tokenizer(config)),
        ("tokens", ensure_tokens(config)),
    ):
        place(name, folder)


def place(name: str, folder: Path) -> None:
    there = ROOT / "data" / name
    if folder.resolve() != there.resolve():
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(folder, there, copy_function=link_or_copy)


def link_or_copy(source: str, target: str) -> None:
    """Corpora are large: a hard link where the file system allows it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def share_cache() -> None:
    """In a git worktree: the DVC cache of the main checkout.

    Written to .dvc/config.local, which git ignores.
    """
    main = main_checkout()
    local = ROOT / ".dvc" / "config.local"
    if main.resolve() == ROOT.resolve() or local.exists():
        return
    if (main / ".dvc" / "config.local").exists():
        shutil.copyfile(main / ".dvc" / "config.local", local)
    else:
        local.write_text(f"[cache]\n    dir = {main / '.dvc' / 'cache'}\n", encoding="utf-8")


def main() -> int:
    if len(sys.argv) != 2 or not sys.argv[1].startswith("run="):
        print("usage: python -m nightshift.publish run=<folder of a run>", file=sys.stderr)
        return 2
    try:
        publish_run(Path(sys.argv[1].removeprefix("run=")).resolve())
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
