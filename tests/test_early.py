"""Early stopping: off without history, true to its rate, deaf to nonsense; and a whole study."""

import json
import math
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from standin import edit, journal_of, make_project, overrides, script

from agent import compare, decide, early, tracking
from agent.answer import must_be_repairable
from agent.digest import digest
from agent.early import MAX_BYTES, Limit, Past, Tail, Watch, compared, dev_points, limit_of
from agent.journal import Journal, Proposal, Run, Trial
from agent.loop import main
from agent.prompt import failed_idea
from agent.proposers import history
from agent.proposers.combine import is_near_miss
from agent.warm import marked_processes
from agent.workspace import Refused

PARENT = [(0.25, 2.6), (0.5, 2.3), (0.75, 2.1), (1.0, 2.0)]
KNOWN = Limit(0.4, trials=19)


def hopeless(gain: float) -> bool:
    return gain < -0.03


def noise(rng: random.Random, lost: float = 0.0) -> Past:
    """Behind by what it will lose, and by chance: more at the start, and all checks together."""
    common = rng.gauss(0, 0.01)
    return Past(tuple(lost + common + rng.gauss(0, 0.02) / (i + 1) for i in range(3)), -lost)


def is_stopped(past: Past, known: Limit) -> bool:
    return max(past.behind) > known.behind


# ---- numbers ----


def test_nothing_is_stopped_before_the_history_bears_the_rate():
    rng = random.Random(1)
    hopeful, losers = [noise(rng) for _ in range(19)], [noise(rng, 0.5) for _ in range(50)]
    assert limit_of([], hopeless, 0.05) is None
    assert limit_of([*hopeful[:18], *losers], hopeless, 0.05) is None, "losers do not count"
    assert limit_of(hopeful, hopeless, 0.05).rate == pytest.approx(0.05)
    assert limit_of(hopeful, hopeless, 0.0) is None, "0 is never"


def test_trials_that_never_differed_do_not_count():
    same = [Past((0.0, 0.0, 0.0), 0.0)] * 50
    assert limit_of(same, hopeless, 0.05) is None
    late = [Past((0.0, 0.0, 0.01 * i), 0.0) for i in range(-5, 15) if i]
    assert limit_of(late, hopeless, 0.05) == Limit(0.14, 19)


def test_a_hopeless_trial_is_stopped_and_a_late_bloomer_that_the_history_shows_is_not():
    rng = random.Random(2)
    plain = [noise(rng) for _ in range(30)]
    bloomer = Past((0.3, 0.2, 0.02), 0.01)
    assert is_stopped(noise(rng, 0.5), limit_of(plain, hopeless, 0.05))
    assert is_stopped(bloomer, limit_of(plain, hopeless, 0.05))
    assert not is_stopped(bloomer, limit_of([*plain, bloomer], hopeless, 0.05))
    assert not is_stopped(Past((0.29, 0.3, 0.02), 0), limit_of([*plain, bloomer], hopeless, 0.05))


def test_the_stated_rate_is_the_rate():
    """Of 4,000 studies with 19 trials with hope each, so many stop the twentieth."""
    rng, stopped = random.Random(3), 0
    for _ in range(4000):
        known = limit_of([noise(rng) for _ in range(19)], hopeless, 0.05)
        stopped += is_stopped(noise(rng), known)
    assert known.rate == 0.05 and 0.04 < stopped / 4000 < 0.06


def test_progress_is_compared_and_not_the_number_of_the_point():
    first, second = compared([(0.25, 2.75), (0.625, 2.3)], PARENT)
    assert first == pytest.approx((0.15, 0.25)) and second == pytest.approx((0.1, 0.5))
    unknown = [
        *compared([(0.1, 9.0)], PARENT),  # the parent's curve begins later
        *compared([(0.5, 9.0)], []),
        *compared([(0.5, 9.0)], [(0.5, 2.0), (1.0, 2.5)]),  # it did not learn any more
    ]
    assert len(unknown) == 3 and all(math.isnan(x) for pair in unknown for x in pair)


def test_the_first_and_then_every_fifth_that_passes_runs_on():
    assert [n for n in range(12) if early.runs_on(n)] == [0, 5, 10]


# ---- what a stopped trial is to others ----


