"""Whole studies of the stand-in project: keeps, failures, kills, resumes."""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from standin import (
    behave,
    bonus,
    edit,
    journal_of,
    make_project,
    overrides,
    run_git,
    script,
    study_command,
    values,
)

from agent import study, workspace
from agent.loop import main
from agent.settings import compose
from agent.warm import marked_processes
from nightshift.fixed.config import flatten


@pytest.fixture
def project(tmp_path) -> Path:
    return make_project(tmp_path / "project")


def study_folder(project: Path) -> Path:
    return project / "outputs/studies/first"


def assert_nothing_is_left(project: Path) -> None:
    """No process, worktree, lock or half trial; every ref says what the journal says."""
    folder, journal = study_folder(project), journal_of(project)
    assert marked_processes(folder) == []
    assert workspace.worktrees(project) == [str(project)]
    assert not list(folder.glob("trials/*/worktree")) and not list(folder.glob("trials/*/cache"))
    assert not (folder / "lock").exists()
    assert not list((project / ".git").rglob("*.lock"))
    refs = workspace.refs_of(project, "first")
    branch = refs.pop("refs/heads/study/first", None)
    if journal.trials:
        assert branch == journal.incumbent.commit
    of_journal = {
        workspace.trial_ref("first", t.number): t.commit for t in journal.trials if t.commit
    }
    assert of_journal.items() <= refs.items()


def test_study_keeps_gains_and_discards_the_rest(project, capsys):
    script(project, [bonus(0.0, 0.5), behave("crash"), bonus(0.5, 0.1), bonus(0.5, 0.5)])
    assert main(overrides(4), project) == 0
    trials = journal_of(project).trials
    assert [(t.status, t.decision) for t in trials] == [
        ("ok", "keep"),
        ("ok", "keep"),
        ("crash", "discard"),
        ("ok", "discard"),
        ("invalid", "discard"),
    ]
    assert [t.parent for t in trials] == [None, 0, 1, 1, 1]
    assert [len(t.runs) for t in trials] == [3, 3, 1, 1, 0]
    assert trials[1].gain == pytest.approx(0.5) and trials[1].val_bpb == pytest.approx(1.7)
    assert "same configuration and code as trial 1" in trials[4].reason
    assert_nothing_is_left(project)
    # The branch holds the lineage alone; the other attempts hang on their refs.
    subjects = run_git(project, "log", "--format=%s", "main..study/first").splitlines()
    assert subjects == ["trial 001: bonus 0.0 -> 0.5", "study first: the baseline's configuration"]
    assert "BONUS = 0.1" in run_git(
        project, "show", "refs/trials/first/003:src/nightshift/model.py"
    )
    assert "-BONUS = 0.0" in (study_folder(project) / "trials/001/diff.patch").read_text()
    # Weights of kept trials stay, of discarded ones they go.
    kept = [
        bool(list(study_folder(project).glob(f"trials/{n:03d}/seed_1/checkpoint")))
        for n in range(4)
    ]
    assert kept == [True, True, False, False]
    shown = capsys.readouterr().out
    assert "    1  ok          1.7000  +0.5000  keep      bonus 0.0 -> 0.5" in shown
    assert "code: bonus 0.0 -> 0.5 (trial 1)" in shown and "git checkout study/first" in shown
    assert (study_folder(project) / "report/summary.md").is_file()
    # Started again, there is nothing to do; with more trials it goes on.
    before = (study_folder(project) / "journal.jsonl").read_bytes()
    assert main(overrides(4), project) == 0
    assert (study_folder(project) / "journal.jsonl").read_bytes() == before
    assert main(overrides(5), project) == 0
    assert len(journal_of(project)) == 6
    assert journal_of(project).trials[5].proposal.source in ("sampler", "recipes")


@pytest.mark.slow
def test_a_near_tie_runs_more_seeds_and_so_does_its_parent_but_only_once(project):
    """Seeds 4, 5, ... are new to the baseline: it runs them for trial 1, in its own code, and they
    serve trial 2 as well."""
    script(project, [behave("uneven"), behave("uneven", also="# again")])
    assert main(overrides(2, "study.max_seeds=6", "study.false_keeps=0.01"), project) == 0
    baseline, first, second = journal_of(project).trials
    assert first.seeds == second.seeds == [1, 2, 3, 4, 5, 6]
    assert [run.seed for run in first.parent_runs] == [4, 5, 6] and second.parent_runs == []
    assert [run.val_bpb for run in first.parent_runs] == pytest.approx([2.201] * 3)
    assert first.parent_runs[0].folder == "trials/001/parent/seed_4"
    expected = [0.0006, 0.0008, 0.0004] * 2
    assert first.differences == second.differences == pytest.approx(expected)
    assert first.gain == pytest.approx(0.0006) and first.low < first.estimate < first.high
    assert first.val_bpb == pytest.approx(2.2 - 0.0006), "over the baseline's seeds alone"
    assert [t.decision for t in (first, second)] == ["discard", "discard"]
    assert not list(study_folder(project).glob("trials/001/**/checkpoint"))
    assert_nothing_is_left(project)


