# SPDX-License-Identifier: Apache-2.0
"""transformers 4.57's Flax models, the last ones: in an environment of their own.

pip install transformers==4.57.6 jax flax jaxtyping beartype pytest rich
PYTHONPATH=kernels:convert python -m pytest tests/adapters/test_clients_hf.py
"""

import jax.numpy as jnp
import numpy as np
import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if int(transformers.__version__.split(".")[0]) > 4:
    pytest.skip(
        f"transformers {transformers.__version__} has no Flax models; 4.57 is the last that does, and needs an "
        "environment of its own",
        allow_module_level=True,
    )

from awq_jax.adapt import Columns  # noqa: E402
from tests.adapters.served import check_client, rules  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("their_promotion")]
SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
LAYER = "model/layers/*/"
LLAMA = {
    LAYER + "input_layernorm/weight": {LAYER + f"self_attn/{n}_proj/kernel" for n in "qkv"},
    LAYER + "post_attention_layernorm/weight": {LAYER + f"mlp/{n}_proj/kernel" for n in ("gate", "up")},
    LAYER + "self_attn/v_proj/kernel": {LAYER + "self_attn/o_proj/kernel"},
    LAYER + "mlp/up_proj/kernel": {LAYER + "mlp/down_proj/kernel"},
}


def build(family: str, **options):
    config = getattr(transformers, f"{family}Config")(**options)
    name = f"Flax{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}"
    return getattr(transformers, name)(config, seed=0)


def check(model):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 128, (2, 32)))
    return check_client(lambda params, ids: model(ids, params=params).logits, model.params, ids)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma"])
def test_decoder(family):
    table, coverage = check(build(family, **SMALL, **HEADS))
    found = rules(table)
    assert {producer: found[producer] for producer in LLAMA} == LLAMA
    assert coverage.methods["awq"] >= 12
    offset = {group.producer: group.offset for group in table.groups}
    assert offset[LAYER + "input_layernorm/weight"] == (1.0 if family == "Gemma" else 0.0)


def test_gpt2():
    table, _ = check(build("GPT2", vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    layer = "transformer/h/*/"
    assert rules(table) == {
        layer + "ln_1/scale": {layer + "attn/c_attn/kernel"},
        layer + "ln_2/scale": {layer + "mlp/c_fc/kernel"},
        layer + "attn/c_attn/kernel": {layer + "attn/c_proj/kernel"},
    }
    (v,) = (group.columns for group in table.groups if group.producer == layer + "attn/c_attn/kernel")
    assert v == Columns(period=192, start=128, stop=192)
    assert "gather" in table.left["transformer/wte/embedding"]
