"""The demo model divided among three processes."""

from pathlib import Path

import pytest

from mlx_server.engine.protocol import LoadOptions, Row, Sampling
from tests.engine.conftest import request, rows_of
from tests.engine.test_ranks import assert_same
from tests.support.engines import DirectEngine

PROMPTS = ([504, 3575, 282, 4649, 314], [504, 2125, 314, 260], [1, 4093, 198, 504, 3575])
TOKENS = 12


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_three_ranks_say_what_one_process_says(demo_model: Path) -> None:
    """On fewer processors than ranks a step takes seconds."""
    expected, whole = await said(demo_model, ranks=1)
    found, part = await said(demo_model, ranks=3)
    assert_same(found, expected)
    assert part < whole / 2


async def said(model: Path, ranks: int) -> tuple[list[list[Row]], int]:
    """What comes of the prompts together, and bytes of the weights of each process."""
    asked = [
        request(prompt, TOKENS, Sampling(temperature=0.8 * (i % 2), seed=i), logprobs=2)
        for i, prompt in enumerate(PROMPTS)
    ]
    client = await DirectEngine.start("demo", model, LoadOptions(ranks=ranks))
    try:
        assert client.ready is not None
        return await rows_of(client, *asked), client.ready.weights_bytes
    finally:
        await client.stop()