def test_a_gain_that_is_equal_and_shorter_is_kept(project):
    model = project / "src/nightshift/model.py"
    model.write_text(model.read_text() + "UNUSED = [\n    1,\n    2,\n]\n")
    run_git(project, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "longer")
    script(project, [edit("UNUSED = [\n    1,\n    2,\n]\n", "UNUSED = []\n")])
    assert main(overrides(1), project) == 0
    trial = journal_of(project).trials[1]
    assert (trial.decision, trial.gain, len(trial.runs)) == ("keep", 0.0, 3)
    assert trial.reason.startswith("equal within noise, and shorter")
    assert "001 edit: 3 lines fewer" in (study_folder(project) / "report/summary.md").read_text()


@pytest.mark.slow
def test_drift_of_the_machine_is_said_and_the_incumbent_measured_again(project, capsys):
    """On the clock, the incumbent runs a seed again every so many trials."""
    clock = ["budget.kind=seconds", "budget.amount=5", "study.drift_every=2"]
    script(project, [bonus(0.0, -0.1), bonus(0.0, -0.2), bonus(0.0, 0.1)])
    assert main(overrides(2, *clock), project) == 0
    (project / ".cache").mkdir(exist_ok=True)
    (project / ".cache/weather").write_text("0.5")
    assert main(overrides(3, *clock), project) == 0
    script(project, [bonus(0.0, 0.2)], first=4)
    assert main(overrides(4, *clock), project) == 0
    trials = journal_of(project).trials
    assert [t.drift for t in trials] == [None, None, 0.0, None, pytest.approx(0.5)]
    assert [t.decision for t in trials] == ["keep", "discard", "discard", "discard", "keep"]
    assert trials[3].gain == pytest.approx(-0.4), "what the drift did, unseen"
    assert [run.seed for run in trials[4].parent_runs] == [1, 2, 3]
    assert trials[4].gain == pytest.approx(0.2)
    assert "the incumbent's val_bpb on seed 1 moved by +0.5000" in capsys.readouterr().out


def test_branch_alone_reproduces_what_was_run_and_the_users_work_stays(project, capsys):
    (project / "src/nightshift/model.py").write_text("raise SystemExit\n")
    status = run_git(project, "status", "--porcelain")
    script(project, [values(optim__matrix_lr=0.03)])
    assert main(overrides(1, "schedule.warmdown_frac=0.4"), project) == 0
    shown = capsys.readouterr().out
    assert "1 uncommitted changes are not part of the study: src/nightshift/model.py" in shown
    assert run_git(project, "status", "--porcelain") == status
    assert run_git(project, "branch", "--show-current") == "main"
    with workspace.worktree(project, project / "outputs/look", "study/first") as tree:
        branch = flatten(compose(tree / "conf", "config", []))
    assert branch["optim.matrix_lr"] == 0.03 and branch["schedule.warmdown_frac"] == 0.4
    assert branch["budget.kind"] == "steps" and branch["budget.amount"] == 3.0


def test_failing_baseline_stops_the_study_with_its_message(project, capsys):
    model = project / "src/nightshift/model.py"
    model.write_text(model.read_text().replace('"ok"', '"crash"'))
    run_git(project, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "break")
    assert main(overrides(1), project) == 1
    error = capsys.readouterr().err
    assert "the baseline failed (crash), seed 1: RuntimeError: shape '[64, 128]'" in error
    assert len(error.splitlines()) == 1
    assert len(journal_of(project)) == 0 and marked_processes(study_folder(project)) == []
    # Mended, the same name starts anew.
    model.write_text(model.read_text().replace('"crash"', '"ok"'))
    run_git(project, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "mend")
    assert main(overrides(0), project) == 0


