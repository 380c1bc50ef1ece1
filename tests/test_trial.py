"""Runs as child processes: limits, kills, retries, and results that are not believed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from standin import behave, make_project

from agent import workspace
from agent.target import CHAT
from agent.trial import Bench, Interrupted, Stop, distrust
from agent.warm import MARK, STUDY_MARK, Starter, StartError, kill_marked, marked_processes
from nightshift.fixed.config import config_digest
from nightshift.fixed.result import Result, Training
from nightshift.fixed.sandbox import PROTECTIONS


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("trial") / "project")


@pytest.fixture
def bench(project, tmp_path):
    """A trial of the stand-in project; `bench.behave(...)` edits its code."""
    study = tmp_path / "a study's folder"
    study.mkdir()
    with workspace.worktree(project, study / "trials/001/worktree", "HEAD") as tree:
        bench = Bench(
            marks={MARK: "first/001", STUDY_MARK: str(study)},
            study_folder=study,
            folder=study / "trials/001",
            tree=tree,
            base=project,
            code=workspace.Code("", "", ""),
            baseline_work=3.0,
            config=workspace.resolve(tree),
            own_cache=study / "trials/001/cache",
            shared_cache=project / ".cache",
            starter=Starter(study, warm=False),
            stop=Stop(),
            show=lambda doing: None,
        )
        yield bench
        bench.starter.close()
        assert marked_processes(study) == []


def run(bench: Bench, behaviour: str, limit_s: float = 20.0):
    workspace.apply(bench.tree, behave(behaviour), behaviour)
    return start(bench, "seed_1", 1, limit_s)


def start(bench: Bench, *args):
    bench.code = workspace.code_of(bench.tree, "main")
    return bench.run(*args)


def test_run_is_of_the_worktree_with_the_settings_of_the_harness(bench):
    result = start(bench, "seed_2", 2, 20.0)
    assert (result.status, result.seed, result.steps) == ("ok", 2, 3)
    assert result.val_bpb == pytest.approx(2.202)
    assert result.folder == "trials/001/seed_2"
    config = yaml.safe_load((bench.folder / "seed_2/config.yaml").read_text())
    assert config["runtime"]["cache_dir"] == str(bench.own_cache)
    assert config["runtime"]["shared_cache_dir"] == str(bench.shared_cache)
    assert config["seed"] == 2 and config["tracking"]["enabled"] is False


@pytest.mark.parametrize(
    ("behaviour", "status", "words"),
    [
        (
            "crash",
            "crash",
            "RuntimeError: shape '[64, 128]' is invalid",
        ),
        ("diverge", "diverged", "loss is nan at step 2"),
        ("other seed", "invalid", "its seed is 2, 1 was started"),
        ("other code", "invalid", "its editable_code is '0000000000000000'"),
        ("plant", "crash", "evaluation ended without a word"),
        ("killed always", "crash", "killed from outside twice"),
        ("killed once", "ok", None),
        ("evaluator killed once", "ok", None),
        ("leave a process", "ok", None),
    ],
)
def test_what_a_run_does_becomes_a_status(bench, behaviour, status, words):
    result = run(bench, behaviour)
    assert result.status == status
    assert words is None or words in result.message
    assert (result.val_bpb is not None) == (status == "ok")
    assert marked_processes(bench.study_folder, bench.marks[MARK]) == []


def test_more_work_for_a_token_than_the_baseline_does_is_invalid_where_tokens_are_the_budget(bench):
    tokens = {"kind": "tokens", "amount": 300.0, "wall_limit_s": 60.0, "replay": None}
    in_tokens = bench.config.model_copy(
        update={"budget": bench.config.budget.model_copy(update=tokens)}
    )
    assert run(bench, "toil").status == "ok", "in seconds, work is paid for"
    bench.config = in_tokens
    result = start(bench, "seed_1", 1, 20.0)
    assert result.status == "invalid" and "270.0 times as much for a token" in result.message


def test_killed_evaluator_is_repeated_alone(bench):
    starts = bench.tree.parents[1] / "starts.log"
    run(bench, "evaluator killed once")
    assert starts.read_text().count("seed_1") == 1


def test_preflight_ends_an_import_error(bench):
    workspace.apply(bench.tree, behave("import error"), "t")
    result = bench.preflight(1, 2, 20.0)
    assert bench.own_cache.is_dir(), "the data were prepared first"
    assert result.status == "crash" and "nothing_of_this_name" in result.message


def test_wall_limit_kills_the_tree_and_what_forked_itself_away(bench):
    started = time.monotonic()
    result = run(bench, "hang", limit_s=0.7)
    assert result.status == "timeout" and "wall limit of 0.7 s" in result.message
    assert marked_processes(bench.study_folder, bench.marks[MARK]) == []
    assert time.monotonic() - started < 5


def test_stop_ends_the_run_and_leaves_nothing(bench):
    threading.Timer(0.5, lambda: setattr(bench.stop, "requested", True)).start()
    with pytest.raises(Interrupted):
        run(bench, "hang")
    assert marked_processes(bench.study_folder, bench.marks[MARK]) == []


def test_killed_server_takes_its_run_along_and_the_run_is_repeated(bench):
    workspace.apply(bench.tree, behave("slow"), "t")
    server = bench.starter.server
    threading.Timer(0.4, server.kill).start()
    result = start(bench, "seed_1", 1, 20.0)
    assert result.status == "ok" and bench.starter.server is not server


def test_data_that_cannot_be_had_end_the_trial_with_their_reason(bench):
    workspace.apply(bench.tree, behave("no data"), "t")
    result = bench.preflight(1, 2, 20.0)
    assert result.status == "crash" and "corpus.path: nothing there" in result.message


ALL = {name: ["layer"] for name in PROTECTIONS}
CODE = workspace.Code("c", "f", "e")


def bound(config, **changes) -> Result:
    """A result as it should be, but for `changes` of its binding."""
    binding = {
        "commit": "c",
        "fixed_code": "f",
        "editable_code": "e",
        "seed": config.seed,
        "config_digest": config_digest(config),
        "budget": config.budget.model_dump(),
        "weights_sha256": "w",
        "protections": ALL,
    }
    training = Training(status="ok", weights_sha256="w")
    return Result(status="ok", val_bpb=1.0, training=training, binding=binding | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"commit": "x"}, "its commit is 'x'"),
        ({"fixed_code": "x"}, "its fixed_code is 'x'"),
        ({"editable_code": "x"}, "its editable_code is 'x'"),
        ({"seed": 77}, "its seed is 77"),
        ({"config_digest": "0"}, "its config_digest is '0'"),
        ({"budget": {"kind": "seconds", "amount": 9999.0}}, "its budget is"),
        ({"weights_sha256": "v"}, "its weights_sha256 is 'v'"),
        ({"base_sha256": "b"}, "its base_sha256 is 'b', None was started"),
    ],
)
def test_a_result_that_is_bound_to_something_else_is_invalid(bench, changes, words):
    found = distrust(bound(bench.config, **changes), CODE, bench.config)
    assert found.status == ("invalid" if words else "ok")
    assert words is None or (words in found.message and found.val_bpb is None)


def test_a_result_of_another_base_or_of_another_number_is_invalid(bench):
    result = bound(bench.config, base_sha256="b")
    for base, words in (("b", "it has no chat_bpb"), ("c", "its base_sha256 is 'b'")):
        found = distrust(result, CODE, bench.config, CHAT, base)
        assert found.status == "invalid" and words in found.message
    result.val_bpb, result.chat_bpb = None, 3.0
    assert distrust(result, CODE, bench.config, CHAT, "b").chat_bpb == 3.0


def test_a_result_without_binding_or_required_protections_is_invalid(bench):
    result = bound(bench.config)
    result.binding = None
    assert distrust(result, CODE, bench.config).status == "invalid"
    strict = bench.config.model_copy(
        update={"sandbox": bench.config.sandbox.model_copy(update={"require": ["network"]})}
    )
    result = bound(strict, protections=ALL | {"network": []})
    found = distrust(result, CODE, strict)
    assert found.status == "invalid" and "required protections: network" in found.message


def test_the_server_carries_no_key_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    starter = Starter(tmp_path, warm=False)
    try:
        place = Path(f"/proc/{starter.server.pid}/environ")
        while not (environment := place.read_bytes()):  # until its program has begun
            time.sleep(0.01)
        assert b"sk-secret" not in environment and MARK.encode() in environment
    finally:
        starter.close()


def test_marked_processes_of_another_study_are_left_alone(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(30)"]
    ours, theirs = (
        subprocess.Popen(
            command, env=os.environ | {STUDY_MARK: str(tmp_path / s), MARK: "first/001"}
        )
        for s in ("ours", "theirs")
    )
    try:
        assert kill_marked(tmp_path / "ours") == 1
        assert ours.wait(5) == -signal.SIGKILL and theirs.poll() is None
    finally:
        theirs.kill()
        theirs.wait()


PROBE = """\
import os, sys, torch
import nightshift
print("package", nightshift.__file__)
print("mark", os.environ["NIGHTSHIFT_TRIAL"], os.environ.get("SECRET"))
print("path", [p for p in sys.path if p.rstrip("/").endswith(("/src", CHECKOUT))])
print("argv", sys.argv[1:], __name__, os.getcwd())
print("preloaded", "lightning" in sys.modules, "fork", torch.cuda._is_in_bad_fork())
print("product", float((torch.ones(64, 64) @ torch.ones(64, 64)).sum()))
if "fork" in sys.argv:
    import time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
