"""Google's Gemma."""

import re

from mlx_server.models.text.adapters.base import Adapter


class GemmaAdapter(Adapter):
    family = "gemma"
    model_types = re.compile(r"gemma")
    names = re.compile(r"gemma")
    end_of_turn = ("<eos>", "<end_of_turn>", "<turn|>")