def refusal(project: Path, capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(overrides(0, *arguments), project) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_what_a_study_cannot_start_with_is_one_line(project, capsys):
    assert "refs of such a study" not in refusal(project, capsys, "study.false_keeps=0")
    assert not (project / "outputs").exists()
    run_git(project, "branch", "study/first")
    assert "git has refs of such a study" in refusal(project, capsys)
    assert not study_folder(project).exists()
    run_git(project, "branch", "-D", "study/first")
    assert main(overrides(0), project) == 0
    other = refusal(project, capsys, "optim.matrix_lr=0.5", "study.seed=4")
    assert "optim.matrix_lr: 0.02 -> 0.5" in other and "study.seed: 0 -> 4" in other
    run_git(project, "checkout", "--quiet", "study/first")
    assert f"branch study/first is checked out at {project}" in refusal(project, capsys)
    run_git(project, "checkout", "--quiet", "main")
    journal = study_folder(project) / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"number": 0', '"number": 5'))
    assert "is damaged" in refusal(project, capsys)


# ---- kills ----


@contextlib.contextmanager
def started(project: Path, arguments: list[str]):
    """A study in a process of its own, killed at the end if it still runs."""
    process = subprocess.Popen(
        study_command(project, arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(condition, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_study_that_demands_a_protection_does_not_start_without_it(project, capsys, monkeypatch):
    found = {"layers": {"files": ["landlock"]}, "open": ["network"]}
    monkeypatch.setattr(study, "ask_doctor", lambda: found)
    assert main(overrides(1, "sandbox.require=all"), project) == 2
    said = capsys.readouterr().err
    assert "network does not hold on this machine" in said and "nightshift doctor" in said
    assert not study_folder(project).exists(), "nothing was written"
    assert main(overrides(0, "sandbox.require=[files]"), project) == 0
    assert "sandbox does not hold for: network" in capsys.readouterr().out


def test_a_protection_that_does_not_exist_is_one_line(project, capsys):
    assert main(overrides(1, "sandbox.require=[fils]"), project) == 2
    assert "Nearest: files." in capsys.readouterr().err


def test_second_process_of_the_same_study_is_refused(project, capsys):
    script(project, [behave("hang")])
    with started(project, overrides(1)):
        wait_for(lambda: (study_folder(project) / "lock").exists())
        assert "another process runs this study" in refusal(project, capsys)


@pytest.mark.slow
def test_ctrl_c_stops_the_trial_and_the_same_command_goes_on(project):
    script(project, [behave("hang")])
    arguments = overrides(1, "budget.wall_limit_s=1")
    with started(project, arguments) as process:
        wait_for(lambda: (study_folder(project) / "trials/001/seed_1").exists())
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopped. To go on: nightshift study study.trials=1" in output
    assert len(journal_of(project)) == 1
    assert_nothing_is_left(project)
    assert os.listdir(study_folder(project) / "trials/001") == ["proposal.json"]
    assert main(arguments, project) == 0
    trials = journal_of(project).trials
    assert [t.proposal.title for t in trials] == ["baseline", "hang"]
    assert trials[1].status == "timeout"


@pytest.mark.slow
def test_what_a_kill_between_two_steps_leaves_is_mended(project):
    """A journal line cut short is a trial that never was; refs that lag behind follow."""
    script(project, [bonus(0.0, 0.5)])
    assert main(overrides(1), project) == 0
    journal = study_folder(project) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    run_git(project, "update-ref", "refs/heads/study/first", "main")
    run_git(project, "update-ref", "-d", "refs/trials/first/000")
    assert main(overrides(1), project) == 0
    assert len(journal_of(project)) == 2
    assert journal_of(project).trials[1].val_bpb == pytest.approx(1.7)
    assert_nothing_is_left(project)


def kill_at_random_moments(project: Path, trials: int, times: int, seed: int) -> int:
    """kill -9 of the loop or of a run, until the study is through. Returns how often it was hit."""
    rng, hits = random.Random(seed), 0
    for attempt in range(10 * times):
        with started(project, overrides(trials)) as process:
            wait_s = rng.uniform(0.3, 3.0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
            if process.poll() is not None:
                assert process.returncode == 0, process.communicate()[0]
                return hits
            victims = [process.pid] if attempt % 2 else marked_processes(study_folder(project))
            if hits < times and victims:
                hits += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(victims), signal.SIGKILL)
            if process.pid not in victims:
                assert process.wait(60) == 0, process.communicate()[0]
                return hits
            process.wait(20)
    raise AssertionError("the study never came to its end")


def check_after_kills(project: Path, proposals) -> None:
    trials = journal_of(project).trials
    assert [t.proposal.title for t in trials[1:]] == [p.title for p in proposals]
    assert [t.number for t in trials] == list(range(len(proposals) + 1))
    assert [t.decision for t in trials] == ["keep", "keep", "discard", "keep", "discard"]
    assert trials[3].val_bpb == pytest.approx(1.2)
    assert_nothing_is_left(project)


PROPOSALS = [bonus(0.0, 0.5), behave("crash"), bonus(0.5, 1.0), behave("leave a process")]


def test_killed_study_loses_and_doubles_no_trial(project):
    script(project, PROPOSALS)
    kill_at_random_moments(project, trials=4, times=2, seed=1)
    check_after_kills(project, PROPOSALS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_study_loses_and_doubles_no_trial_whatever_the_moment(project, seed):
    script(project, PROPOSALS)
    kill_at_random_moments(project, trials=4, times=4, seed=seed + 100)
    check_after_kills(project, PROPOSALS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_kill_among_the_parents_runs_costs_only_time(project, seed):
    script(project, [behave("uneven")])
    kill_at_random_moments(project, trials=1, times=3, seed=seed + 200)
    baseline, trial = journal_of(project).trials
    assert baseline.seeds == [1, 2, 3]
    assert [run.seed for run in trial.parent_runs] == trial.seeds[3:] != []
    assert len(trial.differences) == len(trial.runs)
    assert_nothing_is_left(project)
