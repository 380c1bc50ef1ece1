"""Tokens a second with the KV cache and without, and whether both say the same tokens.

For each number of rows, pairs alternate (cached, whole window, cached, ...) on the same prompts;
the ratio is taken within each pair. The equality counts every token of random prompts, half of them
greedy and half sampled, some longer than the window, the others' answers sliding over it.

    python benchmarks/generate.py <checkpoint folder> [pairs] [prompts]
"""

import random
import statistics
import sys
import time
from pathlib import Path

import torch

import nightshift  # noqa: F401  before torch
from nightshift.fixed import checkpoint, machine
from nightshift.generate import Engine, Sampling

ROWS = (1, 8, 32)
NEW_TOKENS = 64


def prompts_of(tokenizer, count: int, longest: int, seed: int) -> list[list[int]]:
    rng, vocabulary = random.Random(seed), len(tokenizer.ranks)
    lengths = [rng.randrange(longest) for _ in range(count)]
    return [
        [tokenizer.bos, *(rng.randrange(vocabulary) for _ in range(length))] for length in lengths
    ]


def rate(engine: Engine, prompts: list[list[int]]) -> float:
    """Tokens a second over all rows; nothing stops early. On a CPU: a second of one core, which
    does not depend on what else runs there."""
    now = time.perf_counter if torch.cuda.is_available() else time.process_time
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0.8, seed=1, stop_tokens=())
    started_at = now()
    engine.generate(prompts, sampling)
    return len(prompts) * NEW_TOKENS / (now() - started_at)


def speed(cached: Engine, full: Engine, pairs: int) -> None:
    for rows in ROWS:
        prompts = prompts_of(cached.tokenizer, rows, 64, seed=rows)
        found = [(rate(cached, prompts), rate(full, prompts)) for _ in range(pairs)]
        fast, slow = (statistics.median(values) for values in zip(*found, strict=True))
        ratios = [a / b for a, b in found]
        print(
            f"{rows:>3} rows | cached {fast:>8,.0f} tok/s | whole window {slow:>8,.0f} tok/s | "
            f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
            flush=True,
        )


def equality(cached: Engine, full: Engine, count: int) -> None:
    """A quarter of the prompts come close to the window's end or lie beyond it."""
    short = prompts_of(cached.tokenizer, count - count // 4, 64, seed=0)
    far = prompts_of(cached.tokenizer, count // 4, 64, seed=1)
    filler = cached.seq_len - 16
    prompts = short + [prompt[:1] + [7] * filler + prompt[1:] for prompt in far]
    same = num_tokens = 0
    for first in range(0, count, 32):
        part = prompts[first : first + 32]
        wanted = [
            Sampling(max_tokens=24, temperature=0.8 * (i % 2), seed=first + i, stop_tokens=())
            for i in range(len(part))
        ]
        pairs = zip(cached.generate(part, wanted), full.generate(part, wanted), strict=True)
        for a, b in pairs:
            same += a.tokens == b.tokens
            num_tokens += len(a.tokens)
    print(f"{same} of {count} prompts say the same tokens ({num_tokens:,} tokens)", flush=True)


def main() -> None:
    folder = checkpoint.folder_of(sys.argv[1] if len(sys.argv) > 1 else "champion")
    pairs, count = (int(a) for a in (sys.argv[2:] + ["5", "1000"][len(sys.argv[2:]) :]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    model, tokenizer, _ = checkpoint.load(Path(folder), device)
    print(f"{machine.facts(device)['cpu']}, {device.type}, float32, seq_len {model.config.seq_len}")
    cached, full = Engine(model, tokenizer), Engine(model, tokenizer, cache=False)
    assert cached.is_cached, cached.why_uncached
    speed(cached, full, pairs)
    equality(cached, full, count)


if __name__ == "__main__":
    main()
