"""`POST /tokenize` and `POST /detokenize`."""

from fastapi import APIRouter
from starlette.responses import Response

from mlx_server.api.http.dependencies import CallerDep, PoolDep
from mlx_server.api.http.json_route import JsonRoute
from mlx_server.api.openai.prompts import chat_prompt
from mlx_server.api.openai.wire import documented
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.schemas.internal import TextPrompt
from mlx_server.schemas.openai.tokens import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    TokenPiece,
)
from mlx_server.services import tokens
from mlx_server.services.tokens import Tokens

router = APIRouter(route_class=JsonRoute, strict_content_type=False)
ERRORS = documented(400, 401, 403, 404, 413, 429, 500, 503, 504)


@router.post("/tokenize", response_model=Tokenized, responses=ERRORS)
async def tokenize(body: TokenizeRequest, caller: CallerDep, pool: PoolDep) -> Response:
    """The tokens of a text, or of a conversation as the model's template writes it."""
    found = await _tokens(body, pool)
    answer = Tokenized(
        tokens=_pieces(found) if body.with_pieces else found.ids,
        count=len(found.ids),
        max_model_len=found.context_length,
        token_strs=found.names if body.return_token_strs else None,
    )
    return Response(answer.to_json(), media_type="application/json")


@router.post("/detokenize", response_model=Detokenized, responses=ERRORS)
async def detokenize(body: DetokenizeRequest, caller: CallerDep, pool: PoolDep) -> Response:
    """The text of tokens, special ones left out."""
    text = await tokens.detokenized(pool, body.model, body.tokens)
    answer = Detokenized(content=text, prompt=text)
    return Response(answer.to_json(), media_type="application/json")


async def _tokens(body: TokenizeRequest, pool: ModelPoolManager) -> Tokens:
    if body.messages is not None:
        return await tokens.tokenized(pool, body.model, chat_prompt(body.messages, body))
    text = body.content if body.prompt is None else body.prompt
    assert text is not None
    if body.add_special:
        return await tokens.tokenized(pool, body.model, TextPrompt(text))
    return await tokens.tokenized_bare(pool, body.model, text)


def _pieces(found: Tokens) -> list[TokenPiece]:
    pairs = zip(found.ids, found.bytes, found.names, strict=True)
    return [TokenPiece(id=token, piece=_piece(data, name)) for token, data, name in pairs]


def _piece(data: bytes, name: str) -> str | list[int]:
    try:
        return data.decode() or name
    except UnicodeDecodeError:
        return list(data)
