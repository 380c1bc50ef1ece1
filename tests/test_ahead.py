"""The model thinks of the next trial while one runs: what is used, dropped, counted and stopped."""

import copy
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
from recorded import a_trial, recorded_study
from scripted_llm import Reply, ScriptedServer, an_edit, fail, propose, say, use
from standin import bonus, journal_of, overrides, study_command, values
from test_llm import arguments, llm
from test_loop import assert_nothing_is_left

from agent import loop, provider, workspace
from agent.answer import StudyFiles
from agent.costs import Ledger, Paused
from agent.end import End
from agent.form import Form
from agent.journal import Journal, Proposal, Trial
from agent.proposers.llm import Researcher
from agent.settings import compose, read_plan
from agent.study import Study
from agent.traces import exchanges_of
from agent.trial import Interrupted, Stop
from agent.view import View

FOLDER = "outputs/studies/first"
BETTER = bonus(0.0, 0.5)  # the trial that runs, in most of these tests


def code(before: str, after: str, **more) -> Reply:
    return propose(title=f"{before} -> {after}", edits=[an_edit(before, after)], **more)


def value(given: float, wait_s: float = 0.0, **more) -> Reply:
    change = propose(title=f"beta1 {given}", overrides={"optim.beta1": given}, **more)
    return replace(change, wait_s=wait_s)


# ---- with a trial that is applied, and neither run nor judged ----


@pytest.fixture(scope="module")
def applied(tmp_path_factory) -> tuple[Study, Trial]:
    """A study at the moment when its trial 1 begins to run."""
    files = recorded_study(tmp_path_factory.mktemp("ahead") / "project")
    asked = ["study.llm.model=openai:m", "study.sources={llm: 1, sampler: 0, recipes: 0}"]
    plan = read_plan(files.repo / "conf", overrides(9, *asked))
    study = Study(
        repo=files.repo,
        folder=files.folder,
        plan=plan,
        journal=files.journal,
        settings=files.settings,
        starter=None,  # nothing is run
        stop=Stop(),
        view=View(files.journal, End(9)),
        mirror=None,
    )
    trial, folder = a_trial(1, BETTER), files.folder / "trials/001"
    with workspace.worktree(files.repo, folder / "worktree", files.head) as tree:
        folder.mkdir(exist_ok=True)
        loop.apply(study, trial, tree, folder, files.head)
    return study, trial


class Beside:
    """What a study does about its trial 2, from the beginning of trial 1 to its end."""

    def __init__(self, study: Study, entries: list, **changes):
        self.server = ScriptedServer(entries)
        journal = Journal(study.journal.path)
        files, settings = (
            StudyFiles(study.repo, study.folder, journal),
            llm(self.server, **{"ahead": True} | changes),
        )
        asked = study.plan.study.model_copy(update={"llm": settings})
        plan = replace(study.plan, study=asked)
        researcher = Researcher(settings, files, Stop())
        self.study = replace(study, journal=journal, plan=plan, researcher=researcher)

    def __enter__(self) -> "Beside":
        self.server.__enter__()
        return self

    def __exit__(self, *_):
        self.study.researcher.close()
        self.server.__exit__()

    @property
    def thought(self):
        return self.study.researcher.thought

    def begins(self, trial: Trial) -> None:
        loop.think_ahead(self.study, trial)

    def thinks(self, trial: Trial) -> None:
        """To the end, before the trial ends."""
        self.begins(trial)
        self.thought.wait(Stop())

    def ends(self, trial: Trial, **facts) -> Proposal:
        """The proposal of the next trial."""
        self.study.journal.trials.append(replace(trial, **facts))
        number, commit = trial.number + 1, self.study.journal.incumbent.commit
        folder = self.study.folder / f"trials/{number:03d}"
        with workspace.worktree(self.study.repo, folder / "worktree", commit) as tree:
            return loop.next_proposal(self.study, number, folder, tree)

    def text(self, request: int) -> str:
        return self.server.requests[request]["messages"][1]["content"]


