"""Trials made again: what comes out the same is said to, what does not is not.

pytest -n 1 tests/test_replay.py
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from standin import behave, bonus, journal_of, make_project, overrides, run_git, script
from test_loop import assert_nothing_is_left

from agent import loop, replays, study, workspace
from agent.compare import (
    Seen,
    Stated,
    arithmetic,
    compare,
    contradictions,
    interval,
    other_code,
    other_config,
    reach,
    seen_of,
    t_975,
)
from agent.decide import Noise
from agent.replay import main
from agent.replays import Key, Replay, left_to_do
from nightshift.fixed.config import ConfigError, check, config_digest

NOISE = Stated(Noise(0.001, 2), Noise(0.0002, 5))
FACTS = {"torch": "2.13.0", "threads": 1, "data_digest": "d1"}
RAN = dict(status="ok", val_bpb=1.5, weights="w1", steps=30, facts=FACTS)


# ---- then against now ----


def said(now: dict, then: dict | None = None, wrong=()) -> tuple[str, str]:
    outcome = compare(Seen(**RAN | (then or {})), Seen(**RAN | now), NOISE, list(wrong))
    return outcome.kind, outcome.why


def test_the_same_weights_and_number_are_identical_elsewhere_too():
    assert said({})[0] == "identical"
    kind, why = said({"facts": FACTS | {"torch": "2.14.0"}})
    assert kind == "identical" and "torch was 2.13.0, is 2.14.0" in why


def test_other_weights_inside_the_interval_are_noise_counted_in_sigmas():
    kind, why = said({"weights": "w2", "val_bpb": 1.5004})
    assert kind == "within noise"
    assert "0.4 sigma of a seed, 2.0 sigma of a pair" in why and "nothing on record differs" in why


def test_outside_the_interval_the_machine_is_asked_what_differs():
    now = {"weights": "w2", "val_bpb": 1.51, "facts": FACTS | {"threads": 2}}
    kind, why = said(now)
    assert kind == "not reproduced" and "threads was 1, is 2" in why and "outside" in why


def test_a_number_that_its_own_weights_do_not_make_was_changed():
    kind, why = said({"val_bpb": 1.5000004})
    assert kind == "not reproduced" and "the number was changed" in why
    assert said({"val_bpb": 1.5000004, "facts": FACTS | {"torch": "2.14.0"}})[0] == "within noise"


def test_other_data_or_a_record_that_contradicts_itself_is_not_reproduced():
    kind, why = said({"facts": FACTS | {"data_digest": "d2"}})
    assert kind == "not reproduced" and "data_digest was d1, is d2" in why
    assert said({}, wrong=["its gain is off"])[0] == "not reproduced"


def test_a_failure_is_reproduced_by_the_same_failure_only():
    failed = dict(status="oom", val_bpb=None, weights=None, message="9 GB")
    assert said(failed, failed)[0] == "identical"
    assert said(failed | {"status": "crash"}, failed)[0] == "not reproduced"
    kind, why = said(failed)
    assert kind == "not reproduced" and why == "it was ok, now it is oom: 9 GB"
    assert said({}, failed)[0] == "not reproduced"


LONG = dict(curve=[(0, 8.0), (10, 7.0), (20, 6.5), (30, 6.0)], guess_bpb=2.5)  # learned 1 bpb


def test_the_interval_is_that_of_one_more_seed_and_reaches_where_the_steps_lead():
    width = 4.303 * 2**0.5 * 0.001
    low, high = 1.5 - width, 1.5 + width
    assert interval(Seen(**RAN, **LONG), Seen(**RAN), NOISE) == pytest.approx((low, high), abs=1e-6)
    fewer = interval(Seen(**RAN, **LONG), Seen(**RAN | {"steps": 15}), NOISE)
    assert fewer == pytest.approx((low, high + 0.75 / 2.0), abs=1e-6)  # loss 6.75 at step 15
    more = interval(Seen(**RAN | {"steps": 20}), Seen(**RAN, **LONG), NOISE)
    assert more == pytest.approx((low - 0.5 / 2.0, high), abs=1e-6)
    assert interval(Seen(**RAN), Seen(**RAN), Stated(Noise(None, 0), Noise(None, 0))) is None


def test_the_reach_of_fewer_steps_is_bounded_and_errs_to_the_safe_side():
    run = Seen(**RAN, **LONG)
    assert reach(run, 30) == reach(run, 31) == 0.0 and reach(run, 0) == 1.0
    bumpy = Seen(**RAN, curve=[(0, 8.0), (10, 6.5), (20, 7.0), (30, 6.0)], guess_bpb=2.5)
    assert reach(bumpy, 10) == reach(bumpy, 20) == 0.5, "a lucky batch does not shrink it"
    assert reach(Seen(**RAN), 15) == 0.0, "no curve is known"


def test_students_quantiles_fall_to_that_of_the_normal():
    values = [t_975(df) for df in range(1, 200)]
    assert values == sorted(values, reverse=True) and values[-1] == pytest.approx(1.972, abs=1e-3)
    assert t_975(0) == float("inf")


# ---- the record of an audit ----


def made(trial: int, audit: int = 1, **changes) -> Replay:
    values = dict(trial=trial, what="run", seed=1, clock="recorded", outcome="identical", why="",
                  status_then="ok", journal=f"j{trial}", audit=audit)  # fmt: skip
    return Replay(**values | changes)


def test_an_audit_goes_on_where_it_ended_and_again_begins_the_next():
    keys = [Key(n, "run", 1, "recorded") for n in range(3)]
    first = [made(0), made(1)]
    assert left_to_do(keys, [], False) == (1, keys)
    assert left_to_do(keys, first, False) == (1, keys[2:])
    assert left_to_do(keys, first, True) == (2, keys), "all of them, not only the last"
    first.append(made(2))
    assert left_to_do(keys, first, False) == (1, [])
    assert left_to_do(keys, first, True) == (2, keys)
    cut_off = [*first, made(0, audit=2)]
    assert left_to_do(keys, cut_off, True) == (2, keys[1:])
    assert left_to_do(keys, cut_off, False) == (2, [])
    whole = [*cut_off, made(1, audit=2), made(2, audit=2)]
    assert left_to_do(keys, whole, True) == (3, keys)


def test_a_line_counts_while_the_journal_says_what_it_was_compared_with():
    lines = [made(0), made(1), made(7)]
    assert replays.valid(lines, ["j0", "another"]) == [lines[0]]


def test_a_line_that_a_kill_cut_short_never_was(tmp_path):
    path = tmp_path / replays.REPLAYS_FILE
    replays.append(tmp_path, made(0))
    with open(path, "ab") as file:
        file.write(b'{"trial": 1, "wh')
    assert replays.read_replays(tmp_path) == [made(0)]
    replays.append(tmp_path, made(1))
    assert replays.read_replays(tmp_path) == [made(0), made(1)]
    path.write_text("no line of ours\n" + path.read_text())
    with pytest.raises(ConfigError, match="line 1 is damaged"):
        replays.read_replays(tmp_path)


# ---- a whole study of the stand-in project ----


@pytest.fixture(scope="module")
def audited(tmp_path_factory) -> Path:
    """A study with a keep, a crash and a refused repeat; all of it replayed, with Ctrl-C after the
    first line."""
    project = make_project(tmp_path_factory.mktemp("replay") / "project")
    script(project, [bonus(0.0, 0.5), behave("crash"), bonus(0.5, 0.5)])
    assert loop.main(overrides(3, "study.baseline_seeds=[1,2]"), project) == 0
    before = everything(project)
    with interrupted_after_a_line(project):
        assert main(["--all", "first"], project) == 130
    assert [r.trial for r in lines_of(project)] == [0]
    assert_nothing_is_left(project)
    assert main(["--all", "first"], project) == 0
    assert everything(project) == before
    return project


@contextlib.contextmanager
def interrupted_after_a_line(project: Path):
    def interrupt():
        path, deadline = folder_of(project) / replays.REPLAYS_FILE, time.monotonic() + 60
        while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    yield
    thread.join()


@pytest.fixture
def project(audited, tmp_path) -> Path:
    """A copy to tamper with, nothing replayed yet."""
    copy = tmp_path / "project"
    shutil.copytree(audited, copy, symlinks=True)
    (folder_of(copy) / replays.REPLAYS_FILE).unlink()
    return copy


def folder_of(project: Path) -> Path:
    return project / "outputs/studies/first"


def everything(project: Path) -> dict[str, bytes | str]:
    """What a replay may not change: the study's files, git's refs and the working tree."""
    folder = folder_of(project)
    kept = [folder / "journal.jsonl", folder / "settings.json", *(folder / "trials").rglob("*")]
    files = {str(path): path.read_bytes() for path in kept if path.is_file()}
    files["refs"] = run_git(project, "for-each-ref")
    return files | {"status": run_git(project, "status", "--porcelain")}


def lines_of(project: Path) -> list[Replay]:
    return replays.read_replays(folder_of(project))


def starts(project: Path) -> int:
    """How many trainings were started by replays."""
    path = folder_of(project) / "replays/starts.log"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_an_audit_goes_on_after_ctrl_c_and_each_trial_is_the_same_and_nothing_moves(
    audited, capsys
):
    assert [(r.trial, r.what, r.outcome) for r in lines_of(audited)] == [
        (0, "run", "identical"), (1, "run", "identical"), (2, "run", "identical"),
        (3, "refusal", "identical"),
    ]  # fmt: skip
    assert_nothing_is_left(audited)
    report = (folder_of(audited) / "report/summary.md").read_text()
    assert "4 runs of 4 trials: 4 identical, 0 within noise, 0 not reproduced." in report
    before = starts(audited)
    assert main(["--all", "first"], audited) == 0 and starts(audited) == before
    assert "all of it is on record already; again=true" in capsys.readouterr().out


@pytest.mark.slow
def test_one_trial_is_replayed_with_each_of_its_seeds_and_on_request_again(project):
    assert main(["first/1"], project) == 0
    assert [(r.seed, r.outcome) for r in lines_of(project)] == [(1, "identical"), (2, "identical")]
    assert main(["first/1", "seeds=first", "again=true"], project) == 0
    assert [r.audit for r in lines_of(project)] == [1, 1, 2]


def rewrite(project: Path, number: int, change) -> None:
    path = folder_of(project) / "journal.jsonl"
    trials = [json.loads(line) for line in path.read_text().splitlines()]
    change(trials[number])
    path.write_text("".join(json.dumps(trial) + "\n" for trial in trials))


def verdicts_on(project: Path, *arguments: str) -> list[str]:
    """Why each run is not reproduced."""
    assert main([*arguments, "seeds=first", "again=true"], project) == 1
    last = [r for r in lines_of(project) if r.audit == lines_of(project)[-1].audit]
    assert {r.outcome for r in last} == {"not reproduced"}
    return [r.why for r in last]


@pytest.mark.slow
def test_what_was_changed_in_the_record_is_found_and_other_code_is_not_trained(project):
    """Trial 0 has another number in both places, trial 1 another commit (trial 3 started from it),
    and trial 2 failed otherwise."""
    for result in folder_of(project).glob("trials/000/seed_*/result.json"):
        result.write_text(json.dumps(json.loads(result.read_text()) | {"val_bpb": 1.9}))
    rewrite(project, 0, lambda t: [run.update(val_bpb=1.9) for run in t["runs"]])
    rewrite(project, 0, lambda t: t.update(val_bpb=1.9))
    run_git(project, "update-ref", "refs/trials/first/001", "main")
    rewrite(project, 2, lambda t: (t.update(status="oom"), t["runs"][0].update(status="oom")))
    before = starts(project)
    number, commit, status, refusal = verdicts_on(project, "--all", "first")
    assert "val_bpb 1.900000 then, 2.200000 now" in number and "number was changed" in number
    assert "its differences do not follow" in commit and "refs/trials/first/001 is at" in commit
    assert status.startswith("it was oom, now it is crash: RuntimeError")
    assert refusal == commit.rpartition("; ")[2]
    assert starts(project) == before + 2, "the baseline and the crash"


def rebuilt_as(project: Path, number: int) -> tuple[Seen, dict, tuple[str, str]]:
    """What is on record of a trial's first run, the digests of its commit, and its commit."""
    trial = journal_of(project).trials[number]
    with workspace.worktree(project, folder_of(project) / "look", trial.commit) as tree:
        code = workspace.code_of(tree, journal_of(project).trials[0].commit)
        config = workspace.resolve(tree).model_copy(update={"seed": trial.runs[0].seed})
    digests = {"fixed_code": code.fixed, "editable_code": code.editable}
    digests["config_digest"] = config_digest(config)
    return seen_of(folder_of(project), trial.runs[0]), digests, (trial.commit,)


