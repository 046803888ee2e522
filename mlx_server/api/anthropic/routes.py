"""Anthropic's protocol: its routes and paths."""

from mlx_server.api.anthropic import messages, models
from mlx_server.api.anthropic.wire import WIRE
from mlx_server.api.http.wire import ApiProtocol

ANTHROPIC = ApiProtocol(
    wire=WIRE,
    routers=(messages.router, models.router),
    prefixes=("/v1/messages",),
    header=b"anthropic-version",
    shared_prefixes=("/v1/models",),
)
