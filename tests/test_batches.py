import numpy as np
import pytest
import torch
from data_config import folder_config, sentence, write_texts

from nightshift import filtering
from nightshift.fixed import batches, corpus, store
from nightshift.fixed import tokenizer as tokenizer_module
from nightshift.fixed.batches import Batches
from nightshift.fixed.config import ROOT, ConfigError
from nightshift.fixed.tokenizer import Tokenizer, ensure_tokenizer


@pytest.fixture(scope="module")
def texts_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_texts(folder)
    return folder


def stream(folder, length, split="train"):
    """A stream in which each token is its own position."""
    np.arange(length, dtype="<u2").tofile(folder / f"{split}.bin")
    return folder


def documents_in(folder, split, tokenizer):
    ids = np.fromfile(folder / f"{split}.bin", dtype="<u2")
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.bos))[1:]
    return [tokenizer.decode(part[1:]) for part in parts]


def test_the_streams_hold_every_document_once_behind_a_bos(texts_folder):
    config = folder_config(texts_folder)
    folder, documents = batches.ensure_tokens(config), corpus.ensure_corpus(config)
    tokenizer = Tokenizer.load(ensure_tokenizer(config))
    for split in ("train", "dev"):
        expected = [text for _, text in corpus.read_documents(documents, split)]
        found = documents_in(folder, split, tokenizer)
        assert sorted(found) == sorted(expected)
        counts = store.read_manifest(folder)["splits"][split]
        assert counts["documents"] == len(expected)
        assert counts["bytes"] == sum(len(text.encode()) for text in expected)
        assert counts["tokens"] * 2 == (folder / f"{split}.bin").stat().st_size
    assert not (folder / "val.bin").exists() and not (folder / "test.bin").exists()


def test_the_order_of_documents_is_shuffled_and_the_same_every_time(texts_folder, tmp_path):
    config = folder_config(texts_folder)
    folder = batches.ensure_tokens(config)
    found = documents_in(folder, "train", Tokenizer.load(ensure_tokenizer(config)))
    assert found != sorted(found)
    again = folder_config(texts_folder, runtime__cache_dir=str(tmp_path), runtime__num_threads=1)
    assert store.read_manifest(batches.ensure_tokens(again)) == store.read_manifest(folder)


def test_the_filter_applies_to_train_alone(texts_folder):
    rules = [{"match": "00*", "weight": 0}, {"match": "01*", "weight": 3}]
    config = folder_config(texts_folder, filter__mixture=rules)
    folder, documents = batches.ensure_tokens(config), corpus.ensure_corpus(config)
    tokenizer = Tokenizer.load(ensure_tokenizer(config))
    found = documents_in(folder, "train", tokenizer)
    for name, text in corpus.read_documents(documents, "train"):
        assert found.count(text) == (0 if name < "010" else 3 if name < "020" else 1)
    plain = batches.ensure_tokens(folder_config(texts_folder))
    assert plain != folder
    assert (plain / "dev.bin").read_bytes() == (folder / "dev.bin").read_bytes()


def test_editing_the_code_of_the_filter_makes_other_tokens(texts_folder, tmp_path):
    config = folder_config(texts_folder)
    path = tmp_path / "src/nightshift/filtering.py"
    path.parent.mkdir(parents=True)
    path.write_text("edited")
    assert batches.tokens_key(config, "c", "t", tmp_path) != batches.tokens_key(config, "c", "t")


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (lambda text: (text + " more", 1), "no training document"),
        (lambda text: (text, 256), "possible: 0 to 255"),
        (lambda text: (text, -1), "possible: 0 to 255"),
    ],
)
def test_a_filter_chooses_documents_and_cannot_write_them(texts_folder, monkeypatch, chosen, words):
    config = folder_config(texts_folder)
    select = lambda documents, settings: (chosen(text) for _, text in documents)  # noqa: E731
    monkeypatch.setattr(filtering, "select", select)
    with pytest.raises(ConfigError, match=words):
        batches.copies_here(corpus.ensure_corpus(config), config)


def test_a_filter_that_keeps_nothing_is_one_line(texts_folder):
    with pytest.raises(ConfigError, match="no training document passes"):
        batches.ensure_tokens(folder_config(texts_folder, filter__min_chars=10**9))


