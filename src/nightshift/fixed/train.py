"""One training of a trial, by the harness: feed the candidate, watch it, take its weights over.

This process runs the study's base commit. The candidate's process trains in a sandbox on what the
feed hands out (fixed/feed.py) and leaves files in one folder. Of these, the weights are taken over
by name, type and size while it waits, and everything else (curve, samples, a status that is not
ok) as a claim. Steps, tokens, time, seed, digests and hashes in training.json are this side's.

Covered: links, devices and pipes in place of files; weights of more than sandbox.disk_mb; numbers
that are no numbers; a status better than what was seen; files planted for later steps.
Not covered: the curve and the samples are the candidate's word. They are shown to people and
decide nothing.

    python -m nightshift.fixed.train run=<folder with config.yaml> tree=<worktree>
"""

import hashlib
import json
import math
import os
import shutil
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightshift.fixed import candidate, machine
from nightshift.fixed.batches import ensure_tokens
from nightshift.fixed.checkpoint import WEIGHTS_FILE, write_config
from nightshift.fixed.config import Config, ConfigError, config_digest
from nightshift.fixed.feed import Broken, Feeder, splits
from nightshift.fixed.prepare import read_arguments, require
from nightshift.fixed.result import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    CURVE_FILE,
    CURVE_KEYS,
    EDITABLE_MODULES,
    SAMPLES_FILE,
    SCRATCH_FOLDER,
    STATUSES,
    TRAINING_FILE,
    Training,
    code_digests,
    write_json,
)
from nightshift.fixed.sandbox import Report, spawn
from nightshift.fixed.store import read_manifest
from nightshift.fixed.tokenizer import Tokenizer, ensure_tokenizer

SAMPLES_LIMIT_S = 60.0  # after the weights; only the samples are lost
CPU_SLACK, CPU_SLACK_S = 1.25, 5.0  # start-up and the autograd engine's own thread
MAX_CLAIM_BYTES = 20 << 20
MAX_HEADER_BYTES = 20 << 20  # of a safetensors file


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the harness brings to a training: data, and the candidate's part that learns from it."""

    tokenizer: Path  # folder
    data_digest: str
    batches: tuple  # of train and dev
    learn: Callable = candidate.train
    feeder: type[Feeder] = Feeder
    editable: tuple[str, ...] = EDITABLE_MODULES
    base: Path | None = None  # checkpoint folder that tuning begins from (tune.py)


def text(config: Config, tree: Path) -> Given:
    tokens = ensure_tokens(config, tree, not_here)
    return Given(
        tokenizer=ensure_tokenizer(config),
        data_digest=read_manifest(tokens)["digest"],
        batches=splits(config, tokens),
    )


