"""The data of a trial: its filter counts in a sandbox, everything else is the harness's."""

import shutil
import sys

import numpy as np
import pytest
from tiny import config, write_texts

from nightshift.fixed import batches, prepare
from nightshift.fixed.config import ROOT, ConfigError
from nightshift.fixed.corpus import ensure_corpus

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
SELECT = "    for name, text in documents:\n"


@pytest.fixture
def cfg(tmp_path):
    write_texts(tmp_path / "texts", 60)
    return config(tmp_path, **{"filter.min_chars": 860})


def tree_with(tmp_path, code=""):
    """A trial's worktree whose filter runs `code` first."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__"))
    path = tree / "src/nightshift/filtering.py"
    text = path.read_text()
    assert text.count(SELECT) == 1
    path.write_text(text.replace(SELECT, code + SELECT))
    return tree


def copies(cfg, tree, folder):
    return prepare._copies_in_sandbox(ensure_corpus(cfg), cfg, tree, folder)


def test_the_filter_answers_in_its_sandbox_as_it_does_outside(cfg, tmp_path):
    expected = batches.copies_here(ensure_corpus(cfg), cfg)
    assert 0 < expected.sum() < len(expected), "it chooses some"
    assert np.array_equal(copies(cfg, tree_with(tmp_path), tmp_path), expected)
    assert not (tmp_path / "filter").exists()


def test_an_edited_filter_makes_other_tokens_without_running_here(cfg, tmp_path):
    tree = tree_with(tmp_path, "    documents = list(documents)[::2]\n")
    tokens = prepare.prepare(cfg, tree, tmp_path)
    assert tokens != batches.ensure_tokens(cfg)
    assert prepare.prepare(cfg, tree, tmp_path) == tokens


@pytest.mark.parametrize(
    "code",
    [
        "    import nightshift.model\n",  # another module could change without the tokens' key
        "    open(__import__('glob').glob('{cache}/corpus/*/val-00000.parquet')[0]).read()\n",
        "    __import__('socket').socket()\n",
        "    __import__('os')._exit(0)\n",
        "    __import__('os').kill(__import__('os').getpid(), 9)\n",
    ],
)
def test_a_filter_that_reaches_out_has_no_answer(cfg, tmp_path, code):
    tree = tree_with(tmp_path, code.replace("{cache}", cfg.runtime.cache_dir))
    with pytest.raises(ConfigError, match="the filter (failed|left no answer)"):
        copies(cfg, tree, tmp_path)


def test_what_a_filter_writes_stays_in_its_sandbox(cfg, tmp_path):
    place = tmp_path / "cache/planted"
    code = f"    try:\n        open({str(place)!r}, 'w')\n    except OSError:\n        pass\n"
    copies(cfg, tree_with(tmp_path, code), tmp_path)
    assert not place.exists()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("open('copies.u8', 'wb').write(b'1' * 3)", "answered for 3 of"),
        ("os.symlink('/etc/passwd', 'copies.u8')", "left no answer"),
        ("os.mkfifo('copies.u8')", "answered for 0 of"),
    ],
)
def test_an_answer_of_another_shape_is_refused(cfg, tmp_path, answer, words):
    code = f"    import os\n    {answer}\n    os._exit(0)\n"
    with pytest.raises(ConfigError, match=words):
        copies(cfg, tree_with(tmp_path, code), tmp_path)
