# SPDX-License-Identifier: Apache-2.0
"""What lies between the two products of a gated MLP, in one operation; `api` says which implementation runs."""

from awq_jax_kernels.gated.api import gated as gated
from awq_jax_kernels.gated.reference import ACTIVATIONS as ACTIVATIONS
