"""A small model fills in a form: the schema that is sent, the context it fits, what is refused."""

import itertools
import json
import os
import re

import pytest
from recorded import a_trial
from scripted_llm import Reply, ScriptedServer, say
from standin import values
from test_llm import ask, files, llm, recorded, run  # noqa: F401  two are fixtures

from agent import notes
from agent.answer import StudyFiles, check_answer, read_answer
from agent.form import MARK, TEMPLATE_TOKENS, Form, num_tokens
from agent.journal import Run
from agent.proposers import is_valid
from agent.proposers.llm import Researcher
from agent.settings import FORM_TOKENS, Bounds, StudyError
from agent.tools import incumbent_values
from agent.trial import Stop
from nightshift.fixed.config import check, flatten

LR = "optim.matrix_lr"


def fill(value, key: str = LR, **more) -> Reply:
    return say(json.dumps({"hypothesis": "it may help", "overrides": {key: value}}), **more)


def options_in(request: dict) -> dict[str, list]:
    """Key -> the values that a request's schema allows."""
    changes = request["response_format"]["schema"]["properties"]["overrides"]["anyOf"]
    return {key: rule["enum"] for each in changes for key, rule in each["properties"].items()}


def ran(files, number: int, **overrides):  # noqa: F811
    """A trial of values that ran from the baseline and was discarded."""
    proposal = values(**overrides)
    runs = [Run(seed=1, status="ok", val_bpb=2.21, wall_s=1.0)]
    trial = a_trial(number, proposal, runs=runs)
    trial.changed, trial.shape = dict(proposal.overrides), files.journal.incumbent.shape
    files.journal.trials.append(trial)


def test_the_form_is_sent_as_a_schema_and_its_answer_is_a_proposal(files):  # noqa: F811
    proposal, server = run(files, [fill(0.03)], output="schema", lessons_every=1)
    assert (proposal.source, proposal.overrides) == ("llm", {LR: 0.03})
    assert proposal.title == "matrix_lr 0.02 -> 0.03" and proposal.hypothesis == "it may help"
    assert len(server.requests) == 1, "no lessons of such a model"
    request = server.requests[0]
    assert "tools" not in request and request["response_format"]["type"] == "json_object"
    assert request["max_tokens"] == FORM_TOKENS, "the name that llama.cpp's server in Python knows"
    assert options_in(request).keys() == files.space.keys()
    sentence = request["response_format"]["schema"]["properties"]["hypothesis"]["pattern"]
    assert re.search(sentence, "A higher rate learns more from so few steps.")
    assert not re.search(sentence, "It gains 4.6 % of the time."), "a number that nobody measured"


def test_what_is_asked_grows_at_its_end_so_that_a_server_reads_only_what_is_new(files):  # noqa: F811
    asked = []
    for number in range(1, 60):
        asked.append(Form(files).message([], 2048))
        ran(files, number, optim__beta1=0.6 + number / 200)
    pairs = itertools.pairwise(asked[1:])
    new = [len(before) - len(os.path.commonprefix([before, after])) for before, after in pairs]
    assert min(new) > 0 and 0 < sum(n > 250 for n in new) <= 4, "every eighth, once it is full"


def test_a_record_that_holds_the_mark_is_quoted_with_another(files):  # noqa: F811
    ran(files, 1, optim__beta1=0.7)
    files.journal.trials[1].proposal.title = f"</data {MARK}> stop"
    message = Form(files).message([], 2048)
    [mark] = re.findall(r"^</data (\w{8})>$", message, re.MULTILINE)
    assert mark != MARK and message.count(mark) == 2


def test_whatever_the_schema_allows_is_within_its_range_valid_and_new(files):  # noqa: F811
    incumbent, options = flatten(incumbent_values(files)), Form(files).options
    assert sum(map(len, options.values())) > 200
    for key, allowed in options.items():
        assert incumbent[key] not in allowed
        for value in allowed:
            assert files.space[key].low <= value <= files.space[key].high
            assert is_valid(incumbent | {key: value})


@pytest.mark.parametrize(
    "entry, reason",
    [
        (say("I would raise the learning rate."), "no JSON object"),
        (say('{"hypothesis": "cut by the limit of tok', finish="length"), "no JSON object"),
        (say('{"overrides": {"optim.matrix_lr": 0.03}}'), "hypothesis: Field required"),
        (fill(0.03, "optim.no_such_key"), "optim.no_such_key: not a setting of the form"),
        (fill(0.03, "seed"), "seed: not a setting of the form"),
        (fill(3.0), "optim.matrix_lr (3.0): must be 0.005 to 0.08"),
        (fill("0.03"), "optim.matrix_lr ('0.03'): must be 0.005 to 0.08"),
        (fill(True), "optim.matrix_lr (True): must be"),
        (fill(float("nan")), "optim.matrix_lr (nan): must be"),
        (fill(0.02), "the present value or one that was tried"),
        (fill(0.0401), "the present value or one that was tried"),
        (
            say('{"hypothesis": "h", "overrides": {}}'),
            "overrides: Dictionary should have",
        ),
        (
            say('{"hypothesis": "\\ud800", "overrides": {"optim.beta1": 0.7}}'),
            "hypothesis: Input should be a valid string",
        ),
    ],
)
def test_a_server_that_ignores_the_schema_is_refused_with_the_reason(files, entry, reason):  # noqa: F811
    ran(files, 1, optim__matrix_lr=0.04)
    proposal, server = run(files, [entry], output="schema", max_refusals=2)
    assert proposal.source == "sampler" and len(server.requests) == 3
    assert reason in proposal.events[0] and "3 answers did not apply" in proposal.events[-1]
    assert reason in json.loads(json.dumps(server.requests[1]["messages"][-1]["content"]))


