"""Meta's Llama 3.x and 4, and their derivatives."""

import re

from mlx_server.models.text.adapters.base import Adapter
from mlx_server.models.text.styles.json_calls import LLAMA


class LlamaAdapter(Adapter):
    """Llama 4 spells `<|eot_id|>` and `<|eom_id|>` `<|eot|>` and `<|eom|>`."""

    family = "llama"
    model_types = re.compile(r"llama")
    names = re.compile(r"llama")
    end_of_turn = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>")
    call_style = LLAMA
