"""A checkpoint -> a folder that the Hugging Face libraries load.

    nightshift export champion /my/folder
    AutoModelForCausalLM.from_pretrained("/my/folder", trust_remote_code=True)

model.safetensors        the weights, under `gpt.`
config.json, gpt.py      the shape, and the model's own code (the trial's, where a trial edited it)
modeling_nightshift.py   transformers' interface to it
tokenizer.json           for the library `tokenizers`: the same ids for every text up to 32,768
                         characters (longer ones we cut at a space before encoding)

Text that looks like a special token: for us it is ordinary text. `tokenizers` makes the special
token of it, which the chat template needs, unless told otherwise (`encode_special_tokens = True`
there, `split_special_tokens=True` in transformers). Bytes that are not UTF-8 are for neither of
them: decode with errors="replace" first; a string with half a surrogate pair (what
errors="surrogateescape" gives) is refused by both.

No GGUF: llama.cpp runs the architectures that its source code knows, and none of them has this
one's parts together: normalisation without weights, also of queries and keys after the rotation,
squared ReLU, capped logits, a normalised embedding; a trial may have changed more.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from nightshift import catalogue
from nightshift.fixed import checkpoint
from nightshift.fixed.config import ROOT, ConfigError, Model
from nightshift.fixed.result import write_json
from nightshift.fixed.tokenizer import CHUNK_CHARS, PROBE, Tokenizer

CARRIED = ("configuration_nightshift.py", "modeling_nightshift.py")
OUR_IMPORT = "from nightshift.fixed.config import Model"
THEIR_IMPORT = "from .configuration_nightshift import Model"

# The format of conversation.py, as the Jinja template that transformers renders.
CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}"
    "<|{{ message.role }}_start|>{{ message.content }}<|{{ message.role }}_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant_start|>{% endif %}"
)


def export(folder: Path, out: Path, repo: Path = ROOT) -> Path:
    """Writes `out`, which must be new or empty. Raises ConfigError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already; give the name of a new folder")
    shape, tokenizer = catalogue.read_shape(folder), Tokenizer.load(folder / "tokenizer")
    code = self_contained(catalogue.model_source(folder, repo), folder)
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, out, shape.seq_len)
    weights = load_file(folder / checkpoint.WEIGHTS_FILE)
    save_file(
        {f"gpt.{name}": weight for name, weight in weights.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    (out / "gpt.py").write_text(code, encoding="utf-8")
    for name in CARRIED:
        shutil.copyfile(Path(__file__).with_name("huggingface") / name, out / name)
    write_configs(shape, tokenizer, out)
    (out / "README.md").write_text(model_card(folder, tokenizer), encoding="utf-8")
    return out


def self_contained(source: str, folder: Path) -> str:
    code = source.replace(OUR_IMPORT, THEIR_IMPORT)
    ours = [line for line in code.splitlines() if "nightshift." in line and "import " in line]
    if ours:
        raise ConfigError(
            f"{folder}: its model.py needs more of nightshift than the configuration "
            f"({ours[0].strip()}), so it cannot stand alone"
        )
    return code


def write_configs(shape: Model, tokenizer: Tokenizer, out: Path) -> None:
    special = tokenizer.special
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": special["<|assistant_end|>"]}
    ids["pad_token_id"] = tokenizer.bos
    values = {
        "architectures": ["NightshiftForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_nightshift.NightshiftConfig",
            "AutoModelForCausalLM": "modeling_nightshift.NightshiftForCausalLM",
        },
        "model_type": "nightshift",
        "dtype": "float32",
        "vocab_size": tokenizer.vocab_size,
        "model": shape.model_dump(),
        "use_cache": False,
        **ids,
    }
    write_json(out / "config.json", values)
    stops = [ids["eos_token_id"], tokenizer.bos]
    generation = {**ids, "eos_token_id": stops, "do_sample": True, "use_cache": False}
    write_json(out / "generation_config.json", generation)


# -- tokenizer -----------------------------------------------------------------------------------


def write_tokenizer(tokenizer: Tokenizer, out: Path, seq_len: int) -> None:
    write_json(out / "tokenizer.json", tokenizer_json(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|bos|>",
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", settings)
    check_tokenizer(tokenizer, out / "tokenizer.json")


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """Our ranks and split pattern in the format of the library `tokenizers`."""
    pattern = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated"}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = [
        {"id": number, "content": name, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for name, number in tokenizer.special.items()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [pattern | {"invert": False}, to_bytes | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": to_bytes | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as tiktoken: a piece that is a token is that token
            "vocab": {as_characters(token): rank for token, rank in tokenizer.ranks.items()},
            "merges": merges(tokenizer.ranks),
        },
    }


def merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """Every pair of tokens that is a token, by the rank of what they make.

    Not only the pairs that training merged: tiktoken joins whichever pair makes a known token.
    """
    pairs = []
    for token in sorted(ranks, key=ranks.get):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        found = [(a, b) for a, b in cuts if a in ranks and b in ranks]
        pairs += sorted(found, key=lambda pair: max(ranks[pair[0]], ranks[pair[1]]))
    return [[as_characters(a), as_characters(b)] for a, b in pairs]


def byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, which `tokenizers` uses in its files."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


CHARACTERS = byte_characters()


def as_characters(token: bytes) -> str:
    return "".join(CHARACTERS[byte] for byte in token)


def check_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """The written file against ours on every character there is; needs `tokenizers`, else skipped.

    The two libraries have regular expression engines of their own, which could disagree on what is
    a letter. Measured: tokenizers 0.23 and tiktoken 0.14 agree on all of Unicode.
    """
    try:
        from tokenizers import Tokenizer as Theirs
    except ImportError:
        return
    theirs = Theirs.from_file(str(path))
    theirs.encode_special_tokens = True
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = ["".join(characters[i : i + 4096]) for i in range(0, len(characters), 4096)]
    for text in [PROBE, PROBE * (CHUNK_CHARS // len(PROBE)), *texts]:
        if theirs.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise ConfigError(
                f"{path}: the library tokenizers cuts a text from {text[:1]!r} in another way than "
                f"tokenizer.split_pattern ({tokenizer.pattern!r}) does here; it cannot be exported"
            )


# -- the card ------------------------------------------------------------------------------------


def facts_table(folder: Path, tokenizer: Tokenizer) -> str:
    """What the checkpoint is and what was measured, as Markdown."""
    known, model = catalogue.facts(folder), catalogue.read_shape(folder)
    corpus = catalogue.read_values(folder)["corpus"]
    rows = {
        "parameters": known.get("num_params"),
        "layers, width, context": f"{model.depth}, {model.width}, {model.seq_len} tokens",
        "vocabulary": tokenizer.vocab_size,
        "corpus": corpus["repo"] or corpus["source"],
        "training tokens": known.get("tokens"),
        "val_bpb (bits per byte of held-out text)": known["val_bpb"],
        "chat_bpb (bits per byte of held-out answers)": known["chat_bpb"],
        "commit": known.get("commit"),
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def model_card(folder: Path, tokenizer: Tokenizer) -> str:
    """What a reader needs: what it is, its numbers, how it is loaded, what it is not."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# A model by nightshift

{facts_table(folder, tokenizer)}

```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast.from_pretrained("this/folder")
model = AutoModelForCausalLM.from_pretrained("this/folder", trust_remote_code=True)
prompt = tokenizer("<|bos|>My fellow Americans,", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```

Documents begin with `<|bos|>`: the tokenizer adds no token by itself, the chat template writes it.

`trust_remote_code` runs `gpt.py` and `modeling_nightshift.py` of this folder: read them first.
It is a small model for research: what it says is often false, and it says what its texts said.
Texts longer than {catalogue.read_shape(folder).seq_len} tokens are cut on the left.
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="nightshift export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="champion, first/4, pretrain/<run> or a folder")
    parser.add_argument("folder", type=Path, help="a new folder")
    args = parser.parse_args(arguments)
    try:
        export(catalogue.find(args.checkpoint).folder, args.folder)
    except (ConfigError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    files = sorted(path.name for path in args.folder.iterdir())
    print(json.dumps({"folder": str(args.folder), "files": files}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
