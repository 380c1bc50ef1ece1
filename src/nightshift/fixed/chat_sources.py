"""Chat sets -> conversations: the embedded one, files of one's own, or a set of the hub.

A row of a .jsonl or .parquet file is one conversation, in any of these layouts:

    messages        [{"role": ..., "content": ...}, ...]    OpenAI, SmolTalk, UltraChat 200k
    conversations   [{"from": "human", "value": ...}, ...]  ShareGPT
    data            ["question", "answer", ...]             UltraChat
    instruction, input, output                              Alpaca
    prompt, completion (or response)

Rows in which roles do not take turns, or in which the assistant says nothing, are counted and left
out; a row of no known layout stops the build.
"""

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from nightshift.fixed import config as knobs
from nightshift.fixed import sources, store
from nightshift.fixed.config import Config, ConfigError
from nightshift.fixed.tasks import Chat

# sha256 over (name, sha256) of the English files of chatterbot-corpus 1.3.3.
CHATTERBOT_SHA256 = "4d9b47d7058bebdf3145cd4c9ed336c0c829739fb828759faaf8cbdfa517b669"
OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "developer": "system"}

Messages = list[dict[str, str]]


def chats(config: Config, files_read: list[dict[str, Any]], skipped: Counter) -> Iterator[Chat]:
    """The conversations of the source; adds each file to `files_read`, counts what is left out."""
    settings, count = config.conversations, 0
    rows = _chatterbot(files_read) if settings.source == "embedded" else _rows(config, files_read)
    for source, messages in rows:
        messages = trimmed(messages)
        if not takes_turns(messages):
            skipped["no turns"] += 1
            continue
        yield Chat(messages=messages, source=source)
        count += 1
        if count == settings.max_conversations:
            return


def trimmed(messages: Messages) -> Messages:
    """Up to the last answer."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    return messages[: last + 1]


def takes_turns(messages: Messages) -> bool:
    """The rule of conversation.py, for what is only to be counted: and every answer says a word."""
    roles = [message["role"] for message in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    spoken = [role for role in roles if role != "tool"]
    answers = all(m["content"].strip() for m in messages if m["role"] == "assistant")
    tools = all(
        roles[i - 1 : i + 2 : 2] == ["assistant", "assistant"]
        for i, role in enumerate(roles)
        if role == "tool"
    )
    if "tool" in roles:  # two turns of the assistant around a tool are one turn
        spoken = [r for i, r in enumerate(roles) if r != "tool" and roles[i - 1 : i] != ["tool"]]
    return (
        answers
        and tools
        and bool(spoken)
        and len(spoken) % 2 == 0
        and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(spoken))
    )


def _chatterbot(files_read: list[dict[str, Any]]) -> Iterator[tuple[str, Messages]]:
    package = importlib.util.find_spec("chatterbot_corpus")
    if package is None:
        raise ConfigError(
            "conversations=embedded: the package chatterbot-corpus is not installed. "
            "Run: pip install chatterbot-corpus==1.3.3"
        )
    folder = Path(package.submodule_search_locations[0]) / "data" / "english"
    files = sorted(folder.glob("*.yml"))
    sums = "".join(f"{path.name} {store.sha256_file(path)}\n" for path in files)
    found = hashlib.sha256(sums.encode()).hexdigest()
    if found != CHATTERBOT_SHA256:
        raise ConfigError(
            f"conversations=embedded: the {len(files)} files in {folder} have the hash "
            f"{found[:12]}, expected {CHATTERBOT_SHA256[:12]}. "
            "Run: pip install --force-reinstall chatterbot-corpus==1.3.3"
        )
    files_read.append({"name": "chatterbot-corpus 1.3.3", "sha256": found})
    for path in files:
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            yield "chatterbot", alternating([str(turn) for turn in turns])


def alternating(turns: list[str]) -> Messages:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn.strip()} for i, turn in enumerate(turns)]


def _rows(config: Config, files_read: list[dict[str, Any]]) -> Iterator[tuple[str, Messages]]:
    for name, path in _files(config, files_read):
        files_read.append(
            {"name": name, "sha256": store.sha256_file(path), "bytes": path.stat().st_size}
        )
        read = _parquet_rows if path.suffix == ".parquet" else _jsonl_rows
        for where, row in read(path):
            yield name, messages_of(row, where)


def _files(config: Config, files_read: list[dict[str, Any]]) -> Iterator[tuple[str, Path]]:
    """As a corpus finds its files (fixed/sources.py)."""
    like = as_corpus(config)
    with told_as_conversations():
        if like.source == "folder":
            found = sources.folder_files(like)
        else:
            found = sources._hub_files(config.model_copy(update={"corpus": like}), files_read)
        yield from ((name, path) for name, path in found if path.suffix != ".txt")


def as_corpus(config: Config) -> knobs.Corpus:
    """The source's place in the words of a corpus."""
    keys = ("source", "path", "repo", "revision", "files", "num_shards")
    place = {key: getattr(config.conversations, key) for key in keys}
    return config.corpus.model_copy(update=place)


@contextmanager
def told_as_conversations():
    """Mistakes in the place of a corpus, in the words of this group."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace("corpus.", "conversations.")) from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"{path}, line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{path}, line {number}: no valid JSON: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1
    except pa.ArrowInvalid as error:
        raise ConfigError(
            f"{path}: no valid parquet file: {' '.join(str(error).split())[:200]}"
        ) from None


def messages_of(row: Any, where: str) -> Messages:
    """The messages of a row of any known layout. Raises ConfigError for another."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a row must be an object, not {type(row).__name__}")
    if isinstance(row.get("messages"), list):
        return [message(m.get("role"), m.get("content"), where) for m in row["messages"]]
    if isinstance(row.get("conversations"), list):
        return [message(m.get("from"), m.get("value"), where) for m in row["conversations"]]
    if isinstance(row.get("data"), list):
        return alternating([text_of(turn, where) for turn in row["data"]])
    if "instruction" in row and "output" in row:
        asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return alternating([text_of(asked, where), text_of(row["output"], where)])
    answer = row.get("completion", row.get("response"))
    if "prompt" in row and answer is not None:
        return alternating([text_of(row["prompt"], where), text_of(answer, where)])
    raise ConfigError(
        f"{where}: no conversation here (there is: {', '.join(row)}). Known layouts: messages, "
        "conversations, data, instruction + output, prompt + completion"
    )


def message(role: Any, content: Any, where: str) -> dict[str, str]:
    role = OTHER_NAMES.get(role, role)
    if role not in ("system", "user", "assistant", "tool"):
        raise ConfigError(f"{where}: role {role!r}; known are system, user, assistant, tool")
    return {"role": role, "content": text_of(content, where)}


def text_of(content: Any, where: str) -> str:
    """Text, also of OpenAI's content parts; null is an empty text."""
    if isinstance(content, list):
        content = "".join(p.get("text", "") for p in content if isinstance(p, dict))
    if not isinstance(content, str | None):
        raise ConfigError(f"{where}: a message's content is {type(content).__name__}, not text")
    text = content or ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: character {error.start} is half of a surrogate pair") from None
    return text
