# SPDX-License-Identifier: Apache-2.0
"""The decoder that families configure, in Flax NNX; the only part of the package that imports flax."""

from awq_jax.models.cache import KVCache as KVCache
from awq_jax.models.config import DecoderConfig as DecoderConfig
from awq_jax.models.decoder import Decoder as Decoder
from awq_jax.models.decoder import param_shapes as param_shapes
from awq_jax.models.decoder import params_of as params_of
from awq_jax.models.from_hf import config_from_hf as config_from_hf
from awq_jax.models.generate import generate as generate