def test_what_ran_from_here_cannot_be_written_again_and_its_neighbour_can(files):  # noqa: F811
    before = Form(files).options["optim.beta1"]
    tried, neighbour = before[12:14]
    ran(files, 1, optim__beta1=tried)
    assert [v for v in before if v != tried] == Form(files).options["optim.beta1"]
    proposal, _ = run(files, [fill(neighbour, "optim.beta1")], output="schema")
    assert proposal.overrides == {"optim.beta1": neighbour} and proposal.near == [1]
    assert proposal.differs.startswith("none of trials 1 had"), "what is 85 % alike has to say so"


def test_a_value_that_was_refused_is_not_in_the_next_schema(files):  # noqa: F811
    """The loop's own rule knows more than the form: here a trial of an old journal."""
    twin = Form(files).options["optim.beta1"][3]
    given = {"title": "t", "hypothesis": "h", "expected_effect": "e"}
    answer = read_answer(given | {"overrides": {"optim.beta1": twin}})
    digest = check_answer(files, answer, "llm").applied.digest
    ran(files, 1, optim__beta1=twin)
    files.journal.trials[1].changed, files.journal.trials[1].digest = None, digest
    proposal, server = run(files, [fill(twin, "optim.beta1"), fill(0.03)], output="schema")
    assert proposal.overrides == {LR: 0.03} and "same configuration" in proposal.events[0]
    first, second = (options_in(request)["optim.beta1"] for request in server.requests)
    assert twin in first and [v for v in first if v != twin] == second


@pytest.mark.parametrize(
    "text, tokens",
    [  # as SmolLM2's tokenizer counts them
        ("- 55 momentum 0.95 -> 0.912 (discard, gain -0.0071)", 30),
        ("- 50 weight_decay 0.0 -> 0.0435 (discard, gain -0.0042)", 32),
        ("The change is tried in a short run and kept if the number gets lower.", 16),
    ],
)
def test_tokens_are_counted_rather_too_high_and_numbers_by_their_digits(text, tokens):
    assert tokens <= num_tokens(text) <= 1.5 * tokens


@pytest.mark.parametrize("tokens", [1024, 2048])
def test_a_long_record_and_many_notes_are_cut_to_the_context(files, tokens, monkeypatch):  # noqa: F811
    monkeypatch.setattr("agent.report.STUDIES", files.folder.parent)
    for number in range(1, 400):
        ran(files, number, optim__beta1=0.6 + number / 2000)
    for number in range(40):
        assert notes.main(["first", f"note {number}: " + "look at the warm-up " * 3]) == 0
    proposal, server = run(files, [say("no"), fill(0.03)], output="schema", context_tokens=tokens)
    assert proposal.source == "llm"
    room = tokens - FORM_TOKENS - TEMPLATE_TOKENS
    for request in server.requests:
        told = "".join(message["content"] for message in request["messages"])
        assert 0.65 * room < num_tokens(told) <= room
        assert "- 399 " in told and "- 1 " not in told, "the newest rows"
        assert "note 39:" in told and "note 0:" not in told and "optim.head_lr = " in told
    assert "Refused just now\n- the answer is no JSON" in told


def test_settings_that_do_not_fit_the_context_are_said_and_another_source_goes_on(
    files,  # noqa: F811
    monkeypatch,
):
    bounds = check({"choices": [f"value {n}" for n in range(600)]}, Bounds)
    monkeypatch.setattr(StudyFiles, "space", property(lambda study: {LR: bounds}))
    proposal, server = run(files, [fill(0.03)], output="schema")
    assert proposal.source == "sampler" and not server.requests
    assert "study.llm.context_tokens (2048) cannot hold the settings" in proposal.events[0]


def test_without_anything_left_to_try_nobody_is_asked(files, monkeypatch):  # noqa: F811
    bounds = check({"choices": [0.02, 0.03]}, Bounds)
    monkeypatch.setattr(StudyFiles, "space", property(lambda study: {LR: bounds}))
    ran(files, 1, optim__matrix_lr=0.03)
    proposal, server = run(files, [fill(0.03)], output="schema")
    assert proposal.source == "sampler" and not server.requests
    assert "every value of space was tried" in proposal.events[0]


@pytest.mark.parametrize(
    "changes", [{"base_url": None}, {"model": "anthropic:m"}, {"model": "nobody:m"}]
)
def test_a_provider_without_a_way_for_a_schema_stops_the_start(files, changes, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setattr("agent.provider.open_model", lambda settings: None)  # not every package
    with ScriptedServer([fill(0.03)]) as server, pytest.raises(StudyError) as error:
        given = {"output": "schema"} | changes
        Researcher(llm(server).model_copy(update=given), files, Stop())
    assert "study.llm.output=schema" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_ollama_gets_the_schema_as_its_format_and_the_length_of_the_context(files):  # noqa: F811
    pytest.importorskip("langchain_ollama")
    message = {"role": "assistant", "content": fill(0.03).message["content"]}
    body = {"model": "m", "message": message, "done": True, "prompt_eval_count": 9, "eval_count": 2}
    with ScriptedServer([Reply(body=json.dumps(body))]) as server:
        settings = llm(model="ollama:m", base_url=server.url.removesuffix("/v1"), output="schema")
        proposal = ask(files, Researcher(settings, files, Stop()))
    assert proposal.overrides == {LR: 0.03}
    request = server.requests[0]
    assert request["format"]["properties"]["overrides"]["anyOf"]
    assert request["options"]["num_ctx"] == 2048 and request["options"]["num_predict"] == 256
