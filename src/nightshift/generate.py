"""Continue a text, one token at a time. The whole window is computed again for each token."""

import torch

from nightshift.fixed.tokenizer import Tokenizer
from nightshift.model import GPT


@torch.inference_mode()
def complete(
    model: GPT, tokenizer: Tokenizer, prompt: str, num_tokens: int, temperature: float, seed: int
) -> str:
    """The sampled continuation, without the prompt; ends early at a document boundary."""
    device = next(model.parameters()).device
    random = torch.Generator(device="cpu").manual_seed(seed)
    tokens = [tokenizer.bos, *tokenizer.encode(prompt)]
    start = len(tokens)
    for _ in range(num_tokens):
        window_BT = torch.tensor([tokens[-model.config.seq_len :]], device=device)
        logits_V = model(window_BT)[0, -1].float().cpu() / temperature
        token = int(torch.multinomial(torch.softmax(logits_V, dim=-1), 1, generator=random))
        if token == tokenizer.bos:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[start:])
