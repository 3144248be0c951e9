# SPDX-License-Identifier: Apache-2.0
"""The engine's counts in Prometheus' text format."""

from awq_jax.serving.engine import Engine

__all__ = ["exposition"]

_COUNTERS = {
    "requests": "Requests that were queued.",
    "prompt_tokens": "Tokens of prompts that were read.",
    "tokens": "Tokens that were delivered.",
    "cancelled": "Requests that were given up: the client left, or a stop string came.",
    "failed": "Requests that an error of the device ended.",
    "steps": "Dispatches of decode.",
}


def exposition(engine: Engine) -> str:
    """All counters and gauges."""
    lines = []
    for name, words in _COUNTERS.items():
        full = f"awq_jax_{name}_total"
        lines += [f"# HELP {full} {words}", f"# TYPE {full} counter", f"{full} {engine.counts[name]}"]
    for name, words, value in (
        ("running", "Slots in use.", engine.running),
        ("waiting", "Requests without a slot.", engine.waiting),
    ):
        full = f"awq_jax_{name}"
        lines += [f"# HELP {full} {words}", f"# TYPE {full} gauge", f"{full} {value}"]
    return "\n".join(lines) + "\n"
