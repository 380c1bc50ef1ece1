"""Promotions of the stand-in project: verdicts, the study's branch, kills, refusals."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from standin import bonus, edit, journal_of, make_project, overrides, run_git, script, values
from test_loop import assert_nothing_is_left, wait_for

from agent import loop, workspace
from agent.decide import Rule
from agent.journal import Journal, Proposal, Run, Trial
from agent.promote import main
from agent.promotion import Arm, Order, judge, read_lines, read_promotions
from agent.warm import marked_processes
from nightshift.fixed.config import flatten

ARMS = ("baseline", "champion", "without_001", "without_002")
TWO = "seeds=[1,2]"
BAD_AT_SCALE = edit('"ok"\nBONUS = 0.0', '"small only"\nBONUS = 0.05')


def given(trials: int) -> list[str]:
    return overrides(trials, "study.baseline_seeds=[1,2]")


def study_of(folder: Path, *proposals: Proposal, **files: str) -> Path:
    """`files`: modules of fixed/ by name, committed before the study."""
    project = make_project(folder)
    for name, text in files.items():
        (project / f"src/nightshift/fixed/{name}.py").write_text(text)
        run_git(project, "add", ".")
        run_git(project, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", name)
    script(project, list(proposals))
    assert loop.main(given(len(proposals)), project) == 0
    return project


def study_folder(project: Path) -> Path:
    return project / "outputs/studies/first"


def branch(project: Path) -> str:
    return run_git(project, "rev-parse", "study/first")


def read_of(project: Path, commit: str) -> dict:
    with workspace.conf_at(project, commit) as conf:
        return flatten(workspace.compose(conf, "config", []))


def starts(project: Path) -> list[str]:
    """One line a training: name of its folder, seed, process."""
    path = study_folder(project) / "promotions/001/starts.log"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A study that kept an edit and a value, and nothing promoted."""
    folder = tmp_path_factory.mktemp("ready") / "p"
    return study_of(folder, bonus(0.0, 0.5), values(optim__matrix_lr=0.03))


@pytest.mark.slow
def test_every_change_gets_its_verdict_and_the_branch_the_champion_at_scale(
    ready, tmp_path, capsys
):
    project = shutil.copytree(ready, tmp_path / "p")
    incumbent = journal_of(project).incumbent
    assert main(["first", TWO], project) == 0
    (promotion,) = read_promotions(study_folder(project))
    assert [(v.change, v.verdict) for v in promotion.verdicts] == [
        (None, "holds"),
        (1, "holds"),
        (2, "holds"),
    ]
    assert [v.gain for v in promotion.verdicts] == pytest.approx([0.6, 0.5, 0.1])
    assert promotion.verdict.before == pytest.approx(0.6)
    assert promotion.sigma == pytest.approx(0.002 / 2**0.5) and promotion.test_bpb == 2.6
    # The branch stands one commit further, at twice the depth and three times the budget.
    assert branch(project) == promotion.commit != incumbent.commit
    small, large = read_of(project, incumbent.commit), read_of(project, promotion.commit)
    assert (large["model.depth"], large["budget.amount"]) == (8, 9.0)
    assert large["optim.matrix_lr"] == small["optim.matrix_lr"] == 0.03
    assert "BONUS = 0.5" in run_git(project, "show", "study/first:src/nightshift/model.py")
    assert (study_folder(project) / promotion.run / "checkpoint").is_dir()
    assert len(list(study_folder(project).glob("promotions/001/*/seed_*/checkpoint"))) == 1
    summary = (study_folder(project) / "report/summary.md").read_text()
    assert "## Promoted" in summary and "| 002 | {'optim.matrix_lr': 0.03} |" in summary
    assert (study_folder(project) / "report/promoted_001.png").stat().st_size > 1000
    card = (study_folder(project) / "promotions/001/CARD.md").read_text()
    assert "test_bpb 2.6000, of the first seed's weights, read once." in card
    # Asked again, nothing runs and test is not read again.
    trainings = len(starts(project))
    capsys.readouterr()
    assert main(["first", TWO], project) == 0
    assert "through already; test is not read again" in capsys.readouterr().out
    assert len(starts(project)) == trainings
    assert len((project / "outputs/tests_read.log").read_text().splitlines()) == 1
    # The study goes on from its own incumbent, at its own scale; a keep takes the branch along.
    assert loop.main(given(2), project) == 0 and branch(project) == promotion.commit
    script(project, [bonus(0.5, 0.9)], first=3)
    assert loop.main(given(3), project) == 0
    last = journal_of(project).incumbent
    assert (last.number, last.parent) == (3, 2) and branch(project) == last.commit
    assert read_of(project, last.commit)["model.depth"] == 4
    assert_nothing_is_left(project)
    kept = run_git(project, "rev-parse", "refs/promotions/first/001/champion")
    assert kept == promotion.commit


