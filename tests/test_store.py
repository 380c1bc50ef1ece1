import errno
import multiprocessing
import os
import signal
import time

import pytest
from data_config import make_config

from nightshift.fixed import store


def build_slowly(folder):
    with open(folder.parent / "builds", "a") as file:
        file.write("x")
    (folder / "half").write_text("half")
    time.sleep(0.3)
    (folder / "whole").write_text("whole")
    store.write_manifest(folder, "k1")


def build_and_hang(folder):
    (folder / "half").write_text("half")
    (folder.parent / "hanging").touch()
    time.sleep(60)


def build_other(folder):
    store.write_manifest(folder, "k2")


def start(build, folder):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=store.build_into, args=("corpus", "k1", build, folder))
    process.start()
    return process


def test_two_builders_at_once_build_once(tmp_path):
    processes = [start(build_slowly, tmp_path / "k1") for _ in range(3)]
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "builds").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["builds", "k1"]


def test_a_killed_build_leaves_nothing_that_counts_and_the_next_one_succeeds(tmp_path):
    folder = tmp_path / "k1"
    process = start(build_and_hang, folder)
    while not (tmp_path / "hanging").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert not store.has_key(folder, "k1")
    store.build_into("corpus", "k1", build_slowly, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["half", "manifest.json", "whole"]
    assert not (tmp_path / "k1.partial").exists()


def test_a_failed_build_leaves_no_folder(tmp_path):
    def fail(folder):
        (folder / "half").touch()
        raise ValueError("broken line")

    with pytest.raises(ValueError, match="broken line"):
        store.build_into("corpus", "k1", fail, tmp_path / "k1")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_that_says_where_and_leaves_nothing(tmp_path):
    def fill(folder):
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    with pytest.raises(OSError) as error:
        store.build_into("corpus", "k1", fill, tmp_path / "k1")
    assert error.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_another_key_is_replaced_whole(tmp_path):
    folder = store.build_into("corpus", "k1", build_slowly, tmp_path / "corpus")
    store.build_into("corpus", "k2", build_other, folder)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    assert not (tmp_path / "corpus.old").exists()


def test_the_shared_cache_is_read_and_never_written(tmp_path):
    shared = tmp_path / "shared"
    config = make_config(tmp_path, runtime__shared_cache_dir=str(shared))
    built = store.ensure("corpus", "k1", build_slowly, config)
    assert built == tmp_path / "cache" / "corpus" / "k1" and not shared.exists()
    built.rename(tmp_path / "moved")
    shared.joinpath("corpus").mkdir(parents=True)
    (tmp_path / "moved").rename(shared / "corpus" / "k1")
    assert store.ensure("corpus", "k1", build_slowly, config) == shared / "corpus" / "k1"
    assert not built.exists()


def test_a_damaged_manifest_does_not_count(tmp_path):
    (tmp_path / "manifest.json").write_text('{"key": "k1"')
    assert not store.has_key(tmp_path, "k1")
