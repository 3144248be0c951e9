# SPDX-License-Identifier: Apache-2.0
"""Training on quantized weights: adapters beside a frozen INT4 base, and fine-tuning that knows of the rounding."""

from awq_jax.train.lora import Adapted as Adapted
from awq_jax.train.lora import apply_adapters as apply_adapters
from awq_jax.train.lora import init_adapters as init_adapters
from awq_jax.train.lora import merge_adapters as merge_adapters
from awq_jax.train.qat import fake_quantized as fake_quantized
from awq_jax.train.qat import learned as learned
from awq_jax.train.qat import learned_scales as learned_scales
from awq_jax.train.split import apply_updates as apply_updates
from awq_jax.train.split import combine as combine
from awq_jax.train.split import frozen_mask as frozen_mask
from awq_jax.train.split import split as split
