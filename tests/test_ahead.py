"""The model thinks of the next trial while one runs: what is used, dropped, counted and stopped."""

import os
import re
import signal
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
from recorded import a_trial, recorded_study
from scripted_llm import Reply, ScriptedServer, an_edit, propose, use
from standin import journal_of, overrides, study_command, values
from test_llm import arguments
from test_loop import assert_nothing_is_left

from agent.answer import Answer, StudyFiles, check_answer
from agent.costs import Ledger
from agent.form import Form
from agent.loop import main
from agent.settings import compose
from agent.workspace import Refused
from agent.workspace import worktree as worktree_of

FOLDER = "outputs/studies/first"


def code(before: str, after: str, **more) -> Reply:
    return propose(title=f"{before} -> {after}", edits=[an_edit(before, after)], **more)


def value(given: float) -> Reply:
    return propose(title=f"beta1 {given}", overrides={"optim.beta1": given})


WORSE = code("BONUS = 0.0", 'BONUS = -0.3\nBEHAVIOUR = "slow"')
KEPT = code("BONUS = 0.0", 'BONUS = 0.5\nBEHAVIOUR = "slow"')


class Script:
    """Replies by the trial that is asked for; notes how many trials had ended at each request."""

    def __init__(self, replies: dict[int, list[Reply]]):
        self.replies, self.said = replies, defaultdict(int)
        self.project: Path | None = None
        self.asked: list[tuple[int, int, bool]] = []  # trial asked for, trials ended, one runs

    def __call__(self, request) -> Reply:
        number = int(re.search(r"Propose trial (\d+)\.", request["messages"][1]["content"])[1])
        ended = len(journal_of(self.project))
        runs = (self.project / FOLDER / f"trials/{ended:03d}/config.yaml").exists()
        self.asked.append((number, ended, runs))
        said, self.said[number] = self.said[number], self.said[number] + 1
        return self.replies[number][min(said, len(self.replies[number]) - 1)]


class Told:
    """A study whose model answers by a script."""

    def __init__(self, folder: Path, replies: dict[int, list[Reply]]):
        self.script, self.trials = Script(replies), max(replies)
        self.server = ScriptedServer([self.script])
        self.given = arguments(self.server, "study.llm.max_output_tokens=256")
        self.project = self.script.project = recorded_study(folder / "project", *self.given).repo

    def __enter__(self):
        self.server.__enter__()
        return self

    def __exit__(self, *_):
        self.server.__exit__()

    def run(self, *more: str, trials: int | None = None) -> int:
        return main(overrides(trials or self.trials, *self.given, *more), self.project)

    def check_costs(self) -> None:
        """What the server charged is what the ledger and the trials say, to the token."""
        usages = [t.proposal.usage for t in self.journal[1:] if t.proposal.usage]
        ours = [sum(getattr(u, f"{kind}_tokens") for u in usages) for kind in ("input", "output")]
        total = Ledger(self.project / FOLDER).usage()
        assert tuple(ours) == self.server.tokens == (total.input_tokens, total.output_tokens)

    @property
    def journal(self):
        return journal_of(self.project).trials

    def text(self, request: int) -> str:
        return self.server.requests[request]["messages"][1]["content"]


def test_the_model_is_asked_while_the_trial_runs_and_knows_of_it(tmp_path):
    with Told(tmp_path, {1: [WORSE], 2: [WORSE, value(0.6)], 3: [value(0.7)]}) as told:
        assert told.run() == 0
        told.check_costs()
    assert told.script.asked == [(1, 1, False), (2, 1, True), (2, 1, True), (3, 2, True)]
    assert [t.proposal.source for t in told.journal[1:]] == ["llm"] * 3
    first, second, third = (t.proposal.events for t in told.journal[1:])
    assert first == [] and third == ["thought of while trial 2 ran"]
    assert "same configuration and code as trial 1" in second[0], "though it had not ended"
    assert second[1] == "thought of while trial 1 ran"
    assert "# Trial 1 runs now" in told.text(1) and "BONUS = -0.3" in told.text(1)
    assert "runs now" not in told.text(0)
    assert_nothing_is_left(told.project)


