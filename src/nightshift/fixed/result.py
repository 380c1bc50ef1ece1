"""What a run leaves behind for others to read: training.json and result.json.

`training.json` is written by pretrain (what it claims), `result.json` by evaluate (what is
believed). A missing number is null, never 0. Standard library only: the research loop imports this
file.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

STATUSES = ("ok", "crash", "timeout", "oom", "diverged", "invalid")

TRAINING_FILE = "training.json"  # in the run's folder
RESULT_FILE = "result.json"
TEST_RESULT_FILE = "test_result.json"  # of a winner, from its one reading of test
CURVE_FILE = "curve.jsonl"  # one JSON object a line: step, progress, elapsed_s, loss, ...
CHECKPOINT_FOLDER = "checkpoint"
SAMPLES_FILE = "samples.json"  # [{"prompt": ..., "completion": ...}]
CONFIG_FILE = "config.yaml"  # the resolved config
LOG_FILE = "run.log"
CURVE_KEYS = (
    "step", "progress", "elapsed_s", "tokens", "train/loss", "dev_bpb", "lr_scale", "tokens_per_s",
    "memory_gb", "system/cpu_utilization_percentage", "system/system_memory_usage_percentage",
    "time",
)  # fmt: skip
SCRATCH_FOLDER = "scratch"  # the one folder that a candidate's training may write to

TARGETS = ("val_bpb", "chat_bpb")  # what a study may be judged by; lower is better
EDITABLE_MODULES = ("model", "optim", "schedule", "training", "filtering")  # of src/nightshift
TUNING_MODULES = ("tuning", "lora")  # where tuning is judged, instead: the base stays as it is


@dataclass(kw_only=True)
class Training:
    """One training run, by the process that ran it."""

    status: str
    message: str | None = None  # one line: why it is not ok, and the next move
    interrupted: bool = False  # by SIGINT or SIGTERM; the checkpoint can be resumed
    steps: int | None = None
    tokens: int | None = None
    train_s: float | None = None  # the budget's clock
    total_s: float | None = None  # process start to checkpoint written
    final_loss: float | None = None  # nats per token, mean of the last steps
    tokens_per_s: float | None = None
    peak_memory_gb: float | None = None
    mfu: float | None = None  # share of the device's peak matmul speed; null where unknown
    num_params: int | None = None
    seed: int | None = None
    config_digest: str | None = None
    data_digest: str | None = None  # of the token manifest: corpus, filter, tokenizer
    weights_sha256: str | None = None  # of the file that was taken over
    code: str | None = None  # folder that the code was imported from
    commit: str | None = None
    fixed_code: str | None = None  # digest of the files below src/ that trials may not change
    editable_code: str | None = None  # and of those that they may
    cpu_s: float | None = None  # of the candidate's processes
    steps_cpu_s: float | None = None  # of these, while the budget's clock ran
    protections: dict[str, list[str]] | None = None  # of the sandbox; null: it ran without one
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Result:
    """A scored run. It has a number, `val_bpb` or `chat_bpb`, if and only if `status` is ok."""

    status: str
    message: str | None = None
    val_bpb: float | None = None  # bits per byte of raw val text; lower is better
    chat_bpb: float | None = None  # of the assistant's turns in val conversations
    chat_bpb_interval: float | None = None  # half of its 95 % interval over conversations
    num_conversations: int | None = None
    num_bytes: int | None = None  # raw bytes scored
    num_tokens: int | None = None  # predictions scored
    eval_s: float | None = None
    forward_tokens_per_s: float | None = None  # of the model server, while it scored
    forward_cpu_s: float | None = None  # of the model server, for a million tokens
    probes: int | None = None  # windows shown again with another future
    split: str = "val"
    weights_sha256: str | None = None
    binding: dict[str, Any] | None = None  # everything that the number belongs to
    training: Training | None = None

    def __post_init__(self):
        if self.status not in STATUSES:
            raise ValueError(f"status ({self.status!r}) must be one of {', '.join(STATUSES)}")
        numbers = [n for n in (self.val_bpb, self.chat_bpb) if n is not None]
        if len(numbers) != (self.status == "ok"):
            raise ValueError(
                "a result has val_bpb or chat_bpb if and only if its status is ok; "
                f"got {self.status}, {self.val_bpb}, {self.chat_bpb}"
            )


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(
            value if not hasattr(value, "__dataclass_fields__") else asdict(value),
            file,
            indent=1,
            ensure_ascii=False,
            allow_nan=False,
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _build(kind, values: dict[str, Any], path: Path):
    unknown = set(values) - {f.name for f in fields(kind)}
    if unknown:
        raise ValueError(
            f"{path}: unknown field {sorted(unknown)[0]!r}; it was written by other code"
        )
    return kind(**values)


def code_digests(tree: Path, editable: Sequence[str] = EDITABLE_MODULES) -> tuple[str, str]:
    """(fixed, editable) of the files below <tree>/src, as they lie on disk."""
    blobs = {}
    for path in sorted((tree / "src").rglob("*.py")):
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content)
        blobs[path.relative_to(tree).as_posix()] = blob.hexdigest()
    return digests_of_blobs(blobs, editable)


def digests_of_blobs(
    blobs: Mapping[str, str], editable: Sequence[str] = EDITABLE_MODULES
) -> tuple[str, str]:
    """(fixed, editable) from git's blob ids: what `git ls-tree` says of a commit compares."""
    files = {f"src/nightshift/{name}.py" for name in editable}
    parts: list[dict[str, str]] = [{}, {}]
    for path, blob in blobs.items():
        parts[path in files][path] = blob
    fixed, changed = (
        hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16] for part in parts
    )
    return fixed, changed


def read_training(path: Path) -> Training:
    return _build(Training, json.loads(path.read_text(encoding="utf-8")), path)


def read_result(path: Path) -> Result:
    """Raises ValueError for anything that is not a whole result."""
    values = json.loads(path.read_text(encoding="utf-8"))
    training = values.pop("training", None)
    result = _build(Result, values, path)
    result.training = _build(Training, training, path) if training else None
    return result


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The points of a curve file; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    points = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            points.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return points
