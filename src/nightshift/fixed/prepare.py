"""Data of a trial, before it runs: corpus, tokenizer, token files, built by the study's base code.

The only code of the candidate that has a say here is the filter, and it says one number for each
training document, from a sandbox that holds the training documents and nothing else of the corpus.

Covered: held-out text never enters the memory of a process that a candidate's process is forked
from: the corpus is built in a process that ends. The filter writes no tokens, trains nothing that
could be kept, and sees no other editable module.
Not covered: a byte for each training document is a channel from the filter to training; it is as
wide as it must be for a mixture, and it holds what can be learned from training text only.

    python -m nightshift.fixed.prepare run=<folder with config.yaml> tree=<worktree>
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nightshift.fixed import candidate
from nightshift.fixed.batches import ensure_tokens
from nightshift.fixed.chats import ensure_chats
from nightshift.fixed.checkpoint import read_config
from nightshift.fixed.config import Config, ConfigError
from nightshift.fixed.corpus import ensure_corpus
from nightshift.fixed.packing import ensure_rows
from nightshift.fixed.result import CONFIG_FILE
from nightshift.fixed.sandbox import Child, missing, spawn
from nightshift.fixed.store import read_manifest
from nightshift.fixed.tokenizer import Tokenizer, ensure_tokenizer

START_LIMIT_S = 60.0
FILTER_CODE = tuple(f"src/nightshift/{name}" for name in ("__init__.py", "filtering.py", "fixed"))


def require(child: Child, config: Config) -> None:
    """Raises ConfigError if the sandbox lacks what the study demands."""
    if not child.started(START_LIMIT_S):
        child.kill()
        raise ConfigError("the sandbox did not start; the lines above say why")
    if off := missing(child.layers, config.sandbox.require):
        child.kill()
        raise ConfigError(
            f"sandbox.require: {', '.join(off)} cannot be had on this machine "
            "(nightshift doctor shows why); take it out of sandbox.require, or run elsewhere"
        )


def corpus_apart(config: Config) -> Path:
    """`ensure_corpus`, built in another process: held-out text stays out of this one's memory."""
    return apart(ensure_corpus, config, "corpus")


def apart(ensure: Callable[[Config], Path], config: Config, what: str) -> Path:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ensure(config)
            code = 0
        except (ConfigError, OSError) as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise ConfigError(f"the {what} could not be built; the lines above say why")
    return ensure(config)  # it is there: only its manifest is read


def chats_apart(config: Config) -> Path:
    """`ensure_chats`, likewise."""
    return apart(ensure_chats, config, "conversations")


def prepare(config: Config, tree: Path, folder: Path) -> Path:
    """The token files of this configuration and this tree's filter."""
    corpus_apart(config)
    ensure_tokenizer(config)
    return ensure_tokens(
        config, tree, lambda corpus, config: _copies_in_sandbox(corpus, config, tree, folder)
    )


def prepare_chats(config: Config, tree: Path, folder: Path) -> Path:
    """The packed conversations that a tuning learns from, and its share of text."""
    if config.sft.text_frac:
        prepare(config, tree, folder)
    elif config.conversations.tasks.total:  # questions are made from the corpus
        corpus_apart(config)
    chats_apart(config)
    return ensure_rows(config, Tokenizer.load(Path(config.base) / "tokenizer"))


def _copies_in_sandbox(corpus: Path, config: Config, tree: Path, folder: Path) -> np.ndarray:
    scratch = folder / "filter"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    splits = read_manifest(corpus)["splits"]
    shards = [corpus / shard["file"] for shard in splits["train"]["shards"]]
    readable = (corpus / "manifest.json", *shards)
    box = candidate.view(config, tree, readable=readable, writable=scratch, code=FILTER_CODE)
    values = config.model_dump()
    child = spawn(box, lambda: candidate.count_copies(tree, values, corpus, scratch))
    require(child, config)
    report = None
    while report is None:
        report = child.wait(1.0)
    try:
        if report.killed:
            raise ConfigError(f"the filter was killed: {report.killed}")
        if report.exit:
            raise ConfigError(
                f"the filter failed (exit status {report.exit}); the lines above say why"
            )
        return _read_copies(scratch, splits["train"]["documents"])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read_copies(scratch: Path, num_documents: int) -> np.ndarray:
    try:
        descriptor = os.open(
            scratch / candidate.COPIES_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        )
    except OSError as error:
        raise ConfigError(f"the filter left no answer ({error.strerror})") from None
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(num_documents + 1)
    if len(data) != num_documents:
        raise ConfigError(f"the filter answered for {len(data)} of {num_documents} documents")
    return np.frombuffer(data, dtype=np.uint8)


def read_arguments(module: str) -> tuple[Path, Path, Config]:
    """run=... tree=... of the command line. Exits with a sentence for anything else."""
    given = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    if set(given) != {"run", "tree"}:
        print(f"usage: python -m {module} run=<folder> tree=<worktree>", file=sys.stderr)
        sys.exit(2)
    folder = Path(given["run"])
    return folder, Path(given["tree"]), read_config(folder / CONFIG_FILE)


def main() -> int:
    try:
        folder, tree, config = read_arguments("nightshift.fixed.prepare")
        (prepare if config.base is None else prepare_chats)(config, tree, folder)
        return 0
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
