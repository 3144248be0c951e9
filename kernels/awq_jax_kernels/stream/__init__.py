# SPDX-License-Identifier: Apache-2.0
"""A residual stream on its way through a decoder's products: what reads its norm, and what adds to it."""

from awq_jax_kernels.stream.api import Stream, add_product, normed, product, start
from awq_jax_kernels.stream.pallas_gpu import FEW

__all__ = ["FEW", "Stream", "add_product", "normed", "product", "start"]
