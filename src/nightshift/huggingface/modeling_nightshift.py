"""The exported model behind transformers' interface. `gpt.py` beside it is the model's own code,
as it was trained; here is only what transformers asks for.

There is no cache: each new token computes the window again. Texts longer than the model's context
are cut on the left. Batches are padded on the right.
"""

import torch
import torch.nn.functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_nightshift import Model, NightshiftConfig
from .gpt import GPT


class NightshiftForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NightshiftConfig
    base_model_prefix = "gpt"
    _tied_weights_keys = {"gpt.head.weight": "gpt.embed.weight"}

    def __init__(self, config: NightshiftConfig):
        super().__init__(config)
        # Real memory although transformers builds models on the meta device: the rotary tables and
        # masks are in no file. It empties them after loading and then asks for `_init_weights`.
        with torch.device("cpu"):
            self.gpt = GPT(Model(**config.model), config.vocab_size)
        self.tables = {
            module: {name: table.clone() for name, table in module.named_buffers(recurse=False)}
            for module in self.gpt.modules()
        }
        self.post_init()

    def _init_weights(self, module) -> None:
        """Puts the tables back; GPT has initialised its weights itself."""
        for name, table in self.tables.get(module, {}).items():
            getattr(module, name).copy_(table)

    def get_input_embeddings(self):
        return self.gpt.embed

    def set_input_embeddings(self, embedding) -> None:
        self.gpt.embed = embedding

    def get_output_embeddings(self):
        return self.gpt.head

    def forward(self, input_ids, attention_mask=None, labels=None, **others) -> CausalLMOutput:
        """Logits (B, T, V) in float32."""
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            raise ValueError("pad on the right: tokenizer.padding_side = 'right'")
        logits = self.gpt(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, **others) -> dict:
        return {"input_ids": input_ids[:, -self.config.max_position_embeddings :]}