@pytest.fixture
def beside(applied, monkeypatch):
    """(entries, settings) -> Beside, without what the test before left."""
    monkeypatch.setattr(provider, "FIRST_WAIT_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    study, _ = applied
    for name in ("calls.jsonl", "lessons.jsonl", "conversations", "trials/002"):
        path = study.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return lambda entries, **changes: Beside(study, entries, **changes)


@pytest.fixture
def trial(applied) -> Trial:
    return copy.deepcopy(applied[1])


def check_costs(study: Study, server: ScriptedServer, proposal: Proposal) -> None:
    total = Ledger(study.folder).usage()
    assert (total.input_tokens, total.output_tokens) == server.tokens, "to the token"
    usage = replace(proposal.usage, waited_s=None)
    assert usage == total, "all of it stands with the trial that it was asked for"


def test_it_is_told_what_runs_may_not_propose_the_same_and_is_used(beside, trial):
    same = propose(title="again", edits=[an_edit("BONUS = 0.0", "BONUS = 0.5  # hm")])
    repeat = value(0.6, repeats=1)
    repair = value(0.6, repairs=1)
    with beside([same, repeat, repair, value(0.6)]) as it:
        it.thinks(trial)
        proposal = it.ends(trial)
        check_costs(it.study, it.server, proposal)
    assert "# Trial 1 runs now" in it.text(0) and "BONUS = 0.5" in it.text(0)
    assert proposal.title == "beta1 0.6" and proposal.source == "llm"
    first, second, third, last = proposal.events
    assert "same configuration and code as trial 1 ('bonus 0.0 -> 0.5', open, running)" in first
    assert "repeats 1: that trial runs now" in second
    assert "repairs 1: that trial runs now" in third
    assert last == "thought of while trial 1 ran"


def test_after_a_keep_it_is_checked_again_and_values_are_put_on_what_it_left(beside, trial):
    with beside([value(0.6)]) as it:
        it.thinks(trial)
        proposal = it.ends(trial, decision="keep", val_bpb=1.7)
    assert (len(it.server.requests), proposal.overrides) == (1, {"optim.beta1": 0.6})


def test_after_a_keep_what_does_not_apply_is_dropped_and_the_model_asked_again(beside, trial):
    stale, fresh = code("BONUS = 0.0", "BONUS = 0.1"), code("BONUS = 0.5", "BONUS = 0.1")
    with beside([stale, fresh]) as it:
        it.thinks(trial)
        proposal = it.ends(trial, decision="keep", val_bpb=1.7)
        check_costs(it.study, it.server, proposal)
    assert proposal.title == "BONUS = 0.5 -> BONUS = 0.1" and proposal.usage.calls == 2
    [dropped] = proposal.events
    assert dropped.startswith("what was thought of while trial 1 ran ('BONUS = 0.0 -> BONUS = 0.1'")
    assert "is dropped: edit 1 of 1: search text occurs 0 times" in dropped
    assert "# Trial 1 runs now" not in it.text(1)


def test_a_repair_comes_first_and_no_call_is_cut_off_for_it(beside, trial):
    trial.proposal.source = "llm"
    looks = use(("noise", {}), wait_s=0.5)  # the trial has failed before the answer is there
    mended = code("BONUS = 0.0", "BONUS = 0.4", repairs=1)
    with beside([looks, mended]) as it:
        it.begins(trial)
        proposal = it.ends(trial, status="crash", reason="shape is invalid")
        check_costs(it.study, it.server, proposal)
    assert "# Trial 1 of yours failed (crash)" in it.text(1)
    assert (proposal.repairs, proposal.usage.calls, proposal.usage.lost) == (1, 2, 0)
    assert proposal.events == [
        "what was thought of while trial 1 ran is dropped: that trial failed, and whether to "
        "repair it comes first"
    ]


def test_a_failure_of_another_source_changes_nothing(beside, trial):
    with beside([value(0.6)]) as it:
        it.thinks(trial)
        assert it.ends(trial, status="crash").events == ["thought of while trial 1 ran"]


def test_without_an_answer_the_next_source_takes_the_trial_and_it_is_not_asked_twice(beside, trial):
    with beside([fail(401, "bad key")]) as it:
        it.thinks(trial)
        proposal = it.ends(trial)
    assert (proposal.source, len(it.server.requests)) == ("sampler", 1)
    assert [event.split(":")[0] for event in proposal.events] == ["call 0", "openai"]


def test_a_cap_that_is_reached_meanwhile_pauses_after_the_trial(beside, trial):
    with beside([value(0.6)], cap_tokens={"study": 300}) as it:
        it.thinks(trial)
        with pytest.raises(Paused, match="study.llm.cap_tokens.study"):
            it.ends(trial)
    assert it.server.requests == [] and len(it.study.journal) == 2


def test_it_ends_at_once_in_mid_call(beside, trial):
    with beside([say("late", wait_s=60)]) as it:
        it.begins(trial)
        while not it.server.requests:
            time.sleep(0.01)
        started = time.monotonic()
        it.study.researcher.close()
        assert time.monotonic() - started < 2 and not it.thought.thread.is_alive()
        assert isinstance(it.thought.error, Interrupted)
    assert Ledger(it.study.folder).usage(2).lost == 1


def test_ctrl_c_while_the_study_waits_for_it_ends_it_as_well(beside, trial):
    with beside([say("late", wait_s=60)]) as it:
        it.begins(trial)
        stop = it.study.researcher.caller.stop
        threading.Timer(0.5, lambda: setattr(stop, "requested", True)).start()
        with pytest.raises(Interrupted):
            it.ends(trial)
        it.study.researcher.close()
    assert not [t for t in threading.enumerate() if t.name == "ahead"]


def test_it_does_not_begin_where_there_is_no_turn_for_it(beside, trial):
    def begun(it: Beside, trial=trial, **changes) -> bool:
        plan = it.study.plan
        asked = plan.study.model_copy(update=changes)
        it.study = replace(it.study, plan=replace(plan, study=asked))
        it.begins(trial)
        return it.thought is not None

    with beside([value(0.6)], ahead=False) as it:
        assert not begun(it)
    with beside([value(0.6)]) as it:
        assert not begun(it, trials=1), "the last trial"
        assert not begun(it, it.study.journal.trials[0], trials=9), "the baseline"
        assert not begun(it, sources={"llm": 1e-9, "sampler": 1.0}), "another's turn"
        assert begun(it, sources={"llm": 1.0, "sampler": 1e-9})


@pytest.mark.parametrize(
    "model, base_url, ahead",
    [
        ("openai:gpt-4.1", None, True),
        ("openai:m", "https://models.example.com/v1", True),
        ("openai:local", "http://127.0.0.1:8080/v1", False),
        ("openai:local", "http://localhost:8080/v1", False),
        ("ollama:qwen3", None, False),
    ],
)
def test_a_model_on_the_trials_own_machine_waits_unless_it_is_told_to(model, base_url, ahead):
    assert llm(model=model, base_url=base_url).thinks_ahead == ahead
    assert all(
        llm(model=model, base_url=base_url, ahead=x).thinks_ahead == x for x in (True, False)
    )


def test_lessons_of_a_trial_that_runs_are_not_counted_as_learned(beside, trial):
    with beside([say("Nothing yet."), value(0.6)], lessons_every=1) as it:
        it.study.journal.trials.append(replace(trial, digest="x"))
        it.thinks(a_trial(2, values(optim__beta2=0.7), digest="y", changed={}, shape="z"))
    lessons = (it.study.folder / "lessons.jsonl").read_text()
    assert '"trial": 1' in lessons, "so the next ones begin with trial 2"


def test_a_form_does_not_offer_what_runs(applied):
    study, trial = applied
    runs = a_trial(1, values(optim__beta1=0.6), changed={"optim.beta1": 0.6})
    runs.shape = study.journal.trials[0].shape = trial.shape
    files = StudyFiles(study.repo, study.folder, study.journal)
    free = Form(files)
    taken = Form(files._replace(journal=study.journal.while_running(runs)))
    gone = set(free.options["optim.beta1"]) - set(taken.options["optim.beta1"])
    assert gone and all(abs(v - 0.6) < 0.05 for v in gone)
    assert "trial 2." in taken.message([], 4096)


def test_two_threads_compose_configurations_at_once(applied, monkeypatch):
    """Hydra has one global state: who is done clears that of who is not."""
    conf, found, real = applied[0].repo / "conf", [], hydra.compose

    def late(name, overrides):
        time.sleep(0.5 * (overrides == ["seed=0"]))
        return real(name, overrides=overrides)

    monkeypatch.setattr(hydra, "compose", late)

    def work(seed: int) -> None:
        found.append(compose(conf, "config", [f"seed={seed}"])["seed"])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(found) == [0, 1]


# ---- whole studies ----


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
        self.script = Script(replies)
        self.server = ScriptedServer([self.script])
        self.given = arguments(
            self.server, "study.llm.max_output_tokens=256", "study.llm.ahead=true"
        )
        self.project = self.script.project = recorded_study(folder / "project", *self.given).repo

    def __enter__(self) -> "Told":
        self.server.__enter__()
        return self

    def __exit__(self, *_):
        self.server.__exit__()

    def run(self, trials: int, *more: str) -> int:
        return loop.main(overrides(trials, *self.given, *more), self.project)

    def check_costs(self) -> None:
        """What the server charged is what the ledger and the trials say, to the token."""
        usages = [t.proposal.usage for t in self.journal[1:] if t.proposal.usage]
        ours = [sum(getattr(u, f"{kind}_tokens") for u in usages) for kind in ("input", "output")]
        total = Ledger(self.project / FOLDER).usage()
        assert tuple(ours) == self.server.tokens == (total.input_tokens, total.output_tokens)

    @property
    def journal(self) -> list[Trial]:
        return journal_of(self.project).trials


SLOW = code("BONUS = 0.0", 'BONUS = -0.3\nBEHAVIOUR = "lingers 1.5"')


@pytest.mark.slow
def test_a_study_asks_for_a_trial_while_the_one_before_it_runs(tmp_path):
    with Told(tmp_path, {1: [SLOW], 2: [value(0.6, wait_s=0.3)]}) as told:
        assert told.run(2) == 0
        told.check_costs()
    assert told.script.asked == [(1, 1, False), (2, 1, True)]
    exchanges = exchanges_of(told.project / FOLDER / "conversations/002.jsonl")
    prompts = [str(inputs) for inputs, _ in exchanges.values()]
    assert len(prompts) == 1 and "# Trial 1 runs now" in prompts[0], "as its MLflow trace will have"
    first, second = (t.proposal for t in told.journal[1:])
    assert first.events == [] and second.events == ["thought of while trial 1 ran"]
    assert first.usage.waited == first.usage.seconds > 0
    assert second.usage.waited < second.usage.seconds
    assert_nothing_is_left(told.project)


@pytest.mark.slow
def test_a_study_without_it_asks_when_the_trial_has_ended_and_after_a_keep_twice(tmp_path):
    kept = code("BONUS = 0.0", 'BONUS = 0.5\nBEHAVIOUR = "slow"')
    again = [code("BONUS = 0.0", "BONUS = 0.1"), code("BONUS = 0.5", "BONUS = 0.1")]
    with Told(tmp_path, {1: [kept], 2: again, 3: [value(0.6)]}) as told:
        assert told.run(2) == 0
        assert told.run(3, "study.llm.ahead=false") == 0
        told.check_costs()
    assert told.script.asked == [(1, 1, False), (2, 1, True), (2, 2, False), (3, 3, False)]
    assert [t.decision for t in told.journal] == ["keep", "keep", "discard", "discard"]
    assert ["is dropped" in str(t.proposal.events) for t in told.journal[1:]] == [0, 1, 0]
    assert_nothing_is_left(told.project)


@pytest.mark.slow
def test_a_study_that_pauses_while_it_thinks_loses_no_trial(tmp_path, capsys):
    with Told(tmp_path, {1: [SLOW], 2: [value(0.6)], 3: [value(0.7)]}) as told:
        assert told.run(3, "study.llm.cap_tokens.study=7000") == 3
        assert "study.llm.cap_tokens.study (7000)" in capsys.readouterr().err
        assert len(told.journal) == 2 and len(told.script.asked) == 1
        assert told.run(3, "study.llm.cap_tokens.study=90000") == 0
        told.check_costs()
    assert told.script.asked[1:] == [(2, 2, False), (3, 2, True)]
    assert [t.proposal.source for t in told.journal[1:]] == ["llm"] * 3
    assert told.journal[3].proposal.events == ["thought of while trial 2 ran"]


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_study_stopped_or_killed_while_it_thinks_goes_on(tmp_path, number, status):
    lingers = code('BEHAVIOUR = "ok"', 'BEHAVIOUR = "lingers 5"')
    replies = {1: [lingers], 2: [Reply(wait_s=90, drop=True), value(0.6)]}
    with Told(tmp_path, replies) as told:
        given = overrides(2, *told.given, "study.llm.timeout_s=90")
        command = study_command(told.project, given)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while len(told.script.asked) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        started = time.monotonic()
        os.kill(process.pid, number)
        assert process.wait(30) == status and time.monotonic() - started < 10
        assert len(told.journal) == 1
        assert told.run(2) == 0
    assert told.script.asked[1:] == [(2, 1, True), (2, 1, True)]
    usage = told.journal[2].proposal.usage
    assert (usage.calls, usage.lost) == (2, 1)
    assert (usage.input_tokens + told.journal[1].proposal.usage.input_tokens) == (
        told.server.input_tokens
    )
    assert_nothing_is_left(told.project)


@pytest.mark.slow
def test_threads_may_add_and_remove_worktrees_at_once(tmp_path):
    """Without the lock of `git_worktree`, one addition of about 180 fails."""
    repo = recorded_study(tmp_path / "project").repo
    commit, errors = workspace.base_commit(repo), []

    def work(name: str) -> None:
        for _ in range(100):
            try:
                with workspace.worktree(repo, repo / f"outputs/{name}/worktree", commit):
                    pass
            except Exception as error:
                errors.append(str(error))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert errors == [] and workspace.worktrees(repo) == [str(repo)]
