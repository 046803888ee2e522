"""Mistral AI's models: Mistral, Mixtral, Ministral, Codestral and their kin."""

import re

from mlx_server.models.text.adapters.generic import GenericAdapter


class MistralAdapter(GenericAdapter):
    """Ends a turn with the end of the sequence, `</s>`."""

    family = "mistral"
    model_types = re.compile(r"mistral|ministral|mixtral|pixtral")
    names = re.compile(r"(mi|mini|code|dev|magi)stral|mixtral|pixtral")
    end_of_turn = ("</s>",)