sys.exit(7)
"""


@pytest.mark.slow
def test_warm_child_is_fast_and_sees_only_its_worktree(tmp_path, monkeypatch):
    checkout = str(Path(__file__).parents[1])
    package = tmp_path / "tree/src/nightshift"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "probe.py").write_text(f"CHECKOUT = {checkout!r}\n{PROBE}")
    monkeypatch.setenv("SECRET", "of the loop's shell")
    starter, log = Starter(tmp_path, warm=True), tmp_path / "log"
    env = {"PATH": os.environ["PATH"], MARK: "first/001", STUDY_MARK: str(tmp_path)}

    def start(*args) -> int | None:
        number = starter.start(
            "nightshift.probe", list(args), src=tmp_path / "tree/src", env=env, log=log
        )
        return starter.wait(number, 60)

    try:
        assert start("a", "b") == 7
        text = log.read_text()
        assert f"package {package}/__init__.py" in text
        assert "mark first/001 None" in text
        assert f"path ['{tmp_path}/tree/src']" in text
        assert f"argv ['a', 'b'] __main__ {tmp_path}/tree" in text
        assert "preloaded True fork False" in text and "product 262144.0" in text
        started = time.monotonic()
        assert start("fork") == 7
        assert time.monotonic() - started < 2  # a cold start takes longer: torch and lightning
        # A process that forked itself away is found by the mark it never wrote itself.
        assert len(marked_processes(tmp_path, "first/001")) == 1
        assert kill_marked(tmp_path, "first/001") == 1
    finally:
        starter.close()
    assert marked_processes(tmp_path) == []


def test_module_that_cannot_be_preloaded_is_one_line(tmp_path, monkeypatch):
    """The server reads PRELOAD of its own file: a copy that asks for what is not there."""
    import agent.warm as warm

    copy = tmp_path / "warm.py"
    copy.write_text(Path(warm.__file__).read_text().replace('"numpy"', '"nothing_of_this_name"'))
    monkeypatch.setattr(warm, "__file__", str(copy))
    starter = Starter(tmp_path, warm=True)
    try:
        env = {MARK: "first/001", STUDY_MARK: str(tmp_path)}
        number = starter.start("x", [], src=tmp_path / "src", env=env, log=tmp_path / "log")
        with pytest.raises(StartError, match="cannot import nothing_of_this_name"):
            starter.wait(number, 20)
    finally:
        starter.close()
