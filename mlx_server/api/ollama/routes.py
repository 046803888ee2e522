"""Ollama's protocol: its routes and paths."""

from mlx_server.api.http.wire import ApiProtocol
from mlx_server.api.ollama import chat, embed, models, pulls
from mlx_server.api.ollama.wire import WIRE

OLLAMA = ApiProtocol(
    wire=WIRE,
    routers=(
        models.probe,
        models.router,
        chat.router,
        embed.router,
        pulls.router,
        pulls.refused,
    ),
    prefixes=("/api",),
)
