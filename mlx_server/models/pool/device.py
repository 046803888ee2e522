"""The engines' device, asked of a short-lived process."""

import asyncio
import sys

import msgspec

from mlx_server.engine.protocol import Device
from mlx_server.errors import Unavailable

PROBE_SECONDS = 60.0


async def find_device() -> Device:
    """Raises Unavailable if MLX cannot be imported or used."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "mlx_server.engine.probe",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            output, problems = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        last = problems.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        raise Unavailable(f"MLX does not work on this machine: {last}")
    return msgspec.json.decode(output, type=Device)
