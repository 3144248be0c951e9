# SPDX-License-Identifier: Apache-2.0
"""Serving: packed weights from a checkpoint to tokens, in steps that compile once.

`load` reads a checkpoint, `prefill` and `decode` are pure functions over (params, slots, tokens), `Engine` keeps the
slots full, `awq_jax.serving.server` speaks HTTP, `awq_jax.serving.export` writes the steps as artefacts.
"""

from awq_jax.serving.engine import Engine as Engine
from awq_jax.serving.engine import Request as Request
from awq_jax.serving.load import ServingModel as ServingModel
from awq_jax.serving.load import load as load
from awq_jax.serving.steps import Slots as Slots
from awq_jax.serving.steps import decode as decode
from awq_jax.serving.steps import empty_slots as empty_slots
from awq_jax.serving.steps import prefill as prefill
