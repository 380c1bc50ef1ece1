"""A stage of dvc.yaml: params.yaml -> data/ or champion/.

PYTHONPATH=src python -m nightshift.stage corpus
"""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from nightshift.fixed.config import ROOT, Config, ConfigError, check
from nightshift.fixed.result import (
    CURVE_FILE,
    RESULT_FILE,
    TRAINING_FILE,
    Result,
    read_curve,
    read_result,
    write_json,
)

CHAMPION = ROOT / "champion"
CHAT = CHAMPION / "chat"
METRICS_FILE = "metrics.json"
CURVE_COLUMNS = ("step", "tokens", "train/loss", "dev_bpb", "lr_scale", "tokens_per_s")


def corpus(config: Config) -> int:
    from nightshift.fixed import corpus

    corpus.stage(config)
    return 0


def tokenizer(config: Config) -> int:
    from nightshift.fixed import tokenizer

    tokenizer.stage(config)
    return 0


def tokens(config: Config) -> int:
    from nightshift.fixed import batches

    batches.stage(config)
    return 0


def pretrain(config: Config) -> int:
    from nightshift import pretrain

    return train("pretrain", config, pretrain.train, work_folder(), CHAMPION)


def train(kind: str, config: Config, run: Callable, folder: Path, place: Path) -> int:
    """`run` in an MLflow run of its own; what it leaves goes to `place` if all is well."""
    from nightshift import pretrain
    from nightshift.fixed.tracking import open_store

    shutil.rmtree(folder, ignore_errors=True)
    log = open_store(config.tracking).start("dvc repro", kind)
    log.params(config)
    ended = "FAILED"
    try:
        training = run(config, folder, log)
        pretrain.record(log, folder, training, None)
        print(pretrain.summary(folder, training, None))
        ended = "FINISHED" if training.status == "ok" else "FAILED"
    finally:
        log.close(ended)
    if training.status != "ok":
        return 1
    publish(folder, place, "checkpoint", TRAINING_FILE, CURVE_FILE)
    return 0


def evaluate(config: Config) -> int:
    from nightshift.fixed import evaluate

    result: Result = evaluate.evaluate(CHAMPION, config)
    write_json(CHAMPION / RESULT_FILE, result)
    write_json(CHAMPION / METRICS_FILE, metrics(result))
    print(
        f"val_bpb {result.val_bpb}"
        if result.status == "ok"
        else f"{result.status}: {result.message}"
    )
    return 0 if result.status == "ok" else 1


def chats(config: Config) -> int:
    from nightshift.fixed import chats

    chats.stage(config)
    return 0


def sft(config: Config) -> int:
    from nightshift import sft

    config = sft.for_run(config.model_copy(update={"base": str(CHAMPION)}))
    return train("sft", config, sft.train, work_folder() / "chat", CHAT)


def chat_evaluate(config: Config) -> int:
    """The chat checkpoint beside its base, both on the same held-out conversations."""
    from nightshift import chat_evaluate
    from nightshift.fixed.tracking import open_store

    log = open_store(config.tracking).start("dvc repro: chat", "sft")
    ended = "FAILED"
    try:
        base = CHAMPION / "checkpoint"
        result = chat_evaluate.evaluate(CHAT / "checkpoint", config, base)
        write_json(CHAT / chat_evaluate.RESULT_FILE, result)
        write_json(CHAT / METRICS_FILE, result["metrics"])
        chat_evaluate.record(log, CHAT, result)
        print(chat_evaluate.table(result))
        ended = "FINISHED"
    finally:
        log.close(ended)
    return 0


def metrics(result: Result) -> dict:
    """The few numbers that `dvc metrics` compares."""
    t = result.training
    return {
        "val_bpb": result.val_bpb,
        "steps": t.steps,
        "tokens": t.tokens,
        "train_s": t.train_s,
        "tokens_per_s": t.tokens_per_s,
        "peak_memory_gb": t.peak_memory_gb,
    }


def work_folder() -> Path:
    """Training writes here first: a stage that fails leaves champion/ as it was."""
    return ROOT / "outputs" / "dvc"


def publish(run: Path, champion: Path, *names: str) -> None:
    """A run's files -> champion/, the DVC outputs; the curve as CSV for `dvc plots`."""
    champion.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == CURVE_FILE:
            write_curve_csv(read_curve(run / name), champion / "curve.csv")
        elif name in (TRAINING_FILE, RESULT_FILE):
            write_json(
                champion / name, without_place(json.loads((run / name).read_text(encoding="utf-8")))
            )
            if name == RESULT_FILE:
                write_json(champion / METRICS_FILE, metrics(read_result(run / name)))
        elif (run / name).is_dir():
            shutil.rmtree(champion / name, ignore_errors=True)
            shutil.copytree(run / name, champion / name)
        else:
            shutil.copyfile(run / name, champion / name)


def without_place(facts: dict) -> dict:
    """These files go to git: where the code lay on this machine does not belong there."""
    if facts.get("training"):
        facts["training"] = without_place(facts["training"])
    return facts | ({"code": None} if "code" in facts else {})


def write_curve_csv(points: list[dict], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CURVE_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(points)


STAGES = {
    f.__name__: f
    for f in (corpus, tokenizer, tokens, pretrain, evaluate, chats, sft, chat_evaluate)
}


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in STAGES:
        print(f"usage: python -m nightshift.stage {'|'.join(STAGES)}", file=sys.stderr)
        return 2
    try:
        values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        return STAGES[sys.argv[1]](check(values))
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