def test_blocks_are_bounded_and_lose_nothing(monkeypatch):
    monkeypatch.setattr(batches, "BLOCK_BYTES", 1000)
    documents = [(sentence(i), 1) for i in range(50)]
    blocks = list(batches._blocks(iter(documents)))
    assert len(blocks) > 10 and [d for block in blocks for d in block] == documents


def test_y_is_x_one_token_later(tmp_path):
    x, y = Batches(stream(tmp_path, 1000), "train", 16, 4, seed=1).batch(0)
    assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(16))


@pytest.mark.parametrize("length", [17, 18, 31, 32, 33, 48, 500, 1000])
def test_an_epoch_shows_each_window_once(tmp_path, length):
    data = Batches(stream(tmp_path, length), "train", 16, 1, seed=1)
    for epoch in range(4):
        indexes = range(epoch * data.num_windows, (epoch + 1) * data.num_windows)
        starts = sorted(int(data.batch(index)[0][0, 0]) for index in indexes)
        assert (np.diff(starts) == 16).all()
        assert starts[0] >= 0 and starts[-1] + 17 <= length
    assert length - data.num_windows * 16 < 33  # hardly anything is left out


def test_over_the_epochs_every_token_is_a_target(tmp_path):
    data = Batches(stream(tmp_path, 60), "train", 8, 4, seed=1)
    seen = {int(token) for index in range(200) for token in data.batch(index)[1].flatten()}
    assert seen == set(range(1, 60))


def test_batches_depend_on_seed_and_index_alone(tmp_path):
    folder = stream(tmp_path, 1000)
    forward = Batches(folder, "train", 16, 4, seed=1)
    expected = [forward.batch(index)[0] for index in range(60)]
    backward = Batches(folder, "train", 16, 4, seed=1)
    for index in reversed(range(60)):
        assert torch.equal(backward.batch(index)[0], expected[index])
    assert not torch.equal(Batches(folder, "train", 16, 4, seed=2).batch(0)[0], expected[0])


def test_a_batch_may_be_larger_than_the_stream(tmp_path):
    data = Batches(stream(tmp_path, 40), "train", 16, 8, seed=1)
    assert data.num_windows == 1
    x, _ = data.batch(3)
    assert x.shape == (8, 16) and int(x.max()) < 40


def test_a_stream_shorter_than_one_window_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"model.seq_len \(16\).*only 16 tokens, 17"):
        Batches(stream(tmp_path, 16), "train", 16, 1, seed=1)


def test_in_order_covers_the_stream_once(tmp_path):
    data = Batches(stream(tmp_path, 1000, "dev"), "dev", 16, 8, seed=1)
    pairs = list(data.in_order())
    assert torch.cat([x.flatten() for x, _ in pairs]).tolist() == list(range(62 * 16))
    assert torch.cat([y.flatten() for _, y in pairs]).tolist() == list(range(1, 62 * 16 + 1))


def test_in_order_with_a_limit_is_spread_over_the_stream(tmp_path):
    data = Batches(stream(tmp_path, 1000, "dev"), "dev", 16, 8, seed=1)
    x = torch.cat([x for x, _ in data.in_order(max_tokens=160)])
    starts = x[:, 0]
    assert x.shape == (10, 16)
    assert (starts.diff() >= 16).all() and int(starts[-1]) > 800


def test_random_access_into_a_stream_larger_than_memory_reads_only_its_windows(tmp_path):
    path = tmp_path / "train.bin"
    with open(path, "wb") as file:
        file.truncate(4_000_000_000)  # sparse: two thousand million tokens
    data = Batches(tmp_path, "train", 2048, 4, seed=1)
    assert data.batch(10**9)[0].shape == (4, 2048)


def test_the_stages_write_the_dvc_outputs_and_later_runs_find_them(texts_folder, monkeypatch):
    root = texts_folder / "checkout"
    filter_code = "src/nightshift/filtering.py"
    (root / filter_code).parent.mkdir(parents=True)
    (root / filter_code).write_text((ROOT / filter_code).read_text())
    for module in (store, corpus, tokenizer_module, batches):
        monkeypatch.setattr(module, "ROOT", root)
    config = folder_config(texts_folder, runtime__cache_dir="unused")
    for module in (corpus, tokenizer_module, batches):
        module.stage(config)
    assert batches.ensure_tokens(config) == root / "data" / "tokens"
    assert sorted(path.name for path in root.iterdir()) == ["data", "src"]
    assert sorted(path.name for path in (root / "data").iterdir()) == [
        "corpus",
        "tokenizer",
        "tokens",
    ]
