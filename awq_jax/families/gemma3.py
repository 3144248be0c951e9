# SPDX-License-Identifier: Apache-2.0
"""Gemma 3, its text model: Gemma 2 without caps, with a norm over each head and a second rotation inside windows."""

import dataclasses

from awq_jax.families._rows import norm, without
from awq_jax.families._table import Group
from awq_jax.families.gemma2 import GEMMA2

__all__ = ["GEMMA3"]

L, HF = "layers/*", "model.layers.*"

GEMMA3 = dataclasses.replace(
    GEMMA2,
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    groups=(
        # Exact, but others measured that it costs accuracy here: medgemma-27b falls from 85.6 to 69.2 on CareQA
        # (llm-compressor issue 2522; the row was removed in its pull request 2571).
        Group(
            None,
            (f"{L}/attn/q", f"{L}/attn/k", f"{L}/attn/v"),
            output=f"{L}/attn",
            reason="scales in front of q and k that a norm follows were measured to cost Gemma 3 accuracy",
        ),
        *GEMMA2.groups[1:],
    ),
    keys=(
        *GEMMA2.keys,
        *norm(f"{HF}.self_attn.q_norm", f"{L}/attn/q_norm"),
        *norm(f"{HF}.self_attn.k_norm", f"{L}/attn/k_norm"),
    ),
    options=(*GEMMA2.options, ("qk_norm", "head")),
    config=(*without(GEMMA2.config, "attn_logit_softcapping"), ("rope_local_base_freq", "local_rope_theta")),
    defaults=(
        *(row for row in GEMMA2.defaults if not row[0].endswith("softcapping")),
        ("rope_theta", 1e6),
        ("rope_local_base_freq", 10000.0),
    ),
    full_every=6,
    accepts=(*GEMMA2.accepts, ("attn_logit_softcapping", (None,))),
    ignores=(*GEMMA2.ignores, "sliding_window_pattern"),  # the pattern is read where layer_types are missing
)
