"""Microsoft's Phi."""

import re

from mlx_server.models.adapters.generic import GenericAdapter


class PhiAdapter(GenericAdapter):
    """Ends a turn with `<|end|>`, which the larger Phi-4 spells `<|im_end|>`."""

    family = "phi"
    model_types = re.compile(r"^phi")
    names = re.compile(r"\bphi\b|\bphi-?\d")
    end_of_turn = ("<|end|>", "<|im_end|>", "<|endoftext|>")
