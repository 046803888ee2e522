"""Meta's Llama 3.x and 4, and the many models built on the Llama architecture."""

import re

from mlx_server.models.text.adapters.generic import GenericAdapter
from mlx_server.models.text.grammars.call_styles import LLAMA, CallStyle


class LlamaAdapter(GenericAdapter):
    """Ends a turn with `<|eot_id|>`, one that awaits a tool's result with `<|eom_id|>`.

    Llama 4 spells them `<|eot|>` and `<|eom|>`.
    """

    family = "llama"
    model_types = re.compile(r"llama")
    names = re.compile(r"llama")
    end_of_turn = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>")

    def _usual_style(self) -> CallStyle | None:
        known = self.tokenizer.token_to_id(LLAMA.syntax.start) is not None
        return LLAMA if known else None