def train(config: Config, tree: Path, folder: Path, given: Given) -> Training:
    """Train once; files in `folder`. What the candidate does wrong is a status."""
    started = time.monotonic()
    tokenizer, scratch = given.tokenizer, folder / SCRATCH_FOLDER
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "tmp").mkdir(parents=True)
    data_digest, values = given.data_digest, config.model_dump()
    ours, theirs = socket.socketpair()
    readable = (tokenizer, given.base) if given.base else (tokenizer,)
    box = candidate.view(config, tree, readable=readable, writable=scratch)
    trees, commit = code_digests(tree, given.editable), machine.commit_of(tree)
    child = spawn(
        box,
        lambda: given.learn(tree, values, scratch, theirs.fileno(), tokenizer, data_digest),
        fds=[theirs.fileno()],
    )
    theirs.close()
    require(child, config)
    weights: dict[str, Any] = {}

    def take_over() -> None:
        weights.update(take_weights(config, scratch, folder, tokenizer))
        if given.base:
            must_fit(folder / CHECKPOINT_FOLDER, given.base)

    feeder = given.feeder(ours, config, given.batches, take_over)
    broken = None
    try:
        feeder.run(child)
        report = child.wait(SAMPLES_LIMIT_S if feeder.delivered else 5.0) or child.kill()
    except Broken as error:
        broken, report = str(error), child.kill()
    ours.close()
    claims = read_claims(scratch / TRAINING_FILE)
    status, message = verdict(broken or too_many_cpus(config, report), report, claims, feeder)
    take_claims(config, scratch, folder)
    feeder.clock.save(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    return Training(
        status=status,
        message=message,
        **facts(config, feeder, report, claims, time.monotonic() - started),
        **weights,
        seed=config.seed,
        config_digest=config_digest(config),
        data_digest=data_digest,
        code=str(tree),
        commit=commit,
        fixed_code=trees[0],
        editable_code=trees[1],
        protections=child.layers,
    )


def not_here(corpus: Path, config: Config):
    raise ConfigError("the trial's tokens are not there; nightshift.fixed.prepare builds them")


def too_many_cpus(config: Config, report: Report) -> str | None:
    """Where a study says how many threads a run may use, its CPU time is compared with that."""
    threads, wall_s = config.runtime.num_threads, report.wall_s
    if threads is None or report.cpu_s <= CPU_SLACK * threads * wall_s + CPU_SLACK_S:
        return None
    return (
        f"training used {report.cpu_s / wall_s:.1f} CPUs, runtime.num_threads is {threads}: the "
        "number of threads belongs to the harness"
    )


def verdict(
    broken: str | None, report: Report, claims: dict, feeder: Feeder
) -> tuple[str, str | None]:
    """(status, message): what was seen; a claim counts only where it is worse than `ok`."""
    if broken:
        return "invalid", broken
    if report.killed:
        kind = "oom" if report.killed.startswith("memory") else "invalid"
        return kind, f"training was killed: {report.killed}"
    claimed, said = claims.get("status"), str(claims.get("message") or "")[:500]
    if claimed in STATUSES and claimed not in ("ok", "timeout", "invalid"):
        return claimed, said
    if feeder.delivered:
        return "ok", None
    if report.exit == 128 + signal.SIGKILL:
        os.kill(os.getpid(), signal.SIGKILL)  # from outside: the loop sees the same and tries again
    if report.exit > 128:
        return "crash", f"training died of signal {report.exit - 128}"
    if report.exit:
        return "crash", None  # the log says why; agent/trial.py quotes its last line
    return "invalid", "training ended without weights"


def facts(config: Config, feeder: Feeder, report: Report, claims: dict, total_s: float) -> dict:
    """Numbers of this side; the candidate's word where there is nothing else, if it is a number."""
    clock, cuda = feeder.clock, config.runtime.device != "cpu"
    rate = clock.tokens / clock.elapsed_s if clock.elapsed_s > 0 else None
    peak = number(claims.get("peak_memory_gb")) if cuda else None
    known = claims.get("machine") if isinstance(claims.get("machine"), dict) else {}
    extra = {k: known[k] for k in ("dtype", "matmul_tflops", "gpu", "device") if k in known}
    return {
        "steps": clock.steps,
        "tokens": clock.tokens,
        "train_s": round(clock.elapsed_s, 3),
        "total_s": round(total_s, 3),
        "cpu_s": report.cpu_s,
        "steps_cpu_s": round(feeder.cpu_s["steps"], 3),
        "tokens_per_s": rate and round(rate, 1),
        "final_loss": number(claims.get("final_loss")),
        "peak_memory_gb": peak or round(report.peak_memory_mb / 1000, 3),
        "mfu": number(claims.get("mfu")),
        "machine": machine.facts(machine.pick_device(config.runtime))
        | {k: v for k, v in extra.items() if isinstance(v, (str, float, int))},
    }


def number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if usable and math.isfinite(value) else None


# ---- what the candidate left ----


def open_left(folder: Path, *names: str) -> int:
    """A descriptor of a regular file below `folder`; no link is followed on the way. OSError."""
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for name in names[:-1]:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = inner
        file = os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
    finally:
        os.close(place)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(f"{names[-1]} is not a regular file")
    return file


def take_weights(config: Config, scratch: Path, folder: Path, tokenizer: Path) -> dict[str, Any]:
    """Copy the weights into a checkpoint folder of ours. Raises Broken."""
    place = folder / CHECKPOINT_FOLDER
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    limit, state = config.sandbox.disk_mb << 20, hashlib.sha256()
    try:
        with os.fdopen(open_left(scratch, CHECKPOINT_FOLDER, WEIGHTS_FILE), "rb") as source:
            with open(place / WEIGHTS_FILE, "wb") as target:
                while block := source.read(1 << 20):
                    state.update(block)
                    target.write(block)
                    if target.tell() > limit:
                        raise Broken(f"the weights are larger than sandbox.disk_mb ({limit >> 20})")
    except OSError as error:
        raise Broken(f"training left no weights that can be used: {error}") from None
    num_params = count_params(place / WEIGHTS_FILE)
    write_config(config, place / CONFIG_FILE)
    Tokenizer.load(tokenizer).save(place / "tokenizer")
    return {"weights_sha256": state.hexdigest(), "num_params": num_params}


def must_fit(folder: Path, base: Path) -> None:
    """Tuned weights are tensors of the base's names and shapes. Raises Broken."""
    found, wanted = (tensor_shapes(place / WEIGHTS_FILE) for place in (folder, base))
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise Broken(
                f"tuning left {name} of shape {found.get(name)}, the base has it of shape "
                f"{wanted.get(name)}: the base's model stays as it is. Merge what was added into "
                "its matrices, as lora.py does"
            )


def count_params(path: Path) -> int:
    """Numbers in a safetensors file. Raises Broken if it is not one."""
    return sum(math.prod(shape) for shape in tensor_shapes(path).values())


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """From the header of a safetensors file alone. Raises Broken if it is not one."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(file.read(length))
        tensors = {name: t for name, t in header.items() if name != "__metadata__"}
        end = max((t["data_offsets"][1] for t in tensors.values()), default=0)
        if end != size - 8 - length:
            raise ValueError(f"its tensors end at {end}, the file at {size - 8 - length}")
        return {name: [int(n) for n in t["shape"]] for name, t in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise Broken(f"the weights are not a safetensors file: {error}") from None


def read_claims(path: Path) -> dict[str, Any]:
    try:
        with os.fdopen(open_left(path.parent, path.name), "rb") as file:
            claims = json.loads(file.read(MAX_CLAIM_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def take_claims(config: Config, scratch: Path, folder: Path) -> None:
    """Curve and samples, rebuilt from their plain values."""
    points = []
    for line in _lines(scratch, CURVE_FILE):
        try:
            point = json.loads(line)
            kept = {k: number(point.get(k)) for k in CURVE_KEYS}
        except (ValueError, AttributeError, RecursionError):
            continue
        if kept["step"] is not None:  # where MLflow and the charts put it
            points.append({k: v for k, v in kept.items() if v is not None})
    if points:
        text = "".join(json.dumps(point) + "\n" for point in points)
        (folder / CURVE_FILE).write_text(text, encoding="utf-8")
    try:
        samples = json.loads("\n".join(_lines(scratch, SAMPLES_FILE)) or "[]")
        kept = [
            {"prompt": prompt, "completion": str(sample["completion"])[:8000]}
            for prompt, sample in zip(config.evaluate.sample_prompts, samples, strict=False)
        ]
    except (ValueError, KeyError, TypeError, RecursionError):
        kept = []
    if kept:
        write_json(folder / SAMPLES_FILE, kept)


def _lines(scratch: Path, name: str) -> list[str]:
    try:
        with os.fdopen(open_left(scratch, name), "rb") as file:
            return file.read(MAX_CLAIM_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def main(make: Callable[[Config, Path], Given] = text, module: str = "train") -> int:
    try:
        folder, tree, config = read_arguments(f"nightshift.fixed.{module}")
        training = train(config, tree, folder, make(config, tree))
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if training.message is None and training.status == "crash":
        return 1
    write_json(folder / TRAINING_FILE, training)
    return 0 if training.status == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
