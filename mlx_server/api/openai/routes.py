"""OpenAI's protocol: its routes and paths."""

from mlx_server.api.http.wire import ApiProtocol
from mlx_server.api.openai import chat, completions, embeddings, models, tokens
from mlx_server.api.openai.responses import conversations, create, stored
from mlx_server.api.openai.responses import wire as responses_wire
from mlx_server.api.openai.wire import WIRE

OPENAI = ApiProtocol(
    wire=WIRE,
    routers=(chat.router, completions.router, embeddings.router, models.router, tokens.router),
    prefixes=("/v1", "/tokenize", "/detokenize"),
)
RESPONSES = ApiProtocol(
    wire=responses_wire.WIRE,
    routers=(create.router, stored.router, conversations.router),
    prefixes=("/v1/responses", "/v1/conversations"),
)
