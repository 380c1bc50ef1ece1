"""The terminal chat: commands, history, and a Ctrl-C that ends an answer and not the program."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import tiny_checkpoint

from nightshift import chat
from nightshift.catalogue import Entry
from nightshift.chat import Chat, talk
from nightshift.fixed import conversation
from nightshift.fixed.config import ROOT
from nightshift.generate import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("chat")
    changes = {"model.seq_len": 64, "train.batch_tokens": 256}
    return tiny_checkpoint.make(work / "run", work, **changes)


@pytest.fixture
def talker(folder):
    return Chat(Entry(name="tiny", folder=folder), "cpu", Sampling(max_tokens=4, seed=1), False)


def spoken(talker, *lines) -> str:
    out: list[str] = []
    talk(talker, iter(lines), out.append)
    return "".join(out)


def test_an_answer_becomes_part_of_the_history(talker):
    out = spoken(talker, "Hello", "And?")
    assert [turn["role"] for turn in talker.turns] == ["user", "assistant"] * 2
    assert out == "".join(f"{turn['content']}\n" for turn in talker.turns[1::2])


def test_reset_and_system_forget_the_conversation(talker):
    spoken(talker, "Hello", "/reset")
    assert talker.turns == []
    spoken(talker, "Hello", "/system Be brief.")
    assert talker.turns == [] and talker.messages([])[0]["content"] == "Be brief."
    spoken(talker, "/system")
    assert talker.messages([]) == []


def test_retry_answers_the_same_message_again(talker):
    spoken(talker, "Hello", "/seed 2", "/retry")
    assert [turn["content"] for turn in talker.turns[::2]] == ["Hello"]
    assert spoken(talker, "/reset", "/retry") == "forgotten\n"


def test_settings_are_set_and_wrong_ones_are_explained(talker):
    out = spoken(talker, "/temperature 0.25", "/top-k 5", "/top_k off", "/max_tokens x", "/top_p 3")
    assert (talker.sampling.temperature, talker.sampling.top_k) == (0.25, None)
    assert "temperature 0.25" in out and "/max_tokens x: invalid" in out
    assert "top_p (3.0) must be above 0 and at most 1" in out
    assert "temperature" in spoken(talker, "/settings") and "/save" in spoken(talker, "/help")


def test_an_unknown_command_is_not_sent_to_the_model(talker):
    assert "there is no such command" in spoken(talker, "/bogus")
    assert talker.turns == []
    spoken(talker, "//bogus")
    assert talker.turns[0]["content"] == "/bogus"


def test_quit_ends_the_talk(talker):
    assert spoken(talker, "/quit", "Hello") == ""


def test_a_saved_conversation_is_a_line_of_a_chat_file(talker, tmp_path):
    spoken(talker, "/system Be brief.", "Hello", f"/save {tmp_path}/chats.jsonl")
    spoken(talker, f"/save {tmp_path}/chats.jsonl")
    lines = (tmp_path / "chats.jsonl").read_text().splitlines()
    messages = json.loads(lines[0])["messages"]
    conversation.check(messages, last=("assistant",))
    assert len(lines) == 2 and [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert "No such file" in spoken(talker, "/save /no/such/folder/x")


def test_the_oldest_turns_make_room_and_the_system_message_stays(talker):
    spoken(talker, "/system Be brief.", *[f"message {i}" for i in range(12)])
    assert talker.turns[-2]["content"] == "message 11"
    assert 2 <= len(talker.turns) < 24 and talker.turns[0]["role"] == "user"
    assert talker.messages(talker.turns)[0]["role"] == "system"


def test_a_message_that_never_fits_is_refused_and_forgotten(talker):
    out = spoken(talker, "Hello", "x " * 200)
    assert "this model reads 64: shorten it" in out
    assert [turn["content"] for turn in talker.turns[::2]] == ["Hello"]


def test_text_mode_continues_the_text_itself(folder):
    talker = Chat(Entry(name="tiny", folder=folder), "cpu", Sampling(max_tokens=4, seed=1), True)
    tokenizer = talker.engine.tokenizer
    prompt = [tokenizer.bos, *tokenizer.encode("The night")]
    (expected,) = talker.engine.generate([prompt], talker.sampling)
    assert spoken(talker, "The night") == expected.text + "\n" and talker.turns == []


def test_a_model_cannot_steer_the_terminal():
    assert chat.printable("a\x1b[2J\tb\n\x9b\u00e9") == "a\\x1b[2J\tb\n\\x9b\u00e9"


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(talker):
    talker.sampling = Sampling(max_tokens=4000, seed=1, stop_tokens=())
    count = 0

    def write(text):
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    talk(talker, iter(["Hello"]), write)
    assert signal.getsignal(signal.SIGINT) is before
    assert talker.turns[-1]["role"] == "assistant"
    assert len(talker.engine.tokenizer.encode(talker.turns[-1]["content"])) < 100


def command(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "nightshift.cli", "chat", str(folder), *arguments], environment


@pytest.mark.slow
def test_lines_of_a_pipe_are_answered_one_by_one(folder):
    args, environment = command(folder, "--max-tokens", "4", "--seed", "1")
    lines = b"Hello\n/temperature 0\n\xff\xfe\n"
    done = subprocess.run(args, input=lines, env=environment, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert b"temperature 0.0" in done.stdout and done.stderr == b""


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(folder):
    """A real pseudo-terminal, as ssh gives one."""
    args, environment = command(folder, "--max-tokens", "4000", "--temperature", "5", "--text")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(args[0], args, environment | {"TERM": "dumb"})

    unread = b""

    def read_until(text, limit_s=90):
        nonlocal unread
        deadline = time.monotonic() + limit_s
        while text not in unread:
            assert time.monotonic() < deadline, unread[-300:]
            if select.select([terminal], [], [], 1)[0]:
                unread += os.read(terminal, 65536)
        unread = unread.split(text, 1)[1]

    try:
        read_until(b"> ")
        os.write(terminal, b"The night\n")
        time.sleep(1)
        os.write(terminal, b"\x03")
        read_until(b"\n> ")
        os.write(terminal, b"\x03")
        read_until(b"Ctrl-D leaves")
        os.write(terminal, b"/settings\n")
        read_until(b"repetition_penalty")
        read_until(b"> ")
        os.write(terminal, b"\x04")
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        os.close(terminal)
