# SPDX-License-Identifier: Apache-2.0
"""Which GPUs the kernels are for."""

import jax

__all__ = ["unsuitable"]


def unsuitable() -> str | None:
    """Why this process's GPU can't run kernels for Hopper; None if it can, or if there is none, to compile for one."""
    if jax.default_backend() != "gpu":
        return None
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    if capability == "9.0":
        return None
    name = jax.devices()[0].device_kind
    return f"written for Hopper (compute capability 9.0: wgmma, TMA), and {name} has {capability or 'another one'}"
