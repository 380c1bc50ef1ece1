"""The ladder: off by default, ends losers once it has history, and keeps nothing by itself.

pytest -n 0 tests/test_ladder.py
"""

import os
import signal
from dataclasses import asdict

import pytest
from standin import edit, journal_of, make_project, overrides, script
from test_loop import assert_nothing_is_left, started, study_folder, wait_for

from agent import early, ladder, replay, tracking
from agent.journal import Journal, Proposal, Run, Rung, Trial, trial_from_json
from agent.loop import main
from agent.settings import read_plan
from nightshift.fixed.config import CONF, ConfigError

LADDER = ("study.ladder=0.5", "study.early_stop=0.5", "study.false_keeps=50")
FEW = ("study.baseline_seeds=[1,2]", "study.max_seeds=2", "budget.amount=8")
FEW += ("runtime.num_dev_points=0",)  # no early stopping by the curve


def worse(by: float, behaviour: str = "ok"):
    proposal = edit('BEHAVIOUR = "ok"\nBONUS = 0.0', f'BEHAVIOUR = "{behaviour}"\nBONUS = {-by}')
    proposal.title = f"worse by {by}"
    return proposal


# ---- a study ----


def starts(project) -> str:
    """A line for each training of a trial: its folder, seed and pid."""
    return (study_folder(project) / "trials/starts.log").read_text()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("ladder") / "project")
    early_riser = worse(-0.0001, "short -1.0")  # a bit better in its short run alone
    script(project, [worse(0.5), early_riser, worse(0.6), worse(0.7)])
    assert main(overrides(4, *FEW, *LADDER), project) == 0
    return project


@pytest.mark.slow
def test_before_there_is_history_a_loser_runs_on_after_its_short_run(project):
    loser = journal_of(project).trials[1]
    assert loser.rung.behind == pytest.approx(0.5) and loser.behind is None
    assert (loser.status, loser.decision, loser.seeds) == ("ok", "discard", [1])


@pytest.mark.slow
def test_the_incumbents_short_run_is_made_once(project):
    mine = journal_of(project).trials[1:]
    assert [t.rung.parent_run is not None for t in mine] == [True, False, False, False]
    assert mine[0].rung.parent_run.folder == "trials/001/parent/short"
    assert starts(project).count("short 1 ") == 4
    assert not list(study_folder(project).glob("trials/*/**/short/checkpoint"))


@pytest.mark.slow
def test_a_short_run_keeps_nothing_however_good(project):
    trial = journal_of(project).trials[2]
    assert trial.rung.behind == pytest.approx(-1.0001)
    assert (trial.status, trial.decision, trial.seeds) == ("ok", "discard", [1, 2])
    assert trial.differences == pytest.approx([0.0001] * 2), "of the whole runs"


@pytest.mark.slow
def test_then_a_loser_ends_after_its_short_run_but_the_first_runs_on_as_a_check(project):
    *_, checked, ended = journal_of(project).trials
    assert (checked.status, checked.seeds) == ("ok", [1])
    assert "would have ended it (0.6000 behind in its short run), and it was hope" in checked.reason
    assert (ended.status, ended.decision, ended.runs) == ("stopped", "discard", [])
    assert ended.reason.startswith("short run: with 50% of the budget it was 0.7000 behind")
    assert ended.behind == pytest.approx(0.7) and not ended.failed and ended.score is None


@pytest.mark.slow
def test_the_records_show_it(project):
    folder, ended = study_folder(project), journal_of(project).trials[-1]
    assert ended.cost_s == ended.rung.run.wall_s > 0
    metrics = tracking.trial_metrics(ended)
    assert metrics["short_behind"] == pytest.approx(0.7) and metrics["val_bpb"] is None
    assert metrics["short_val_bpb"] == pytest.approx(2.9)
    head, *_, last = (folder / "report/results.tsv").read_text().splitlines()
    row = dict(zip(head.split("\t"), last.split("\t"), strict=True))
    assert (row["run_status"], row["short_behind"], row["seeds"]) == ("stopped", "0.700000", "")
    summary = (folder / "report/summary.md").read_text()
    assert "1 trials were stopped" in summary and "1 ran on as a check: 0 of them" in summary


