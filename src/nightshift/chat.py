"""Talk to a checkpoint in the terminal.

    nightshift chat                       the champion
    nightshift chat first/4 --temperature 0.5
    nightshift chat pretrain/latest --text        continue texts: what a base model can do
    echo "Spell liberty." | nightshift chat       one line of stdin, one answer

Answers stream. Ctrl-C ends an answer, not the program; twice ends both. /help lists the commands.
Plain lines on a plain terminal, nothing moves the cursor: it works over ssh, in a pipe, in a log.
"""

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nightshift import catalogue
from nightshift.fixed import conversation
from nightshift.fixed.config import ConfigError
from nightshift.generate import Engine, Sampling

SETTINGS = ("temperature", "top_p", "top_k", "max_tokens", "repetition_penalty", "seed")
WHOLE_NUMBERS = ("top_k", "max_tokens", "seed")
MAY_BE_OFF = ("top_k", "seed")


class Chat:
    """One conversation with one model."""

    def __init__(self, entry: catalogue.Entry, device: str, sampling: Sampling, is_text: bool):
        self.device, self.sampling, self.is_text = device, sampling, is_text
        self.system = ""
        self.turns: list[dict[str, str]] = []  # user and assistant, in turn
        self.open(entry)

    def open(self, entry: catalogue.Entry) -> None:
        """Raises ConfigError, ValueError."""
        model, tokenizer, _ = catalogue.load(entry.folder, self.device)
        self.entry, self.engine = entry, Engine(model, tokenizer)

    def messages(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *turns]

    def answer(self, text: str, write: Callable[[str], None]) -> None:
        """Streams the answer into `write`. Raises ValueError for what is too long."""
        prompt = self.prompt(text)
        said = ""
        try:
            with interruptible() as stopped:
                for (piece,) in self.engine.stream([prompt], self.sampling):
                    said += piece.text
                    write(printable(piece.text))
                    if stopped():
                        break
        finally:
            if not self.is_text:
                self.turns.append({"role": "assistant", "content": said})

    def prompt(self, text: str) -> list[int]:
        """The tokens to go on from. The oldest turns are left out where they do not fit."""
        tokenizer, seq_len = self.engine.tokenizer, self.engine.seq_len
        if self.is_text:
            return [tokenizer.bos, *tokenizer.encode(text)]
        turns = [*self.turns, {"role": "user", "content": text}]
        while len(prompt := conversation.prompt(self.messages(turns), tokenizer)) >= seq_len:
            if len(turns) < 3:
                raise ValueError(
                    f"that is {len(prompt)} tokens long, this model reads {seq_len}: shorten it"
                )
            turns = turns[2:]
        self.turns = turns
        return prompt

    def retry(self) -> str | None:
        """Takes the last exchange back; returns what the user had said."""
        if len(self.turns) < 2:
            return None
        *self.turns, asked, _ = self.turns
        return asked["content"]

    def save(self, path: Path) -> None:
        """As one line of a chat file: /save twice gives two conversations to tune on."""
        with open(path, "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"messages": self.messages(self.turns)}, ensure_ascii=False) + "\n"
            )

    def set(self, name: str, value: str) -> None:
        """Raises ValueError: the name, the value, the rule."""
        if value in ("off", "none") and name in MAY_BE_OFF:
            number = None
        else:
            number = int(value) if name in WHOLE_NUMBERS else float(value)
        self.sampling = dataclasses.replace(self.sampling, **{name: number})


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed. The second time it raises."""
    presses: list[int] = []

    def press(number, frame) -> None:
        presses.append(number)
        if len(presses) > 1:
            raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # not the main thread: nobody presses anything
        yield lambda: False
        return
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, before)


def printable(text: str) -> str:
    """Control characters made visible: a model must not steer the terminal."""
    return "".join(
        c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else f"\\x{ord(c):02x}"
        for c in text
    )


# -- the commands --------------------------------------------------------------------------------

HELP = f"""/help                what you are reading
/reset               forget the conversation
/retry               take the last answer back and answer again
/system [text]       the system message (without a text: none); forgets the conversation
/model [name]        another checkpoint (without a name: what there is); forgets the conversation
/save file           append the conversation to a file of chats (.jsonl)
/settings            the sampling as it is
/<setting> value     one of {", ".join(SETTINGS)}; off for {" and ".join(MAY_BE_OFF)}
/quit                leave (so does Ctrl-D)
//...                a message that begins with a slash"""


