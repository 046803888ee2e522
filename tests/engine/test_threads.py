"""What an engine on a CPU leaves to others that need the processors."""

import os
import subprocess
import sys

import pytest

from mlx_server.engine.cpu.threads import wanted
from mlx_server.engine.memory import device_name


@pytest.mark.parametrize(
    ("threads", "most", "free", "number"),
    [
        (2, 2, 2.0, 2),
        (2, 2, 1.6, 2),  # the server itself
        (2, 2, 1.1, 1),
        (2, 2, -0.1, 1),
        (1, 2, 1.0, 1),
        (1, 2, 1.9, 2),
        (8, 8, 4.2, 4),
        (4, 8, 7.8, 8),
        (4, 4, 8.0, 4),
    ],
)
def test_as_many_threads_are_used_as_processors_are_free(
    threads: int, most: int, free: float, number: int
) -> None:
    assert wanted(threads, most, free) == number


def test_two_engines_that_share_processors_settle_at_half_of_them() -> None:
    mine, theirs = 8, 8
    for _ in range(5):
        share = 8 / max(8, mine + theirs)
        mine, theirs = wanted(mine, 8, 8 - theirs * share), wanted(theirs, 8, 8 - mine * share)
    assert (mine, theirs) == (4, 4)


BESIDE_OTHERS = """
import sys
from mlx_server.engine.cpu.blas import load_openblas
loaded = load_openblas("auto")
import mlx.core as mx
from threadpoolctl import threadpool_info
from mlx_server.engine.cpu.threads import BlasThreads

threads, x = BlasThreads(), mx.random.normal((512, 512))
alone = x @ x
mx.eval(alone)
print(threads.most)
while threads.number > 1:
    threads.share()
    y = x @ x
    mx.eval(y)
left = {library["filepath"]: library["num_threads"] for library in threadpool_info()}
print(left[loaded], mx.array_equal(alone, y).item())
"""


@pytest.mark.skipif(
    device_name() != "cpu" or not sys.platform.startswith("linux"), reason="about OpenBLAS"
)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
def test_an_engine_beside_other_work_takes_fewer_threads_and_computes_the_same() -> None:
    work = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(work) for _ in range(os.cpu_count() or 1)]
    try:
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
        command = [sys.executable, "-c", BESIDE_OTHERS]
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
    finally:
        for one in others:
            one.kill()
            one.wait()
    assert ran.stdout.split() == ["2", "1", "True"]
