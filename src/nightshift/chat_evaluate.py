"""Score a chat checkpoint on held-out conversations: run folder -> chat_result.json.

chat_bpb   bits per byte of the assistant's turns, given what was said before. As in val_bpb,
           special tokens have no bytes and are left out of both sums
exact      share of questions answered with exactly the right text (greedy; case, spaces around it
           and a full stop at the end do not count), with Wilson's 95 % interval
stops      share of those answers that the model ends by itself
choice     share of questions where the right answer is the likeliest of those offered, by its bits
           per byte (what lm-evaluation calls acc_norm); `centred` is 0 for guessing and 1 for all
           right, and their mean over the kinds of task is `core` (Li et al. 2024)

text_bpb   bits per byte of the corpus's dev text: what tuning forgets. Only comparable with
           `text_bpb_before`: the windows are not those of val_bpb

With a base to compare (config.base, or base=...), the same is measured for it, and the gain in
chat_bpb has an interval over conversations: both models are scored on the same ones.

    nightshift chat-evaluate run=outputs/sft/<run>
"""

import itertools
import sys
import time
from collections.abc import Sequence
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nightshift.fixed import checkpoint, conversation, machine
from nightshift.fixed.chat_ruler import Scored, Z, bytes_said, windows
from nightshift.fixed.chats import ensure_chats, read_chats
from nightshift.fixed.config import Config, ConfigError
from nightshift.fixed.corpus import ensure_corpus, read_documents
from nightshift.fixed.result import CONFIG_FILE, write_json
from nightshift.fixed.tasks import Chat
from nightshift.fixed.tokenizer import Tokenizer
from nightshift.generate import Engine, Sampling, padded_tokens
from nightshift.sft import CHAT_RESULT_FILE, base_folder

RESULT_FILE = CHAT_RESULT_FILE
DOCUMENT_CHARS = 4000  # of a dev document, for text_bpb

# B rows, T time, V vocabulary


# -- likelihood


@torch.inference_mode()
def nats_of(
    model, tokenizer: Tokenizer, texts: Sequence[tuple[list[int], list[bool]]], batch_size: int
) -> list[float]:
    """-log p of the masked tokens of each text that have bytes.

    A text longer than the window is seen in windows that move by half of it: each token is counted
    once, with at least half a window before it.
    """
    T, num_plain = model.config.seq_len, len(tokenizer.ranks)
    device = next(model.parameters()).device
    pieces = [
        (number, tokens[start : start + T + 1], counted)
        for number, (tokens, mask) in enumerate(texts)
        for start, counted in windows(tokens, mask, T, num_plain)
    ]
    pieces.sort(key=lambda piece: len(piece[1]))  # rows of a batch are of about one length
    nats = [0.0] * len(texts)
    for first in range(0, len(pieces), batch_size):
        part = pieces[first : first + batch_size]
        tokens_BT = padded_tokens([tokens for _, tokens, _ in part]).to(device)
        logits_BTV = model(tokens_BT[:, :-1]).float()
        if not torch.isfinite(logits_BTV).all():
            raise RuntimeError("the model's logits are not all finite: its weights are broken")
        loss_BT = F.cross_entropy(logits_BTV.mT, tokens_BT[:, 1:], reduction="none")
        for row, (number, _, counted) in enumerate(part):
            nats[number] += float(loss_BT[row, counted].double().sum())
    return nats


def likelihood(model, tokenizer: Tokenizer, chats: Sequence[Chat], batch_size: int) -> Scored:
    rendered = [conversation.render(chat.messages, tokenizer) for chat in chats]
    nats = nats_of(model, tokenizer, rendered, batch_size)
    return Scored(np.array(nats), bytes_said(chats))


def text_bpb(model, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int) -> float:
    tokens = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
    seen = [(row, [False] + [True] * (len(row) - 1)) for row in tokens]
    nats = sum(nats_of(model, tokenizer, seen, batch_size))
    return nats / log(2) / sum(len(text.encode()) for text in texts)


# -- tasks


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): sensible for 0 of n and n of n too."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = right / count, Z * Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z * sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if right == 0 else low), (1.0 if right == count else high)


def plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def answers(engine: Engine, questions: Sequence[list[dict]], num_tokens: int, batch_size: int):
    """A greedy completion for each list of messages; ends where the assistant ends it."""
    sampling = Sampling(max_tokens=num_tokens, temperature=0)
    prompts = [conversation.prompt(messages, engine.tokenizer) for messages in questions]
    done = []
    for first in range(0, len(prompts), batch_size):
        done += engine.generate(prompts[first : first + batch_size], sampling)
    return done


