"""The one inference path: prompt → tokens → text events, the same for every protocol."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mlx_server.schemas.internal import Event, InferenceRequest


class Generation:
    """A request that was accepted: its prompt fits and its model is held for it."""

    model: str
    """The id under which the model is known, which may differ from the alias asked for."""
    prompt_tokens: int

    def events(self) -> AsyncIterator[Event]:
        """The choices' events, interleaved as they happen. Iterate once.

        Raises EngineFailed when the engine ends, BadRequest when it refuses the request.
        """
        raise NotImplementedError


class InferenceService:
    """Turns internal requests into events."""

    @asynccontextmanager
    async def open(self, request: InferenceRequest) -> AsyncIterator[Generation]:
        """Render and check the prompt, hold the model, and hand the generation to the caller.

        Leaving the block aborts what is still running and lets the model go. Raises the errors a
        client should see as a status: BadRequest, ContextLengthExceeded, ModelNotFound,
        ModelLoading, ModelLoadFailed.
        """
        raise NotImplementedError
        yield Generation()