@pytest.mark.slow
def test_a_champion_that_is_worse_at_scale_is_not_promoted_and_test_stays_unread(tmp_path, capsys):
    project = study_of(tmp_path / "p", BAD_AT_SCALE)
    before = branch(project)
    assert main(["first", TWO], project) == 1
    (promotion,) = read_promotions(study_folder(project))
    assert [v.verdict for v in promotion.verdicts] == ["hurts", "hurts"]
    assert promotion.verdict.before > 0 > promotion.verdict.high
    assert promotion.commit is None and branch(project) == before
    assert not (project / "outputs/tests_read.log").exists()
    assert len(promotion.arms) == 2, "one change: without it, the champion is the baseline"
    assert "not promoted: the baseline is better" in capsys.readouterr().out


@pytest.mark.slow
def test_a_change_on_which_another_stands_cannot_be_separated(tmp_path):
    old = "# a ledger in the outputs/ of whatever worktree reads"
    project = study_of(tmp_path / "p", bonus(0.0, 0.5), bonus(0.5, 0.6), ledger=old)
    assert main(["first", TWO, "depth=6"], project) == 0
    (promotion,) = read_promotions(study_folder(project))
    assert [v.verdict for v in promotion.verdicts] == ["holds", "cannot be separated", "holds"]
    assert "does not apply without trial 1: edit 1 of 1" in promotion.verdicts[1].reason
    assert read_of(project, promotion.commit)["model.depth"] == 6
    # Its own code would forget that test was read, so it does not read it.
    assert promotion.test_bpb is None and "older than the ledger" in promotion.test_note
    assert not (project / "outputs/tests_read.log").exists()


@contextlib.contextmanager
def started(project: Path, *arguments: str):
    code = (
        "import sys; from pathlib import Path; from agent.promote import main; "
        "sys.exit(main(sys.argv[2:], Path(sys.argv[1])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(project), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finished(runs: Path) -> int:
    """Looks only: read_lines mends."""
    return runs.read_bytes().count(b"\n") if runs.exists() else 0


@pytest.mark.slow
def test_killed_or_stopped_it_goes_on_and_repeats_no_finished_run(ready, tmp_path):
    project = shutil.copytree(ready, tmp_path / "p")
    runs = study_folder(project) / "promotions/001/runs.jsonl"
    for number, how in ((1, signal.SIGKILL), (2, signal.SIGINT)):
        with started(project, "first", TWO) as process:
            wait_for(lambda number=number: finished(runs) >= number, limit_s=120)
            os.kill(process.pid, how)
            output, _ = process.communicate(timeout=60)
        if how == signal.SIGINT and process.returncode:  # not through before it was seen
            assert process.returncode == 130
            assert "stopped. To go on: nightshift promote first 'seeds=[1,2]'" in output
            assert marked_processes(study_folder(project)) == []
            assert workspace.worktrees(project) == [str(project)]
    assert main(["first", TWO], project) == 0
    done = [(line["arm"], line["seed"]) for line in read_lines(runs)]
    assert done == [(arm, seed) for arm in ARMS for seed in (1, 2)]
    assert [p.number for p in read_promotions(study_folder(project))] == [1]
    assert workspace.worktrees(project) == [str(project)]
    assert not list(study_folder(project).glob("promotions/*/*/cache"))
    assert len((project / "outputs/tests_read.log").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["firs"], "study (firs): there is no such study. Nearest: first."),
        (["first", "second"], "promote: give one study, got 2"),
        (["first", "trial=0"], "trial 0 of first is its baseline"),
        (["first", "trial=9"], "trial=9: study first has trials 0 to 2"),
        (["first", "trial=x"], "trial=x: must be the number of a trial"),
        (["first", "seeds=[1]"], "seeds=[1]: must be at least two different seeds"),
        (["first", "model.dept=8"], "model.dept=8: there is no such key. Nearest: model.depth."),
        (["first", "model.depth=-8"], "model.depth (-8): must be greater than or equal to 1"),
        (["first", "corpus.path=/x"], "corpus.path: a promotion takes trial, seeds"),
        (["first", "budget=x"], "budget.amount ('x'): must be a valid number"),
        (["first", "model=d12"], "model: a promotion takes"),
        (["first", "optim.matrix_lr=0.02"], "optim.matrix_lr: a change of this study sets it"),
        (["first", "budget.kind=tokens"], "budget.kind: another kind needs its amount too"),
        (["first", "runtime.device=tpu"], "runtime.device ('tpu'): must be 'auto'"),
        (["first", "--dry"], "--dry: there is no such option"),
    ],
)  # fmt: skip
def test_nonsense_is_one_line_before_any_work(ready, capsys, arguments, said):
    capsys.readouterr()
    assert main(arguments, ready) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1, error
    assert not (study_folder(ready) / "promotions").exists()


