"""The settings of a study: conf/study.yaml and the command line -> one checked `Plan`.

The composed configuration has three parts: `study` and `space` belong to the loop and are checked
here; the rest is the pipeline's configuration, which fixed/config.py checks as it does for any run.
"""

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from agent.decide import Rule
from agent.end import End
from agent.proposers import mixed, recipes
from agent.target import TARGETS, Target
from nightshift.fixed.config import (
    Config,
    ConfigError,
    Group,
    check,
    flatten,
    nearest,
    require_corpus,
)

FORM_TOKENS = 256  # of an answer that is a form (agent/form.py): it has a sentence and a value
ONE_HYDRA = threading.Lock()  # it composes for one thread at a time; a check may run beside a trial
HARNESS_KEYS = (
    "parent_run_id",
    "run_name",
    "resume",
    "runtime",
    "sandbox",
    "tracking",
)  # not what is learned
# When a study is started again:
MAY_CHANGE = (
    "trials",
    "hours",
    "warm",
    "keep_checkpoints",
    "llm",
    "outside_wait_s",
    "strategy",  # says what is tried next, and nothing of what was tried
    "plateau_after",
    "early_stop",
    "ladder",
)


class StudyError(RuntimeError):
    """The study cannot start or go on; the message is one line that says why and the next move."""


