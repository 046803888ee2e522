"""A model with a head of its own behind a real server."""

import json
from pathlib import Path

from tests.support.heads import build_headed
from tests.support.server import CHAT, ask, chat, serving
from tests.support.tiny import build_tiny_model


async def test_a_model_with_a_head_says_what_it_says_without(tmp_path: Path) -> None:
    models = tmp_path / "models"
    folder = build_tiny_model(models / "headed", "qwen")
    config = json.loads((folder / "config.json").read_text())
    build_headed(folder, "qwen3_5", vocab_size=config["vocab_size"])
    body = chat("headed", max_tokens=100, ignore_eos=True, temperature=0.8, seed=1, stream=True)
    answers, statuses = [], []
    for speculation in ("auto", "off"):
        settings = {"model_dirs": [str(models)], "speculation": speculation}
        with serving(tmp_path / speculation, "--model", "headed", **settings) as server:
            async with server.client(timeout=60) as client:
                answers.append(await ask(client, CHAT, body))
                statuses.append((await server.models())["headed"])
    assert answers[0].text == answers[1].text
    assert [status["own_head"] for status in statuses] == [True, False]
    assert statuses[0]["need"] > statuses[1]["need"], "its memory is reserved"
