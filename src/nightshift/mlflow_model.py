"""A checkpoint as a registered MLflow model that answers chats.

    python -m nightshift.mlflow_model champion --name nightshift --alias champion
    mlflow models serve -m models:/nightshift@champion --env-manager local

    model = mlflow.pyfunc.load_model("models:/nightshift@champion")
    model.predict({"messages": [{"role": "user", "content": "Hello"}]})

The model's folder carries the checkpoint, the model.py that belongs to it, this package's code and
a card. Nothing in it is a pickle: MLflow runs mlflow_entry.py. Loading needs the libraries that
nightshift needs, not this checkout. Input and output are OpenAI's chat completion; the rows of a
data frame are answered in one batch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow.pyfunc import PythonModel

from nightshift import catalogue, export
from nightshift.fixed import checkpoint
from nightshift.fixed.config import ConfigError, Tracking
from nightshift.fixed.tokenizer import Tokenizer

LIBRARIES = ("mlflow", "numpy", "pyarrow", "pydantic", "pyyaml", "regex", "rustbpe")
LIBRARIES += ("safetensors", "tiktoken", "torch", "psutil")
EXAMPLE = {"messages": [{"role": "user", "content": "Hello! Who are you?"}]}
# Names, types and defaults of what a request may set beside its messages. -1: not set.
SETTINGS = (
    ("temperature", "double", 0.8),
    ("top_p", "double", 1.0),
    ("max_tokens", "long", 128),
    ("seed", "long", -1),
)
MAX_DESCRIPTION_CHARS = 5000  # of a version, in MLflow's database
CODE_FILE, CARD_FILE = "model.py", "CARD.md"


class ChatFunction(PythonModel):
    """What MLflow loads and asks."""

    def load_context(self, context) -> None:
        from nightshift.generate import Engine

        folder = Path(context.artifacts["checkpoint"])
        source = Path(context.artifacts["code"]).read_text(encoding="utf-8")
        tokenizer = Tokenizer.load(folder / "tokenizer")
        shape = catalogue.read_shape(folder)
        model = catalogue.model_class(source)(shape, tokenizer.vocab_size)
        checkpoint.load_weights(model, folder)
        self.engine = Engine(model, tokenizer)

    def predict(self, context, model_input, params: dict[str, Any] | None = None):
        """A chat completion for a dict, a list of them for a data frame. Raises ValueError."""
        if isinstance(model_input, dict):
            return self.answers([model_input["messages"]], params or {})[0]
        found = self.answers([list(row) for row in model_input["messages"]], params or {})
        return found[0] if len(found) == 1 else found

    def answers(self, conversations: Sequence[list[dict]], params: dict[str, Any]) -> list[dict]:
        from nightshift.generate import Sampling
        from nightshift.openai_api import Answer, ApiError, ChatRequest, chat_prompt, check_length

        settings = {name: params.get(name, default) for name, _, default in SETTINGS}
        seed = None if settings["seed"] < 0 else settings["seed"]
        try:
            requests = [ChatRequest(messages=[*map(dict, each)]) for each in conversations]
            prompts = [chat_prompt(request, self.engine.tokenizer) for request in requests]
            check_length(prompts, self.engine.seq_len, "messages")
        except ApiError as error:
            raise ValueError(error.message) from None
        said = self.engine.generate(prompts, Sampling(**settings | {"seed": seed}))
        found = []
        for prompt, completion in zip(prompts, said, strict=True):
            frame = Answer(True, "nightshift", len(prompt), len(completion.tokens))
            choice = frame.choice(0, completion.text, completion.finish, None)
            del choice["logprobs"], choice["message"]["refusal"]
            body = frame.body([choice])
            del body["system_fingerprint"]
            found.append(body)
        return found


def signature():
    """Messages in, a chat completion out; MLflow checks both."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.llm import CHAT_MODEL_OUTPUT_SCHEMA
    from mlflow.types.schema import Array, Object, Property

    message = Object([Property("role", DataType.string), Property("content", DataType.string)])
    inputs = Schema([ColSpec(name="messages", type=Array(message))])
    params = [ParamSpec(name, DataType[kind], default) for name, kind, default in SETTINGS]
    return ModelSignature(inputs, CHAT_MODEL_OUTPUT_SCHEMA, ParamSchema(params))


