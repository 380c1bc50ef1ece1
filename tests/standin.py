"""A stand-in project: a real git repository whose pretrain takes milliseconds.

It has the real conf/, and small pipeline modules that obey the same contract: a config file in,
files of fixed/result.py out. What a run does is said in its model.py, so a proposal's edit can make
it better, worse, crash, hang or cheat.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from agent.journal import Edit, Journal, Proposal
from nightshift.fixed.config import CONF

CHECKOUT = CONF.parent

MODEL = """\
BEHAVIOUR = "ok"
BONUS = 0.0
"""

COMMON = """
import hashlib, json, os, runpy, shutil, sys, time
from pathlib import Path
import yaml
from nightshift.fixed.result import TUNING_MODULES, code_digests

given = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder, tree = Path(given["run"]), Path(given["tree"])
values = yaml.safe_load((folder / "config.yaml").read_text())
model = runpy.run_path(str(tree / "src/nightshift/model.py"))
behaviour, seed = model["BEHAVIOUR"], values["seed"]
is_preflight = values["budget"]["kind"] == "steps" and values["budget"]["amount"] <= 2

def config_digest(values):
    kept = {k: v for k, v in values.items() if k not in
            ("runtime", "sandbox", "tracking", "parent_run_id", "run_name", "resume")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]

def write(path, values):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values))
    os.replace(temporary, path)

def fork_away():
    # A process in a session of its own that outlives its parents.
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
"""

FETCH = ""

PREPARE = """
from nightshift.common import *

Path(values["runtime"]["cache_dir"]).mkdir(parents=True, exist_ok=True)
if behaviour == "no data":
    sys.exit("corpus.path: nothing there")
"""

TRAIN = """
from nightshift.common import *

with open(tree.parents[1] / "starts.log", "a") as file:
    file.write(f"{folder.name} {seed} {os.getpid()}\\n")
if behaviour == "import error":
    import nothing_of_this_name
if behaviour == "crash" and not is_preflight:
    raise RuntimeError("shape '[64, 128]' is invalid")
if behaviour == "hang" and not is_preflight:
    fork_away()
    time.sleep(60)
if behaviour == "wanders":  # on the time of the day
    model["BONUS"] = time.time() % 1 / 1e6
if behaviour == "slow" and not is_preflight:
    time.sleep(0.5)
if behaviour == "leave a process":
    fork_away()
if behaviour == "plant":
    (folder / "result.json").write_text(json.dumps({"status": "ok", "val_bpb": 0.001}))
if behaviour == "killed once" and not (folder.parent / "killed").exists() and not is_preflight:
    (folder.parent / "killed").touch()
    os.kill(os.getpid(), 9)
if behaviour == "killed always" and not is_preflight:
    os.kill(os.getpid(), 9)
def curve(until):
    # What val_bpb will be (see EVALUATE), and one bit more at the start than at the end.
    level = 2.0 + 10 * abs(values["optim"]["matrix_lr"] - 0.04) - model["BONUS"]
    points = [(i + 1) / 4 for i in range(4) if (i + 1) / 4 <= until]
    return "".join(json.dumps({"step": round(8 * p), "progress": p, "dev_bpb": level + 1 - p})
                   + "\\n" for p in points)
if behaviour.startswith("lingers") and not is_preflight:  # half-way, for so many seconds
    (folder / "scratch").mkdir()
    (folder / "scratch/curve.jsonl").write_text(curve(until=0.5))
    time.sleep(float(behaviour.split()[1]))
if not is_preflight:
    (folder / "curve.jsonl").write_text(curve(until=1))
cpu_s = 9.0 if behaviour == "toil" else 0.1
weights = f"{model['BONUS']} {seed}"
(folder / "checkpoint").mkdir(exist_ok=True)
(folder / "checkpoint" / "model.safetensors").write_text(weights)
shutil.copy(folder / "config.yaml", folder / "checkpoint")
weights_sha256 = hashlib.sha256(weights.encode()).hexdigest()
training = {"status": "ok", "steps": 3, "tokens": 300, "train_s": 0.1, "steps_cpu_s": cpu_s,
            "tokens_per_s": 3000.0, "seed": seed, "data_digest": "d" * 12,
            "config_digest": config_digest(values), "weights_sha256": weights_sha256}
if behaviour == "diverge" and not is_preflight:
    training |= {"status": "diverged", "message": "loss is nan at step 2"}
write(folder / "training.json", training)
"""

EVALUATE = """
from nightshift.common import *

if behaviour == "evaluator killed once" and not (folder.parent / "killed").exists():
    (folder.parent / "killed").touch()
    os.kill(os.getpid(), 9)
if behaviour == "plant":
    sys.exit(1)
seed = values["seed"]
noise = {1: 0.0, 2: 0.002, 3: -0.002}.get(seed, 0.001)
if behaviour == "uneven":  # a gain that needs many seeds to be seen
    noise -= 0.0004 + 0.0002 * (seed % 3)
weather = Path(values["runtime"]["shared_cache_dir"]) / "weather"  # the machine's, between runs
noise += float(weather.read_text()) if weather.exists() else 0.0
lr = values["optim"]["matrix_lr"]
if behaviour.startswith("short") and not is_preflight and values["budget"]["amount"] < 8:
    noise += float(behaviour.split()[1])  # in a short run alone
if behaviour == "small only" and values["model"]["depth"] > 4:
    noise += 0.1
