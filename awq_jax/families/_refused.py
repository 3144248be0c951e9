# SPDX-License-Identifier: Apache-2.0
"""Architectures that no table of this decoder can describe, and why; docs/families.md says more."""

__all__ = ["REFUSED"]

_LATENT = (
    "it keeps the keys and values of all heads as one latent vector (MLA), with keys wider than values and their "
    "rotated channels shared by the heads, and its first layers have no experts while the others do"
)

REFUSED = {
    "DeepseekV2ForCausalLM": _LATENT,
    "DeepseekV3ForCausalLM": _LATENT,
}
"""architecture -> why."""
