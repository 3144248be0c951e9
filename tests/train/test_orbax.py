# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from awq_jax import adapt
from awq_jax.train import init_adapters
from tests.adapters.models import D, mlp, mlp_params
from tests.adapters.served import quantized


def test_a_mixed_tree_comes_back_bit_for_bit(tmp_path):
    """Codes, half-precision scales, dense leaves, adapters and a step counter, by the user's own checkpointer."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 40, D)), jnp.float32)
    base = quantized(mlp, mlp_params(), x)[1]
    state = {"base": base, "adapters": init_adapters(jax.random.key(0), base, rank=2), "step": jnp.int32(7)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    np.testing.assert_array_equal(adapt.serve(mlp)(again["base"], x), adapt.serve(mlp)(base, x))
