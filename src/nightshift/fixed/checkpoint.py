"""A checkpoint is a folder: weights, resolved config, tokenizer. Loading runs no code: no pickle.

model.safetensors   float32 weights
config.yaml         the resolved configuration of the run
tokenizer/          ranks and JSON (fixed/tokenizer.py)
state.safetensors   only in an unfinished run: what `resume` needs, with state.json
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nightshift.fixed.config import Config, ConfigError, check
from nightshift.fixed.result import CHECKPOINT_FOLDER
from nightshift.fixed.tokenizer import Tokenizer

WEIGHTS_FILE = "model.safetensors"
STATE_FILES = ("state.safetensors", "state.json")


def write_config(config: Config, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )


def read_config(path: Path) -> Config:
    if not path.is_file():
        raise ConfigError(
            f"{path}: there is no such file; give the folder of a run or of a checkpoint"
        )
    return check(yaml.safe_load(path.read_text(encoding="utf-8")))


def save(
    folder: Path,
    model: torch.nn.Module,
    config: Config,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer | None = None,
    clock_state: dict | None = None,
) -> None:
    """Whole or not at all. With an optimizer the run can be resumed."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(_weights(model), temporary / WEIGHTS_FILE)
        write_config(config, temporary / "config.yaml")
        tokenizer.save(temporary / "tokenizer")
        if optimizer is not None:
            _save_state(temporary, model, optimizer, clock_state)
        _replace_folder(temporary, folder)
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise OSError(f"{folder}: the checkpoint could not be saved. {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tied weights once: safetensors refuses shared memory, and `load` ties them again."""
    seen, weights = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        weights[name] = tensor.detach().cpu().contiguous()
    return weights


def load(
    folder: Path, device: torch.device | str = "cpu"
) -> tuple[torch.nn.Module, Tokenizer, Config]:
    from nightshift.model import (
        GPT,
    )  # the one arrow that points up: a checkpoint rebuilds the candidate's model

    config = read_config(folder / "config.yaml")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    model = GPT(config.model, tokenizer.vocab_size)
    load_weights(model, folder)
    return model.to(device), tokenizer, config


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
        n for n, _ in model.named_parameters()
    }
    if unexpected or set(missing) - tied:
        wrong = (unexpected or sorted(set(missing) - tied))[0]
        raise ConfigError(
            f"{folder / WEIGHTS_FILE}: the weights do not fit the model ({wrong}); "
            "they were saved by other code"
        )


def weights_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    with open(folder / WEIGHTS_FILE, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _save_state(folder: Path, model, optimizer, clock_state: dict) -> None:
    """Optimizer state by parameter name; tensors as safetensors, counters as JSON."""
    names = {p: name for name, p in model.named_parameters()}
    tensors, numbers = {"rng": torch.get_rng_state()}, {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            where = f"{names[parameter]}|{key}"
            if isinstance(value, torch.Tensor):
                tensors[where] = value.detach().cpu().contiguous()
            else:
                numbers[where] = value
    save_file(tensors, folder / STATE_FILES[0])
    (folder / STATE_FILES[1]).write_text(json.dumps({"clock": clock_state, "numbers": numbers}))


def load_clock(folder: Path) -> dict:
    """The clock's state in a checkpoint that can be resumed."""
    if not (folder / STATE_FILES[1]).is_file():
        raise ConfigError(
            f"resume ({folder}): this run is finished or never saved its state; "
            "only an interrupted run resumes"
        )
    return json.loads((folder / STATE_FILES[1]).read_text())["clock"]


def load_state(folder: Path, model, optimizer) -> None:
    """Puts weights, optimizer and RNG back."""
    load_weights(model, folder)
    numbers = json.loads((folder / STATE_FILES[1]).read_text())["numbers"]
    tensors = load_file(folder / STATE_FILES[0])
    torch.set_rng_state(tensors.pop("rng"))
    parameters = dict(model.named_parameters())
    for where, value in (tensors | numbers).items():
        name, key = where.rsplit("|", 1)
        parameter = parameters[name]
        optimizer.state[parameter][key] = (
            value.to(parameter.device) if isinstance(value, torch.Tensor) else value
        )


def folder_of(place: str) -> Path:
    """A run's folder or its checkpoint folder -> the checkpoint folder."""
    folder = Path(place)
    return folder / CHECKPOINT_FOLDER if (folder / CHECKPOINT_FOLDER).is_dir() else folder
