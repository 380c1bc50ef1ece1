"""The whole of it, for real and small: a clone, a study, MLflow, DVC. `make test-all` runs it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from standin import script

from agent.journal import Edit, Proposal
from nightshift.fixed.config import ROOT

pytestmark = pytest.mark.slow

SMALL = [
    "budget.kind=steps", "budget.amount=6", "evaluate.max_bytes=20000", "evaluate.sample_tokens=4",
    "runtime.num_dev_points=1", "runtime.dev_bytes=5000",
]  # fmt: skip


def environment(clone):
    return os.environ | {
        "PYTHONPATH": f"{clone / 'src'}:{clone}",
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }


def run(clone, *command, ok=True):
    command = [sys.executable, "-m", *command]
    place = {"cwd": clone, "env": environment(clone)}
    done = subprocess.run(command, **place, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What is in git now, with what is not committed yet, in a repository of its own."""
    folder = tmp_path_factory.mktemp("clone") / "nightshift"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "start"]):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)
    return folder


def test_a_study_is_told_alike_by_the_journal_mlflow_and_dvc(clone):
    from nightshift.fixed.config import Tracking
    from nightshift.fixed.tracking import open_store

    said = run(
        clone,
        "nightshift.cli",
        "study",
        "study.name=t",
        "study.trials=4",
        "study.false_keeps=100",
        *SMALL,
    )
    trials = [json.loads(line) for line in open(clone / "outputs/studies/t/journal.jsonl")]
    assert [t["number"] for t in trials] == [0, 1, 2, 3, 4]
    assert sum(bool(t["proposal"]["edits"]) for t in trials) >= 1, "code changes are among them"
    assert "reproduce:" in said

    uri = f"sqlite:///{clone}/outputs/mlflow/mlflow.db"
    store = open_store(Tracking(enabled=True, uri=uri, experiment="nightshift"))
    parent = store.find(kind="study")[0]
    children = {int(c.data.tags["trial"]): c for c in store.children(parent.info.run_id)}
    assert sorted(children) == [0, 1, 2, 3, 4] and parent.info.status == "FINISHED"
    for trial in trials:
        assert children[trial["number"]].data.metrics.get("val_bpb") == pytest.approx(
            trial["val_bpb"], abs=1e-6
        )

    kept = [t for t in trials if t["decision"] == "keep"][-1]
    other = clone.with_name("other")
    subprocess.run(["git", "clone", "-q", str(clone), str(other)], check=True)
    subprocess.run(["git", "checkout", "-q", "study/t"], cwd=other, check=True)
    run(other, "dvc", "cache", "dir", "--local", str(clone / ".dvc/cache"))
    assert "Running stage" not in run(other, "dvc", "repro", "evaluate")
    again = json.loads((other / "champion/metrics.json").read_text())["val_bpb"]
    assert again == kept["runs"][0]["val_bpb"]
    assert "Running stage 'pretrain'" in run(
        other, "dvc", "repro", "-f", "pretrain", "evaluate", "--single-item"
    )
    assert json.loads((other / "champion/metrics.json").read_text())["val_bpb"] == again, (
        "to the last digit"
    )


PLAIN_MLFLOW = """
import sys
import mlflow
model = mlflow.pyfunc.load_model("models:/nightshift@champion")
said = model.predict({"messages": [{"role": "user", "content": "Hello"}]}, {"max_tokens": 6})
print(said["usage"]["completion_tokens"], sys.modules["nightshift"].__file__)
"""


