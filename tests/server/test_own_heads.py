"""A model with a head of its own behind a real server."""

from pathlib import Path

from tests.support.heads import build_headed
from tests.support.server import CHAT, ask, chat, serving
from tests.support.tiny import VOCAB_SIZE, build_tiny_model


async def test_a_model_with_a_head_says_what_it_says_without(tmp_path: Path) -> None:
    models = tmp_path / "models"
    build_tiny_model(models / "headed", "qwen")
    build_headed(models / "headed", "qwen3_5", vocab_size=VOCAB_SIZE)
    body = chat("headed", max_tokens=100, ignore_eos=True, temperature=0.8, seed=1, stream=True)
    answers, statuses = [], []
    for speculation in ("auto", "off"):
        flags = ("--model", "headed", "--speculation", speculation)
        with serving(tmp_path / speculation, *flags, model_dirs=[str(models)]) as server:
            async with server.client(timeout=60) as client:
                answers.append(await ask(client, CHAT, body))
                statuses.append((await server.models())["headed"])
    assert answers[0].text == answers[1].text
    assert [status["own_head"] for status in statuses] == [True, False]
    assert statuses[0]["need"] > statuses[1]["need"], "its memory is reserved"
