"""Models of a family that no other adapter knows."""

from mlx_server.models.text.adapters.base import Adapter


class GenericAdapter(Adapter):
    """Knows what the model's files say."""

    family = "generic"