class Bounds(Group):
    """What the sampler may do to one key: a range, or a list of values."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False  # equal steps are equal ratios
    choices: list[Any] | None = None

    @property
    def rule_broken(self) -> str | None:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                return "has both choices and a range; give {choices: [...]} or {low: ., high: .}"
            if len(self.choices) < 2:
                return f"has choices {self.choices}; there must be at least two to choose from"
        elif self.low is None or self.high is None:
            return "needs {low: ., high: .} or {choices: [...]}"
        elif self.low >= self.high:
            return f"has low {self.low} and high {self.high}; low must be below high"
        elif self.log and self.low <= 0:
            return f"has log: true and low {self.low}; a logarithmic range starts above 0"
        return None


class Caps(Group):
    """The most that may be spent, in dollars or tokens; null: no cap. See agent/costs.py."""

    call: int | float | None = Field(gt=0)
    trial: int | float | None = Field(gt=0)
    study: int | float | None = Field(gt=0)


class Price(Group):
    """Dollars per million tokens."""

    input: int | float = Field(ge=0)
    output: int | float = Field(ge=0)


class LlmSettings(Group):
    """The language model that proposes (agent/proposers/llm.py); unused while its share is 0."""

    model: str | None  # provider:name
    base_url: str | None
    temperature: float | None = Field(ge=0, le=2)
    output: Literal["tools", "schema"] = "tools"
    context_tokens: int = Field(default=2048, ge=1024)  # with output=schema
    max_output_tokens: int = Field(ge=256)
    timeout_s: float = Field(gt=0)  # for one answer, to its last byte
    max_retries: int = Field(ge=0, le=20)
    max_wait_s: float = Field(ge=0)
    max_calls: int = Field(ge=1, le=100)
    ahead: bool | None = None  # of trial n + 1 while trial n runs; null: if `is_elsewhere`
    max_refusals: int = Field(ge=0, le=20)
    lessons_every: int = Field(ge=0)
    price: Price | None
    cap_dollars: Caps
    cap_tokens: Caps
    trace: bool

    @property
    def is_elsewhere(self) -> bool:
        """Is it served by another machine, by its address? One that shares the trial's GPU or cores
        slows the trial, which a budget in seconds and the limit of work (trial.py) would hold
        against it."""
        if self.base_url is None:
            return str(self.model).split(":")[0] != "ollama"
        return urlsplit(self.base_url).hostname not in ("localhost", "127.0.0.1", "::1")

    @property
    def thinks_ahead(self) -> bool:
        return self.is_elsewhere if self.ahead is None else self.ahead

    @property
    def longest_answer(self) -> int:
        """Tokens."""
        return FORM_TOKENS if self.output == "schema" else self.max_output_tokens


class StudySettings(Group):
    """How the pipeline is searched (conf/study.yaml)."""

    name: str
    target: Literal["val_bpb", "chat_bpb"]
    trials: int | None = Field(ge=0)
    hours: float | None = Field(default=None, gt=0)
    seed: int = Field(ge=0)
    baseline_seeds: list[int]
    max_seeds: int
    false_keeps: float = Field(gt=0, le=100)
    equal_within: float = Field(ge=0, le=2)
    drift_every: int = Field(ge=0)
    strategy: Literal["greedy", "tree", "islands"] = "greedy"  # of studies older than the choice
    plateau_after: int | None = Field(default=15, ge=1)
    early_stop: float = Field(default=0.05, ge=0, lt=1)
    ladder: float | None = None
    sources: dict[str, float]
    outside_wait_s: float = Field(default=300.0, ge=0)
    llm: LlmSettings
    preflight_steps: int = Field(ge=1)
    warm: bool
    keep_checkpoints: bool
    after: str | None = None  # an earlier study (after.py)

    @field_validator("name")
    @classmethod
    def _name_fits_a_branch(cls, name):
        # No '..' and no '.lock' at the end: git refuses them in a branch.
        fits = re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name)
        if not fits or ".." in name or name.endswith((".", ".lock")):
            raise ValueError(
                f"study.name ({name!r}) must be lower-case letters, digits, '.', '_' or '-', at "
                "most 64, for it names a folder and a branch. Try: study.name=first"
            )
        return name

    @model_validator(mode="after")
    def _it_ends(self):
        if self.trials is None and self.hours is None:
            raise ValueError(
                "study.trials=null and study.hours=null: such a study would never end. "
                "Try: study.trials=null study.hours=8"
            )
        return self

    @property
    def end(self) -> End:
        return End.of(self.trials, self.hours)

    @field_validator("baseline_seeds")
    @classmethod
    def _seeds_repeat_the_baseline(cls, seeds):
        if len(seeds) < 2 or len(set(seeds)) < len(seeds) or not all(0 <= s < 2**31 for s in seeds):
            raise ValueError(
                f"study.baseline_seeds ({seeds}) must be at least two different seeds from 0 up: "
                "their spread is the noise. Try: study.baseline_seeds=[1,2,3]"
            )
        return seeds

    @model_validator(mode="after")
    def _cap_holds_the_baseline_seeds(self):
        if not len(self.baseline_seeds) <= self.max_seeds <= 100:
            raise ValueError(
                f"study.max_seeds ({self.max_seeds}) must be from the number of baseline_seeds "
                f"({len(self.baseline_seeds)}) to 100. Try: study.max_seeds=12"
            )
        return self

    @model_validator(mode="after")
    def _ladder_is_a_share_that_may_end_trials(self):
        if self.ladder is not None and not 0 < self.ladder < 1:
            raise ValueError(
                f"study.ladder ({self.ladder:g}) must be a share of the budget between 0 and 1, or "
                "null for no short runs. Try: study.ladder=0.25"
            )
        if self.ladder is not None and not self.early_stop:
            raise ValueError(
                f"study.ladder ({self.ladder:g}): with study.early_stop=0 no short run may ever "
                "end a trial. Give study.early_stop=0.05, or study.ladder=null"
            )
        return self

    @property
    def judged_by(self) -> Target:
        return TARGETS[self.target]

    @property
    def rule(self) -> Rule:
        """By which its trials are judged."""
        return Rule(self.false_keeps, self.equal_within, len(self.baseline_seeds), self.max_seeds)

    @property
    def seeds(self) -> list[int]:
        """All that a trial may run: the baseline's, then the lowest others from 1 up."""
        others = [n for n in range(1, 2 * self.max_seeds) if n not in self.baseline_seeds]
        return [*self.baseline_seeds, *others][: self.max_seeds]

    @model_validator(mode="after")
    def _sources_are_known(self):
        for name, share in self.sources.items():
            if name not in mixed.PROPOSERS:
                raise ValueError(
                    f"study.sources.{name}: there is no such source. Possible: "
                    f"{', '.join(mixed.PROPOSERS)}.{nearest(name, mixed.PROPOSERS)}"
                )
            if share < 0:
                raise ValueError(f"study.sources.{name} ({share:g}): a share must be at least 0")
        if not sum(self.sources.values()):
            raise ValueError("study.sources: at least one source needs a share above 0")
        return self

    @model_validator(mode="after")
    def _model_is_named(self):
        model = self.llm.model or ""
        if self.sources.get("llm") and not all(model.partition(":")):
            raise ValueError(
                f"study.llm.model ({model or 'null'}): with study.sources.llm above 0 it must name "
                "provider:model, e.g. study.llm.model=openai:gpt-6.1-sol or ollama:qwen3 "
                "(docs/researcher.md)"
            )
        return self


