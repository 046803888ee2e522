"""Tokenizing and detokenizing."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_server.errors import BadRequest, ContextLengthExceeded
from mlx_server.models.pool.loading import LoadedModel
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.models.text.names import spell
from mlx_server.schemas.internal import Prompt, TextPrompt
from mlx_server.services.output.text import token_text


@dataclass(frozen=True, slots=True)
class Tokens:
    """`bytes` are empty for special tokens; `names` are for display."""

    ids: list[int]
    bytes: list[bytes]
    names: list[str]
    context_length: int


async def tokenized(pool: ModelPoolManager, model_id: str, prompt: Prompt) -> Tokens:
    """As a completion's prompt. Raises as `ModelPoolManager.acquire` and `ModelText.prepare`."""
    async with pool.acquire(model_id, purpose="any") as model:
        ids = await _ids(model, prompt)
        return Tokens(
            ids,
            [model.text.token_bytes(token) for token in ids],
            [token_text(model.text, token) for token in ids],
            model.facts.context_length,
        )


async def tokenized_bare(pool: ModelPoolManager, model_id: str, text: str) -> Tokens:
    """Without the tokens that the tokenizer prepends."""
    whole = await tokenized(pool, model_id, TextPrompt(text))
    front = await tokenized(pool, model_id, TextPrompt(""))
    if text.startswith("".join(front.names)):  # the text itself holds them
        return whole
    skip = len(front.ids)
    return Tokens(whole.ids[skip:], whole.bytes[skip:], whole.names[skip:], whole.context_length)


async def count(pool: ModelPoolManager, model_id: str, prompt: Prompt) -> int:
    async with pool.acquire(model_id, purpose="any") as model:
        return len(await _ids(model, prompt))


async def fits(pool: ModelPoolManager, model_id: str, prompt: Prompt, answer: int) -> bool:
    """Whether the context has room for `answer` tokens besides, or for a fair share if less."""
    async with pool.acquire(model_id, purpose="any") as model:
        context = model.facts.context_length
        try:
            length = len(await _ids(model, prompt))
        except ContextLengthExceeded:
            return False
        return length + max(1, min(answer, context // 4)) <= context


async def detokenized(pool: ModelPoolManager, model_id: str, tokens: Sequence[int]) -> str:
    """Without special tokens. Raises BadRequest, and as `acquire`."""
    async with pool.acquire(model_id, purpose="any") as model:
        vocabulary = model.facts.vocab_size
        if not all(token < vocabulary for token in tokens):
            raise BadRequest(
                f"A token id is outside this model's vocabulary of {vocabulary}.", param="tokens"
            )
        return await model.text.decode(tokens)


async def _ids(model: LoadedModel, prompt: Prompt) -> list[int]:
    shown = spell(prompt, model.text.syntax.calls).prompt
    return (await model.text.prepare(shown, None, model.facts.context_length)).tokens