def command(chat: Chat, line: str, say: Callable[[str], None]) -> str | None:
    """Runs a /command. Returns a message to answer, if it asks for one. Raises EOFError to quit."""
    name, _, rest = line[1:].partition(" ")
    name, rest = name.lower().replace("-", "_"), rest.strip()
    if name in ("quit", "exit", "q"):
        raise EOFError
    if name in SETTINGS:
        return _set(chat, name, rest, say)
    actions = {
        "help": lambda: say(HELP),
        "reset": lambda: (chat.turns.clear(), say("forgotten")),
        "retry": lambda: None,
        "system": lambda: _system(chat, rest, say),
        "model": lambda: _model(chat, rest, say),
        "save": lambda: _save(chat, rest, say),
        "settings": lambda: [say(f"{n:<19} {getattr(chat.sampling, n)}") for n in SETTINGS],
    }
    if name not in actions:
        say(f"/{name}: there is no such command. Commands: {', '.join(actions)}, quit")
        return None
    actions[name]()
    return chat.retry() if name == "retry" else None


def _set(chat: Chat, name: str, value: str, say: Callable[[str], None]) -> None:
    try:
        if value:
            chat.set(name, value)
        say(f"{name} {getattr(chat.sampling, name)}")
    except ValueError as error:
        say(f"/{name} {value}: {error}")


def _system(chat: Chat, text: str, say: Callable[[str], None]) -> None:
    chat.system = text
    chat.turns.clear()
    say("the conversation begins anew" + ("" if text else ", without a system message"))


def _model(chat: Chat, name: str, say: Callable[[str], None]) -> None:
    if not name:
        for entry in catalogue.entries():
            number = "" if entry.val_bpb is None else f"{entry.val_bpb:.4f}"
            say(f"{entry.name:<32} {number:<7} {entry.title}{'' if entry.is_kept else ' (gone)'}")
        return
    try:
        chat.open(catalogue.find(name))
        chat.turns.clear()
        say(chat.entry.name)
    except (ConfigError, ValueError) as error:
        say(str(error))


def _save(chat: Chat, place: str, say: Callable[[str], None]) -> None:
    if not place:
        return say("/save file.jsonl: give the name of a file")
    try:
        chat.save(Path(place).expanduser())
        say(f"{len(chat.turns)} messages in {place}")
    except OSError as error:
        say(f"{place}: {error.strerror}")


# -- the loop ------------------------------------------------------------------------------------


def talk(chat: Chat, lines: Iterator[str], write: Callable[[str], None]) -> None:
    """Until the lines end or /quit."""
    say = lambda text: write(f"{text}\n")  # noqa: E731
    with suppress(EOFError):
        for line in lines:
            message: str | None = line
            if line.startswith("/") and not line.startswith("//"):
                message = command(chat, line.strip(), say)
            elif line.startswith("//"):
                message = line[1:]
            if message and message.strip():
                try:
                    chat.answer(message, write)
                    say("")
                except ValueError as error:
                    say(str(error))


def typed_lines() -> Iterator[str]:
    """From a terminal, with the arrow keys where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")
        except EOFError:
            print()
            return


def piped_lines() -> Iterator[str]:
    """From anything else: a line is a message."""
    sys.stdin.reconfigure(errors="replace")
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    args = parser().parse_args(arguments)
    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    try:
        entry = catalogue.find(args.checkpoint) if args.checkpoint else catalogue.default()
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        chat = Chat(entry, device, Sampling(**given), args.text)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    chat.system = args.system
    with suppress(ValueError, OSError):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{entry.name}: {entry.title or entry.folder}. /help lists the commands.")
    try:
        talk(chat, typed_lines() if is_terminal else piped_lines(), write_now)
    except BrokenPipeError:  # `nightshift chat | head`
        sys.stderr.close()
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="nightshift chat", description=__doc__.splitlines()[0])
    found.add_argument("checkpoint", nargs="?", help="champion, first/4, sft/latest or a folder")
    found.add_argument("--text", action="store_true", help="continue texts, without chat format")
    found.add_argument("--system", default="", help="the system message")
    for name in SETTINGS:
        kind = int if name in WHOLE_NUMBERS else float
        found.add_argument(f"--{name.replace('_', '-')}", type=kind, dest=name)
    found.add_argument("--device", help="cpu or cuda (cuda if there is one)")
    found.error = lambda message: found.exit(2, f"{found.prog}: {message}\n")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
