# SPDX-License-Identifier: Apache-2.0
"""The second product of a gated MLP, which reads the first one's columns as they are."""

from awq_jax_kernels.gated_int4_matmul.api import gated_int4_matmul as gated_int4_matmul
