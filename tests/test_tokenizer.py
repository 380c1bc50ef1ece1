import json
import random
import time

import numpy as np
import pytest
import yaml
from data_config import folder_config, make_config, sentence, write_texts

from nightshift.fixed import store, tokenizer
from nightshift.fixed.config import CONF, ConfigError
from nightshift.fixed.tokenizer import SPECIAL_TOKENS, Tokenizer

PATTERN = make_config(CONF).tokenizer.split_pattern
TEXTS = [sentence(i) for i in range(200)]


def trained(**overrides):
    return tokenizer.train(TEXTS, make_config(CONF, **overrides).tokenizer)


@pytest.fixture(scope="module")
def small():
    return trained()


HARD_TEXTS = {
    "nothing": "",
    "emoji": "\U0001f642 \U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "control characters": "a\x00b\x01\x7f\ufeff\ufffd\u2028",
    "windows line ends": "one\r\ntwo\r\n\r\n \r three\n",
    "spaces": "   \t\t  x   \n   ",
    "accents": "e\u0301 \u00e9 \u0e44\u0e17\u0e22 \u6f22\u5b57",
    "special tokens": "".join(SPECIAL_TOKENS) + "<|bos|",
    "every character below 2048": "".join(map(chr, range(2048))),
    "the end of Unicode": "\U0010ffff\ue000\uffff",
}


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS)
def test_every_text_comes_back_exactly(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert small.decode_bytes(ids) == text.encode()
    assert all(id < small.bos for id in ids)


def test_random_characters_come_back_exactly(small):
    pick = random.Random(0)
    for _ in range(200):
        points = [pick.choice([pick.randrange(0x80), pick.randrange(0x110000)]) for _ in range(40)]
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        assert small.decode(small.encode(text)) == text


def test_any_sequence_of_tokens_decodes_to_the_bytes_of_its_tokens(small):
    ids = np.random.default_rng(0).integers(0, small.bos, 500)
    single = [small.decode_bytes([id]) for id in ids]
    assert small.decode_bytes(ids) == b"".join(single)
    assert [len(token) for token in single] == small.token_bytes()[ids].tolist()
    small.decode(ids)  # bytes that are not UTF-8 do not raise


def test_half_of_a_surrogate_pair_is_refused_in_one_line(small):
    with pytest.raises(ValueError, match=r"character 2 .*U\+D800"):
        small.encode("ab\ud800")


def test_special_tokens_come_after_all_others_and_have_no_bytes(small):
    assert list(small.special) == list(SPECIAL_TOKENS)
    assert list(small.special.values()) == list(range(small.vocab_size - 9, small.vocab_size))
    counts = small.token_bytes()
    assert counts.shape == (300,) and counts.dtype == np.int32
    assert (counts[-9:] == 0).all() and (counts[:-9] > 0).all()
    assert small.decode([small.bos]) == "<|bos|>"


def test_a_text_longer_than_a_chunk_comes_back_and_is_the_same_in_a_batch(small):
    text = " ".join(TEXTS * 20)
    assert len(text) > 2 * tokenizer.CHUNK_CHARS
    arrays = small.encode_batch([text, "", TEXTS[0]], num_threads=2)
    assert [array.tolist() for array in arrays] == [small.encode(t) for t in (text, "", TEXTS[0])]
    assert small.decode(arrays[0]) == text


@pytest.mark.parametrize("character", ["a", " ", "\n", "\U0001f642", "!"])
def test_an_endless_run_of_one_character_takes_linear_time(small, character):
    started_at = time.monotonic()
    ids = small.encode(character * 1_000_000)
    assert small.decode(ids) == character * 1_000_000
    assert time.monotonic() - started_at < 5


def test_training_on_an_endless_word_ends():
    word = "".join(random.Random(0).choices("abcdefgh", k=1_000_000))
    made = tokenizer.train([word], make_config(CONF, tokenizer__vocab_size=500).tokenizer)
    assert made.decode(made.encode(word)) == word


def test_training_is_deterministic_and_reads_no_more_than_train_bytes():
    assert trained().digest() == trained().digest()
    read = []

    def texts():
        for text in TEXTS:
            read.append(text)
            yield text

    settings = make_config(CONF, tokenizer__train_bytes=10_000, tokenizer__vocab_size=270).tokenizer
    tokenizer.train(texts(), settings)
    assert 10_000 <= sum(map(len, read)) < 11_000


def test_simple_text_gives_a_smaller_vocabulary_and_says_so(capsys):
    made = trained(tokenizer__vocab_size=60_000)
    assert 265 < made.vocab_size < 60_000
    assert f"tokenizer: {made.vocab_size} of 60000 tokens" in capsys.readouterr().err
    assert made.decode(made.encode("any text, 漢字")) == "any text, 漢字"


@pytest.mark.parametrize("name", ["bpe4k", "bpe8k", "bpe32k"])
def test_the_patterns_in_conf_are_accepted(name):
    values = yaml.safe_load((CONF / "tokenizer" / f"{name}.yaml").read_text())
    trained(tokenizer__split_pattern=values["split_pattern"])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("(", "Parsing error"),
        ("[z-a]", "no valid pattern"),
        ("a*", "empty string"),
        ("", "empty string"),
        (r"\p{L}+|\s", "loses characters"),
        (r"[^\n]+", "loses characters"),
    ],
)
def test_a_bad_split_pattern_is_one_line(pattern, expected):
    with pytest.raises(ConfigError) as error:
        trained(tokenizer__split_pattern=pattern)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert "tokenizer.split_pattern" in str(error.value)


