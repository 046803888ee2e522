"""Models of unknown families."""

from mlx_server.models.text.adapters.base import Adapter


class GenericAdapter(Adapter):
    family = "generic"
