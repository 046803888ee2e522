"""The tokens of texts and conversations, without a completion."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_server.errors import BadRequest
from mlx_server.models.pool.manager import ModelPoolManager
from mlx_server.schemas.internal import Prompt, TextPrompt
from mlx_server.services.output.text import token_text


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt's tokens, and how many the model's context holds.

    `bytes` are what each stands for in running text, none for special ones; `names` are for
    people to read.
    """

    ids: list[int]
    bytes: list[bytes]
    names: list[str]
    context_length: int


async def tokenized(pool: ModelPoolManager, model_id: str, prompt: Prompt) -> Tokens:
    """The tokens of a prompt, just as a completion of it would have them.

    Raises as `ModelPoolManager.acquire` and `ModelText.prepare` do.
    """
    async with pool.acquire(model_id, purpose="any") as model:
        context = model.facts.context_length
        ids = (await model.text.prepare(prompt, None, context)).tokens
        return Tokens(
            ids,
            [model.text.token_bytes(token) for token in ids],
            [token_text(model.text, token) for token in ids],
            context,
        )


async def tokenized_bare(pool: ModelPoolManager, model_id: str, text: str) -> Tokens:
    """The tokens of a text, without those that the tokenizer puts in front of one."""
    whole = await tokenized(pool, model_id, TextPrompt(text))
    front = await tokenized(pool, model_id, TextPrompt(""))
    if text.startswith("".join(front.names)):
        # The text had them itself.
        return whole
    skip = len(front.ids)
    return Tokens(whole.ids[skip:], whole.bytes[skip:], whole.names[skip:], whole.context_length)


async def count(pool: ModelPoolManager, model_id: str, prompt: Prompt) -> int:
    """How many tokens a prompt has. Raises as `tokenized` does."""
    async with pool.acquire(model_id, purpose="any") as model:
        return len((await model.text.prepare(prompt, None, model.facts.context_length)).tokens)


async def detokenized(pool: ModelPoolManager, model_id: str, tokens: Sequence[int]) -> str:
    """The text of `tokens`, special ones left out. Raises as `ModelPoolManager.acquire` does."""
    async with pool.acquire(model_id, purpose="any") as model:
        vocabulary = model.facts.vocab_size
        if not all(token < vocabulary for token in tokens):
            raise BadRequest(
                f"A token id is outside this model's vocabulary of {vocabulary}.", param="tokens"
            )
        return await model.text.decode(tokens)
