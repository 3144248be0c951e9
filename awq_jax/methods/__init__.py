# SPDX-License-Identifier: Apache-2.0
"""Ways to round a weight once its scale and thresholds are chosen, and the methods that AWQ is compared with."""

from awq_jax.methods.gptq import gptq
from awq_jax.methods.rounding import round_by

__all__ = ["gptq", "round_by"]
