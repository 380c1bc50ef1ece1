"""The exported folder is the checkpoint: the same ids, the same logits, nothing of ours needed."""

import importlib.util
import json
import random
import subprocess
import sys
from dataclasses import fields

import pytest
import tiny_checkpoint
import torch

from nightshift import export
from nightshift.fixed import checkpoint, conversation
from nightshift.fixed.config import ROOT, ConfigError, Model
from nightshift.fixed.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="needs the `export` extra")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(checkpoint, exported folder)"""
    work = tmp_path_factory.mktemp("export")
    folder = tiny_checkpoint.make(work / "run", work, **{"tokenizer.vocab_size": 500})
    return folder, export.export(folder, work / "out")


def both(exported) -> tuple[Tokenizer, "tokenizers.Tokenizer"]:
    folder, out = exported
    return (
        Tokenizer.load(folder / "tokenizer"),
        tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")),
    )


def disagreements(exported, count: int) -> list[str]:
    """Random texts that the two tokenizers cut in different ways."""
    ours, theirs = both(exported)
    theirs.encode_special_tokens = True
    random_ = random.Random(0)
    texts = [tiny_checkpoint.random_text(random_) for _ in range(count)]
    found = theirs.encode_batch(texts, add_special_tokens=False)
    return [t for t, f in zip(texts, found, strict=True) if f.ids != ours.encode(t)]


def test_exported_ids_are_ours_on_random_text_of_all_scripts(exported):
    assert disagreements(exported, 3_000) == []


@pytest.mark.slow
def test_exported_ids_are_ours_on_100_000_random_texts(exported):
    assert disagreements(exported, 100_000) == []


def test_exported_ids_are_ours_where_no_text_looks_special_without_any_setting(exported):
    ours, theirs = both(exported)
    for text in ("", "My fellow Americans,", " \n\n x\u00e9\U0001f642", "a" * 500):
        assert theirs.encode(text).ids == ours.encode(text)


def test_special_tokens_keep_their_ids(exported):
    ours, theirs = both(exported)
    for name, number in ours.special.items():
        assert theirs.encode(name).ids == [number]
        assert theirs.id_to_token(number) == name


def test_random_ids_decode_to_the_same_text_also_within_characters(exported):
    ours, theirs = both(exported)
    random_ = random.Random(1)
    for _ in range(500):
        ids = random_.choices(range(len(ours.ranks)), k=random_.randrange(20))
        assert theirs.decode(ids) == ours.decode(ids)


def test_half_a_surrogate_pair_is_refused_by_both(exported):
    ours, theirs = both(exported)
    text = b"caf\xe9".decode("utf-8", "surrogateescape")
    with pytest.raises(ValueError, match="surrogate"):
        ours.encode(text)
    with pytest.raises((ValueError, TypeError)):
        theirs.encode(text)


def test_the_shape_file_has_every_key_of_conf_model():
    source = (ROOT / "src/nightshift/huggingface/configuration_nightshift.py").read_text()
    body = source[source.index("@dataclass") : source.index("class NightshiftConfig")]
    names: dict = {}
    exec("import math\nfrom dataclasses import dataclass\n" + body, names)
    assert [field.name for field in fields(names["Model"])] == list(Model.model_fields)


def test_exported_code_imports_nothing_of_nightshift(exported):
    for path in exported[1].glob("*.py"):
        assert "from nightshift" not in path.read_text()
        compile(path.read_text(), path.name, "exec")


def test_code_that_needs_more_of_nightshift_is_refused(exported):
    with pytest.raises(ConfigError, match="fixed.machine"):
        export.self_contained("from nightshift.fixed.machine import facts\n", exported[0])


def test_a_folder_with_files_is_not_written_over(exported):
    folder, out = exported
    with pytest.raises(ConfigError, match="is there already"):
        export.export(folder, out)


def test_a_tokenizer_that_cuts_otherwise_is_found_out(exported, tmp_path):
    ours, _ = both(exported)
    values = export.tokenizer_json(ours)
    values["model"]["merges"] = values["model"]["merges"][:-40]
    values["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="cannot be exported"):
        export.check_tokenizer(ours, tmp_path / "tokenizer.json")


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the `export` extra"
)

THERE = """
import sys, torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
folder, tokens, logits = sys.argv[1:]
assert not any(name.startswith("nightshift") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
tokens = torch.load(tokens, weights_only=True)
with torch.inference_mode():
    torch.save(model(tokens).logits, logits)
    said = model.generate(tokens[:1, :4], max_new_tokens=40, do_sample=False)
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
print(ids)
print(said[0].tolist())
"""


@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.tied_head": True, "model.mlp": "swiglu"},
        {"model.window_pattern": "SL", "model.value_embeds": True, "model.kv_group": 2},
    ],
    ids=["default", "tied", "windows"],
)
def test_transformers_computes_our_logits_without_nightshift(tmp_path, changes):
    """In a process of its own that cannot import nightshift."""
    folder = tiny_checkpoint.make(tmp_path / "run", tmp_path, **changes)
    out = export.export(folder, tmp_path / "out")
    model, tokenizer, config = checkpoint.load(folder)
    tokens_BT = torch.randint(0, tokenizer.vocab_size, (4, config.model.seq_len))
    torch.save(tokens_BT, tmp_path / "tokens.pt")
    command = [sys.executable, "-I", "-c", THERE, out, tmp_path / "tokens.pt", tmp_path / "l.pt"]
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        ours = model(tokens_BT)
    theirs = torch.load(tmp_path / "l.pt", weights_only=True)
    assert (ours - theirs).abs().max() < 1e-4
    ids, said = map(json.loads, done.stdout.strip().splitlines()[-2:])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert ids == conversation.prompt(messages, tokenizer)
    greedy = tokens_BT[0, :4].tolist()
    for token in said[4:]:
        with torch.inference_mode():
            window = torch.tensor([greedy[-config.model.seq_len :]])
            assert int(model(window)[0, -1].argmax()) == token
        greedy.append(token)