def exact_match(engine: Engine, chats: Sequence[Chat], settings) -> dict[str, Any]:
    """For each kind of task; its open questions, whose answer cannot be guessed from choices."""
    said = answers(
        engine,
        [chat.messages[:-1] for chat in chats],
        settings.answer_tokens,
        settings.batch_size,
    )
    end, results = conversation.end_of_turn(engine.tokenizer), {}
    for task in sorted({chat.source for chat in chats}):
        rows = [(c, s) for c, s in zip(chats, said, strict=True) if c.source == task]
        right = sum(plain(s.text) == plain(c.messages[-1]["content"]) for c, s in rows)
        low, high = wilson(right, len(rows))
        results[task.removeprefix("task/")] = {
            "share": right / len(rows),
            "low": low,
            "high": high,
            "num": len(rows),
            "stops": sum(s.tokens[-1] == end for _, s in rows) / len(rows),
        }
    return results


def multiple_choice(
    model, tokenizer: Tokenizer, chats: Sequence[Chat], batch_size: int
) -> dict[str, Any]:
    """Which of the offered answers has the fewest bits per byte."""
    texts = [
        conversation.render([*chat.messages[:-1], {"role": "assistant", "content": c}], tokenizer)
        for chat in chats
        for c in chat.choices
    ]
    nats, results = iter(nats_of(model, tokenizer, texts, batch_size)), {}
    for chat in chats:
        bits = [next(nats) / len(choice.encode()) for choice in chat.choices]
        task = results.setdefault(
            chat.source.removeprefix("task/"), {"right": 0, "num": 0, "by": 0}
        )
        task["right"] += bits[0] < min(bits[1:])  # the answer comes first; a tie is wrong
        task["num"] += 1
        task["by"] += 1 / len(bits)
    for task in results.values():
        right, num, guessing = task.pop("right"), task["num"], task.pop("by") / task["num"]
        low, high = wilson(right, num)
        task |= {"share": right / num, "low": low, "high": high, "guessing": guessing}
        task["centred"] = (right / num - guessing) / (1 - guessing)
    return results


# -- a checkpoint


def measure(
    folder: Path, chats: Sequence[Chat], texts: Sequence[str], config: Config
) -> dict[str, Any]:
    """Everything about one checkpoint; `scored` holds the likelihood of each conversation."""
    settings, device = config.chat_evaluate, machine.pick_device(config.runtime)
    model, tokenizer, _ = checkpoint.load(folder, device)
    engine = Engine(model, tokenizer)
    tasks = [chat for chat in chats if chat.source.startswith("task/")]
    opened = first_of_each(tasks, settings.questions_per_task, "continuation")
    offered = first_of_each([c for c in tasks if c.choices], settings.questions_per_task)
    scored = likelihood(model, tokenizer, chats[: settings.max_conversations], settings.batch_size)
    return {
        "scored": scored,
        "text_bpb": text_bpb(model, tokenizer, texts, settings.batch_size) if texts else None,
        "exact": exact_match(engine, opened, settings),
        "choice": multiple_choice(model, tokenizer, offered, settings.batch_size),
        "samples": samples(engine, settings),
    }


