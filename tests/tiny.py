"""Small configurations and a small corpus, shared by the tests."""

from pathlib import Path
from typing import Any

import yaml

from nightshift import command
from nightshift.fixed.config import CONF, Config, Model, check, flatten, unflatten

TINY = {
    "model.depth": 2, "model.aspect_ratio": 16, "model.head_dim": 16, "model.seq_len": 32,
    "train.batch_tokens": 128, "train.micro_batch_size": 4, "train.precision": "fp32",
    "tokenizer.vocab_size": 300, "budget.kind": "steps", "budget.amount": 6.0,
    "evaluate.max_bytes": 4000, "evaluate.sample_tokens": 4, "runtime.dev_bytes": 1000,
    "runtime.num_dev_points": 1, "runtime.log_every_steps": 2, "runtime.progress_bar": False,
    "runtime.device": "cpu", "runtime.num_threads": 1, "tracking.enabled": False,
    "corpus.source": "folder", "corpus.files": "**/*",
}  # fmt: skip


def model_config(**changes) -> Model:
    values = yaml.safe_load((CONF / "model" / "tiny.yaml").read_text())
    small = {"depth": 2, "aspect_ratio": 16, "head_dim": 16, "seq_len": 32}
    return Model(**(values | small | changes))


def write_texts(folder: Path, num_files: int = 40) -> Path:
    """Documents of made-up but regular sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    nouns, verbs = (
        ["night", "model", "river", "seed", "train"],
        ["sees", "keeps", "learns", "finds"],
    )
    for i in range(num_files):
        lines = [
            f"The {nouns[(i + j) % 5]} {verbs[(i * j) % 4]} the {nouns[(i * 3 + j) % 5]} {i * j}."
            for j in range(30)
        ]
        (folder / f"{i:03d}.txt").write_text("\n".join(lines))
    return folder


def values(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Plain values of a run of a second. Keys with dots: values(tmp, **{"model.depth": 3})."""
    texts = tmp_path / "texts"
    if not texts.exists():
        write_texts(texts)
    flat = flatten(command.compose()) | TINY
    flat |= {"corpus.path": str(texts), "runtime.cache_dir": str(tmp_path / "cache")} | changes
    return unflatten(flat)


def config(tmp_path: Path, **changes: Any) -> Config:
    return check(values(tmp_path, **changes))
