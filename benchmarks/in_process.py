"""mlx-lm's `batch_generate` without a server: the limit that a server can come near.

python -m benchmarks.in_process MODEL_FOLDER < jobs.json > figures.json
"""

import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
from mlx_lm import batch_generate, load
from mlx_lm.sample_utils import make_sampler

from benchmarks.measures import DECODE_RATE, RATE, Figures
from benchmarks.servers import Job

_WARM_UP_TOKENS = 4
# mlx-lm's own default, except that it must not widen a batch which is meant to be narrower.
_PREFILL_BATCH = 8


def measure(model: Any, tokenizer: Any, job: Job) -> Figures:
    """Runs the warm-up, then the job."""
    _generate(model, tokenizer, job, job.warm_up, _WARM_UP_TOKENS)
    start = time.perf_counter()
    answer = _generate(model, tokenizer, job, job.prompts, job.max_tokens)
    wall = time.perf_counter() - start
    lengths = [len(ids) for ids in answer.token_ids]
    return {
        RATE: sum(lengths) / wall,
        DECODE_RATE: answer.stats.generation_tps,
        "tokens": sum(lengths),
        "short": sum(length < job.max_tokens for length in lengths),
    }


def _generate(model: Any, tokenizer: Any, job: Job, prompts: list[str], max_tokens: int) -> Any:
    """mlx-lm's answer to `prompts`; rendering and tokenizing counts, as it does for a server."""
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )
        for prompt in prompts
    ]
    return batch_generate(
        model,
        tokenizer,
        rendered,
        max_tokens=max_tokens,
        return_token_ids=True,
        sampler=make_sampler(job.temperature, job.top_p) if job.temperature > 0 else None,
        completion_batch_size=job.streams,
        prefill_batch_size=min(job.streams, _PREFILL_BATCH),
    )


def main() -> None:
    """Entry point of the process."""
    jobs = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Job])
    # mlx-lm prints as it pleases; standard output is for the figures alone.
    out, sys.stdout = sys.stdout, sys.stderr
    model, tokenizer = load(str(Path(sys.argv[1])))
    mx.random.seed(0)
    figures = [measure(model, tokenizer, job) for job in jobs]
    out.write(msgspec.json.encode(figures).decode())
    out.flush()


if __name__ == "__main__":
    main()