def test_a_dry_run_says_how_many_runs_and_how_long_and_does_nothing(ready, capsys):
    assert main(["first", "model.depth=6", "budget.amount=30", "--dry-run"], ready) == 0
    said = capsys.readouterr().out
    assert "depth 4 -> 6, steps 3 -> 30, 4 configurations x 2 seeds: 8 runs left, about" in said
    assert not (study_folder(ready) / "promotions").exists()


def test_a_study_at_work_is_not_promoted_from_under_it(ready, capsys):
    (study_folder(ready) / "lock").touch()
    with open(study_folder(ready) / "lock", "w") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["first"], ready) == 2
    assert "another process runs this study" in capsys.readouterr().err


# ---- verdicts, from numbers alone ----


def arm(name: str, *numbers: float, **more) -> Arm:
    runs = [Run(seed=i, status="ok", val_bpb=n) for i, n in enumerate(numbers, 1)]
    return Arm(name=name, runs=runs, **more)


def journal(tmp_path) -> Journal:
    """A baseline and one keep whose differences scatter as two seeds do."""
    found = Journal(tmp_path / "journal.jsonl")
    for number, numbers in enumerate(((2.0, 2.003, 1.997), (1.98, 1.985, 1.976))):
        found.trials.append(
            Trial(
                number=number, parent=number - 1 if number else None, status="ok", decision="keep",
                proposal=Proposal(title=f"t{number}", hypothesis="", source="x",
                                  overrides={"optim.matrix_lr": 0.03} if number else {}),
                reason="", runs=arm("", *numbers).runs,
                differences=[0.02, 0.018, 0.021] if number else [],
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize(
    "champion, verdict",
    [
        ((1.980, 1.984, 1.978), "holds"),
        ((1.9995, 2.0035, 1.9965), "fades"),
        ((1.99, 2.006, 2.0), "fades"),
        ((2.030, 2.032, 2.028), "hurts"),
    ],
)
def test_the_verdict_follows_from_the_interval(tmp_path, champion, verdict):
    arms = [arm("baseline", 2.0, 2.003, 1.997), arm("champion", *champion)]
    trials = journal(tmp_path)
    found = judge(trials, trials.trials[1], arms, Rule(0.05, 0.1, 2, 12))
    whole = found["verdicts"][0]
    assert whole.verdict == verdict and whole.low < whole.estimate < whole.high
    assert (whole.low > 0) == (verdict == "holds") and (whole.high < 0) == (verdict == "hurts")
    assert abs(whole.estimate) <= abs(whole.gain) + 1e-6, "shrunk, never stretched"


def test_a_change_without_which_the_champion_crashes_has_no_number(tmp_path):
    trials = journal(tmp_path)
    third = json.loads(json.dumps(asdict(trials.trials[1]))) | {"number": 2, "parent": 1}
    from agent.journal import trial_from_json

    trials.trials.append(trial_from_json(third))
    crash = "crash without trial 1: NameError"
    arms = [
        arm("baseline", 2.0, 2.003),
        arm("champion", 1.9, 1.902),
        Arm(name="without_001", left_out=1, problem=crash),
        arm("without_002", 1.95, 1.953, left_out=2),
    ]
    _, first, second = judge(trials, trials.trials[2], arms, Rule(0.05, 0.1, 2, 12))["verdicts"]
    assert (first.verdict, first.reason, first.gain) == ("cannot be separated", crash, None)
    assert second.gain == pytest.approx(0.0505)


def test_a_line_that_a_kill_cut_short_never_was(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"arm": "baseline"}\n{"arm": "cham')
    assert read_lines(path) == [{"arm": "baseline"}]
    assert path.read_text() == '{"arm": "baseline"}\n'


def test_an_order_is_found_again_by_what_was_asked_for():
    one = Order(trial=1, seeds=[1, 2], given={"model.depth": 8})
    assert asdict(one) == json.loads(json.dumps(asdict(one)))
