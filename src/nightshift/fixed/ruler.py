"""The number: bits per byte of text that training never read, from logits that anybody may send.

val_bpb = nats of the text / (ln 2 * its UTF-8 bytes). The text is one stream of tokens cut into
windows of T; each token but the first is a target once, whatever the tokenizer, T or the batch.
Document boundaries have no bytes and are left out of both sums.

Covered here, by computation and whatever the model does:
- probabilities are normalised here, in float32, on a private copy of the logits;
- bytes are counted from the text; every byte is scored once, which is asserted;
- logits that are not finite are an error, never a number;
- probes: a second process, which never saw the text, is shown some windows again with another
  text after one position, in another order and other company. Up to there the nats must be the
  same. A model that reads the future, other rows or what it was shown before cannot do that: the
  second process does not have what the first one used. Half of the positions are drawn from all,
  half from those where the model does suspiciously well. See `judge_probes` for what is tolerated.
Not covered here: what a model does with its own window's past is its own affair (an n-gram cache or
a compressor inside the window is an architecture); a leak used at fewer than about one position in
500 can escape the probes of one run (each further seed has probes of its own).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum, log
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nightshift.fixed.corpus import read_documents
from nightshift.fixed.tokenizer import Tokenizer

# token ids int64 (B, T) -> logits (B, T, V); always the same B
LogitsOf = Callable[[np.ndarray], Tensor]

LEAK_NATS = 0.25  # at one position: no rounding moves a prediction that far
SAME_NATS = 0.001  # float32 arithmetic on the same shapes agrees far better
MEAN_LEAK_NATS = 0.002  # on average over the probes
STATE_RMS_NATS = 0.05  # models that compute in bf16 inside stay below
SUSPICIOUS_FRAC = 0.02  # of the positions: where the model beats a unigram by most
ORDER_SEED = 20_261  # the first showing's order; the probes' secret comes from the system


class Invalid(Exception):
    """The model broke a rule of the metric; the message says which."""


def held_out_text(corpus: Path, split: str, max_bytes: int | None) -> list[str]:
    """Whole documents of a split in order, until `max_bytes` is reached; at least one."""
    texts, size = [], 0
    for _, text in read_documents(corpus, split):
        if texts and max_bytes is not None and size + len(text.encode()) > max_bytes:
            continue
        texts.append(text)
        size += len(text.encode())
    return texts


def token_stream(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """bos, document, bos, document, ... int64; each document checked to come back byte for byte."""
    parts = []
    for text in texts:
        tokens = tokenizer.encode(text)
        if tokenizer.decode_bytes(tokens) != text.encode():
            raise Invalid("the tokenizer does not reproduce the val text byte for byte")
        parts.append(np.array([tokenizer.bos, *tokens], dtype=np.int64))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Windows:
    """The text as the model is asked about it. N windows of T tokens."""

    inputs: np.ndarray  # int64 (N, T)
    targets: np.ndarray  # int64 (N, T), one ahead; -1 after the end
    sizes: np.ndarray  # bytes of each target (N, T); 0 for document boundaries and after the end
    num_bytes: int  # of the raw text

    @property
    def scored(self) -> np.ndarray:
        return self.sizes > 0


def cut(texts: list[str], tokenizer: Tokenizer, seq_len: int) -> Windows:
    """Raises Invalid unless every byte of the text is a byte of exactly one target."""
    stream = token_stream(texts, tokenizer)
    num_targets = len(stream) - 1
    count = -(-num_targets // seq_len)
    inputs = np.zeros(count * seq_len, dtype=np.int64)
    targets = np.full(count * seq_len, -1, dtype=np.int64)
    inputs[:num_targets], targets[:num_targets] = stream[:-1], stream[1:]
    sizes = tokenizer.token_bytes().astype(np.int64)[targets.clip(min=0)] * (targets >= 0)
    num_bytes = sum(len(text.encode()) for text in texts)
    if int(sizes.sum()) != num_bytes:
        raise Invalid(f"{int(sizes.sum())} bytes were scored, the val text has {num_bytes}")
    shape = count, seq_len
    return Windows(inputs.reshape(shape), targets.reshape(shape), sizes.reshape(shape), num_bytes)


def nats_of_targets(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """-log p of each target in float32, (B, T); 0 where the target is -1. Raises Invalid.

    The largest logit is taken off before anything is rounded: with 1e30 on all of them
    logsumexp(logits) - logits[target] would be exactly 0.
    """
    logits = logits_BTV.float()
    if not torch.isfinite(logits).all():
        raise Invalid("the model's logits are not all finite")
    logp_BTV = torch.log_softmax(logits, dim=-1)  # subtracts the maximum first
    chosen = logp_BTV.gather(-1, targets_BT.clamp(min=0)[..., None]).squeeze(-1)
    return -chosen * (targets_BT >= 0)


@torch.inference_mode()
def nats_of_rows(
    logits_of: LogitsOf, inputs: np.ndarray, targets: np.ndarray, batch_size: int
) -> np.ndarray:
    """float32 (N, T) for N rows. The last batch is filled up, so that all have one shape."""
    nats = np.zeros(targets.shape, dtype=np.float32)
    for first in range(0, len(inputs), batch_size):
        rows = np.arange(first, first + batch_size) % len(inputs)
        logits_BTV = logits_of(inputs[rows])
        for slot, row in enumerate(rows[: len(inputs) - first]):
            own_TV = logits_BTV[slot : slot + 1].clone()  # nobody else can change this one
            target = torch.from_numpy(targets[row : row + 1]).to(own_TV.device)
            nats[row] = nats_of_targets(own_TV, target)[0].cpu().numpy()
    return nats


def score(logits_of: LogitsOf, windows: Windows, batch_size: int) -> np.ndarray:
    """Nats of every target, float32 (N, T), from one showing of each window in a mixed order."""
    order = np.random.default_rng(ORDER_SEED).permutation(len(windows.inputs))
    nats = np.zeros(windows.targets.shape, dtype=np.float32)
    nats[order] = nats_of_rows(logits_of, windows.inputs[order], windows.targets[order], batch_size)
    return nats


def bits_per_byte(nats: np.ndarray, windows: Windows) -> float:
    """Summed in one order, in float64: the same for any batch size and order of showing."""
    per_window = (nats.astype(np.float64) * windows.scored).sum(axis=1)
    return fsum(per_window) / log(2) / windows.num_bytes


# ---- probes ----


@dataclass(frozen=True)
class Probe:
    """A window shown again, with another text after `position`."""

    window: int
    position: int


def plan_probes(
    nats: np.ndarray, windows: Windows, count: int, random: np.random.Generator
) -> list[Probe]:
    """Half anywhere, half where knowing the future would show most. At most one in a window, and
    half of the windows stay out: they lend the other texts."""
    num_windows, seq_len = windows.targets.shape
    count = min(count, num_windows // 2)
    allowed = windows.scored[:, : seq_len - 1]  # the last position of a window has no future in it
    advantage = _unigram_nats(windows)[:, : seq_len - 1] - nats[:, : seq_len - 1]
    ranked = np.argsort(np.where(allowed, -advantage, np.inf), axis=None)
    top = ranked[: max(count, int(SUSPICIOUS_FRAC * allowed.sum()))]
    everywhere = np.flatnonzero(allowed)
    probes: dict[int, Probe] = {}
    for pool, wanted in ((top, count // 2), (everywhere, count)):
        for flat in random.permutation(pool):
            if len(probes) >= wanted:
                break
            window, position = divmod(int(flat), seq_len - 1)
            probes.setdefault(window, Probe(window, position))
    values = list(probes.values())
    return [values[i] for i in random.permutation(len(values))]


def _unigram_nats(windows: Windows) -> np.ndarray:
    """What a model that knows only how often each token occurs would pay, (N, T)."""
    tokens = windows.targets.clip(min=0)
    counts = np.bincount(tokens[windows.targets >= 0])
    frequency = counts[tokens] / max(1, counts.sum())
    return -np.log(np.maximum(frequency, 1e-12))


def probe_rows(
    probes: Sequence[Probe], windows: Windows, random: np.random.Generator
) -> np.ndarray:
    """int64 (probes, T): each window up to its position, then text of one that is not probed."""
    probed = {probe.window for probe in probes}
    donors = [i for i in range(len(windows.inputs)) if i not in probed]
    rows = windows.inputs[[probe.window for probe in probes]].copy()
    for row, probe in zip(rows, probes, strict=True):
        after = probe.position + 1
        for donor in random.permutation(donors)[:50]:
            if windows.inputs[donor, after] != row[after]:
                break
        row[after:] = windows.inputs[donor, after:]
    return rows


def judge_probes(
    first: np.ndarray, second: np.ndarray, probes: Sequence[Probe], windows: Windows
) -> None:
    """Compare nats of both showings, (N, T) and (probes, T). Raises Invalid.

    At a probe's position the first process knew the true next text and the second did not: a model
    that used it did better there. Before it only state or other rows can make a difference. Up to
    SAME_NATS is arithmetic; up to LEAK_NATS may be (bf16 inside the model), if it goes both ways.
    """
    ahead = np.array(
        [second[i, p.position] - first[p.window, p.position] for i, p in enumerate(probes)]
    )
    before = np.concatenate(
        [
            (second[i] - first[p.window])[: p.position][windows.scored[p.window, : p.position]]
            for i, p in enumerate(probes)
        ]
    )
    rms = float(np.sqrt(np.mean(before**2))) if len(before) else 0.0
    furthest = float(np.abs(before).max()) if len(before) else 0.0
    if furthest > LEAK_NATS or rms > STATE_RMS_NATS:
        raise Invalid(
            "the model keeps state between windows, looks into other rows, or is not deterministic:"
            f" the same text shown again in other company moved its predictions by {furthest:.3g} "
            "nats. A window's logits may depend on that window alone"
        )
    worst, mean = float(np.abs(ahead).max()), float(ahead.mean())
    error = float(ahead.std(ddof=1) / len(ahead) ** 0.5) if len(ahead) > 1 else 0.0
    if worst > LEAK_NATS or (worst > SAME_NATS and mean > MEAN_LEAK_NATS + 3 * error):
        raise Invalid(
            f"the model sees the future: with another text after a position its prediction there "
            f"moved by up to {worst:.3g} nats, {mean:+.3g} on average over {len(ahead)} positions. "
            "Logits may depend on tokens up to their own position alone"
        )


def check_probes(
    logits_of: LogitsOf, nats: np.ndarray, windows: Windows, batch_size: int, count: int
) -> int:
    """`logits_of`: of a process that was shown nothing yet. Returns how many were made."""
    random = np.random.default_rng()  # unpredictable: seeded by the system
    probes = plan_probes(nats, windows, count, random)
    if not probes:
        return 0
    rows = probe_rows(probes, windows, random)
    targets = windows.targets[[probe.window for probe in probes]].copy()
    for target, probe in zip(targets, probes, strict=True):
        target[probe.position + 1 :] = -1
    judge_probes(nats, nats_of_rows(logits_of, rows, targets, batch_size), probes, windows)
    return len(probes)
