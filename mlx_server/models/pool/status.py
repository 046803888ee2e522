"""A model for operators and metrics."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from mlx_server.engine.protocol import Batching, Memory, PrefixStats
from mlx_server.models.pool.slot import MIN_RETRY_AFTER, Slot
from mlx_server.models.pool.supervisors import ReplicaStatus

ModelState = Literal[
    "absent", "downloading", "loading", "ready", "restarting", "draining", "failed"
]
SHOWN_LINES = 20
SHOWN_CHARACTERS = 500
"""Per line."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """Times are in seconds, points in time since the epoch; memory is in bytes."""

    id: str
    state: ModelState
    reason: str | None = None
    pid: int | None = None
    device: str | None = None
    context_length: int | None = None
    mixed_steps: str | None = None
    """Whether prompts are computed in one pass with decode steps, or why not."""
    memory: Memory | None = None
    need: int | None = None
    """Reserved, or what it would take."""
    load_seconds: float | None = None
    loads: int = 0
    failures: int = 0
    """Loads that failed."""
    restarts: int = 0
    last_lines: tuple[str, ...] = ()
    in_flight: int = 0
    running: int = 0
    waiting: int = 0
    preempted: int = 0
    guessed: int = 0
    """Tokens, by speculation."""
    accepted: int = 0
    """Of those, tokens that came true."""
    step_seconds: float = 0.0
    """Of a recent decode step."""
    kv_bytes: int = 0
    """Of running requests."""
    kv_limit: int | None = None
    prefix_cache: PrefixStats | None = None
    batching: Batching | None = None
    replicas: tuple[ReplicaStatus, ...] = ()
    """Its engines."""
    waiting_to_load: int = 0
    pinned: bool = False
    draft_model: str | None = None
    """The id of the one beside it."""
    own_head: bool = False
    """Whether a head of its own guesses tokens."""
    last_used: float | None = None
    expires: float | None = None


def state_of(slot: Slot) -> ModelState:
    if slot.model is None:
        if slot.phase == "loading":
            return "loading"
        return "failed" if slot.error else "absent"
    if slot.draining or slot.leaving:
        return "draining"
    return "restarting" if slot.model.supervisor.restarting else "ready"


def status_of(slot: Slot) -> ModelStatus:
    known: dict[str, Any] = {
        "id": slot.entry.id,
        "state": state_of(slot),
        "reason": slot.error.message if slot.error else None,
        "need": slot.need or None,
        "load_seconds": slot.load_seconds,
        "loads": slot.loads,
        "failures": slot.failures,
        "in_flight": slot.in_use,
        "waiting_to_load": slot.waiters,
        "pinned": slot.pinned,
        "last_used": slot.last_used,
    }
    model = slot.model
    if model is None:
        lines = _shown(slot.last_lines)
        return ModelStatus(**known, restarts=slot.restarts, last_lines=lines)
    supervisor, facts, stats = model.supervisor, model.facts, model.supervisor.stats
    if stats is not None:
        known |= {
            "running": stats.running + stats.prefilling,
            "waiting": stats.waiting,
            "preempted": stats.preempted,
            "guessed": stats.guessed,
            "accepted": stats.accepted,
            "step_seconds": stats.step_seconds,
            "kv_bytes": stats.kv_bytes,
            "prefix_cache": stats.prefix,
        }
    return ModelStatus(
        **known,
        restarts=slot.restarts + supervisor.restarts,
        last_lines=_shown(supervisor.last_lines or slot.last_lines),
        pid=supervisor.pid,
        device=facts.device,
        context_length=facts.context_length,
        kv_limit=facts.kv_limit,
        mixed_steps=facts.mixed_steps,
        batching=facts.batching,
        replicas=tuple(supervisor.replicas),
        memory=stats.memory if stats else facts.memory,
        draft_model=slot.plan.draft.id if slot.plan and slot.plan.draft else None,
        own_head=facts.own_head,
        expires=_expiry(slot),
    )


def not_ready_reason(slots: Iterable[Slot]) -> str | None:
    missing = [slot for slot in slots if slot.preloaded and not slot.proven]
    if not missing:
        return None
    return " ".join(
        f"Model `{slot.entry.id}` is {state_of(slot)}"
        + (f": {slot.error.message}" if slot.error else ".")
        for slot in missing
    )


def retry_after(slot: Slot, now: float) -> float:
    """Seconds, from the last load's duration."""
    elapsed = now - slot.began_at if slot.phase == "loading" else 0.0
    usual = slot.load_seconds if slot.load_seconds is not None else 2 * elapsed
    return max(MIN_RETRY_AFTER, usual - elapsed)


def _expiry(slot: Slot) -> float | None:
    if slot.expires_at is None:
        return None
    return time.time() + slot.expires_at - time.monotonic()


def _shown(lines: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(line[:SHOWN_CHARACTERS] for line in lines[-SHOWN_LINES:])
