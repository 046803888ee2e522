"""A device that fails for good: its engine ends, and the next one goes on."""

import asyncio
import json
from pathlib import Path

from mlx_server.engine.worker import DEVICE_GONE_CODE
from tests.faults.conftest import CONTEXT, read_timed, running, state_of
from tests.support.server import CHAT, chat, serving
from tests.support.tiny import build_tiny_model

OWN_CODE = """
from pathlib import Path
from mlx_lm.models import llama

ModelArgs = llama.ModelArgs
FAIL = Path(__file__).parent / "fail"

class Model(llama.Model):
    def __call__(self, inputs, cache=None, **more):
        if FAIL.exists():
            FAIL.unlink()
            raise RuntimeError("cudaGraphLaunch() failed: an illegal memory access was encountered")
        return super().__call__(inputs, cache=cache, **more)
"""


async def test_streams_go_on_with_another_engine_when_the_device_is_gone(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "doomed", context=CONTEXT, layers=2, hidden=256)
    (folder / "doomed.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "doomed.py"}))
    asked = [
        (CHAT, chat("doomed", max_tokens=60, ignore_eos=True, seed=i, temperature=i % 2))
        for i in range(2)
    ]
    with serving(
        tmp_path / "home",
        "--model",
        str(folder),
        steps_may_fail=True,
        trust_remote_code=[str(folder), folder.name],
        prefix_cache="0",
    ) as server:
        async with server.client() as client:
            expected = await asyncio.gather(*(read_timed(client, *one) for one in asked))
            async with running(client, *asked) as tasks:
                (folder / "fail").touch()
                answers = await asyncio.gather(*tasks)
        assert [answer.text for answer in answers] == [answer.text for answer in expected]
        assert all(answer.done and answer.error is None for answer in answers)
        assert (await state_of(server, "doomed"))["restarts"] == 1
        said = server.log.read_text()
    assert said.count("event=device_gone") == 1
    assert f"exit code {DEVICE_GONE_CODE}" in said
