"""The shape of an exported nightshift model, for transformers; this file needs nothing else of
nightshift. `model` holds the keys of conf/model as they were trained.
"""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Model:
    """The keys of conf/model. Width and heads follow from depth."""

    depth: int
    aspect_ratio: int
    head_dim: int
    kv_group: int
    seq_len: int
    mlp: str
    mlp_ratio: float
    rope_base: float
    softcap: float | None
    tied_head: bool
    value_embeds: bool
    window_pattern: str
    short_window_frac: float
    attention: str

    @property
    def n_head(self) -> int:
        return math.ceil(self.depth * self.aspect_ratio / self.head_dim)

    @property
    def width(self) -> int:
        return self.n_head * self.head_dim


class NightshiftConfig(PretrainedConfig):
    model_type = "nightshift"

    def __init__(self, vocab_size: int = 0, model: dict | None = None, **others):
        self.vocab_size = vocab_size
        self.model = model
        if model:
            shape = Model(**model)
            self.hidden_size, self.num_hidden_layers = shape.width, shape.depth
            self.num_attention_heads = shape.n_head
            self.max_position_embeddings = shape.seq_len
            others["tie_word_embeddings"] = shape.tied_head
        super().__init__(**others)