def stopped(number: int, **values) -> Trial:
    proposal = Proposal(title="too large", hypothesis="It will.", source="llm", **values)
    run = Run(seed=1, status="stopped", message="at 50% ...")
    return Trial(
        number=number,
        proposal=proposal,
        parent=0,
        status="stopped",
        decision="discard",
        reason="stopped early: at 50% ...",
        behind=0.3,
        runs=[run],
    )


def baseline() -> Trial:
    runs = [Run(seed=1, status="ok", val_bpb=2.0)]
    proposal = Proposal(title="baseline", hypothesis="", source="baseline")
    values = dict(status="ok", decision="keep", reason="", val_bpb=2.0, runs=runs)
    return Trial(number=0, proposal=proposal, parent=None, **values)


def test_a_stopped_trial_is_a_loser_and_no_failure_to_be_repaired(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.trials = [baseline(), stopped(1)]
    assert decide.tested(journal.trials) == [], "it spends nothing of the error budget"
    assert failed_idea(journal) is None and not is_near_miss(journal.trials[1])
    with pytest.raises(Refused, match="that trial ran"):
        again = Proposal(title="t", hypothesis="h", source="llm", repairs=1)
        must_be_repairable(journal, again)
    text = digest(journal)
    assert "1 stopped" in text and "Failures" not in text
    assert tracking.run_name(journal.trials[1]) == "001 - too large"


def test_the_sampler_learns_where_it_was_bad(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.trials = [baseline(), stopped(1, overrides={"optim.matrix_lr": 0.4})]
    context = SimpleNamespace(journal=journal, memory=[], baseline={"optim": {"matrix_lr": 0.02}})
    result = history.results(context)[1]
    assert result.values == {"optim.matrix_lr": 0.4}
    assert result.score == pytest.approx(2.3 - journal.trials[0].score)


@pytest.mark.parametrize(
    ("now", "kind", "why"),
    [
        ([(0.25, 3.0), (0.5, 2.9), (0.75, 2.8)], "identical", "it has val_bpb 2.700000"),
        ([(0.25, 3.0), (0.5, 2.905)], "within noise", "moved by up to 0.005000"),
        ([(0.25, 3.0), (0.5, 2.5)], "not reproduced", "moved by up to 0.400000"),
        ([(0.25, 3.0)], "not reproduced", "is gone"),
    ],
)
def test_a_replay_runs_a_stopped_run_to_its_end(now, kind, why):
    noise = compare.Stated(decide.Noise(0.01, 2), decide.Noise(0.01, 2))
    then = compare.Seen(status="stopped", dev=[(0.25, 3.0), (0.5, 2.9)])
    seen = compare.compare(then, compare.Seen(status="ok", val_bpb=2.7, dev=now), noise, [])
    assert seen.kind == kind and why in seen.why


# ---- what a candidate may write ----


def live(tmp_path: Path, text: str | bytes) -> Path:
    """The folder of a run that has written this much of its curve."""
    (tmp_path / "scratch").mkdir(exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    (tmp_path / "scratch/curve.jsonl").write_bytes(data)
    return tmp_path


def line(progress, dev_bpb, **more) -> str:
    return json.dumps({"step": 1, "progress": progress, "dev_bpb": dev_bpb, **more}) + "\n"


def test_a_run_is_stopped_once_its_line_is_whole_and_its_curve_stays(tmp_path):
    watch, text = (
        Watch(PARENT, KNOWN, checks=3, runs_on=False),
        line(0.25, 2.7) + line(0.5, 2.45, name="x"),
    )
    for end in (0, 10, len(text) - 1):
        assert watch(live(tmp_path, text[:end])) is None
    why = watch(live(tmp_path, text))
    assert (
        "at 50% its dev_bpb was 0.1500 behind its parent's, 0.50 times" in why
        and "none of 19 earlier trials" in why
    )
    assert watch.passed.bpb == pytest.approx(0.15)
    kept = [json.loads(one) for one in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert dev_points(kept) == [(0.25, 2.7), (0.5, 2.45)] and "name" not in kept[1]


def test_a_checked_run_goes_on_and_is_noted(tmp_path):
    watch = Watch(PARENT, KNOWN, checks=3, runs_on=True)
    assert watch(live(tmp_path, line(0.25, 3.0))) is None and watch.passed.behind > 0.4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json\n[1, 2]\nnull\n7\n" + "[" * 3000 + "\n",
        '{"progress": NaN, "dev_bpb": 9}\n{"progress": 0.5, "dev_bpb": NaN}\n',
        '{"progress": 0.5, "dev_bpb": Infinity}\n{"progress": 0.5, "dev_bpb": "9"}\n',
        '{"progress": 0.5, "dev_bpb": true}\n{"progress": true, "dev_bpb": 9}\n',
        '{"progress": 0.5, "dev_bpb": 1' + "0" * 400 + "}\n",
        '{"progress": 0.5, "dev_bpb": 9, "more": "' + "x" * 5000 + '"}\n',
        line(-0.5, 9) + line(0, 9) + line(1.5, 9),
        line(0.25, 2.6) + line(0.2, 9) + line(0.25, 9),
        b"\xff\xfe\x00\n" + b"\0" * 100,
    ],
)
def test_nonsense_in_a_curve_is_ignored(tmp_path, text):
    watch = Watch(PARENT, KNOWN, checks=3, runs_on=False)
    assert watch(live(tmp_path, text)) is None and watch.passed is None


def test_a_live_curve_is_no_link_pipe_or_folder_and_is_not_read_without_end(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(line(0.5, 9.0))
    scratch, began = tmp_path / "scratch", time.monotonic()
    scratch.mkdir()
    for make in (
        lambda path: path.symlink_to(elsewhere),
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
    ):
        path = scratch / "curve.jsonl"
        make(path)
        assert Watch(PARENT, KNOWN, checks=3, runs_on=False)(tmp_path) is None
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    huge = Tail(scratch / "curve.jsonl")
    with open(huge.path, "wb") as file:
        file.truncate(100 << 30)  # a hole, without a line's end
    huge.read()
    huge.read()
    assert huge.offset <= MAX_BYTES and huge.points == [] and len(huge.unread) <= MAX_BYTES
    assert time.monotonic() - began < 2


# ---- a study ----


def worse(by: float, behaviour: str = "ok"):
    proposal = edit('BEHAVIOUR = "ok"\nBONUS = 0.0', f'BEHAVIOUR = "{behaviour}"\nBONUS = {-by}')
    proposal.title = f"worse by {by}"
    return proposal


@pytest.mark.slow
def test_a_study_stops_a_hopeless_trial_once_it_has_history(tmp_path):
    """One trial with hope; one far behind is checked, the next is stopped. It is no failure, and
    nothing is left of it but its curve."""
    project = make_project(tmp_path / "project")
    script(project, [worse(-0.0001), worse(0.5, "lingers 0.5"), worse(0.6, "lingers 60")])
    few = ["study.baseline_seeds=[1,2]", "study.max_seeds=2", "runtime.num_dev_points=4"]
    assert main(overrides(3, "study.early_stop=0.5", "study.false_keeps=50", *few), project) == 0
    *near, checked, stopped = journal_of(project).trials
    assert [(t.status, t.behind, len(t.runs)) for t in near] == [("ok", None, 2)] * 2
    assert (checked.status, len(checked.runs)) == ("ok", 1)
    assert checked.behind == pytest.approx(0.5)
    assert "early stopping would have ended it" in checked.reason
    assert (stopped.status, stopped.decision, stopped.score) == ("stopped", "discard", None)
    assert stopped.behind == pytest.approx(0.6) and not stopped.failed and stopped.wall_s < 50
    assert stopped.reason.startswith("stopped early: at 25% its dev_bpb was 0.6000 behind")
    assert all(t.rung is None for t in (*near, checked, stopped)), "there is no ladder by default"
    folder = project / "outputs/studies/first"
    assert not (folder / "trials/003/seed_1/scratch").exists() and not marked_processes(folder)
    assert len(early.curve_of(folder, stopped.runs[0])) == 2
    summary = (folder / "report/summary.md").read_text()
    assert "1 trials were stopped" in summary and "1 ran on as a check: 0 of them" in summary
    assert "What failed" not in summary
    row = (folder / "report/results.tsv").read_text().splitlines()[-1].split("\t")
    assert row[3] == "discard" and "stopped" in row
