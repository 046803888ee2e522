"""What limits a server, concluded from how its figures change with concurrency."""

from collections.abc import Sequence

from mlx_server.cli.bench.figures import Level

GROWTH = 1.1
"""Less than this for twice the streams is no growth."""
BUSY_CLIENT = 0.9


def verdict(levels: Sequence[Level]) -> str:
    """One sentence or two on the last levels; `levels` are of growing concurrency."""
    last = levels[-1]
    if last.errors:
        failed = f"{len(last.errors)} of {last.requests} requests failed"
        return f"At {last.concurrency} streams {failed}: {last.errors[0]}"
    if last.client_cpu > BUSY_CLIENT:
        return (
            f"This client: it used {last.client_cpu:.0%} of a core at {last.concurrency} streams,"
            " so the server may do more than the table says."
        )
    best = _best(levels)
    if (best is last and len(levels) > 1) or last.output_rate == 0:
        return (
            f"Nothing yet at {last.concurrency} streams: throughput still grows."
            f" Try --concurrency {last.concurrency * 2}."
        )
    if len(levels) == 1:
        return "One level shows no limit: give several to --concurrency."
    return f"From {best.concurrency} streams on: {_reason(best, last)}"


def _best(levels: Sequence[Level]) -> Level:
    """The last level up to which more streams brought more tokens."""
    best = levels[0]
    for level in levels[1:]:
        # What twice the streams should bring at least, for the streams that were added.
        wanted = 1 + (GROWTH - 1) * (level.concurrency / best.concurrency - 1)
        if level.output_rate >= best.output_rate * min(wanted, GROWTH):
            best = level
    return best


def _reason(best: Level, last: Level) -> str:
    server = last.server
    if server is not None and server.preempted:
        return (
            f"memory for KV caches, which made {server.preempted} requests give up their place:"
            " raise `kv_cache` or `memory_limit`, or set `kv_bits`."
        )
    if server is not None and server.waiting and server.running < last.concurrency:
        return (
            f"places in the batch: {server.running} ran and {server.waiting} waited."
            " Raise `max_batch`, as long as memory allows."
        )
    slower = last.itl_p50 / best.itl_p50 if best.itl_p50 else 1.0
    later = last.ttft_p50 / best.ttft_p50 if best.ttft_p50 else 1.0
    if later > 2 * slower:
        return (
            "prompts or a queue: the first token comes"
            f" {later:.1f} times later, further ones {slower:.1f} times."
        )
    return f"the device: each token takes {slower:.1f} times as long at {last.concurrency} streams."
