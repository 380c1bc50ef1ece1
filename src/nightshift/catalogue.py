"""Every checkpoint of this checkout by a short name, and the model that belongs to it.

champion/chat            champion/chat/checkpoint, the champion tuned to chat (`dvc repro sft`)
champion                 champion/checkpoint, what `dvc repro` made
sft/<run>                outputs/sft/<run>/checkpoint; sft/latest is the newest
pretrain/<run>           outputs/pretrain/<run>/checkpoint
<study>/<number>         a trial's first seed: first/4; first/4/seed_2 is another one
a path                   any folder of a run or of a checkpoint

A trial may have edited model.py, and its weights fit only its own. So a checkpoint is loaded with
the model.py of the commit that its training.json names, from git, where that differs from ours.
That code then runs in this process, with this user's rights: show trials that you would check out.
"""

import difflib
import hashlib
import json
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from nightshift.fixed import checkpoint
from nightshift.fixed.config import ROOT, ConfigError, Model, check
from nightshift.fixed.result import CHECKPOINT_FOLDER, RESULT_FILE, TRAINING_FILE
from nightshift.fixed.tokenizer import Tokenizer
from nightshift.model import GPT
from nightshift.sft import CHAT_RESULT_FILE

MODEL_FILE = "src/nightshift/model.py"
CHAMPIONS = {"champion/chat": "the champion, tuned to chat", "champion": "the champion"}
STAGES = ("sft", "pretrain")
STUDIES = "outputs/studies"
NUMBERS = ("val_bpb", "chat_bpb")


@dataclass(frozen=True, kw_only=True)
class Entry:
    name: str
    folder: Path  # the checkpoint's
    title: str = ""  # for a person
    val_bpb: float | None = None  # bits per byte of held-out text
    chat_bpb: float | None = None  # of held-out answers, for what was tuned to chat
    decision: str | None = None  # of a trial
    is_kept: bool = True  # false: a trial whose checkpoint was deleted, or never made
    created: int = 0  # Unix time


def entries(root: Path = ROOT) -> list[Entry]:
    """All there are; the champion first, then runs and trials, newest first."""
    found = [entry for name in CHAMPIONS if (entry := _champion(root, name))]
    for stage in STAGES:
        runs = root.glob(f"outputs/{stage}/*/{CHECKPOINT_FOLDER}")
        found += sorted((_run(stage, run) for run in runs), key=lambda e: -e.created)
    studies = sorted(root.glob(f"{STUDIES}/*/journal.jsonl"), key=lambda p: -p.stat().st_mtime)
    for journal in studies:
        found += _trials(journal)
    return found


def find(name: str, root: Path = ROOT, *, paths: bool = True) -> Entry:
    """Raises ConfigError: the name, what there is, what to do. `paths`: may it be any folder?"""
    known = {entry.name: entry for entry in entries(root)}
    wanted = _canonical(name)
    if wanted in known:
        return _kept(known[wanted])
    stage, _, run = name.partition("/")
    if run == "latest" and stage in STAGES:
        newest = [entry for entry in known.values() if entry.name.startswith(f"{stage}/")]
        if newest:
            return newest[0]
    if (folder := _trial_seed(wanted, root)) or (folder := paths and _folder(name)):
        return Entry(name=name, folder=folder, **_numbers(folder))
    raise ConfigError(_not_there(name, [n for n, e in known.items() if e.is_kept]))


def default(root: Path = ROOT) -> Entry:
    """The champion, tuned to chat if it is; else the newest run. Raises ConfigError."""
    usable = [entry for entry in entries(root) if entry.is_kept]
    if not usable:
        raise ConfigError("there is no checkpoint yet. Run: dvc repro, or nightshift pretrain")
    return usable[0]


def load(
    folder: Path, device: torch.device | str = "cpu", root: Path = ROOT
) -> tuple[torch.nn.Module, Tokenizer, Model]:
    """The model by the checkpoint's own model.py, its tokenizer, its shape. Raises ConfigError.

    Of the configuration only the group `model` is checked: the rest may be of an older schema.
    """
    source = model_source(folder, root)
    shape, tokenizer = read_shape(folder), Tokenizer.load(folder / "tokenizer")
    model = model_class(source)(shape, tokenizer.vocab_size)
    checkpoint.load_weights(model, folder)
    return model.to(device), tokenizer, shape


