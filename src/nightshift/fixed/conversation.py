"""The one chat format: messages <-> tokens, and which tokens are the assistant's.

    <|bos|> <|system_start|>Be brief.<|system_end|>
    <|user_start|>Two and two?<|user_end|> <|assistant_start|>Four.<|assistant_end|> ...

(without the spaces and line breaks). A message is a dict with `role` and `content`. A system
message comes first or not at all, user and assistant take turns, and `tool` (what a tool answered)
stands between two turns of the assistant. Text that looks like a special token is ordinary text:
only this file places special tokens.
"""

from collections.abc import Sequence

from nightshift.fixed.tokenizer import Tokenizer

Message = dict[str, str]  # {"role": ..., "content": ...}

ROLES = ("system", "user", "assistant", "tool")

# What may stand before a role; None is the beginning.
AFTER = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant",),
}


class ConversationError(ValueError):
    """Messages that are no conversation; one line: which message, the rule, the next move."""


def check(messages: Sequence[Message], last: tuple[str, ...] = ("user", "tool", "assistant")):
    """Raises ConversationError unless the roles take turns and the last message is one of `last`.

    `last` is ("user", "tool") for a prompt, ("assistant",) for something to learn from.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ConversationError("messages: a list with at least one message is needed")
    before = None
    for number, message in enumerate(messages):
        before = _role_of(message, before, f"messages[{number}]")
    if before not in last:
        raise ConversationError(
            f"messages[{len(messages) - 1}].role ({before}): the last message must be from "
            f"{' or '.join(last)}"
        )


def _role_of(message: Message, before: str | None, where: str) -> str:
    if not isinstance(message, dict):
        raise ConversationError(
            f"{where} ({type(message).__name__}): a message is an object with role and content"
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ConversationError(f"{where}.role ({role!r}) must be one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ConversationError(f"{where}.content ({type(content).__name__}) must be text")
    if before not in AFTER[role]:
        allowed = " or ".join(name or "the beginning" for name in AFTER[role])
        raise ConversationError(
            f"{where}.role ({role}) cannot follow {before or 'the beginning'}: it follows {allowed}"
        )
    return role


def render(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """(tokens, which of them the assistant says: its text and `<|assistant_end|>`)."""
    check(messages)
    tokens, mask = [tokenizer.bos], [False]
    for message in messages:
        role = message["role"]
        said = [*tokenizer.encode(message["content"]), tokenizer.special[f"<|{role}_end|>"]]
        tokens += [tokenizer.special[f"<|{role}_start|>"], *said]
        mask += [False] + [role == "assistant"] * len(said)
    return tokens, mask


def prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Tokens that end in `<|assistant_start|>`: it is the assistant's turn."""
    check(messages, last=("user", "tool"))
    return [*render(messages, tokenizer)[0], tokenizer.special["<|assistant_start|>"]]


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The token by which an answer ends."""
    return tokenizer.special["<|assistant_end|>"]
