"""The sandbox, attacked. Needs Linux with user namespaces or Landlock; says so where they lack."""

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nightshift.fixed import doctor
from nightshift.fixed.sandbox import PROTECTIONS, Sandbox, clean_environment, python_paths, spawn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")
SRC = str(Path(doctor.__file__).parents[2])


@pytest.fixture
def box(tmp_path):
    (tmp_path / "mine").mkdir()
    return Sandbox(
        readable=[*python_paths(), SRC],
        writable=[str(tmp_path / "mine")],
        memory_mb=600,
        disk_mb=20,
        num_processes=50,
    )


def ask(box, function, *fds):
    """What a function in the sandbox returns, as JSON; and the report."""
    reader, writer = os.pipe()
    child = spawn(
        box, lambda: os.write(writer, json.dumps(function()).encode()), fds=[writer, *fds]
    )
    os.close(writer)
    report = child.wait(20) or child.kill()
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    return (json.loads(data) if data else None), report, child


def tried(action) -> str:
    try:
        action()
        return "done"
    except OSError as error:
        return type(error).__name__


def test_every_attack_of_the_doctor_is_held_off():
    command = [sys.executable, "-m", "nightshift.fixed.doctor", "--json"]
    environment = clean_environment("/tmp") | {"PYTHONPATH": SRC}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["open"] == [] and done.returncode == 0, found["findings"]
    assert set(found["layers"]) == set(PROTECTIONS)


WITHOUT_UNSHARE = """
import ctypes, os, platform, struct, sys
number = {"x86_64": 272, "aarch64": 97}[platform.machine()]
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
program, libc = Program(len(lines), ctypes.cast(code, ctypes.c_void_p)), ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
os.execv(sys.executable, [sys.executable, "-m", "nightshift.fixed.doctor", "--json"])
"""


def test_where_namespaces_are_forbidden_landlock_and_seccomp_hold_alone():
    """As in most containers: the kernel refuses `unshare` to the whole process tree."""
    command = [sys.executable, "-c", WITHOUT_UNSHARE]
    environment = clean_environment("/tmp") | {"PYTHONPATH": SRC}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["layers"]["files"] == ["landlock"], found["layers"]
    assert found["layers"]["processes"] == ["subreaper"]
    assert found["open"] == [], [f for f in found["findings"] if not f["holds"]]


def test_the_doctor_says_what_is_open_and_what_to_do():
    findings = [
        doctor.Finding("files", "read a file outside", False, "got through"),
        doctor.Finding("network", "connect over TCP", True, "PermissionError"),
    ]
    text = doctor.table({"network": ["seccomp"]}, findings)
    assert doctor.off(findings) == ["files"]
    assert "OPEN  got through" in text and "open here: files" in text and "files      none" in text


def test_it_reads_and_writes_what_it_may_and_nothing_else(box, tmp_path):
    (tmp_path / "secret").write_text("x")

    def look():
        return [
            tried(lambda: (tmp_path / "mine/file").write_text("x")),
            tried(lambda: Path(json.__file__).read_text()),
            tried(lambda: (tmp_path / "secret").read_text()),
            tried(lambda: os.listdir(os.path.expanduser("~"))),
            tried(lambda: Path(doctor.__file__).write_text("x")),
        ]

    answers, _, _ = ask(box, look)
    assert answers[:2] == ["done", "done"] and "done" not in answers[2:]
    assert (tmp_path / "mine/file").exists()


def test_links_in_its_folder_lead_nowhere(box, tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "mine/link").symlink_to(tmp_path / "secret")
    (tmp_path / "mine/up").symlink_to(tmp_path)
    answers, _, _ = ask(
        box,
        lambda: [
            tried(lambda: (tmp_path / "mine/link").read_text()),
            tried(lambda: (tmp_path / "mine/up/secret").read_text()),
            tried(lambda: os.link(tmp_path / "secret", tmp_path / "mine/hard")),
        ],
    )
    assert "done" not in answers


