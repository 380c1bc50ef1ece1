"""The registered model answers chats through MLflow's own calls, without this checkout."""

import json
import os
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request

import pytest
import tiny_checkpoint

from nightshift import catalogue, mlflow_model
from nightshift.fixed import checkpoint, conversation
from nightshift.fixed.config import ConfigError, Tracking
from nightshift.generate import Engine, Sampling

HELLO = [{"role": "user", "content": "Hello"}]
LONGER = {"model.seq_len": 64, "train.batch_tokens": 256}
SETTINGS = {"max_tokens": 6, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("mlflow")
    return tiny_checkpoint.make(work / "run", work, val_bpb=1.7, **LONGER)


@pytest.fixture(scope="module")
def said(folder) -> str:
    """What the engine itself answers."""
    model, tokenizer, _ = checkpoint.load(folder)
    prompt = conversation.prompt(HELLO, tokenizer)
    return Engine(model, tokenizer).generate([prompt], Sampling(**SETTINGS))[0].text


@pytest.fixture
def function(folder, tmp_path):
    code = tmp_path / "model.py"
    code.write_text(catalogue.model_source(folder))
    function = mlflow_model.ChatFunction()
    artifacts = {"checkpoint": str(folder), "code": str(code)}
    function.load_context(types.SimpleNamespace(artifacts=artifacts))
    return function


def test_a_chat_is_answered_as_the_engine_would(function, said):
    body = function.predict(None, {"messages": HELLO}, SETTINGS)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": said}
    assert body["usage"]["completion_tokens"] == 6
    rows = {"messages": [HELLO, HELLO]}
    assert len(function.answers(rows["messages"], SETTINGS)) == 2


def test_what_is_no_conversation_is_one_line(function):
    with pytest.raises(ValueError, match="cannot follow the beginning"):
        function.predict(None, {"messages": [{"role": "assistant", "content": "x"}]})
    with pytest.raises(ValueError, match="maximum context length"):
        function.predict(None, {"messages": [{"role": "user", "content": "x" * 500}]})


def test_what_the_model_needs_can_be_asked_of_the_public_index():
    """A local build's name (2.13.0+cpu) is not there."""
    needed = mlflow_model.requirements()
    assert any(line.startswith("torch==2.") for line in needed)
    assert not [line for line in needed if "+" in line or "==" not in line]


def test_without_tracking_there_is_nowhere_to_register(folder):
    off = Tracking(enabled=False, uri=None, experiment="x")
    with pytest.raises(ConfigError, match="tracking=off"):
        mlflow_model.register(folder, tracking=off)


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory) -> str:
    """The URI of a store in which the checkpoint was registered twice."""
    place = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{place}/mlflow.db"
    tracking = Tracking(enabled=True, uri=uri, experiment="nightshift")
    known = {"card": "# A card", "tags": {"dvc_md5": "0a1b.dir"}}
    versions = [
        mlflow_model.register(folder, "tiny", "champion", tracking, **more) for more in ({}, known)
    ]
    assert versions == ["1", "2"]
    return uri


def elsewhere(store: str) -> dict[str, str]:
    """An environment that knows nothing of this checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW"))}
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # MLflow starts uvicorn
    return kept | {"PATH": path, "MLFLOW_TRACKING_URI": store, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_alias_the_card_and_the_numbers_are_in_the_registry(store):
    from mlflow import MlflowClient

    client = MlflowClient(store, store)
    version = client.get_model_version_by_alias("tiny", "champion")
    assert version.version in (2, "2")
    assert version.tags["val_bpb"] == "1.700000" and version.description == "# A card"
    assert version.tags["dvc_md5"] == "0a1b.dir"
    assert "| val_bpb" in client.get_model_version("tiny", "1").description
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["val_bpb"] == 1.7


PROGRAM = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model("models:/tiny@champion")
messages = [{"role": "user", "content": "Hello"}]
print(json.dumps(model.predict({"messages": messages}, params={"max_tokens": 6, "seed": 1})))
print(sys.modules["nightshift"].__file__)
"""


@pytest.mark.slow
def test_plain_mlflow_loads_it_with_its_own_code(store, said, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=elsewhere(store),
    )
    assert done.returncode == 0, done.stderr
    body, place = done.stdout.strip().splitlines()[-2:]
    assert json.loads(body)["choices"][0]["message"]["content"] == said
    assert "/artifacts/code/nightshift/" in place


@pytest.mark.slow
def test_mlflow_models_serve_answers_openai_s_request(store, said, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/tiny@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    log = open(tmp_path / "log", "w")
    server = subprocess.Popen(
        command, cwd=tmp_path, env=elsewhere(store), stdout=log, stderr=log, start_new_session=True
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", server)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"messages": HELLO} | SETTINGS).encode(),
            {"Content-Type": "application/json"},
        )
        body = json.load(urllib.request.urlopen(request, timeout=60))
        assert body["choices"][0]["message"]["content"] == said
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)


def wait_for(address: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError("mlflow models serve did not start")
