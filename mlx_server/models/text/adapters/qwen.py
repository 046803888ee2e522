"""Alibaba's Qwen, from 1.5 on."""

import re

from mlx_server.models.text.adapters.base import Adapter


class QwenAdapter(Adapter):
    """Base models stop at `<|endoftext|>`."""

    family = "qwen"
    model_types = re.compile(r"qwen")
    names = re.compile(r"qwen|qwq")
    end_of_turn = ("<|im_end|>", "<|endoftext|>")
