"""Google's Gemma."""

import re

from mlx_server.models.text.adapters.generic import GenericAdapter


class GemmaAdapter(GenericAdapter):
    """Ends a turn with `<end_of_turn>`, which Gemma 4 spells `<turn|>`."""

    family = "gemma"
    model_types = re.compile(r"gemma")
    names = re.compile(r"gemma")
    end_of_turn = ("<eos>", "<end_of_turn>", "<turn|>")
