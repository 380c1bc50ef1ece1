"""One real short run, forked by agent/warm.py: config.yaml in a folder -> score.json in it.

Trains with the code of the tree that it was started from, in the open (nobody cheats here), and
scores val text with fixed/ruler.py's arithmetic. Seconds are CPU time, of training and scoring
together: one thread, so that a busy machine does not count.
"""

import json
import sys
import time
from pathlib import Path

import torch

from nightshift.fixed import checkpoint, machine
from nightshift.fixed.config import Config
from nightshift.fixed.corpus import ensure_corpus
from nightshift.fixed.feed import LocalFeed
from nightshift.fixed.result import CHECKPOINT_FOLDER, CONFIG_FILE
from nightshift.fixed.ruler import bits_per_byte, cut, held_out_text, score
from nightshift.fixed.tracking import open_store
from nightshift.model import GPT
from nightshift.pretrain import train


def main(folder: Path) -> None:
    config = checkpoint.read_config(folder / CONFIG_FILE)
    feed = LocalFeed(config)  # data that are missing are made here, and not counted
    before = time.process_time()
    training = train(
        config, folder / "run", open_store(config.tracking).start("run", "pretrain"), feed
    )
    told = {"status": training.status, "message": training.message, "val_bpb": None}
    if training.status == "ok":
        told["val_bpb"] = round(
            val_bpb(folder / "run" / CHECKPOINT_FOLDER, config, feed.tokenizer), 6
        )
    told["seconds"] = round(time.process_time() - before, 3)
    (folder / "score.json").write_text(json.dumps(told))


@torch.no_grad()
def val_bpb(folder: Path, config: Config, tokenizer) -> float:
    model = GPT(config.model, tokenizer.vocab_size)
    checkpoint.load_weights(model, folder)
    device = machine.pick_device(config.runtime)
    model.dtype = machine.ruler_dtype(device, config.train)
    model.to(device).eval()
    texts = held_out_text(ensure_corpus(config), "val", config.evaluate.max_bytes)
    windows = cut(texts, tokenizer, config.model.seq_len)
    nats = score(
        lambda ids: model(torch.from_numpy(ids).to(device)), windows, config.evaluate.batch_size
    )
    return bits_per_byte(nats, windows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