def test_a_pattern_that_loses_a_rare_character_is_caught_when_it_does(small):
    sly = Tokenizer(small.ranks, r"[^\u2603]")
    assert sly.decode(sly.encode("snow")) == "snow"
    with pytest.raises(ConfigError, match="\u2603"):
        sly.encode("snow \u2603")


def test_a_saved_tokenizer_is_data_and_loads_the_same(small, tmp_path):
    small.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.tiktoken", "tokenizer.json"]
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest() == small.digest() and loaded.encode(TEXTS[0]) == small.encode(TEXTS[0])


def drop_line(folder):
    path = folder / "ranks.tiktoken"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))


def drop_byte(folder):
    path = folder / "ranks.tiktoken"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0].replace("AA==", "AAAA"), *lines[1:]]))


def repeat_rank(folder):
    path = folder / "ranks.tiktoken"
    path.write_text(path.read_text().replace(" 290\n", " 289\n"))


def write_nonsense(folder):
    (folder / "ranks.tiktoken").write_text("AA==\n")


def move_special(folder):
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["special_tokens"]["<|bos|>"] = 0
    path.write_text(json.dumps(settings))


def cut_settings(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:50])


@pytest.mark.parametrize(
    "damage", [drop_line, drop_byte, repeat_rank, write_nonsense, move_special, cut_settings]
)
def test_a_damaged_tokenizer_is_refused_in_one_line(small, tmp_path, damage):
    small.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match="is damaged") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_tokenizer_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match="dvc repro tokenizer"):
        Tokenizer.load(tmp_path)


def test_the_tokenizer_is_built_once_for_a_corpus(tmp_path):
    write_texts(tmp_path)
    folder = tokenizer.ensure_tokenizer(folder_config(tmp_path))
    built_at = (folder / "ranks.tiktoken").stat().st_mtime_ns
    assert tokenizer.ensure_tokenizer(folder_config(tmp_path)) == folder
    assert (folder / "ranks.tiktoken").stat().st_mtime_ns == built_at
    assert store.read_manifest(folder)["digest"] == Tokenizer.load(folder).digest()
    (tmp_path / "texts" / "more.txt").write_text("more text")
    assert tokenizer.ensure_tokenizer(folder_config(tmp_path)) != folder
