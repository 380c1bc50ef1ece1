"""Chat sets in every layout, questions made by program, splits that follow from the question."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_tiny import chat_config, write_chats
from test_corpus import Hub

from nightshift.fixed import chat_sources, chats, conversation, store, tasks
from nightshift.fixed.chat_sources import messages_of
from nightshift.fixed.config import ConfigError
from nightshift.fixed.tasks import Chat

TALK = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
]
LAYOUTS = {
    "openai": {"messages": TALK},
    "parts": {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Two and two?"}]}, TALK[1]]},
    "sharegpt": {"conversations": [
        {"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]},
    "ultrachat": {"id": "1", "data": ["Two and two?", "Four."]},
    "alpaca": {"instruction": "Two and two?", "input": "", "output": "Four."},
    "pairs": {"prompt": "Two and two?", "completion": "Four."},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_the_same_messages(layout):
    assert messages_of(LAYOUTS[layout], "row 1") == TALK


def test_an_alpaca_input_stands_below_its_instruction():
    row = {"instruction": "Translate.", "input": "Nacht", "output": "night"}
    assert messages_of(row, "row 1")[0]["content"] == "Translate.\n\nNacht"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "parts"])
def test_files_of_every_layout_are_read(layout, suffix, tmp_path):
    rows = [LAYOUTS[layout]] * 3
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / f"set.{suffix}"
    if suffix == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    cfg = chat_config(tmp_path, **{"conversations.path": str(tmp_path / "mine")})
    files = []
    read = list(chat_sources.chats(cfg, files, Counter()))
    assert [chat.messages for chat in read] == [TALK] * 3
    assert files[0]["name"] == f"set.{suffix}" and len(files[0]["sha256"]) == 64


@pytest.mark.parametrize(
    "row, said",
    [
        ({"text": "once"}, "no conversation here (there is: text)"),
        (["a"], "must be an object"),
        ({"messages": [{"role": "owl", "content": "hu"}]}, "role 'owl'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is int"),
        ({"prompt": "a", "completion": "\ud800"}, "surrogate"),
    ],
)
def test_a_row_that_is_no_conversation_stops_with_its_place(row, said):
    with pytest.raises(ConfigError) as error:
        messages_of(row, "x.jsonl, line 7")
    assert said in str(error.value) and "x.jsonl, line 7" in str(error.value)


def test_a_chat_set_that_is_not_there_is_told_in_the_words_of_its_group(tmp_path):
    with pytest.raises(ConfigError, match="conversations.path .*no such file"):
        chats.ensure_chats(chat_config(tmp_path, **{"conversations.path": str(tmp_path / "no")}))


@pytest.mark.parametrize(
    "roles, fits",
    [
        ("ua", True), ("sua", True), ("uaua", True), ("uata", True), ("uatata", True),
        ("u", False), ("au", False), ("uu", False), ("uaa", False), ("usa", False),
        ("uta", False), ("uat", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_taken_is_what_the_chat_format_takes(roles, fits):
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages = [{"role": names[letter], "content": "x"} for letter in roles]
    assert chat_sources.takes_turns(messages) == fits
    try:
        conversation.check(messages, last=("assistant",))
        assert fits
    except conversation.ConversationError:
        assert not fits


def test_what_follows_the_last_answer_is_cut_and_an_empty_answer_left_out():
    asked = [*TALK, {"role": "user", "content": "More?"}]
    assert chat_sources.trimmed(asked) == TALK
    assert not chat_sources.takes_turns([TALK[0], {"role": "assistant", "content": " "}])


def test_the_same_question_never_straddles_two_splits(tmp_path):
    settings = chat_config(tmp_path).conversations
    talks = [
        Chat(messages=tasks.question("x", f"{q} {case}", f"{a}").messages, source="x")
        for q in range(200)
        for a in range(3)
        for case in ("here", "  HERE")
    ]
    splits = chats.split(talks, settings, Counter())
    where = {}
    for name, found in splits.items():
        for chat in found:
            where.setdefault(chat.messages[0]["content"].split()[0], set()).add(name)
    assert len(where) == 200 and all(len(names) == 1 for names in where.values())
    assert {name: bool(found) for name, found in splits.items()} == dict.fromkeys(
        chats.SPLITS, True
    )


def test_adding_conversations_moves_none(tmp_path):
    few = chats.ensure_chats(chat_config(tmp_path))
    write_chats(tmp_path / "more", count=90)
    more = chats.ensure_chats(
        chat_config(tmp_path, **{"conversations.path": str(tmp_path / "more")})
    )
    for name in chats.SPLITS:
        before, after = (
            {json.dumps(c.messages) for c in chats.read_chats(f, name)} for f in (few, more)
        )
        assert before <= after, name


def test_too_few_conversations_say_so(tmp_path):
    none = dict.fromkeys(tasks.TASKS, 0)
    write_chats(tmp_path / "few", count=2)
    cfg = chat_config(
        tmp_path,
        **{"conversations.path": str(tmp_path / "few"), "conversations.tasks": none},
    )
    with pytest.raises(ConfigError, match="too few to split"):
        chats.ensure_chats(cfg)


@pytest.mark.slow
def test_a_chat_set_of_the_hub_is_downloaded_and_read(tmp_path):
    """From a local stand-in of the hub's interface, in SmolTalk's layout."""
    asked = [{"role": "user", "content": f"{i}: two and two?"} for i in range(90)]
    talk = [[q, {"role": "assistant", "content": f"Four, {i}."}] for i, q in enumerate(asked)]
    pq.write_table(pa.table({"messages": talk}), tmp_path / "train-0.parquet")
    files = {"train-0.parquet": (tmp_path / "train-0.parquet").read_bytes()}
    handler = type("Handler", (Hub,), {"files": files, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cfg = chat_config(
        tmp_path,
        **{"conversations.source": "hub", "conversations.repo": "someone/texts"},
        **{"conversations.tasks": dict.fromkeys(tasks.TASKS, 0)},
    )
    program = (
        "import sys; from nightshift.fixed import config, chats\n"
        "settings = config.Config.model_validate_json(sys.stdin.read())\n"
        "print(chats.ensure_chats(settings))\n"
    )
    address = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=cfg.model_dump_json(),
        env=os.environ | address | {"HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    read = [c.messages for split in chats.SPLITS for c in chats.read_chats(folder, split)]
    assert sorted(m[1]["content"] for m in read) == sorted(t[1]["content"] for t in talk)
    assert store.read_manifest(folder)["sources"][0]["commit"] == Hub.commit


# -- questions made by program


WORDS = ["nation", "people", "war", "peace", "commerce", "treasury", "public", "good"]


def documents():
    text = " ".join(f"We must keep the {w} and the {w} of our fathers in the year of our Lord {i}. "
                    f"It is of great moment that the {w} be kept safe by all of the people {i}. "
                    for i in range(40) for w in WORDS)  # fmt: skip
    return [("1863-Lincoln-1", text), ("1790-Washington-1", text)]


def made(**counts):
    return tasks.make(counts, documents(), seed=0)


def test_every_answer_is_right():
    for chat in made(spelling=30, counting=60, arithmetic=200, sorting=60):
        asked, answer = (m["content"] for m in chat.messages)
        words = asked.replace("?", "").replace(".", "").replace("'", "").split()
        match chat.source:
            case "task/spelling":
                assert answer.replace("-", "") in words and set(answer[1::2]) <= {"-"}
            case "task/counting" if "letters" in asked:
                assert int(answer) == len(words[-1])
            case "task/counting":
                assert int(answer) == words[-1].count(words[words.index("letter") + 1])
            case "task/arithmetic":
                a, b = [int(w) for w in words if w.isdigit()]
                signs = {"plus": a + b, "+": a + b, "Add": a + b, "minus": a - b, "-": a - b}
                signs |= {"times": a * b, "*": a * b}
                assert int(answer) == next(v for sign, v in signs.items() if sign in words)
            case "task/sorting":
                items = asked.split(": ")[1].split(", ")
                key = int if items[0].isdigit() else str
                assert answer.split(", ") == sorted(items, key=key)


def test_questions_about_documents_are_about_train_documents_alone():
    asked = [chat for chat in made(documents=100) if "task/documents" == chat.source]
    years = {word.strip("?.:,") for chat in asked for word in chat.messages[0]["content"].split()}
    assert {year for year in years if year.isdigit()} == {"1863", "1790"}
    who = [c for c in asked if "1863" in c.messages[0]["content"] and len(c.choices) == 2]
    assert {c.messages[1]["content"] for c in who} >= {"Abraham Lincoln"}
    assert all(c.choices[0] == c.messages[1]["content"] for c in asked if c.choices)
    assert tasks.make({"documents": 9}, [("mine.txt", "Nothing.")], 0) == []


def test_a_continuation_is_the_rest_of_a_sentence_among_rests_of_others():
    for chat in made(continuation=20):
        begun = chat.messages[0]["content"].removeprefix("Continue: ")
        assert f"{begun} {chat.choices[0]}" in documents()[0][1] + documents()[1][1]
        assert len(chat.choices) == 4 and chat.choices[0] == chat.messages[1]["content"]


def test_the_same_seed_makes_the_same_different_questions():
    counts = dict.fromkeys(tasks.TASKS, 30)
    first, again = made(**counts), made(**counts)
    assert first == again
    asked = [c.messages[0]["content"] for c in first]
    assert len(asked) == len(set(asked))
    assert tasks.make(counts, documents(), seed=1) != first


def test_the_embedded_chats_are_there():
    files = []
    read = list(chat_sources._chatterbot(files))
    assert len(read) > 2000 and files[0]["name"] == "chatterbot-corpus 1.3.3"
    assert all(messages[0]["role"] == "user" for _, messages in read)


def test_the_manifest_tells_what_came_from_where(tmp_path):
    folder = chats.ensure_chats(chat_config(tmp_path))
    manifest = store.read_manifest(folder)
    assert manifest["sources"][0]["name"] == "chats.jsonl"
    assert manifest["splits"]["train"]["sources"]["task/arithmetic"] > 20
