"""Mistral AI's models."""

import re

from mlx_server.models.text.adapters.base import Adapter


class MistralAdapter(Adapter):
    family = "mistral"
    model_types = re.compile(r"mistral|ministral|mixtral|pixtral")
    names = re.compile(r"(mi|mini|code|dev|magi)stral|mixtral|pixtral")
    end_of_turn = ("</s>",)
