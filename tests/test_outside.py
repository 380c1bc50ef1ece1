"""An outside agent as the researcher: the inbox, the tools, the command line, the MCP server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from standin import journal_of, make_project, overrides, script, study_command, values

from agent import outside, shell
from agent.inbox import MAX_WAITING, Full, Inbox
from agent.journal import Journal, Trial
from agent.loop import main

ALONE = "sources=outside"
MODEL = "src/nightshift/model.py"


@pytest.fixture
def project(tmp_path) -> Path:
    return make_project(tmp_path / "project")


def folder_of(project: Path) -> Path:
    return project / "outputs/studies/first"


def proposal(search: str = "", replace: str = "", **more) -> dict:
    edits = [{"path": MODEL, "search": search, "replace": replace}] if search else []
    given = {"title": f"{search} -> {replace}", "hypothesis": "It will.", "expected_effect": "-0.1"}
    return given | {"edits": edits} | more


def bonus(before: float, after: float, **more) -> dict:
    return proposal(f"BONUS = {before}", f"BONUS = {after}", **more)


def behave(behaviour: str, **more) -> dict:
    return proposal('BEHAVIOUR = "ok"', f'BEHAVIOUR = "{behaviour}"', **more)


def ask(project: Path, tool: str, **arguments) -> dict:
    """As it goes over a wire."""
    arguments = json.loads(json.dumps(arguments))
    answer = outside.call(project, "first", tool, arguments, lambda now: None)
    return json.loads(json.dumps(answer, allow_nan=False))


def wait_for(condition, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def runs(project: Path) -> bool:
    return ask(project, "status").get("running", False)


def with_agent(project: Path, trials: int, agent, *more: str) -> int:
    """The study in this thread, the agent in another; a failing agent stops the study."""
    failures = []

    def act() -> None:
        try:
            wait_for(lambda: runs(project))
            agent()
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=act)
    thread.start()
    code = main(overrides(trials, *(more or [ALONE])), project)
    thread.join()
    if failures:
        raise failures[0]
    return code


def python(code: str, project: Path, *arguments: str) -> list[str]:
    code = f"import sys; from pathlib import Path; {code}"
    return [sys.executable, "-c", code, str(project), *arguments]


def command_line(project: Path, tool: str, arguments: dict | None = None) -> list[str]:
    code = "from agent.shell import main; sys.exit(main(sys.argv[2:], Path(sys.argv[1])))"
    return python(code, project, "first", tool, json.dumps(arguments or {}))


# ---- one study, two ways to drive it ----

SMALL = [ALONE, "study.baseline_seeds=[1,2]"]
SHORT = [
    ("status", {}),
    ("propose", bonus(0.0, 0.5, wait=False)),
    ("propose", {"title": "no hypothesis"}),
    ("outcome", {"id": "p0001", "wait_s": 300}),
    ("propose", bonus(0.5, 0.9)),
]
LONG = [
    ("propose", bonus(0.0, 0.5)),
    ("propose", {"title": "no hypothesis"}),
    ("propose", proposal("x", "y", edits=[{"path": "dvc.yaml", "search": "a", "replace": "b"}])),
    ("propose", behave("crash")),
    ("propose", bonus(0.5, 0.5)),
    ("nothing", {}),
    ("propose", proposal(overrides={"optim.matrix_lr": 0.03}, wait=False)),
    ("outcome", {"id": "p0003", "wait_s": 300}),
    ("list_trials", {"source": "outside"}),
    ("propose", bonus(0.5, 0.9)),
]


def drive_by_command_line(project: Path, scenario, told: list) -> list[dict]:
    answers = []
    for tool, arguments in scenario:
        done = subprocess.run(command_line(project, tool, arguments), capture_output=True)
        answers.append(json.loads(done.stdout))
        told += done.stderr.decode().splitlines()
        assert done.returncode == (2 if "error" in answers[-1] else 0), done.stderr
    return answers


def drive_by_mcp(project: Path, scenario, told: list) -> list[dict]:
    """The SDK's own client, and the server as a process of its own."""
    import anyio
    from mcp import Client, StdioServerParameters, stdio_client

    code = "from agent.mcp_server import main; sys.exit(main(['first'], Path(sys.argv[1])))"
    command, *args = python(code, project)
    server = StdioServerParameters(command=command, args=args, env=dict(os.environ))

    async def progress(step, total, message):
        told.append(message)

    async def drive() -> list[dict]:
        answers = []
        async with Client(stdio_client(server)) as client:
            listed = [tool.name for tool in (await client.list_tools()).tools]
            assert listed == list(outside.TOOLS)
            for tool, arguments in scenario:
                result = await client.call_tool(tool, arguments, progress_callback=progress)
                answers.append(result.structured_content)
                assert json.loads(result.content[0].text) == answers[-1]
                assert result.is_error == ("error" in answers[-1])
        return answers

    return anyio.run(drive)


