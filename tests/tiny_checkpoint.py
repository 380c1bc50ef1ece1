"""A checkpoint of a model that was never trained, in half a second: random, but not at its zeros.

`make` gives the folder of a run; a folder of its own is what catalogue.py would find.
"""

import json
import random
from pathlib import Path

import tiny
import torch

from nightshift.fixed import checkpoint
from nightshift.fixed.result import CHECKPOINT_FOLDER, RESULT_FILE, TRAINING_FILE
from nightshift.fixed.tokenizer import Tokenizer, train
from nightshift.model import GPT


def tokenizer_of(config) -> Tokenizer:
    texts = [path.read_text() for path in sorted(Path(config.corpus.path).glob("*.txt"))]
    return train(texts, config.tokenizer)


def make(run: Path, work: Path, gpt=GPT, commit=None, val_bpb=None, seed=0, **changes) -> Path:
    """`work` holds texts and caches. Keys of the configuration with dots, as in tiny.config."""
    config = tiny.config(work, **changes)
    tokenizer = tokenizer_of(config)
    torch.manual_seed(seed)
    model = gpt(config.model, tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.head.weight[len(tokenizer.ranks) :] = 0  # it hardly ever ends its answer by itself
    checkpoint.save(run / CHECKPOINT_FOLDER, model, config, tokenizer)
    (run / TRAINING_FILE).write_text(json.dumps({"status": "ok", "commit": commit}))
    if val_bpb is not None:
        result = {"status": "ok", "val_bpb": val_bpb}
        (run / RESULT_FILE).write_text(json.dumps(result))
    return run / CHECKPOINT_FOLDER


def make_trial(root: Path, work: Path, number: int, decision: str, kept=True, **others) -> None:
    """A trial of the study `first` under `root`, with its line in the journal."""
    study = root / "outputs/studies/first"
    run = study / f"trials/{number:03d}/seed_1"
    if kept:
        make(run, work, seed=number, **others)
    line = {
        "number": number,
        "decision": decision,
        "status": "ok",
        "val_bpb": 2.0 - number / 100,
        "proposal": {"title": f"change {number}"},
        "runs": [{"seed": 1, "folder": run.relative_to(study).as_posix()}],
    }
    study.mkdir(parents=True, exist_ok=True)
    with open(study / "journal.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


# Scripts of several families, marks that combine, emoji, controls, what looks like special tokens.
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz ABC  '''sdmtllvere",
    "\u00e4\u00f6\u00fc\u00df\u0131\u0130\u017f\ufb06",
    "\u0430\u0431\u0432\u0413\u0434",
    "\u03b1\u03b2\u03b3\u0394",
    "\u05d0\u05d1\u05d2\u05b8",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\u0915\u094d\u0937\u0924\u094d\u0930",
    "\u0e44\u0e17\u0e22\u0e49",
    "\u6f22\u5b57\u4eee\u540d\u304b\u306a\u30ab\u30ca",
    "\ud55c\uad6d\uc5b4",
    "\U0001f642\U0001f469\u200d\U0001f467\U0001f3fd\ufe0f\U0001f1e9\U0001f1ea",
    "0123456789.,%$\u0661\u0662\u096a\u00bd\u2167",
    "\t\n\r\x0b\x0c \u00a0\u2003\u2028\u3000\ufeff\u200b",
    "".join(map(chr, range(32))) + "\x7f\x80\x85\x9f",
    "!?-_=+*/\\()[]{}<>|@#&~`^;:\"'",
)
PIECES = ("<|bos|>", "<|user_start|>", "<|", "|>", "\r\n", "  ", "aaaa", "====", "abab")


def random_text(random_: random.Random) -> str:
    """Up to 60 characters: of one or several scripts, of all of Unicode, or of random bytes."""
    kind = random_.random()
    if kind < 0.15:  # bytes that are mostly not UTF-8
        return random_.randbytes(random_.randrange(40)).decode("utf-8", "replace")
    if kind < 0.4:  # any character there is
        codes = (random_.choice((0x80, 0x800, 0x3000, 0x110000)) for _ in range(30))
        found = [random_.randrange(limit) for limit in codes]
        return "".join(chr(c) for c in found if not 0xD800 <= c < 0xE000)
    parts = []
    for _ in range(random_.randrange(1, 6)):
        alphabet = random_.choice(ALPHABETS)
        parts.append("".join(random_.choices(alphabet, k=random_.randrange(12))))
        if random_.random() < 0.2:
            parts.append(random_.choice(PIECES) * random_.randrange(1, 4))
    return "".join(parts)
