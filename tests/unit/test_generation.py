"""Counting what the choices of an answer used."""

from mlx_server.api.generation import Tally
from mlx_server.schemas.internal import Finished, Usage


def test_the_prompt_of_several_choices_counts_once() -> None:
    tally = Tally()
    for prompt, choice, cached in ((0, 0, 0), (0, 1, 5), (1, 0, 4)):
        tally.feed(prompt, Finished(choice, "stop", Usage(5, 2, cached)))
    assert tally.finish() == Usage(prompt_tokens=10, completion_tokens=6, cached_tokens=4)
