# SPDX-License-Identifier: Apache-2.0
"""One token more for every sequence of a batch: rotate, keep, attend; `api` says which implementation runs."""

from awq_jax_kernels.decode_attention.api import decode_attention as decode_attention
