# SPDX-License-Identifier: Apache-2.0
"""google-tunix's NNX models: in an environment of their own.

pip install google-tunix==0.1.7 jax flax jaxtyping beartype pytest
PYTHONPATH=kernels:convert python -m pytest tests/adapters/test_clients_tunix.py
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("their_promotion")]
pytest.importorskip("tunix", reason="google-tunix is not installed; it wants an environment of its own")

from flax import nnx  # noqa: E402

from awq_jax import nnx as awq  # noqa: E402
from tests.adapters.served import RECIPE, dense, distance, rules  # noqa: E402

WIDTHS = {"num_layers": 2, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4, "head_dim": 16, "num_kv_heads": 2}
ROPE = {"vocab_size": 128, "rope_theta": 10_000, "norm_eps": 1e-6}


def build(family: str):
    module = importlib.import_module(f"tunix.models.{family}.model")
    if family == "gemma":
        extra = {"num_embed": 128, "final_logit_softcap": None, "use_post_attn_norm": False, "use_post_ffw_norm": False}
        config = module.ModelConfig(**WIDTHS, **extra, attention_types=(module.AttentionType.GLOBAL,) * 2)
        return module.Gemma(config, rngs=nnx.Rngs(0))
    return getattr(module, family.capitalize())(module.ModelConfig(**WIDTHS, **ROPE), rngs=nnx.Rngs(0))


def randomize(model):
    """Some of its kernels start at zero, where nothing could be found out."""
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        shape = variable.get_value().shape
        width = np.prod(shape) / shape[-1] if len(shape) > 1 else 16
        variable.set_value(jnp.asarray(rng.standard_normal(shape) * width**-0.5 + (len(shape) == 1), jnp.float32))


def call(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool)), (*tokens.shape, tokens.shape[1]))
    return model(tokens, positions, None, mask)[0].astype(jnp.float32)


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "gemma"])
def test_served_by_its_own_forward(family):
    model = build(family)
    randomize(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 128, (2, 32)))
    table = awq.propose(model, tokens, call=call)
    stats = awq.observe(model, [tokens], table, call=call)
    quantized, coverage = awq.quantize(model, stats, table, RECIPE, call=call)
    got = nnx.jit(lambda m, t: m(t))(quantized, tokens)
    params = dense(awq.params_of(quantized))
    wanted = awq.serve(model, params, call=call)(tokens)
    bound = 2e-5 if wanted.dtype == jnp.float32 and next(iter(params.values())).dtype == jnp.float32 else 3e-2
    assert distance(got, wanted) < bound
    assert {linear.path for linear in coverage.linears} == {*table.weights, *table.left}
    assert all(linear.method == "awq" or linear.reason for linear in coverage.linears)
    groups = rules(table)
    assert any("up_proj" in producer and "down_proj" in "".join(sinks) for producer, sinks in groups.items())
    attention = [sinks for producer, sinks in groups.items() if "input_layernorm" in producer or "pre_att" in producer]
    assert attention
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), params)))
