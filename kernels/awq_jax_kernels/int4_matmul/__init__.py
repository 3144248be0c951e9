# SPDX-License-Identifier: Apache-2.0
"""The product of activations and an INT4 weight; `api` says which implementation runs."""

from awq_jax_kernels.int4_matmul.api import int4_matmul as int4_matmul
from awq_jax_kernels.int4_matmul.api import refusal as refusal
