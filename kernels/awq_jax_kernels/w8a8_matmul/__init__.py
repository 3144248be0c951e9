# SPDX-License-Identifier: Apache-2.0
"""Activations rounded to int8 times int8 weights, summed in int32."""

from awq_jax_kernels.w8a8_matmul.api import w8a8_matmul as w8a8_matmul
from awq_jax_kernels.w8a8_matmul.rounding import round_rows as round_rows