def test_a_commit_that_is_not_the_one_that_ran_is_told_by_its_code(audited):
    then, now, commits = rebuilt_as(audited, 1)
    assert other_code(then, now, (commits[0], then.facts["commit"])) == []
    _, other, another = rebuilt_as(audited, 0)
    code, commit = other_code(then, other, another)
    assert code.startswith("editable_code was ") and f"says {another[0][:12]}" in commit


def test_numbers_and_values_that_contradict_each_other_are_named(project):
    folder, trial = folder_of(project), journal_of(project).trials[1]
    config = study_config(folder / "trials/001/seed_1/config.yaml")
    assert contradictions(folder, trial.runs[0]) == []
    assert other_config(folder / "trials/001/seed_1", config) == []
    changed = replace(trial.runs[0], val_bpb=1.6)
    assert contradictions(folder, changed) == [
        "the journal says val_bpb 1.6, result.json 1.7000000000000002"
    ]
    path = folder / "trials/001/seed_1/config.yaml"
    path.write_text(path.read_text().replace("matrix_lr: 0.02", "matrix_lr: 0.03"))
    assert other_config(path.parent, config) == [
        "config.yaml of the run says optim.matrix_lr 0.03, the commit 0.02"
    ]
    path.write_text("a: [")
    assert other_config(path.parent, config) == ["config.yaml of the run cannot be read"]