def read_values(folder: Path) -> dict:
    """A checkpoint's configuration as it was saved. Raises ConfigError."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give a run's folder or a checkpoint's")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_shape(folder: Path) -> Model:
    return check(read_values(folder)["model"], Model)


def model_source(folder: Path, root: Path = ROOT) -> str:
    """The text of model.py as it was when these weights were trained.

    Ours, where the commit is unknown to git or the run was made from uncommitted changes.
    """
    commit = facts(folder).get("commit") or ""
    if commit and not commit.endswith("+"):
        git = ["git", "-C", str(root), "show", f"{commit}:{MODEL_FILE}"]
        shown = subprocess.run(git, capture_output=True, text=True)
        if shown.returncode == 0:
            return shown.stdout
    return own_source()


def own_source() -> str:
    return Path(sys.modules[GPT.__module__].__file__).read_text(encoding="utf-8")


def model_class(source: str) -> type:
    """The class GPT of a model.py: ours, or in a module of its own if it differs."""
    if source == own_source():
        return GPT
    name = f"nightshift_model_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        module = types.ModuleType(name)
        try:
            exec(compile(source, f"<{MODEL_FILE} of another commit>", "exec"), module.__dict__)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the checkpoint's own model.py does not run in this checkout ({error}). "
                "Check out its commit and try there"
            ) from None
        sys.modules[name] = module
    return sys.modules[name].GPT


def facts(folder: Path) -> dict:
    """What the run of a checkpoint says of itself: training.json, val_bpb and chat_bpb."""
    run = folder.parent
    numbers = _read(run / CHAT_RESULT_FILE).get("metrics") or {}
    result = _read(run / RESULT_FILE)
    return _read(run / TRAINING_FILE) | {
        "val_bpb": result.get("val_bpb"),
        "chat_bpb": numbers.get("chat_bpb", result.get("chat_bpb")),
    }


def _read(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _numbers(folder: Path) -> dict:
    weights = folder / checkpoint.WEIGHTS_FILE
    created = int(weights.stat().st_mtime) if weights.exists() else 0
    known = facts(folder)
    return {name: known[name] for name in NUMBERS} | {"created": created}


def _champion(root: Path, name: str) -> Entry | None:
    folder = root / name / CHECKPOINT_FOLDER
    if not folder.is_dir():
        return None
    return Entry(name=name, folder=folder, title=CHAMPIONS[name], **_numbers(folder))


def _run(stage: str, folder: Path) -> Entry:
    title = {"sft": "tuned to chat", "pretrain": "pretrained"}[stage]
    return Entry(
        name=f"{stage}/{folder.parent.name}", folder=folder, title=title, **_numbers(folder)
    )


def _trials(journal: Path) -> list[Entry]:
    """The trials of a study that have a number, kept ones first, newest first."""
    found = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            trial = json.loads(line)
            run, number = trial["runs"][0], trial["number"]
            folder = journal.parent / run["folder"] / CHECKPOINT_FOLDER
            entry = Entry(
                name=f"{journal.parent.name}/{number:03d}",
                folder=folder,
                title=trial["proposal"]["title"],
                decision=trial["decision"],
                is_kept=folder.is_dir(),
                **(_numbers(folder) | {k: trial[k] for k in NUMBERS if trial.get(k) is not None}),
            )
        except (ValueError, KeyError, IndexError, TypeError):
            continue  # invalid trials have no run; a line cut by a kill is no trial
        found.append(entry)
    return sorted(reversed(found), key=lambda entry: not entry.is_kept)


def _canonical(name: str) -> str:
    """first/4 -> first/004."""
    study, _, rest = name.removeprefix(f"{STUDIES}/").partition("/")
    number, slash, seed = rest.partition("/")
    return f"{study}/{int(number):03d}{slash}{seed}" if number.isdecimal() else name


def _trial_seed(name: str, root: Path) -> Path | None:
    """first/004/seed_2 -> its checkpoint."""
    found = re.fullmatch(r"([\w.-]+)/(\d{3})/(seed_\d+)", name)
    if not found:
        return None
    study, number, seed = found.groups()
    folder = root / STUDIES / study / "trials" / number / seed / CHECKPOINT_FOLDER
    return folder if folder.is_dir() else None


def _folder(place: str) -> Path | None:
    folder = checkpoint.folder_of(place)
    return folder if (folder / checkpoint.WEIGHTS_FILE).is_file() else None


def _kept(entry: Entry) -> Entry:
    if entry.is_kept:
        return entry
    study, number = entry.name.split("/")
    raise ConfigError(
        f"{entry.name}: its checkpoint was not kept ({entry.decision}). A study started with "
        "study.keep_checkpoints=true keeps all of them. To train this one again: "
        f"git worktree add ../{study}-{number} refs/trials/{study}/{number} && "
        f"cd ../{study}-{number} && PYTHONPATH=src python -m nightshift.pretrain"
    )


def _not_there(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f" Nearest: {close[0]}." if close else ""
    there = ", ".join(names[:6]) or "none yet: run dvc repro, or nightshift pretrain"
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{name}: there is no such checkpoint.{hint} There are: {there}{more}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the folder of a checkpoint that a study may begin from. One that belongs to another
    model.py than this checkout's is refused: the study's trials would run ours."""
    (name,) = sys.argv[1:] if arguments is None else arguments
    try:
        folder = find(name).folder
        if model_source(folder) != own_source():
            raise ConfigError(
                f"{folder} was trained with another {MODEL_FILE} than this checkout's. Check out "
                f"its commit ({facts(folder).get('commit')}) and start the study there"
            )
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(folder.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