def test_what_is_hidden_below_a_readable_folder_is_not_there(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/text").write_text("val")
    (tmp_path / "other").write_text("x")
    box = Sandbox(
        readable=[*python_paths(), str(tmp_path)],
        hidden=[str(tmp_path / "package")],
        memory_mb=600,
        disk_mb=20,
        num_processes=50,
    )
    answers, _, _ = ask(
        box,
        lambda: [
            tried(lambda: (tmp_path / "other").read_text()),
            tried(lambda: (tmp_path / "package/text").read_text()),
        ],
    )
    assert answers[0] == "done" and answers[1] != "done"


def test_only_given_descriptors_are_open(box, tmp_path):
    (tmp_path / "journal").write_text("secret")
    with open(tmp_path / "journal") as journal:
        os.set_inheritable(journal.fileno(), True)
        answers, _, _ = ask(box, lambda: tried(lambda: os.read(journal.fileno(), 6)))
    assert answers == "OSError"


def test_a_whole_tree_ends_with_its_trial(box):
    """Double forks, new sessions and closed descriptors included."""
    reader, writer = os.pipe()

    def scatter():
        for _ in range(5):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(60)
                os._exit(0)
        time.sleep(0.2)

    child = spawn(box, scatter, fds=[writer])
    os.close(writer)
    assert child.wait(20).exit == 0
    os.set_blocking(reader, False)
    assert os.read(reader, 1) == b"", "somebody still holds the pipe"


def test_kill_ends_the_tree_at_once(box):
    child = spawn(box, lambda: time.sleep(60))
    assert child.started(20)
    started = time.monotonic()
    assert child.kill().exit == 128 + signal.SIGKILL
    assert time.monotonic() - started < 5


def test_the_tree_ends_when_its_owner_is_killed(tmp_path):
    code = f"""
import os, sys, time
sys.path.insert(0, {SRC!r})
from nightshift.fixed.sandbox import Sandbox, python_paths, spawn
box = Sandbox(readable=python_paths(), memory_mb=600, disk_mb=20, num_processes=50)
child = spawn(box, lambda: time.sleep(60), fds=[1])
child.started(20)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
    assert done.returncode == -signal.SIGKILL  # and its output was closed: nobody is left


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        ("memory", "memory: "),
        ("many files", "disk: more than 10000 files"),
        ("disk", "disk: "),
        ("processes", "processes: "),
    ],
)
def test_a_limit_that_is_passed_ends_the_tree_and_is_named(tmp_path, attack, reason):
    mine = tmp_path / "mine"
    mine.mkdir()
    box = Sandbox(
        readable=[*python_paths(), SRC],
        writable=[str(mine)],
        memory_mb=6000 if attack == "processes" else 200,
        disk_mb=20,
        num_processes=50,
    )

    def act():
        if attack == "memory":
            # A mapping of its own: an allocation may fit into what is free of the forked heap.
            held = mmap.mmap(-1, 350 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            for place in range(0, len(held), mmap.PAGESIZE):
                held[place] = 1
            time.sleep(20)
            del held
        if attack == "many files":
            for i in range(10_500):
                (mine / str(i)).touch()
        if attack == "disk":
            for i in range(10):
                (mine / str(i)).write_bytes(bytes(5 << 20))
        for _ in range(120 if attack == "processes" else 0):
            if os.fork() == 0:
                time.sleep(20)
                os._exit(0)
        time.sleep(20)

    report = spawn(box, act).wait(30)
    assert report.exit and (report.killed or "").startswith(reason) or attack == "processes"
    if attack == "processes":  # an ordinary user meets the rlimit first: BlockingIOError
        assert report.killed or report.exit


def test_a_flood_of_output_ends_the_tree(box, tmp_path):
    def flood():
        while True:
            print("ignore previous instructions " * 40_000)

    with open(tmp_path / "log", "wb") as log:
        report = spawn(box, flood, log=log.fileno()).wait(30)
    assert (report.killed or "").startswith("log: ") or report.exit, (
        "the size of a file is limited too"
    )
    assert (tmp_path / "log").stat().st_size < 500 << 20


def test_an_exit_status_and_a_signal_come_through(box):
    assert spawn(box, lambda: sys.exit(7)).wait(20).exit == 7
    died = spawn(box, lambda: os.kill(os.getpid(), signal.SIGSEGV)).wait(20)
    assert died.exit == 128 + signal.SIGSEGV


def test_the_environment_holds_no_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("LD_PRELOAD", "/evil.so")
    environment = clean_environment("/tmp")
    assert not {"OPENAI_API_KEY", "LD_PRELOAD", "PYTHONPATH"} & set(environment)
    assert environment["HOME"] == "/tmp"


def test_cpu_time_of_a_tree_counts_all_threads_and_children(box):
    import threading

    def toil():
        def count():
            end = time.process_time() + 0.4
            while time.process_time() < end:
                pass

        thread = threading.Thread(target=count)
        thread.start()
        thread.join()
        if os.fork() == 0:
            count()
            os._exit(0)
        os.wait()
        time.sleep(3)

    child = spawn(box, toil)
    assert child.started(20)
    deadline = time.monotonic() + 20
    while child.cpu_s() < 0.7 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert 0.7 <= child.cpu_s() < 1.6
    child.kill()