def test_a_promoted_champion_is_reproduced_by_dvc_and_loaded_by_mlflow(clone):
    """A keep is forced: the baseline trains its embeddings ten times too slowly."""
    change = {"title": "faster embeddings", "hypothesis": "They lag.", "source": "test"}
    change |= {"overrides": {"optim.embedding_lr": 0.2}, "edits": []}
    place = clone / "outputs/studies/p/trials/001/proposal.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(change))
    slow = ["optim.embedding_lr=0.02", "study.baseline_seeds=[1,2]", "study.false_keeps=100"]
    small = ["model.depth=1", "model.seq_len=64", "train.batch_tokens=256", *SMALL[2:]]
    small += ["tokenizer.vocab_size=512", "budget.kind=tokens", "budget.amount=8000"]
    small += ["evaluate.probes=8", "runtime.num_threads=1"]
    run(clone, "nightshift.cli", "study", "study.name=p", "study.trials=1", *slow, *small)
    said = run(clone, "nightshift.cli", "promote", "p", "budget.amount=12000")
    assert "models:/nightshift@champion" in said

    line = json.loads((clone / "outputs/studies/p/promotions.jsonl").read_text())
    folder = clone / "outputs/studies/p" / line["run"]
    assert line["test_bpb"] > 0 and line["dvc_md5"].endswith(".dir")
    refused = run(clone, "nightshift.cli", "evaluate", f"run={folder}", "split=test", ok=False)
    assert "a second reading is refused" in refused and len(refused.splitlines()) == 1

    done = subprocess.run(
        [sys.executable, "-c", PLAIN_MLFLOW],
        cwd=clone.parent,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"MLFLOW_TRACKING_URI": f"sqlite:///{clone}/outputs/mlflow/mlflow.db"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "/artifacts/code/nightshift/" in done.stdout, "with its own code, not this checkout's"

    other = clone.with_name("promoted")
    subprocess.run(["git", "clone", "-q", str(clone), str(other)], check=True)
    subprocess.run(["git", "checkout", "-q", "study/p"], cwd=other, check=True)
    run(other, "dvc", "cache", "dir", "--local", str(clone / ".dvc/cache"))
    assert "Running stage" not in run(other, "dvc", "repro", "evaluate")
    number = json.loads((other / "champion/metrics.json").read_text())["val_bpb"]
    assert "Running stage 'pretrain'" in run(
        other, "dvc", "repro", "-f", "--no-run-cache", "pretrain", "evaluate", "--single-item"
    )
    again = json.loads((other / "champion/metrics.json").read_text())["val_bpb"]
    assert again == number == line["arms"][1]["runs"][0]["val_bpb"], "to the last digit"


CHAT = [
    *SMALL, "study.target=chat_bpb", "study.false_keeps=100", "sft_budget.kind=steps",
    "sft_budget.amount=8", "chat_evaluate.questions_per_task=2", "chat_evaluate.answer_tokens=4",
    "chat_evaluate.sample_tokens=4", "runtime.num_threads=1", "study.baseline_seeds=[1,2]",
]  # fmt: skip


def test_a_study_of_chat_trains_its_base_once_and_dvc_has_both(clone):
    edit = Edit(
        path="conf/sft/full.yaml", search="batch_tokens: 1024", replace="batch_tokens: 2048"
    )
    twice = Proposal(
        title="batches of twice the size",
        hypothesis="With steps as the budget they are twice the tokens.",
        source="outside",
        edits=[edit],
    )
    script(clone, [twice], "c")
    said = run(clone, "nightshift.cli", "study", "study.name=c", "study.trials=1", *CHAT)
    trials = [json.loads(line) for line in open(clone / "outputs/studies/c/journal.jsonl")]
    kept = trials[1]
    assert kept["decision"] == "keep" and said.count("the base is trained") == 1
    assert all(t["val_bpb"] is None for t in trials)
    other = clone.with_name("chat")
    subprocess.run(["git", "clone", "-q", "-b", "study/c", str(clone), str(other)], check=True)
    run(other, "dvc", "cache", "dir", "--local", str(clone / ".dvc/cache"))
    assert "Running stage" not in run(other, "dvc", "repro")
    numbers = json.loads((other / "champion/chat/metrics.json").read_text())
    assert numbers["chat_bpb"] == pytest.approx(kept["runs"][0]["chat_bpb"], abs=1e-6)
    forced = ["dvc", "repro", "-f", "--no-run-cache", "--single-item"]
    weights = other / "champion/chat/checkpoint/model.safetensors"
    before = weights.read_bytes()
    assert "Running stage 'sft'" in run(other, *forced, "sft")
    assert weights.read_bytes() == before, "to the bit"
    weights = other / "champion/checkpoint/model.safetensors"
    before = weights.read_bytes()
    run(other, *forced, "pretrain")
    assert weights.read_bytes() == before, "and so is the base"


def test_a_study_may_begin_from_a_checkpoint_that_is_there(clone):
    folder = clone / "outputs/pretrain/given"
    small = [*SMALL, "model.depth=2", "tracking=off", f"hydra.run.dir={folder}"]
    run(clone, "nightshift.pretrain", *small)
    arguments = ["study.name=g", "study.trials=0", "base=pretrain/given", *CHAT]
    assert "the base is trained" not in run(clone, "nightshift.cli", "study", *arguments)
    weights = (folder / "checkpoint/model.safetensors").read_bytes()
    shutil.rmtree(folder)
    other = clone.with_name("given")
    subprocess.run(["git", "clone", "-q", "-b", "study/g", str(clone), str(other)], check=True)
    run(other, "dvc", "cache", "dir", "--local", str(clone / ".dvc/cache"))
    run(other, "dvc", "checkout")  # what is frozen, `dvc repro` does not even bring
    assert "Running stage" not in run(other, "dvc", "repro")
    assert (other / "champion/checkpoint/model.safetensors").read_bytes() == weights
    conf = other / "conf/optim/muon.yaml"
    conf.write_text(conf.read_text().replace("momentum: 0.95", "momentum: 0.9"))
    assert "Running stage 'pretrain'" not in run(other, "dvc", "repro", "pretrain")


def test_a_sweep_with_a_bad_job_keeps_the_others(clone):
    from nightshift.fixed.config import Tracking
    from nightshift.fixed.tracking import open_store

    run(
        clone,
        "nightshift.pretrain",
        "-m",
        "optim.matrix_lr=0.01,-1,0.04",
        "seed=1,2",
        *SMALL,
        ok=False,
    )
    uri = f"sqlite:///{clone}/outputs/mlflow/mlflow.db"
    store = open_store(Tracking(enabled=True, uri=uri, experiment="nightshift"))
    parent = store.find(kind="sweep")[0]
    ended = sorted(c.info.status for c in store.children(parent.info.run_id))
    assert ended == ["FAILED"] * 2 + ["FINISHED"] * 4 and parent.info.status == "FAILED"


def test_dvc_runs_only_what_a_change_touches(clone):
    """`60s` is the budget of pretraining and of tuning; both are a few steps here."""
    smaller = clone / "conf/budget/60s.yaml"
    smaller.write_text("kind: steps\namount: 4.0\nwall_limit_s: 60.0\nreplay: null\n")
    questions = clone / "conf/chat_evaluate/default.yaml"
    questions.write_text(questions.read_text().replace("per_task: 100", "per_task: 5"))
    said = run(clone, "dvc", "repro")
    assert "Running stage 'evaluate'" in said and "Running stage 'chat_evaluate'" in said
    assert "up to date" in run(clone, "dvc", "repro")
    shown = json.loads(run(clone, "dvc", "metrics", "show", "--json"))[""]["data"]
    assert shown["champion/metrics.json"]["data"]["val_bpb"] > 0
    chat = shown["champion/chat/metrics.json"]["data"]
    assert chat["chat_bpb"] == pytest.approx(chat["chat_bpb_before"] - chat["chat_bpb_gain"])
    file = clone / "conf/sft/full.yaml"
    file.write_text(file.read_text().replace("lr_scale: 0.5", "lr_scale: 0.4"))
    said = run(clone, "dvc", "repro")
    stages = ("chats", "sft", "chat_evaluate", "pretrain", "evaluate")
    ran = [s for s in stages if f"Running stage '{s}'" in said]
    assert ran == ["sft", "chat_evaluate"], "the base is not trained again"
    file = clone / "conf/optim/muon.yaml"
    file.write_text(file.read_text().replace("matrix_lr: 0.02", "matrix_lr: 0.03"))
    said = run(clone, "dvc", "repro", "evaluate")
    stages = ("corpus", "tokenizer", "tokens", "pretrain", "evaluate")
    assert [s for s in stages if f"Running stage '{s}'" in said] == ["pretrain", "evaluate"]
    said = run(clone, "dvc", "exp", "run", "-S", "optim.matrix_lr=0.05", ok=False)
    assert "-S 'conf/trial/champion.yaml:++optim.matrix_lr=0.05'" in said
