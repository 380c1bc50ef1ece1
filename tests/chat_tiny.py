"""Small chats, and a base checkpoint that learned nothing much, shared by the chat tests."""

import json
from pathlib import Path

import torch
from tiny import config, write_texts

from nightshift import pretrain
from nightshift.fixed import checkpoint
from nightshift.fixed.tokenizer import Tokenizer, ensure_tokenizer
from nightshift.fixed.tracking import open_store
from nightshift.model import GPT

CHAT = {
    "conversations.source": "folder", "conversations.files": "**/*", "conversations.tasks": {
        "spelling": 40, "counting": 40, "arithmetic": 80, "sorting": 40, "documents": 0,
        "continuation": 40},
    "conversations.dev_frac": 0.1, "conversations.val_frac": 0.2, "conversations.test_frac": 0.1,
    "sft.batch_tokens": 256, "sft.micro_batch_size": 4, "sft.lr_scale": 1.0,
    "sft_budget.kind": "steps", "sft_budget.amount": 20.0, "chat_evaluate.questions_per_task": 5,
    "chat_evaluate.answer_tokens": 4, "chat_evaluate.sample_tokens": 4, "model.seq_len": 64,
    "train.batch_tokens": 256,
}  # fmt: skip


def write_chats(folder: Path, count: int = 60) -> Path:
    """Questions and answers of one pattern, in the OpenAI layout."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        talk = [("user", f"Is {i} here?"), ("assistant", f"Yes, {i} is here."), ("user", "Bye")]
        talk.append(("assistant", "Bye."))
        messages = [{"role": role, "content": content} for role, content in talk]
        lines.append(json.dumps({"messages": messages}))
    (folder / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def long_sentences(number: int) -> str:
    """Some that can be cut in two (fixed/tasks.py)."""
    said = " Night {} of year {} is before us and the models that we train are all behind us. Yes."
    return "".join(said.format(i, number) for i in (1, 2, 3))


def chat_config(tmp_path: Path, **changes):
    chats, texts = tmp_path / "chats", tmp_path / "texts"
    if not chats.exists():
        write_chats(chats)
        for i, file in enumerate(sorted(write_texts(texts).glob("*.txt"))):
            file.write_text(file.read_text() + long_sentences(i))
    return config(tmp_path, **(CHAT | {"conversations.path": str(chats)} | changes))


def base_run(tmp_path: Path) -> Path:
    """The folder of a pretraining run of a few steps."""
    cfg = chat_config(tmp_path)
    training = pretrain.train(cfg, tmp_path / "base", open_store(cfg.tracking).start("b", "sft"))
    assert training.status == "ok"
    return tmp_path / "base"


def untrained_base(tmp_path: Path) -> Path:
    """The folder of a run that looks like pretraining's, with weights as they were initialised."""
    cfg = chat_config(tmp_path)
    tokenizer = Tokenizer.load(ensure_tokenizer(cfg))
    torch.manual_seed(0)
    model = GPT(cfg.model, tokenizer.vocab_size)
    checkpoint.save(tmp_path / "base" / "checkpoint", model, cfg, tokenizer)
    return tmp_path / "base"
