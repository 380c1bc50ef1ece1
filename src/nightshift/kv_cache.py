"""Keys and values of the tokens that a model has seen, so that the next token costs one position.

The model stays the one definition of what is computed: attention hands its keys and values to the
cache that hangs on it (model.py, `self.cache`) and, when it is asked for one further token a row,
attends to what lies there. Rows may have different lengths. A model whose edit mixes positions in
another way does not equal itself under a cache; generate.py finds out before it relies on this.

B rows, K key/value heads, H query heads, N positions with room, T time, D head dim, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

ROOM = 64  # positions; room grows by so many at once


class Layer:
    """One attention layer's part of a cache."""

    def __init__(self, cache: "Cache"):
        self.cache = cache
        self.keys_BKND: Tensor | None = None
        self.values_BKND: Tensor | None = None

    def add(self, k_BKTD: Tensor, v_BKTD: Tensor) -> bool:
        """Stores them; true if earlier tokens lie here, so that `attend` is to be asked."""
        if self.cache.positions_B is None:
            self.keys_BKND, self.values_BKND = k_BKTD, v_BKTD
            return False
        rows, places = self.cache.rows_B, self.cache.positions_B
        self.keys_BKND[rows, :, places] = k_BKTD[:, :, 0]
        self.values_BKND[rows, :, places] = v_BKTD[:, :, 0]
        return True

    def attend(self, q_BHTD: Tensor, window: int) -> Tensor:
        """Of one token a row, to the last `window` tokens of that row, itself included."""
        mask_BN = self.cache.visible(window)
        num = mask_BN.size(1)
        return F.scaled_dot_product_attention(
            q_BHTD,
            self.keys_BKND[:, :, :num],
            self.values_BKND[:, :, :num],
            attn_mask=mask_BN[:, None, None],
            enable_gqa=q_BHTD.size(1) != self.keys_BKND.size(1),
        )


class Cache:
    """The rows of a batch. `prefill` makes one; rows can leave (`select`) and join (`join`)."""

    def __init__(self, num_layers: int):
        self.layers = [Layer(self) for _ in range(num_layers)]
        self.lengths: list[int] = []  # tokens of each row that lie here
        self.positions_B: Tensor | None = None  # of the next tokens; null while prefilling
        self._masks: dict[int, Tensor] = {}

    @classmethod
    def prefill(cls, model, tokens_BT: Tensor, lengths: Sequence[int]) -> tuple["Cache", Tensor]:
        """(cache, logits (B, T, V)) of rows filled up on the right; row b counts `lengths[b]`."""
        cache = cls(len(model.blocks))
        with cache.on(model):
            logits_BTV = model(tokens_BT)
        if any(layer.keys_BKND is None for layer in cache.layers):
            raise RuntimeError("an attention layer of this model does not use its cache")
        cache.lengths = list(lengths)
        return cache, logits_BTV

    def decode(self, model, tokens_B: Tensor) -> Tensor:
        """Logits (B, V) after one further token of each row."""
        if max(self.lengths) + 1 > self._room():
            self._make_room(max(self.lengths) + ROOM)
        self.positions_B = torch.tensor(self.lengths, device=tokens_B.device)
        self.rows_B = torch.arange(len(self.lengths), device=tokens_B.device)
        self._masks = {}
        with self.on(model):
            logits_BTV = model(tokens_B[:, None])
        self.lengths = [length + 1 for length in self.lengths]
        return logits_BTV[:, 0]

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order."""
        for layer in self.layers:
            layer.keys_BKND = layer.keys_BKND[list(rows)]
            layer.values_BKND = layer.values_BKND[list(rows)]
        self.lengths = [self.lengths[row] for row in rows]

    def join(self, other: "Cache") -> None:
        """Adds the rows of another cache behind these."""
        room = max(self._room(), other._room())
        self._make_room(room)
        other._make_room(room)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.keys_BKND = torch.cat((mine.keys_BKND, theirs.keys_BKND))
            mine.values_BKND = torch.cat((mine.values_BKND, theirs.values_BKND))
        self.lengths += other.lengths

    # -- what the model asks for

    def of_positions(self, table_TD: Tensor, T: int) -> Tensor:
        """A table's rows for the tokens being computed: (T, D), or (B, 1, D) one token a row."""
        return table_TD[:T] if self.positions_B is None else table_TD[self.positions_B][:, None]

    def visible(self, window: int) -> Tensor:
        """(B, N) bool: which positions the token of each row attends to."""
        if window not in self._masks:
            last_B1 = self.positions_B[:, None]
            where_N = torch.arange(max(self.lengths) + 1, device=last_B1.device)
            self._masks[window] = (where_N <= last_B1) & (where_N > last_B1 - window)
        return self._masks[window]

    @contextmanager
    def on(self, model):
        """Hangs the cache on the model for one forward pass; the caller holds the model's lock."""
        model.cache = self
        for block, layer in zip(model.blocks, self.layers, strict=True):
            block.attention.cache = layer
        try:
            yield
        finally:
            model.cache = None
            for block in model.blocks:
                block.attention.cache = None

    def _room(self) -> int:
        return self.layers[0].keys_BKND.size(2)

    def _make_room(self, size: int) -> None:
        more = (0, 0, 0, size - self._room())
        if more[3] > 0:
            for layer in self.layers:
                layer.keys_BKND = F.pad(layer.keys_BKND, more)
                layer.values_BKND = F.pad(layer.values_BKND, more)