class _StudyPart(Group):
    study: StudySettings
    space: dict[str, Bounds]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study as it was asked for."""

    study: StudySettings
    space: dict[str, Bounds]
    config: Config
    origin: dict[str, Any] | None = None  # what it begins from (after.py); null: this checkout

    def as_json(self) -> dict[str, Any]:
        """What settings.json keeps; a study that is started again must agree with it."""
        return {
            "study": self.study.model_dump(),
            "space": {key: b.model_dump(exclude_defaults=True) for key, b in self.space.items()},
            "config": self.config.model_dump(),
            "after": self.origin,
        }


def read_plan(
    conf: Path,
    overrides: list[str],
    pipeline_conf: Path | None = None,
    origin: dict[str, Any] | None = None,
) -> Plan:
    """Raises ConfigError with a line for each mistake in any of the three parts.

    `pipeline_conf`: where the pipeline's values come from, if not from `conf`.
    """
    try:
        values = compose_study(conf, overrides)
        part = {key: values.pop(key) for key in ("study", "space") if key in values}
        if pipeline_conf:
            others = [o for o in overrides if not re.match(r"[+~]*(study|space)[.=]", o)]
            values = compose(pipeline_conf, "study", others)
            values = {k: v for k, v in values.items() if k not in ("study", "space")}
    except ConfigError as error:
        raise ConfigError(_about_study(str(error))) from None
    mistakes = []
    config = study = None
    try:
        config = check(values)
        require_corpus(config)
    except ConfigError as error:
        mistakes.append(str(error))
    try:
        study = check(part, _StudyPart)
        mistakes += _mistakes_in_space(study.space, study.study.judged_by)
        recipes.read_recipes(recipes.folder_of(study.study.judged_by))
    except ConfigError as error:
        mistakes.append(str(error))
    if config and study and config.base and study.study.target == "val_bpb":
        mistakes.append(
            f"base ({config.base}): a study of val_bpb trains from nothing. Give "
            "study.target=chat_bpb, or leave base out."
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return Plan(study=study.study, space=study.space, config=config, origin=origin)


def compose_study(conf: Path, overrides: list[str]) -> dict[str, Any]:
    """conf/study.yaml composed; what is usual for its target holds where nothing else is given."""
    values = compose(conf, "study", overrides)
    given = {override.lstrip("+~").split("=")[0] for override in overrides}
    target = TARGETS.get(values["study"].get("target"))
    usual = [one for one in (target.usual if target else ()) if one.split("=")[0] not in given]
    return compose(conf, "study", [*usual, *overrides]) if usual else values


def _about_study(message: str) -> str:
    """Hydra's refusal of a key below `study` or `space`, with the nearest of their own keys."""
    given = message.split(": there is no such key.")[0]
    key = given.split("=")[0].lstrip("+~")
    if given == message or key.split(".")[0] not in ("study", "space"):
        return message
    if key in leaf_keys(_StudyPart):
        return f"{given}: a key in it does not exist; conf/study.yaml has those that do."
    return f"{given}: there is no such key.{nearest(key, leaf_keys(_StudyPart))}"


def _mistakes_in_space(space: dict[str, Bounds], target: Target) -> list[str]:
    editable = [key for key in leaf_keys(Config) if key.split(".")[0] in target.groups]
    mistakes = []
    for key, bounds in space.items():
        if key in leaf_keys(Config) and key not in editable:
            mistakes.append(
                f"space.{key}: not editable, so it cannot be searched. "
                f"Editable: keys of {', '.join(target.groups)}."
            )
        elif key not in editable:
            mistakes.append(f"space.{key}: there is no such key.{nearest(key, editable)}")
        elif bounds.rule_broken:
            mistakes.append(f"space.{key} {bounds.rule_broken}.")
    return mistakes


def leaf_keys(schema: type[Group], prefix: str = "") -> list[str]:
    """The keys that hold a value, dotted: 'optim.matrix_lr' but not 'optim'."""
    keys = []
    for name, field in schema.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Group):
            keys += leaf_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def differences(settings: dict[str, Any], plan: Plan) -> list[str]:
    """Lines 'key: then -> now' where a study that is started again was asked for something else."""
    then, now = _comparable(settings), _comparable(plan.as_json())
    return [
        f"{key}: {then.get(key, 'unset')} -> {now.get(key, 'unset')}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]


def _comparable(values: dict[str, Any]) -> dict[str, Any]:
    flat = flatten(values["config"])
    config = {k: v for k, v in flat.items() if k.split(".")[0] not in HARNESS_KEYS}
    study = {k: v for k, v in values["study"].items() if k not in MAY_CHANGE}
    study.setdefault("target", "val_bpb")  # what studies had before there was a choice
    study["sources"] = {k: v for k, v in study["sources"].items() if v}  # no share is no source
    device = {key: flat[key] for key in ("runtime.device", "runtime.num_threads")}
    return config | device | flatten({"study": study, "space": values["space"]})


def compose(conf: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """The composed values of <conf>/<name>.yaml. Raises ConfigError when Hydra refuses."""
    from nightshift.command import compose as checked_compose

    with ONE_HYDRA:
        return checked_compose(name, overrides, conf)