def study_config(path: Path):
    return check(yaml.safe_load(path.read_text()))


def test_means_and_differences_must_follow_from_the_runs(audited):
    journal = journal_of(audited)
    trial = journal.trials[1]
    assert [arithmetic(journal, t, [1, 2]) for t in journal.trials] == [[], [], [], []]
    (mean,) = arithmetic(journal, replace(trial, val_bpb=1.6), [1, 2])
    assert mean == "its val_bpb is 1.600000 in the journal, its runs make 1.701000"
    (gain,) = arithmetic(journal, replace(trial, gain=0.6), [1, 2])
    assert gain == "its gain is 0.600000 in the journal, its runs make 0.500000"
    journal.trials[0].runs[0].val_bpb = 2.3
    assert "do not follow from its runs and those of 0" in arithmetic(journal, trial, [1, 2])[0]


@pytest.mark.slow
def test_a_commit_that_git_has_lost_is_said(project):
    gone = "0123456789" * 4
    rewrite(project, 1, lambda t: t.update(commit=gone))
    (why,) = verdicts_on(project, "first/1")
    assert f"git has no commit {gone} (trial 1) any more" in why


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage: nightshift replay"),
        (["frist/1"], "there is no such study. Nearest: first"),
        (["first/9"], "first/9: there is no such trial; the study has 0 to 3"),
        (["first"], "give a trial by its number, such as first/3, or the whole study"),
        (["first/x"], "give a trial by its number"),
        (["--all", "first/1"], "give the study alone: --all first"),
        (["--everything", "first"], "--everything: there is no such option"),
        (["first/1", "seed=all"], "there is no such key. Keys: seeds, clock"),
        (["first/1", "seeds=2"], "seeds=2: must be all or first"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(audited, capsys, arguments, words):
    before = lines_of(audited)
    assert main(arguments, audited) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
    assert lines_of(audited) == before


def test_while_the_study_runs_it_is_not_replayed(audited, capsys):
    with study.lock(folder_of(audited), "first"):
        assert main(["first/1", "again=true"], audited) == 2
    assert "another process runs this study or a replay of it" in capsys.readouterr().err


def test_a_study_without_its_settings_keeps_its_journal(project, capsys):
    (folder_of(project) / "settings.json").unlink()
    assert main(["first/1"], project) == 2
    assert "settings.json is gone" in capsys.readouterr().err
    assert len(journal_of(project)) == 4


@pytest.mark.slow
def test_a_journal_line_cut_short_stays_as_it_is(project):
    path = folder_of(project) / "journal.jsonl"
    path.write_bytes(path.read_bytes() + b'{"number": 4, "prop')
    before = path.read_bytes()
    assert main(["first/3"], project) == 0
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("wait_s", [0.5, 1.5, 3.0, 4.5])
def test_a_killed_audit_loses_nothing_and_leaves_nothing(project, wait_s):
    code = "import sys; from pathlib import Path; from agent.replay import main; "
    code += "sys.exit(main(sys.argv[2:], Path(sys.argv[1])))"
    process = subprocess.Popen([sys.executable, "-c", code, str(project), "--all", "first"])
    time.sleep(wait_s)
    process.kill()
    process.wait()
    assert main(["--all", "first"], project) == 0
    assert [r.trial for r in lines_of(project)] == [0, 1, 2, 3]
    assert_nothing_is_left(project)
