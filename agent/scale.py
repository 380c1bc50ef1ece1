"""From a command line to a larger scale: what is asked of a promotion, checked before any work."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agent import workspace
from agent.journal import Run, Trial
from agent.settings import Plan, StudyError, _StudyPart, compose
from nightshift.fixed.config import Config, ConfigError, check, flatten, nearest, unflatten

DEPTH_FACTOR, BUDGET_FACTOR = 2, 3
MACHINE = ("runtime", "sandbox")  # where it runs; not part of the champion's configuration
GROUPS = ("model", "optim", "schedule", "train", "filter", "tokenizer", "budget", "evaluate")
SHORT = {"depth": "model.depth", "budget": "budget.amount"}
START_S = 60.0  # a wall limit leaves room to start and save


@dataclass(kw_only=True)
class Request:
    """The command line, read."""

    study: str
    trial: int | None = None
    seeds: list[int] | None = None
    dry_run: bool = False
    overrides: list[str] = field(default_factory=list)

    def resolve(self, repo: Path, baseline: Trial, trial: Trial) -> tuple:
        """(flat values of the keys that were given, the baseline's configuration, and scaled).
        Checked for baseline and champion. Raises ConfigError."""
        keys = [override.split("=", 1)[0] for override in self.overrides]
        with workspace.conf_at(repo, baseline.commit) as conf:
            wanted = flatten(compose(conf, "config", self.overrides)) if keys else {}
            plain = [flatten(compose(conf, "config", []))]
        with workspace.conf_at(repo, trial.commit) as conf:
            plain.append(flatten(compose(conf, "config", [])))
        for key in keys:
            if plain[0].get(key) != plain[1].get(key):
                raise ConfigError(
                    f"{key}: a change of this study sets it ({plain[0].get(key)} -> "
                    f"{plain[1].get(key)}), and one value for all would undo that. Leave it out"
                )
        given = {key: wanted[key] for key in keys}
        before, after = (check(unflatten(values)) for values in plain)
        scaled(after, given)
        return given, before, scaled(before, given)


def read_request(argv: Sequence[str]) -> Request:
    """Raises ConfigError with one line."""
    names = [a for a in argv if "=" not in a and not a.startswith("-")]
    options = [a for a in argv if a.startswith("-")]
    if unknown := [a for a in options if a != "--dry-run"]:
        raise ConfigError(f"{unknown[0]}: there is no such option; there is --dry-run")
    if len(names) != 1:
        raise ConfigError(f"promote: give one study, got {len(names)}: nightshift promote first")
    request = Request(study=names[0], dry_run=bool(options))
    for argument in argv:
        if "=" in argument:
            _take(request, argument)
    return request


def _take(request: Request, argument: str) -> None:
    key, value = argument.split("=", 1)
    if key == "trial":
        if not value.isdecimal():
            raise ConfigError(f"trial={value}: must be the number of a trial, e.g. trial=4")
        request.trial = int(value)
    elif key == "seeds":
        request.seeds = _seeds(value)
    else:
        request.overrides.append(f"{_key(key)}={value}")


def _seeds(value: str) -> list[int]:
    try:
        seeds = json.loads(value)
    except ValueError:
        seeds = None
    whole = isinstance(seeds, list) and all(type(s) is int and 0 <= s < 2**31 for s in seeds)
    if not whole or len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"seeds={value}: must be at least two different seeds: their spread is the noise. "
            "Try: seeds=[1,2,3]"
        )
    return seeds


def _key(key: str) -> str:
    key = SHORT.get(key, key)
    group, dot, _ = key.partition(".")
    if not dot or group not in GROUPS + MACHINE:
        near = "" if key in GROUPS + MACHINE else nearest(key, [*SHORT, "trial", "seeds"])
        raise ConfigError(
            f"{key}: a promotion takes trial, seeds, depth, budget, and single keys of "
            f"{', '.join(GROUPS + MACHINE)}.{near}"
        )
    return key


def scaled(config: Config, given: dict[str, Any]) -> Config:
    """The configuration at the larger scale: what is given, the defaults for the rest; limits grow
    with the cost of a run. Raises ConfigError."""
    flat = flatten(config.model_dump()) | given
    if "model.depth" not in given:
        flat["model.depth"] *= DEPTH_FACTOR
    if "budget.kind" in given and "budget.amount" not in given:
        raise ConfigError("budget.kind: another kind needs its amount too; give budget.amount=...")
    if "budget.amount" not in given:
        flat["budget.amount"] *= BUDGET_FACTOR
    check(unflatten(flat))  # before anything is computed with them
    growth = max(1.0, (flat["model.depth"] / config.model.depth) ** 3)  # width grows with depth
    more = max(1.0, flat["budget.amount"] / config.budget.amount)
    if flat["budget.kind"] == "seconds":
        wall_s = max(config.budget.wall_limit_s, 2 * flat["budget.amount"] + START_S)
    else:
        wall_s = config.budget.wall_limit_s * more * growth
    limits = {
        "budget.wall_limit_s": round(wall_s, 1),
        "evaluate.limit_s": round(config.evaluate.limit_s * growth, 1),
    }
    return check(unflatten(flat | {k: v for k, v in limits.items() if k not in given}))


def num_weights(config: Config) -> int:
    """Of blocks and head, about: what a token costs."""
    model = config.model
    return 12 * model.depth * model.width**2 + config.tokenizer.vocab_size * model.width


def estimate_s(runs: Sequence[Run], before: Config, after: Config) -> float:
    """Seconds for a run at the larger scale, from the baseline's: cost as the weights' number.

    An upper estimate on a CPU, where larger matrices are multiplied more efficiently.
    """
    known = [run for run in runs if run.wall_s and run.train_s and run.tokens]
    if not known:
        return 0.0
    growth = num_weights(after) / num_weights(before)
    token_s = statistics.median(run.train_s / run.tokens for run in known) * growth
    other_s = statistics.median(run.wall_s - run.train_s for run in known) * growth
    amount = after.budget.amount
    tokens = amount * after.train.batch_tokens if after.budget.kind == "steps" else amount
    return other_s + (amount if after.budget.kind == "seconds" else tokens * token_s)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def read_plan_of(repo: Path, study_folder: Path) -> Plan:
    """The plan of a study that was run, from its settings.json. Raises StudyError."""
    path = study_folder / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        newer = yaml.safe_load((repo / "conf/study.yaml").read_text(encoding="utf-8"))["study"]
        part = {"study": newer | settings["study"], "space": settings["space"]}
        checked = check(part, _StudyPart)
        config = check(settings["config"])
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StudyError(
            f"{path}: cannot be used ({reason}). Was it made by another version?"
        ) from None
    return Plan(study=checked.study, space=checked.space, config=config)