def without_times(trial: Trial) -> dict:
    """A trial without what differs from process to process: ids, commits and times."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in TIMES}
        return [plain(v) for v in value] if isinstance(value, list) else value

    return plain(asdict(trial))


TIMES = (
    "id", "commit", "started_at", "wall_s", "train_s", "tokens_per_s", "peak_memory_gb", "mfu",
    "work",
)  # fmt: skip


def driven_both_ways(tmp_path: Path, trials: int, scenario) -> tuple[list, list, list]:
    """Journals, answers and what was told on the way: by the command line, by MCP."""
    journals, answers, told = [], [], ([], [])
    for which, drive in enumerate((drive_by_command_line, drive_by_mcp)):
        project = make_project(tmp_path / drive.__name__)
        act = lambda d=drive, p=project, t=told[which]: answers.append(d(p, scenario, t))  # noqa: E731
        assert with_agent(project, trials, act, *SMALL) == 0
        journals.append([without_times(t) for t in journal_of(project).trials])
        ids = [trial.proposal.id for trial in journal_of(project).trials]
        assert ids == [None, *(f"p{n:04d}" for n in range(1, trials + 1))]
    return journals, answers, told


def test_an_mcp_client_and_the_command_line_drive_a_study_to_the_same_journal(tmp_path):
    journals, (by_shell, by_mcp), told = driven_both_ways(tmp_path, 1, SHORT)
    assert journals[0] == journals[1] and by_shell[2:] == by_mcp[2:]
    kinds = [(t["status"], t["decision"], t["proposal"]["source"]) for t in journals[0]]
    assert kinds == [("ok", "keep", "baseline"), ("ok", "keep", "outside")]
    assert "hypothesis: Field required" in by_mcp[2]["error"]
    assert by_mcp[3]["decision"] == "keep" and by_mcp[3]["gain"] == pytest.approx(0.5)
    assert by_mcp[3]["trials_left"] == 0
    assert "study first has run its 1 trials" in by_mcp[4]["error"]
    later = ("trial 1: seed_2", "trial 1: seed_3")  # each is short: a look may miss one
    assert all(any(seed in line for line in lines for seed in later) for lines in told)


@pytest.mark.slow
def test_a_longer_study_with_refusals_is_the_same_both_ways(tmp_path):
    journals, (by_shell, by_mcp), _ = driven_both_ways(tmp_path, 4, LONG)
    assert journals[0] == journals[1] and len(journals[0]) == 5
    decisions = [(t["status"], t["decision"]) for t in journals[0][1:]]
    assert decisions == [("ok", "keep"), ("crash", "discard"), ("ok", "keep"), ("ok", "keep")]
    states = ["done", None, None, "done", None, None, "waiting", "done", None, "done"]
    assert [answer.get("state") for answer in by_shell] == states
    assert [answer.get("state") for answer in by_mcp] == states
    assert "dvc.yaml is not editable" in by_mcp[2]["error"]
    assert "same configuration and code as trial 1" in by_mcp[4]["error"]
    assert "there is no such tool" in by_mcp[5]["error"]


# ---- whatever is killed ----


@pytest.mark.slow
def test_an_agent_that_is_killed_in_mid_trial_loses_nothing(project):
    def agent():
        command = command_line(project, "propose", behave("slow"))
        client = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: list(folder_of(project).glob("trials/001/seed_1")))
        client.kill()
        client.wait()
        answer = ask(project, "outcome", id="p0001", wait_s=300)
        assert answer["state"] == "done" and answer["decision"] == "discard"

    assert with_agent(project, 1, agent) == 0
    assert len(journal_of(project)) == 2


@pytest.mark.slow
def test_a_study_killed_in_mid_trial_goes_on_with_the_same_proposals_once(project):
    study = subprocess.Popen(
        study_command(project, overrides(2, ALONE)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: len(journal_of(project)) == 1)
    first = ask(project, "propose", **behave("slow", wait=False))
    second = ask(project, "propose", **bonus(0.0, 0.5, wait=False))
    assert (first["id"], second["id"]) == ("p0001", "p0002")
    wait_for(lambda: list(folder_of(project).glob("trials/001/seed_1")))
    assert ask(project, "outcome", id="p0001")["state"] == "running"
    study.kill()
    study.wait()
    answer = ask(project, "outcome", id="p0001")
    assert answer["state"] == "running" and "no process runs study first" in answer["now"]
    assert ask(project, "status")["waiting"] == ["p0001", "p0002"]
    assert "no process runs study first" in ask(project, "propose", **bonus(0.0, 0.1))["error"]
    assert main(overrides(2, ALONE), project) == 0
    assert [t.proposal.id for t in journal_of(project).trials] == [None, "p0001", "p0002"]
    assert not list(folder_of(project).glob("checks")) and not list(folder_of(project).glob("lock"))


@pytest.mark.slow
def test_ctrl_c_works_while_the_study_waits(project):
    command = study_command(project, overrides(1, ALONE))
    study = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    said = next(line for line in study.stdout if line.startswith("waiting"))
    assert "for a proposal from outside: nightshift agent first propose" in said
    started = time.monotonic()
    study.send_signal(signal.SIGINT)
    study.communicate(timeout=20)
    assert study.returncode == 130 and time.monotonic() - started < 10
    assert len(journal_of(project)) == 1


# ---- turns ----


@pytest.mark.slow
def test_an_agent_that_says_nothing_loses_its_turn_to_the_others_once(project, capsys):
    """The second and third trials do not wait for it again."""
    sources = ["study.sources={sampler: 0.01, recipes: 0, combine: 0, simplify: 0, outside: 99}"]
    assert main(overrides(3, *sources, "study.outside_wait_s=1"), project) == 0
    assert [t.proposal.source for t in journal_of(project).trials[1:]] == ["sampler"] * 3
    said = capsys.readouterr().out
    assert said.count("no proposal from outside in 1 s: the other sources go on") == 1


@pytest.mark.slow
def test_two_agents_with_the_same_idea_at_once_cost_one_trial(project):
    """Both are checked and submitted before either has run; the second is refused at its turn."""

    def agent():
        wait_for(lambda: len(journal_of(project)) == 1)
        answers = [None, None]

        def propose(who: int) -> None:
            answers[who] = ask(project, "propose", **behave("slow"))

        threads = [threading.Thread(target=propose, args=[who]) for who in (0, 1)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        done, refused = sorted(answers, key=lambda answer: answer["state"])
        assert (done["state"], refused["state"]) == ("done", "refused")
        assert "same configuration and code as trial 1" in refused["error"]
        assert ask(project, "propose", **bonus(0.0, 0.5))["trial"] == 2

    assert with_agent(project, 2, agent, *SMALL) == 0


@pytest.mark.slow
def test_garbage_in_the_inbox_is_refused_and_the_study_goes_on(project):
    inbox = Inbox(folder_of(project))
    inbox.folder.mkdir(parents=True)
    script(project, [values(optim__matrix_lr=0.03)])
    assert main(overrides(1, ALONE), project) == 0
    garbage = ["{", "[]", '{"title": 3}', "\udcff", '{"a": ' * 5000, "null", "7" * 6000]
    for number, text in enumerate(garbage, 1):
        path = inbox.folder / f"p{number:04d}.json"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    (inbox.folder / "notes.txt").write_text("mine")
    good = inbox.submit(bonus(0.0, 0.5), journal_of(project))
    assert good == "p0008"
    assert main(overrides(2, ALONE), project) == 0
    assert [t.proposal.id for t in journal_of(project).trials] == [None, None, "p0008"]
    assert all(inbox.refusal(f"p{number:04d}") for number in range(1, 8))
    assert ask(project, "outcome", id="p0001")["state"] == "refused"


# ---- the same again, and nearly ----


@pytest.mark.slow
def test_stale_and_repeated_proposals(project):
    """Two change the same line: after the first was kept, the second has nothing to change. A
    repeat runs on other seeds."""

    def agent():
        for after in (0.5, 0.6):
            ask(project, "propose", **bonus(0.0, after, wait=False))
        stale = ask(project, "outcome", id="p0002", wait_s=300)
        assert stale["state"] == "refused" and "occurs 0 times" in stale["error"]
        loser = bonus(0.5, 0.4)
        assert ask(project, "propose", **loser)["decision"] == "discard"
        assert "say repeats: 2" in ask(project, "propose", **loser)["error"]
        assert "no such trial" in ask(project, "propose", **proposal(repeats=9))["error"]
        wrong = ask(project, "propose", **bonus(0.5, 0.2, repeats=2))["error"]
        assert "would not compute what trial 2 did" in wrong
        assert "is the incumbent" in ask(project, "propose", **bonus(0.5, 0.5, repeats=1))["error"]
        assert ask(project, "propose", **proposal(repeats=2))["trial"] == 3
        commented = bonus(0.5, "0.4  # less", title="a comment")
        said = ask(project, "propose", **commented)["error"]
        assert "same configuration and code as trial 2" in said
        assert ask(project, "propose", **bonus(0.5, 0.9))["trial"] == 4

    assert with_agent(project, 4, agent, *SMALL) == 0
    _, kept, loser, again, _ = journal_of(project).trials
    assert kept.val_bpb == pytest.approx(1.701) and loser.digest == again.digest != kept.digest
    assert (loser.seeds, again.seeds) == ([1], [2])
    assert again.proposal.repeats == 2 and again.gain == pytest.approx(-0.1)
    assert again.val_bpb == pytest.approx(1.802)


@pytest.mark.slow
def test_what_differs_in_names_and_comments_alone_has_to_say_what_is_new(project):
    add = "BONUS = 0.0\n\ndef bonus(x):\n    return x\n"
    renamed = "BONUS = 0.0\n\n# nothing\ndef gain(y):\n    '''Of y.'''\n    return y\n"

    def agent():
        assert ask(project, "propose", **proposal("BONUS = 0.0\n", add))["trial"] == 1
        said = ask(project, "propose", **proposal("BONUS = 0.0\n", renamed))["error"]
        assert "much like trial 1" in said and "gain +0.0000" in said and "`differs`" in said
        more = {"differs": "Another name, for the sake of it."}
        answer = ask(project, "propose", **proposal("BONUS = 0.0\n", renamed, **more))
        assert answer["trial"] == 2 and answer["near"] == [1]

    assert with_agent(project, 2, agent) == 0
    assert journal_of(project).trials[2].proposal.near == [1]


# ---- mistakes, and what has no place here ----


def told(project: Path, capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert shell.main(list(argv), project) == 2
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    return json.loads(out)


def test_mistakes_on_the_command_line_are_one_json_line(
    study_that_waits, tmp_path, capsys, monkeypatch
):
    project = study_that_waits
    assert "there is no such study" in told(tmp_path, capsys, "first", "status")["error"]
    for argv, words in [
        (["first"], "give a study, a tool"),
        (["first", "status", "{}", "x"], "give a study, a tool"),
        (["frist", "status"], "Nearest: first. Studies: first."),
        (["../first", "status"], "there is no such study"),
        (["first", "stats"], "Nearest: status."),
        (["first", "propose", "{"], "not JSON"),
        (["first", "propose", "[" * 100_000], "not JSON"),
        (["first", "propose", "[1]"], "valid dictionary"),
        (["first", "propose", "x" * 1_000_001], "more than 1000000 characters"),
        (["first", "outcome", '{"id": "../../x"}'], "String should match pattern"),
        (["first", "outcome", '{"id": "p0007"}'], "no such proposal; there is none yet"),
        (["first", "read_file", '{"path": "/etc/passwd"}'], "is not editable"),
        (["first", "propose", json.dumps(bonus(0.0, 1.0))], "no process runs study first"),
    ]:
        assert words in told(project, capsys, *argv)["error"], argv
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    assert "not JSON" in told(project, capsys, "first", "propose", "-")["error"]
    assert shell.main(["--help"], project) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name}: " in shown for name in outside.TOOLS)


@pytest.mark.slow
def test_a_study_that_asks_no_outside_agent_says_so(project):
    assert main(overrides(0), project) == 0
    assert "study.sources.outside is 0" in ask(project, "propose", **bonus(0.0, 1.0))["error"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edits": [{"path": "src/nightshift/fixed/evaluate.py", "search": "a", "replace": ""}]},
         "is not editable"),
        ({"edits": [{"path": "../../../x.py", "search": "a", "replace": "b"}]}, "is not editable"),
        ({"overrides": {"seed": 3}}, "not editable"),
        ({"overrides": {"optim.matrix_lr": float("nan")}}, "cannot be written down"),
        ({"overrides": {"optim.matrix_lr": -1}}, "optim.matrix_lr"),
        ({"overrides": {"optim.matrix_lr": "${oc.env:HOME}"}}, "optim.matrix_lr"),
        ({"source": "baseline", "overrides": {"optim.matrix_lr": 0.03}}, "source"),
        ({"id": "p0001", "overrides": {"optim.matrix_lr": 0.03}}, "id"),
        ({}, "changes nothing"),
    ],
)  # fmt: skip
def test_there_is_no_way_around_the_workspace(study_that_waits, change, words):
    project = study_that_waits
    answer = ask(project, "propose", **{**proposal(wait=False), **change})
    assert words in answer["error"]
    assert not Inbox(folder_of(project)).ids(), "nothing was submitted"


@pytest.fixture(scope="module")
def study_that_waits(tmp_path_factory) -> Path:
    """It has room for a trial; no process runs it."""
    project = make_project(tmp_path_factory.mktemp("waits") / "project")
    assert main(overrides(0, ALONE), project) == 0
    path = folder_of(project) / "settings.json"
    settings = json.loads(path.read_text())
    settings["study"]["trials"] = 5
    path.write_text(json.dumps(settings))
    return project


# ---- the inbox itself ----


def test_many_who_submit_at_once_get_ids_of_their_own_and_nothing_is_lost(tmp_path):
    inbox, journal, ids = Inbox(tmp_path), Journal(tmp_path / "journal.jsonl"), []

    def submit(who: int) -> None:
        for n in range(6):
            ids.append((inbox.submit({"who": who, "n": n}, journal), who, n))

    threads = [threading.Thread(target=submit, args=[who]) for who in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert inbox.ids() == [f"p{n:04d}" for n in range(1, 49)]
    assert {(name, *inbox.read(name).values()) for name, _, _ in ids} == set(ids)
    assert [path.name for path in inbox.folder.iterdir() if path.name.startswith(".")] == []
    for _ in range(MAX_WAITING - 48):
        inbox.submit({}, journal)
    with pytest.raises(Full, match="50 proposals wait already"):
        inbox.submit({}, journal)


def test_a_reader_leaves_a_line_that_is_being_written_alone(study_that_waits):
    path = folder_of(study_that_waits) / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])
    assert len(Journal(path, repair=False)) == 1
    assert ask(study_that_waits, "status")["trials"] == 0
    assert path.read_bytes() == whole + whole[:50]
    path.write_bytes(whole)