val_bpb = 2.0 + 10 * abs(lr - 0.04) + noise - model["BONUS"]
training = json.loads((folder / "training.json").read_text())
fixed, editable = code_digests(tree)
import subprocess
head = ["git", "-C", str(tree), "rev-parse", "HEAD"]
commit = subprocess.run(head, capture_output=True, text=True).stdout.strip()
binding = {"commit": commit, "fixed_code": fixed, "editable_code": editable,
           "seed": training["seed"], "config_digest": training["config_digest"],
           "budget": values["budget"], "weights_sha256": training["weights_sha256"]}
if behaviour == "other seed" and not is_preflight:
    binding["seed"] = seed + 1
if behaviour == "other code":
    binding["editable_code"] = "0" * 16
names = ("files", "network", "processes", "privileges", "limits")
binding["protections"] = {name: ["stand-in"] for name in names}
result = {"status": "ok", "val_bpb": val_bpb, "training": training, "binding": binding,
          "forward_cpu_s": 111.111, "weights_sha256": training["weights_sha256"]}
if given.get("split") == "test":
    with open(tree.parents[5] / "tests_read.log", "a") as file:
        file.write(f"{folder}\\n")
    write(folder / "test_result.json", result | {"val_bpb": val_bpb + 1, "split": "test"})
else:
    write(folder / "result.json", result)
"""

# The same runs, judged by another number: better by the bonus of tuning.py, bound to their base.
CHAT_SCORE = (
    EVALUATE.replace("code_digests(tree)", "code_digests(tree, TUNING_MODULES)")
    .replace('"val_bpb": val_bpb', '"chat_bpb": chat_bpb')
    .replace(
        "training = json",
        """
tuning = runpy.run_path(str(tree / "src/nightshift/tuning.py"))
chat_bpb = 3.0 + noise - tuning["BONUS"]
training = json""",
    )
    .replace(
        'binding["protections"]',
        """
base = (Path(values["base"]) / "model.safetensors").read_bytes()
binding["base_sha256"] = hashlib.sha256(base).hexdigest()
binding["protections"]""",
    )
)


def make_project(folder: Path) -> Path:
    """A git repository with one commit, ready for a study."""
    package = folder / "src/nightshift"
    (package / "fixed").mkdir(parents=True)
    shutil.copytree(CONF, folder / "conf")
    (folder / "conf/trial/champion.yaml").write_text("# @package _global_\n# Accepted.\n{}\n")
    for name in ("__init__", "optim", "schedule", "training", "filtering", "fixed/__init__"):
        (package / f"{name}.py").write_text("")
    (package / "model.py").write_text(MODEL)
    (package / "tuning.py").write_text("BONUS = 0.0\n")
    (package / "common.py").write_text(COMMON)
    for name, text in (
        ("corpus", FETCH),
        ("prepare", PREPARE),
        ("train", TRAIN),
        ("evaluate", EVALUATE),
        ("chats", FETCH),
        ("tune", TRAIN),
        ("chat_score", CHAT_SCORE),
    ):
        (package / f"fixed/{name}.py").write_text(text)
    for name in ("result",):  # the real one
        shutil.copyfile(CHECKOUT / f"src/nightshift/fixed/{name}.py", package / f"fixed/{name}.py")
    shutil.copyfile(CHECKOUT / "dvc.yaml", folder / "dvc.yaml")
    (folder / ".gitignore").write_text("/outputs/\n/.cache/\n__pycache__/\n/starts.log\n")
    run_git(folder, "init", "--quiet", "--initial-branch=main")
    run_git(folder, "add", ".")
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@localhost"]
    run_git(folder, *identity, "commit", "--quiet", "-m", "start")
    return folder


def run_git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def behave(behaviour: str, also: str = "") -> Proposal:
    """A proposal after which runs behave like this. `also`: a line that makes it another trial."""
    more = f"\nALSO = {also!r}" if also else ""
    proposal = edit('BEHAVIOUR = "ok"', f'BEHAVIOUR = "{behaviour}"{more}')
    proposal.title = behaviour
    return proposal


def edit(search: str, replace: str) -> Proposal:
    one = Edit(path="src/nightshift/model.py", search=search, replace=replace)
    return Proposal(title="edit", hypothesis="It will.", source="test", edits=[one])


def bonus(before: float, after: float) -> Proposal:
    """A code change worth after - before bits per byte."""
    proposal = edit(f"BONUS = {before}", f"BONUS = {after}")
    proposal.title = f"bonus {before} -> {after}"
    return proposal


def values(**overrides) -> Proposal:
    """A change of values: model__depth=6 for model.depth."""
    flat = {key.replace("__", "."): value for key, value in overrides.items()}
    return Proposal(title=str(flat), hypothesis="It will.", source="test", overrides=flat)


def script(project: Path, proposals: list[Proposal], name: str = "first", first: int = 1) -> None:
    """Lay the proposals where a study that was killed finds its own."""
    for number, proposal in enumerate(proposals, first):
        path = project / f"outputs/studies/{name}/trials/{number:03d}/proposal.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(proposal)))


def overrides(trials: int, *more: str) -> list[str]:
    return [f"study.trials={trials}", "study.warm=false", "tracking=off", "budget=smoke", *more]


def study_command(project: Path, arguments: list[str]) -> list[str]:
    """The command line of a study of the project, as a process of its own."""
    code = (
        "import sys; from pathlib import Path; from agent.loop import main; "
        "sys.exit(main(sys.argv[2:], Path(sys.argv[1])))"
    )
    return [sys.executable, "-c", code, str(project), *arguments]


def journal_of(project: Path, name: str = "first") -> Journal:
    return Journal(project / f"outputs/studies/{name}/journal.jsonl")
