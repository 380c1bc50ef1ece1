"""The default configuration, small, with its caches in a temporary folder."""

import random

import yaml

from nightshift.fixed.config import CONF, check

GROUPS = {
    "corpus": "sotu",
    "filter": "default",
    "tokenizer": "bpe4k",
    "model": "tiny",
    "optim": "muon",
    "schedule": "trapezoid",
    "train": "cpu",
    "budget": "smoke",
    "evaluate": "val_bpb",
    "conversations": "embedded",
    "sft": "full",
    "chat_evaluate": "default",
    "runtime": "default",
    "sandbox": "default",
    "tracking": "off",
}


def make_config(folder, **overrides):
    """`corpus__path="..."` sets corpus.path."""
    values = {
        group: yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
        for group, name in GROUPS.items()
    }
    values["sft_budget"] = values["budget"] | {}
    values |= {"seed": 1, "base": None, "resume": None, "parent_run_id": None, "run_name": None}
    values["runtime"]["cache_dir"] = str(folder / "cache")
    values["tokenizer"]["vocab_size"] = 300
    for key, value in overrides.items():
        group, _, name = key.partition("__")
        values[group][name] = value
    return check(values)


def folder_config(folder, **overrides):
    """A config over the texts in `folder`/texts."""
    path = str(folder / "texts")
    return make_config(
        folder, corpus__source="folder", corpus__path=path, corpus__files="**/*", **overrides
    )


def write_texts(folder, number=120):
    """Small documents, all different."""
    (folder / "texts").mkdir(exist_ok=True)
    for i in range(number):
        (folder / "texts" / f"{i:03d}.txt").write_text(sentence(i))


def sentence(seed, words=60):
    pick = random.Random(seed)
    vocabulary = "the lab runs a trial at night and keeps what is truly better than before".split()
    return f"Document {seed}. " + " ".join(pick.choices(vocabulary, k=words)) + "\n"