@pytest.mark.slow
def test_a_trial_that_ended_so_is_replayed_by_its_short_run(project, capsys):
    assert replay.main(["first/4"], project) == 0
    assert "1 run of 1 trial: 1 identical" in capsys.readouterr().out


@pytest.mark.slow
def test_switched_on_in_the_middle_and_killed_in_a_short_run_a_study_goes_on(tmp_path):
    project = make_project(tmp_path / "project")
    script(project, [worse(0.4), worse(0.5, "slow")])
    assert main(overrides(1, *FEW, *LADDER[1:]), project) == 0
    with started(project, overrides(2, *FEW, *LADDER)) as process:
        wait_for(lambda: "short 1 " in starts(project))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(journal_of(project)) == 2
    assert main(overrides(2, *FEW, *LADDER), project) == 0
    before, trial = journal_of(project).trials[1:]
    assert before.rung is None and trial.rung.behind == pytest.approx(0.5)
    assert trial.rung.parent_run and (trial.status, trial.seeds) == ("ok", [1])
    assert starts(project).count("short 1 ") == 2
    assert_nothing_is_left(project)


# ---- numbers ----


def trial(number: int, behind: float | None, gain: float | None, share=0.5, **values) -> Trial:
    run = Run(seed=1, status="ok", val_bpb=2.0 + (behind or 0.0))
    proposal = Proposal(title="t", hypothesis="h", source="test")
    return Trial(
        number=number,
        proposal=proposal,
        parent=0,
        status="ok",
        decision="discard",
        reason="",
        rung=Rung(share=share, run=run, behind=behind, **values),
        differences=[] if gain is None else [gain],
    )


def journal(tmp_path, *trials: Trial) -> Journal:
    found = Journal(tmp_path / "journal.jsonl")
    found.trials = list(trials)
    return found


def test_the_history_is_of_trials_that_ran_on_with_this_share(tmp_path):
    known = journal(
        tmp_path, trial(1, 0.1, -0.05), trial(2, 0.7, None), trial(3, None, 0.1),
        trial(4, 0.2, 0.0, share=0.25),
    )  # fmt: skip
    assert ladder.history_of(known, 0.5) == [early.Past((0.1,), -0.05)]


def test_a_kept_trials_own_short_run_is_the_parents_for_its_children(tmp_path):
    parent, child = trial(0, -0.1, 0.1), trial(2, 0.0, None)
    made = Run(seed=1, status="ok", val_bpb=7.0)
    drifted = trial(1, 0.0, 0.0)
    known = journal(tmp_path, parent, drifted)
    assert known.rung_of(parent, 0.5, child).val_bpb == pytest.approx(1.9)
    assert known.rung_of(parent, 0.25, child) is None
    drifted.drifted = True
    assert known.rung_of(parent, 0.5, child) is None, "from before the drift"
    drifted.rung.parent_run = made
    assert known.rung_of(parent, 0.5, child) is made
    assert trial_from_json(asdict(drifted)) == drifted


def test_it_is_off_by_default():
    assert read_plan(CONF, []).study.ladder is None


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["study.ladder=0"], r"study.ladder \(0\) must be a share .* Try: study.ladder=0.25"),
        (["study.ladder=1"], r"study.ladder \(1\) must be a share"),
        (["study.ladder=x"], r"study.ladder \('x'\): must be a valid number"),
        (["study.ladder=0.25", "study.early_stop=0"], "no short run may ever end a trial"),
    ],
)
def test_a_share_that_is_none_is_refused_in_one_line(given, why):
    with pytest.raises(ConfigError, match=why) as error:
        read_plan(CONF, given)
    assert "\n" not in str(error.value)
