"""A GPT for small research: one file, every part of it in view and open to change.

Pre-norm transformer with rotary positions (Su et al. 2021), RMSNorm without weights, normalised
queries and keys (Henry et al. 2020), grouped-query attention (Ainslie et al. 2023), squared ReLU
(So et al. 2021) or SwiGLU (Shazeer 2020), capped logits (Gemma 2) and, as options, value embeddings
(Zhou et al. 2024; modded-nanogpt) and sliding windows. The shape of the recipe is nanochat's.

Weights are float32; each layer casts them to the dtype of its input, so the caller chooses the
precision of the arithmetic by the `dtype` it gives to the model.

Shapes: B batch, T time, C width, H query heads, K key/value heads, D head dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightshift.fixed.config import Model


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """No bias; the weight follows the dtype of the input."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rope_tables(seq_len: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of shape (T, D/2)."""
    frequency_D = base ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle_TD = torch.outer(torch.arange(seq_len).float(), frequency_D)
    return angle_TD.cos(), angle_TD.sin()


def apply_rope(x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turns channel pairs (i, i + D/2) by their position."""
    a, b = x_BTHD.chunk(2, dim=-1)
    cos, sin = cos_TD[:, None, :].to(x_BTHD.dtype), sin_TD[:, None, :].to(x_BTHD.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def window_of_layer(config: Model, layer: int) -> int:
    """How many tokens back a layer sees, itself included. The last layer always sees everything."""
    short = config.window_pattern[layer % len(config.window_pattern)] == "S"
    if not short or layer == config.depth - 1:
        return config.seq_len
    return max(1, int(config.short_window_frac * config.seq_len))


def has_value_embedding(config: Model, layer: int) -> bool:
    """Every other layer, the last one included."""
    return config.value_embeds and layer % 2 == (config.depth - 1) % 2


class Attention(nn.Module):
    def __init__(self, config: Model, layer: int):
        super().__init__()
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.n_kv_head = config.n_head // config.kv_group
        self.window, self.seq_len = window_of_layer(config, layer), config.seq_len
        self.use_flex = config.attention == "flex"
        self.flex_where_it_pays = config.attention == "auto"
        self.cache = None  # generation hangs one here (kv_cache.py)
        kv_width = self.n_kv_head * self.head_dim
        self.query = Linear(config.width, config.width)
        self.key = Linear(config.width, kv_width)
        self.value = Linear(config.width, kv_width)
        self.output = Linear(config.width, config.width)
        if has_value_embedding(config, layer):
            self.value_mix = nn.Parameter(torch.zeros(self.n_kv_head))
        if self.window < self.seq_len:
            age = torch.arange(self.seq_len)[:, None] - torch.arange(self.seq_len)[None, :]
            self.register_buffer("mask_TT", (age >= 0) & (age < self.window), persistent=False)

    def forward(
        self, x_BTC: Tensor, rope: tuple[Tensor, Tensor], value_embed_BTC: Tensor | None
    ) -> Tensor:
        B, T, _ = x_BTC.shape
        q_BTHD = self.query(x_BTC).view(B, T, self.n_head, self.head_dim)
        k_BTKD = self.key(x_BTC).view(B, T, self.n_kv_head, self.head_dim)
        v_BTKD = self.value(x_BTC).view(B, T, self.n_kv_head, self.head_dim)
        if value_embed_BTC is not None:
            gate = 2 * torch.sigmoid(self.value_mix).to(x_BTC.dtype)  # 1 at the start
            v_BTKD = v_BTKD + gate[:, None] * value_embed_BTC.view_as(v_BTKD)
        q_BTHD = rms_norm(apply_rope(q_BTHD, *rope))
        k_BTKD = rms_norm(apply_rope(k_BTKD, *rope))
        y_BHTD = self.attend(q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2))
        return self.output(y_BHTD.transpose(1, 2).reshape(B, T, -1))

    def attend(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        T, grouped = q_BHTD.size(2), self.n_kv_head != self.n_head
        if self.cache is not None and self.cache.add(k_BKTD, v_BKTD):
            return self.cache.attend(q_BHTD, self.window)
        if self.window >= T and not self.use_flex:
            return F.scaled_dot_product_attention(
                q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=grouped
            )
        # A mask makes sdpa leave its fast CUDA kernel; FlexAttention skips the masked blocks.
        if self.use_flex or (self.flex_where_it_pays and q_BHTD.is_cuda):
            return flex_window(q_BHTD, k_BKTD, v_BKTD, self.window, grouped)
        mask = self.mask_TT[:T, :T]
        return F.scaled_dot_product_attention(
            q_BHTD, k_BKTD, v_BKTD, attn_mask=mask, enable_gqa=grouped
        )


def flex_window(q: Tensor, k: Tensor, v: Tensor, window: int, grouped: bool) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, to, source):
        return (to >= source) & (to - source < window)

    blocks = create_block_mask(visible, None, None, q.size(2), k.size(2), device=q.device)
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=grouped)


class MLP(nn.Module):
    def __init__(self, config: Model):
        super().__init__()
        hidden = int(config.mlp_ratio * config.width)
        self.gated = config.mlp == "swiglu"
        self.up = Linear(config.width, 2 * hidden if self.gated else hidden)
        self.down = Linear(hidden, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h = self.up(x_BTC)
        if self.gated:
            gate, h = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * h)
        return self.down(F.relu(h).square())


class Block(nn.Module):
    def __init__(self, config: Model, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x_BTC: Tensor, rope: tuple[Tensor, Tensor], value_embed_BTC: Tensor | None
    ) -> Tensor:
        x_BTC = x_BTC + self.attention(rms_norm(x_BTC), rope, value_embed_BTC)
        return x_BTC + self.mlp(rms_norm(x_BTC))


class GPT(nn.Module):
    def __init__(self, config: Model, vocab_size: int):
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.cache = None
        self.embed = nn.Embedding(vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.head = Linear(config.width, vocab_size)
        if config.tied_head:
            self.head.weight = self.embed.weight
        kv_width = config.width // config.kv_group
        self.value_embeds = nn.ModuleDict(
            {
                str(layer): nn.Embedding(vocab_size, kv_width)
                for layer in range(config.depth)
                if has_value_embedding(config, layer)
            }
        )
        cos, sin = rope_tables(config.seq_len, config.head_dim, config.rope_base)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices at 1/sqrt(fan in); what writes to the residual stream starts at zero, so that
        every block begins as the identity; the head starts near zero, so that the loss begins at
        ln V."""
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=1.0)
        for block in self.blocks:
            nn.init.zeros_(block.attention.output.weight)
            nn.init.zeros_(block.mlp.down.weight)
        nn.init.normal_(
            self.head.weight, std=self.config.width**-0.5 if self.config.tied_head else 0.001
        )

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) in float32 for the token after each position."""
        T = tokens_BT.size(1)
        rope = self.rope_cos[:T], self.rope_sin[:T]
        if self.cache is not None:
            rope = tuple(self.cache.of_positions(t, T) for t in (self.rope_cos, self.rope_sin))
        x_BTC = rms_norm(self.embed(tokens_BT).to(self.dtype))
        for layer, block in enumerate(self.blocks):
            embed = self.value_embeds[str(layer)] if str(layer) in self.value_embeds else None
            x_BTC = block(x_BTC, rope, None if embed is None else embed(tokens_BT).to(self.dtype))
        logits_BTV = self.head(rms_norm(x_BTC)).float()
        if self.config.softcap is not None:
            logits_BTV = self.config.softcap * torch.tanh(logits_BTV / self.config.softcap)
        return logits_BTV

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Forward and backward: 6 for each matmul weight, 12 * C for each token attended to
        (Chowdhery et al. 2022, appendix B; a causal window is seen half full on average)."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        seen = sum(window_of_layer(self.config, layer) for layer in range(self.config.depth))
        return 6 * weights + 6 * self.config.width * seen