def dev_texts(config: Config) -> list[str]:
    """The beginnings of the corpus's dev documents; none where the chats do not need the corpus
    (a checkpoint from elsewhere is tuned without downloading what it was trained on)."""
    if not config.conversations.tasks.total:
        return []
    documents = read_documents(ensure_corpus(config), "dev")
    texts = (text[:DOCUMENT_CHARS] for _, text in documents)
    return list(itertools.islice(texts, max(1, config.runtime.dev_bytes // DOCUMENT_CHARS)))


def first_of_each(chats: Sequence[Chat], count: int, but: str = "") -> list[Chat]:
    """The first `count` of each kind of task (chats lie in the order of a hash)."""
    kinds = sorted({chat.source for chat in chats} - {f"task/{but}"})
    return [chat for kind in kinds for chat in [c for c in chats if c.source == kind][:count]]


def samples(engine: Engine, settings) -> list[dict[str, str]]:
    asked = [[{"role": "user", "content": text}] for text in settings.sample_questions]
    said = answers(engine, asked, settings.sample_tokens, settings.batch_size)
    return [
        {"question": text, "answer": completion.text, "finish": completion.finish}
        for text, completion in zip(settings.sample_questions, said, strict=True)
    ]


def metrics(measured: dict[str, Any]) -> dict[str, float]:
    """The numbers by which runs are compared, flat."""
    exact, choice = measured["exact"], measured["choice"]
    numbers = {
        "chat_bpb": measured["scored"].bpb,
        "chat_bpb_interval": measured["scored"].interval(),
    }
    if measured["text_bpb"] is not None:
        numbers["text_bpb"] = measured["text_bpb"]
    if exact:
        numbers["exact"] = sum(t["share"] for t in exact.values()) / len(exact)
        numbers["stops"] = sum(t["stops"] for t in exact.values()) / len(exact)
    if choice:
        numbers["core"] = sum(t["centred"] for t in choice.values()) / len(choice)
    numbers |= {f"exact/{name}": task["share"] for name, task in exact.items()}
    numbers |= {f"choice/{name}": task["share"] for name, task in choice.items()}
    return {name: round(float(value), 6) for name, value in numbers.items()}


def evaluate(folder: Path, config: Config, base: Path | None) -> dict[str, Any]:
    """chat_result.json's content for a checkpoint folder, beside its base if there is one."""
    started_at = time.monotonic()
    machine.prepare(config.runtime, machine.pick_device(config.runtime))
    chats = list(read_chats(ensure_chats(config), "val"))
    texts = dev_texts(config)
    measured = measure(folder, chats, texts, config)
    result = {
        "metrics": metrics(measured),
        "exact": measured["exact"],
        "choice": measured["choice"],
        "samples": measured["samples"],
        "num_conversations": len(measured["scored"].nats),
        "num_bytes": int(measured["scored"].num_bytes.sum()),
        "weights_sha256": checkpoint.weights_sha256(folder),
    }
    if base is not None:
        before = measure(base, chats, texts, config)
        gain = before["scored"].nats - measured["scored"].nats
        result["before"] = metrics(before) | {"samples": before["samples"]}
        result["metrics"] |= {
            "chat_bpb_before": round(before["scored"].bpb, 6),
            **({"text_bpb_before": round(before["text_bpb"], 6)} if texts else {}),
            "chat_bpb_gain": round(before["scored"].bpb - measured["scored"].bpb, 6),
            "chat_bpb_gain_interval": round(measured["scored"].interval(gain), 6),
        }
    return result | {"eval_s": round(time.monotonic() - started_at, 3)}


def record(log, folder: Path, result: dict[str, Any]) -> None:
    """What MLflow shows of it."""
    log.metrics(result["metrics"])
    log.artifact(folder / RESULT_FILE)
    log.table(result["samples"], "answers.json")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    given = dict(a.split("=", 1) for a in arguments if "=" in a)
    if "run" not in given or set(given) - {"run", "base"} or len(given) < len(arguments):
        print(
            "usage: nightshift chat-evaluate run=<folder of a run> [base=<folder to compare>], "
            "e.g. run=outputs/sft/<run>",
            file=sys.stderr,
        )
        return 2
    run = Path(given["run"])
    try:
        folder = checkpoint.folder_of(str(run))
        config = checkpoint.read_config(folder / CONFIG_FILE)
        config = config.model_copy(update={"base": given.get("base", config.base)})
        result = evaluate(folder, config, base_folder(config) if config.base else None)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    write_json(run / RESULT_FILE, result)
    print(table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    m = result["metrics"]
    lines = [f"chat_bpb {m['chat_bpb']:.4f} +- {m['chat_bpb_interval']:.4f}"]
    if "chat_bpb_gain" in m:
        lines[0] += (
            f", base {m['chat_bpb_before']:.4f}: gain {m['chat_bpb_gain']:.4f} "
            f"+- {m['chat_bpb_gain_interval']:.4f}"
        )
    for kind in ("exact", "choice"):
        for name, task in result[kind].items():
            before = result.get("before", {}).get(f"{kind}/{name}")
            was = "" if before is None else f", base {before:.2f}"
            guess = f", guessing {task['guessing']:.2f}" if kind == "choice" else ""
            lines.append(
                f"{kind:<7} {name:<13} {task['share']:.2f} ({task['low']:.2f} to "
                f"{task['high']:.2f}, n {task['num']}{was}{guess})"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
