"""The base of a study of chat_bpb: the checkpoint that every trial's tuning begins from.

It is trained once, sandboxed and scored as any run, and kept in <cache_dir>/base/<key>, a run's
folder. The key names all that dvc.yaml says pretraining depends on, so a study that is started
again, or another one with the same pretraining, finds it. Or it is given (`base=<name or folder>`,
as src/nightshift/catalogue.py knows them) and copied to a key of its own.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from agent import workspace
from agent.settings import StudyError
from agent.study import BASE_FOLDER, BaselineFailed, Study, marks_of
from agent.target import CHAT, VAL
from agent.trial import PREPARE_LIMIT_S, Bench
from nightshift.fixed.config import Config, ConfigError, check, digest, for_tuning
from nightshift.fixed.result import CHECKPOINT_FOLDER, CONFIG_FILE, RESULT_FILE, read_result

UPSTREAM = ("corpus", "tokenizer", "tokens", "pretrain")  # stages of dvc.yaml
RUN_FOLDER = "base_run"  # in the study's folder, while the base is trained
WEIGHTS_FILE = "model.safetensors"


class Base(NamedTuple):
    folder: Path  # of a run
    sha256: str  # of its weights
    config: Config  # that it was trained with

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT_FOLDER


def ensure_base(study: Study) -> None:
    """Sets study.base and records it in the settings. Raises StudyError, BaselineFailed."""
    if study.plan.study.judged_by is not CHAT:
        return
    given = study.plan.config.base
    base = copied(study, given) if given else trained_once(study)
    recorded = study.settings.setdefault("base", {"weights_sha256": base.sha256})
    if recorded["weights_sha256"] != base.sha256:
        raise StudyError(
            f"study.name ({study.name}): its trials began from a base with weights "
            f"{recorded['weights_sha256'][:12]}, {base.folder} has {base.sha256[:12]}. "
            "Choose another study.name"
        )
    recorded["folder"] = str(base.folder)
    study.base = base


def for_runs(study: Study, config: Config) -> Config:
    """What the runs of a trial are given: its configuration, begun from the base."""
    if study.base is None:
        return config
    try:
        return for_tuning(config, study.base.config, str(study.base.checkpoint))
    except ConfigError as error:
        raise workspace.Refused("; ".join(str(error).splitlines())) from None


# ---- trained for the study, or for one before it ----


def trained_once(study: Study) -> Base:
    tree = study.folder / BASE_FOLDER  # at the study's first commit
    config = workspace.resolve(tree)
    folder = cache(study) / digest(recipe(tree, config))
    if not is_whole(folder):
        pretrain(study, tree, config, folder)
    return read_base(folder)


def recipe(tree: Path, config: Config) -> dict[str, Any]:
    """What the base is made of: values and files, as dvc.yaml names them."""
    stages = yaml.safe_load((tree / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    upstream = [stages[name] for name in UPSTREAM]
    keys = {key for stage in upstream for key in stage.get("params", ())}
    paths = {path for stage in upstream for path in stage["deps"] if path.startswith("src/")}
    lines = workspace.git(tree, "ls-tree", "-r", "HEAD", "--", *sorted(paths)).splitlines()
    values = config.model_dump()
    return {"values": {key: values[key] for key in sorted(keys)}, "files": lines}


def pretrain(study: Study, tree: Path, config: Config, folder: Path) -> None:
    """One run, in the sandbox, as the baseline of a study of val_bpb."""
    study.view.begin(0, "the base")
    place = study.folder / RUN_FOLDER
    shutil.rmtree(place, ignore_errors=True)
    shared = cache(study).parent
    given = study.plan.config
    machine = {"runtime": given.runtime, "sandbox": given.sandbox, "tracking": given.tracking}
    bench = Bench(
        marks=marks_of(study.folder, 0),
        study_folder=study.folder,
        folder=place,
        tree=tree,
        base=tree,
        code=workspace.code_of(tree, study.settings["first_commit"]),
        baseline_work=None,
        config=config.model_copy(update=machine),
        own_cache=shared,
        shared_cache=shared,
        starter=study.starter,
        stop=study.stop,
        show=study.view.show,
        target=VAL,
    )
    run = bench.prepared_run("base", config.seed, PREPARE_LIMIT_S)
    if run.status != "ok":
        raise BaselineFailed(f"the base failed ({run.status}): {run.message}")
    study.note(f"the base is trained: val_bpb {run.val_bpb:.4f}, {run.tokens:,} tokens")
    keep(study.folder / run.folder, folder)
    shutil.rmtree(place, ignore_errors=True)


def keep(run: Path, folder: Path) -> None:
    """Whole or not at all; another study may have been first."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(run, partial)
    if not is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    shutil.rmtree(partial, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Its weights are those that its result was given for."""
    try:
        result = read_result(folder / RESULT_FILE)
        return result.weights_sha256 == sha256_of(folder / CHECKPOINT_FOLDER)
    except (OSError, ValueError):
        return False


# ---- given ----


def copied(study: Study, name: str) -> Base:
    """A checkpoint of this checkout, copied so that it stays as it is."""
    checkpoint = locate(study, name)
    folder = cache(study) / f"given-{sha256_of(checkpoint)[:12]}"
    if not (folder / CHECKPOINT_FOLDER).is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in checkpoint.parent.glob("*.json*"):  # what its run says of itself
            shutil.copy(path, partial)
        shutil.copytree(checkpoint, partial / CHECKPOINT_FOLDER)
        os.rename(partial, folder)
    return read_base(folder)


def locate(study: Study, name: str) -> Path:
    """The checkpoint folder. Asked of the catalogue in a process of its own, for that needs torch.
    Raises StudyError."""
    done = subprocess.run(
        [sys.executable, "-m", "nightshift.catalogue", name],
        cwd=study.repo,
        env=os.environ | {"PYTHONPATH": str(study.repo / "src")},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise StudyError(f"base ({name}): {last}")
    return Path(done.stdout.strip())


# ---- both ----


def cache(study: Study) -> Path:
    return (study.repo / study.plan.config.runtime.cache_dir).resolve() / "base"


def read_base(folder: Path) -> Base:
    path = folder / CHECKPOINT_FOLDER / CONFIG_FILE
    try:
        config = check(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ConfigError) as error:
        first = str(error).splitlines()[0]
        raise StudyError(f"base ({folder}): its configuration cannot be used: {first}") from None
    return Base(folder, sha256_of(path.parent), config)


def sha256_of(checkpoint: Path) -> str:
    with open(checkpoint / WEIGHTS_FILE, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
