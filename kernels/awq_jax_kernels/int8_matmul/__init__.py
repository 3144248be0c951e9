# SPDX-License-Identifier: Apache-2.0
"""Floating activations times a weight of eight-bit codes."""

from awq_jax_kernels.int8_matmul.api import int8_matmul as int8_matmul
