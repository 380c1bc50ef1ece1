"""The real pipeline, small, with an outside agent as the researcher: by MCP and by command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_end_to_end import SMALL, clone, environment  # noqa: F401
from test_outside import without_times

from agent.journal import Journal

pytestmark = pytest.mark.slow

PROPOSAL = {
    "title": "warm up",
    "hypothesis": "A short warm-up keeps the first steps from going too far.",
    "expected_effect": "a little, for no cost",
    "overrides": {"schedule.warmup_frac": 0.05},
}
CODE = PROPOSAL | {
    "title": "RMS norm with a larger epsilon",
    "overrides": {},
    "edits": [{"path": "src/nightshift/optim.py", "search": "", "replace": ""}],
}


def nightshift(clone, *command, **more):  # noqa: F811
    command = [sys.executable, "-m", "nightshift.cli", *command]
    return subprocess.Popen(
        command, cwd=clone, env=environment(clone), stdout=subprocess.PIPE, text=True, **more
    )


def answer_of(clone, *command) -> dict:  # noqa: F811
    return json.loads(nightshift(clone, "agent", *command).communicate()[0])


def started(clone, name: str):  # noqa: F811
    """A study that waits for its first proposal."""
    process = nightshift(
        clone, "study", f"study.name={name}", "study.trials=2", "sources=outside",
        "study.baseline_seeds=[1,2]", *SMALL,
    )  # fmt: skip
    assert any(line.startswith("waiting for a proposal") for line in process.stdout)
    return process


def by_mcp(clone, name: str) -> list[dict]:  # noqa: F811
    import anyio
    from mcp import Client, StdioServerParameters, stdio_client

    async def drive():
        server = StdioServerParameters(
            command=sys.executable,
            args=["-m", "nightshift.cli", "mcp", name],
            env=environment(clone),
            cwd=clone,
        )
        async with Client(stdio_client(server)) as client:
            program = (await client.call_tool("program", {})).structured_content["text"]
            assert program.startswith("# The research programme")
            return [
                (await client.call_tool("propose", values)).structured_content
                for values in proposals(clone)
            ]

    return anyio.run(drive)


def by_command_line(clone, name: str) -> list[dict]:  # noqa: F811
    return [answer_of(clone, name, "propose", json.dumps(v)) for v in proposals(clone)]


def proposals(clone) -> list[dict]:  # noqa: F811
    """A value; a code change that is refused, for its text is not there; one that applies."""
    line = next(
        line
        for line in (clone / "src/nightshift/schedule.py").read_text().splitlines(keepends=True)
        if line.strip().startswith("return ")
    )
    edit = {"path": "src/nightshift/schedule.py", "search": line, "replace": line * 2}
    return [PROPOSAL, CODE, CODE | {"edits": [edit]}]


def test_the_real_pipeline_gives_the_same_journal_by_mcp_and_by_command_line(clone):  # noqa: F811
    journals, answers = [], []
    for name, drive in (("mcp", by_mcp), ("shell", by_command_line)):
        study = started(clone, name)
        answers.append(drive(clone, name))
        assert study.wait(60) == 0, study.communicate()[0]
        trials = Journal(clone / f"outputs/studies/{name}/journal.jsonl").trials
        journals.append([without_times(trial) for trial in trials])
    for one, other in zip(*journals, strict=True):
        assert one == other, "to the last digit"
    assert [len(each) for each in journals] == [3, 3]
    for given in answers:
        assert [answer.get("state") for answer in given] == ["done", None, "done"]
        assert given[0]["status"] == "ok" and "edits.0.search" in given[1]["error"]


def test_a_server_killed_in_mid_trial_loses_nothing(clone):  # noqa: F811
    """The MCP server dies with -9 while its client waits; the trial ends, and is answered."""
    study = started(clone, "killed")
    server = nightshift(clone, "mcp", "killed", stdin=subprocess.PIPE)
    send = lambda **message: print(json.dumps({"jsonrpc": "2.0", **message}), file=server.stdin)  # noqa: E731
    about = {"protocolVersion": "2025-06-18", "capabilities": {}}
    send(id=1, method="initialize", params=about | {"clientInfo": {"name": "t", "version": "1"}})
    send(method="notifications/initialized")
    send(id=2, method="tools/call", params={"name": "propose", "arguments": PROPOSAL})
    server.stdin.flush()
    deadline = time.monotonic() + 120
    while not list((clone / "outputs/studies/killed/trials").glob("001/seed_1")):
        assert time.monotonic() < deadline, "the trial never began"
        time.sleep(0.05)
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    answer = answer_of(clone, "killed", "outcome", '{"id": "p0001", "wait_s": 120}')
    assert (answer["state"], answer["trial"], answer["trials_left"]) == ("done", 1, 1)
    study.send_signal(signal.SIGINT)
    assert study.wait(30) == 130
    answer = answer_of(clone, "killed", "propose", json.dumps(PROPOSAL))
    assert "no process runs study killed" in answer["error"]