def register(
    folder: Path,
    name: str = "nightshift",
    alias: str | None = "champion",
    tracking: Tracking | None = None,
    card: str | None = None,
    tags: dict[str, str] | None = None,
    run_id: str | None = None,
) -> str:
    """Logs the checkpoint in `folder` as a version of the model `name`; returns the version.

    The alias moves to it. `run_id`: of the MLflow run that it belongs to, which stays open; else a
    new one. Raises ConfigError.
    """
    from nightshift.fixed.tracking import load_tracking, open_store

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

    tracking = tracking or load_tracking()
    if not tracking.enabled:
        raise ConfigError("tracking=off: a model is registered in MLflow's store; leave it on")
    store = open_store(tracking)
    known = catalogue.facts(folder)
    card = card or _card(folder)
    if run_id:
        return _log_version(store, run_id, folder, name, alias, card, tags or {})
    log = store.start(
        f"register {name}", "model", tags={"commit": known.get("commit")}, strict=True
    )
    ended = "FAILED"
    try:
        found = _log_version(store, log.run_id, folder, name, alias, card, tags or {})
        log.metrics({key: known[key] for key in ("val_bpb", "chat_bpb")})
        ended = "FINISHED"
        return found
    finally:
        log.close(ended)


def _log_version(store, run_id: str, folder: Path, name: str, alias, card: str, tags: dict) -> str:
    import mlflow

    from nightshift.fixed.tracking import reported

    with reported(store.uri):
        mlflow.set_tracking_uri(store.uri)
        mlflow.set_registry_uri(store.uri)
        with mlflow.start_run(run_id=run_id):
            info = _log_model(folder, name, card)
        found = str(info.registered_model_version)
        _describe(store.client, name, found, folder, card, tags)
        if alias:
            store.client.set_registered_model_alias(name, alias, found)
    return found


def _log_model(folder: Path, name: str, card_text: str):
    import tempfile

    import mlflow

    package = Path(__file__).parent
    with tempfile.TemporaryDirectory() as place:
        code, card = Path(place, CODE_FILE), Path(place, CARD_FILE)
        code.write_text(catalogue.model_source(folder), encoding="utf-8")
        card.write_text(card_text, encoding="utf-8")
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "mlflow_entry.py"),
            artifacts={"checkpoint": str(folder), "code": str(code), "card": str(card)},
            code_paths=[str(package)],
            signature=signature(),
            input_example=EXAMPLE,
            pip_requirements=requirements(),
            registered_model_name=name,
            await_registration_for=60,
        )


def requirements() -> list[str]:
    """Exact versions; without the local part, for the public index has no 2.13.0+cpu."""
    return [f"{library}=={version(library).split('+')[0]}" for library in LIBRARIES]


def _card(folder: Path) -> str:
    return export.facts_table(folder, Tokenizer.load(folder / "tokenizer"))


def _describe(client, name: str, version: str, folder: Path, card: str, tags: dict) -> None:
    client.update_registered_model(
        name, "A language model of nightshift's: chat messages in, an answer out."
    )
    client.update_model_version(name, version, card[:MAX_DESCRIPTION_CHARS])
    numbers = {key: catalogue.facts(folder)[key] for key in ("val_bpb", "chat_bpb")}
    found = {key: f"{value:.6f}" for key, value in numbers.items() if value is not None}
    for key, value in (found | tags).items():
        client.set_model_version_tag(name, version, key, value)


def main(arguments: list[str]) -> int:
    from nightshift.fixed.tracking import load_tracking

    parser = argparse.ArgumentParser(
        prog="nightshift.mlflow_model", description=__doc__.split("\n")[0]
    )
    parser.add_argument("checkpoint", help="champion, first/4, sft/latest or a folder")
    parser.add_argument("--name", default="nightshift", help="of the model (%(default)s)")
    parser.add_argument("--alias", default="champion", help="that moves to it (%(default)s)")
    parser.add_argument("overrides", nargs="*", help="tracking.uri=...")
    parser.add_argument("--card", type=Path, help="a Markdown file; else a table of its facts")
    parser.add_argument("--run", help="id of the MLflow run that it belongs to; else a new one")
    parser.add_argument("--tag", action="append", default=[], help="key=value of the version")
    args = parser.parse_args(arguments)
    try:
        folder = catalogue.find(args.checkpoint).folder
        card = args.card and args.card.read_text(encoding="utf-8")
        tags = dict(tag.split("=", 1) for tag in args.tag)
        tracking = load_tracking(args.overrides)
        found = register(folder, args.name, args.alias, tracking, card, tags, args.run)
    except (ConfigError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"models:/{args.name}/{found}")
    print(f"models:/{args.name}@{args.alias}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
