"""A study that begins where an earlier one ended.

    nightshift study study.name=second study.after=first

Its base commit is the earlier study's champion: the newest promotion of its incumbent, or the
incumbent itself. So code, accepted values, scale and budget are those of that commit; single keys
on the command line change them. The earlier journal, with what that study remembered, is copied to
`memory.jsonl`: proposers may look at it, no number of it is compared, no trial of it is ours. Each
baseline there says in `changed` all the values that it had, so that trials have values, not only
differences (proposers/history.py).
"""

import json
from pathlib import Path
from typing import Any

from agent import workspace
from agent.journal import Journal, Trial, trial_from_json
from agent.promotion import head_of
from agent.report import find_study
from agent.settings import Plan, compose, read_plan
from nightshift.fixed.config import EDITABLE_GROUPS, TUNING_GROUPS, ConfigError, flatten

MEMORY_FILE = "memory.jsonl"
GROUPS_ALLOWED = ("space", "tracking")  # whose choice the champion's values cannot hide


def read_plan_with_origin(repo: Path, overrides: list[str]) -> Plan:
    """The plan of a study, where it begins after another one included. Raises ConfigError."""
    if not any(override.startswith("study.after=") for override in overrides):
        return read_plan(repo / "conf", overrides)
    study = compose(repo / "conf", "study", overrides)["study"]
    if study["after"] is None:
        return read_plan(repo / "conf", overrides)
    for override in overrides:
        group = override.split("=", 1)[0]
        if "." not in group and group not in GROUPS_ALLOWED:
            raise ConfigError(
                f"{override}: study.after begins from a champion's values, which would win over a "
                f"file of conf/{group}. Give single keys, e.g. budget.amount=150000"
            )
    origin = find_origin(repo / "outputs/studies", study["name"], str(study["after"]))
    with workspace.conf_at(repo, origin["commit"]) as conf:
        return read_plan(repo / "conf", overrides, conf, origin)


def find_origin(studies: Path, name: str, after: str) -> dict[str, Any]:
    """study, trial, promotion and commit that the study begins from; the first answer stays, though
    the earlier study may go on."""
    settings = studies / name / "settings.json"
    if settings.exists():
        known = json.loads(settings.read_text(encoding="utf-8")).get("after")
        if known and known["study"] == after:
            return known
    if name == after:
        raise ConfigError(f"study.after ({after}): a study cannot begin after itself")
    folder = find_study(after, studies)
    champion = Journal(folder / "journal.jsonl").incumbent
    if champion is None:
        raise ConfigError(f"study.after ({after}): it has no trial yet. Run it first")
    promotion = head_of(folder, champion)
    return {
        "study": after,
        "trial": champion.number,
        "promotion": promotion and promotion.number,
        "commit": promotion.commit if promotion else champion.commit,
    }


def remember(studies: Path, folder: Path, origin: dict[str, Any]) -> None:
    """Copy what the earlier study knew."""
    earlier = studies / origin["study"]
    known = [earlier / MEMORY_FILE, earlier / "journal.jsonl"]
    lines = [path.read_bytes() if path.exists() else b"" for path in known]
    text = lines[0] + _with_values(lines[1], earlier / "settings.json")
    (folder / MEMORY_FILE).write_bytes(text[: text.rfind(b"\n") + 1])


def _with_values(journal: bytes, settings: Path) -> bytes:
    """The baseline's line tells all its editable values, where settings.json has them."""
    first, end, rest = journal.partition(b"\n")
    if not (end and settings.exists()):
        return journal
    config = flatten(json.loads(settings.read_text(encoding="utf-8")).get("config", {}))
    groups = (*EDITABLE_GROUPS, *TUNING_GROUPS)
    values = {key: value for key, value in config.items() if key.split(".")[0] in groups}
    baseline = json.loads(first) | {"changed": values}
    return json.dumps(baseline, ensure_ascii=False).encode("utf-8") + end + rest


def read_memory(folder: Path) -> list[Trial]:
    """Trials of earlier studies, oldest first; their numbers repeat from study to study."""
    path = folder / MEMORY_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [trial_from_json(json.loads(line)) for line in lines]