def test_without_it_nothing_is_asked_while_a_trial_runs(tmp_path):
    with Told(tmp_path, {1: [WORSE], 2: [value(0.6)]}) as told:
        assert told.run("study.llm.ahead=false") == 0
    assert told.script.asked == [(1, 1, False), (2, 2, False)]
    assert [t.proposal.events for t in told.journal[1:]] == [[], []]


def test_after_a_keep_it_is_used_where_it_applies_and_else_asked_for_again(tmp_path):
    stale = code("BONUS = 0.0", "BONUS = 0.1")
    fresh = code("BONUS = 0.5", "BONUS = 0.1")
    with Told(tmp_path, {1: [KEPT], 2: [stale, fresh]}) as told:
        assert told.run() == 0
        told.check_costs()
    assert told.script.asked == [(1, 1, False), (2, 1, True), (2, 2, False)]
    trial = told.journal[2]
    assert (trial.parent, trial.proposal.title) == (1, "BONUS = 0.5 -> BONUS = 0.1")
    [dropped] = trial.proposal.events
    assert dropped.startswith("what was thought of while trial 1 ran ('BONUS = 0.0 -> BONUS = 0.1'")
    assert "is dropped: edit 1 of 1: search text occurs 0 times" in dropped
    assert trial.proposal.usage.calls == 2, "the dropped one is paid for as well"


def test_after_a_keep_values_are_put_on_what_it_left(tmp_path):
    with Told(tmp_path, {1: [KEPT], 2: [value(0.6)]}) as told:
        assert told.run() == 0
    assert len(told.script.asked) == 2
    assert (told.journal[2].parent, told.journal[2].gain) == (1, 0.0)
    assert told.journal[2].proposal.events == ["thought of while trial 1 ran"]


def test_a_repair_comes_first_and_no_call_is_cut_off_for_it(tmp_path):
    crash = code('BEHAVIOUR = "ok"', 'BEHAVIOUR = "import error"')
    looks = use(("noise", {}), wait_s=4)  # the trial has crashed by then
    mended = code('BEHAVIOUR = "ok"', 'BEHAVIOUR = "mended"', repairs=1)
    with Told(tmp_path, {1: [crash], 2: [looks, mended]}) as told:
        assert told.run() == 0
        told.check_costs()
    assert told.script.asked == [(1, 1, False), (2, 1, True), (2, 2, False)]
    assert "# Trial 1 of yours failed (crash)" in told.text(2)
    proposal = told.journal[2].proposal
    assert proposal.repairs == 1 and (proposal.usage.calls, proposal.usage.lost) == (2, 0)
    assert proposal.events == [
        "what was thought of while trial 1 ran is dropped: that trial failed, and whether to "
        "repair it comes first"
    ]


def test_a_cap_that_is_reached_meanwhile_pauses_when_the_trial_has_ended(tmp_path, capsys):
    with Told(tmp_path, {1: [WORSE], 2: [value(0.6)]}) as told:
        assert told.run("study.llm.cap_tokens.study=7000") == 3
        assert "study.llm.cap_tokens.study (7000)" in capsys.readouterr().err
        assert [t.status for t in told.journal] == ["ok", "ok"], "the trial was not lost"
        assert len(told.script.asked) == 1
        assert told.run("study.llm.cap_tokens.study=90000") == 0
        told.check_costs()
    assert told.script.asked[1:] == [(2, 2, False)] and told.journal[2].proposal.source == "llm"


def test_ctrl_c_ends_trial_and_thinking_at_once_and_the_same_command_goes_on(tmp_path):
    hang = code('BEHAVIOUR = "ok"', 'BEHAVIOUR = "lingers 60"')
    with Told(tmp_path, {1: [hang], 2: [Reply(wait_s=60, drop=True), value(0.6)]}) as told:
        sent = []

        def interrupt():
            while len(told.script.asked) < 2:
                time.sleep(0.02)
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        assert told.run() == 130
        assert time.monotonic() - sent[0] < 5
        assert_nothing_is_left(told.project)
        assert not [t for t in threading.enumerate() if t.name == "ahead"]
        assert len(told.journal) == 1
        assert told.run("budget.wall_limit_s=1") == 0
    trial = told.journal[2]
    assert (trial.proposal.usage.calls, trial.proposal.usage.lost) == (2, 1)
