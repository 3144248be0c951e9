# SPDX-License-Identifier: Apache-2.0
"""Rows sorted by expert times one INT4 weight per expert; `api` says which implementation runs."""

from awq_jax_kernels.ragged_int4_matmul.api import ragged_int4_matmul as ragged_int4_matmul
