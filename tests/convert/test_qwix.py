# SPDX-License-Identifier: Apache-2.0
"""qwix runs our weights: its own inference path, held against the dense weights they stand for.

qwix is no dependency; in an environment that has it (tried with 0.1.8), these run.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from awq_jax import QTensor, QuantSpec, dequantize, quantize
from awq_jax.adapt.kernel import QKernel
from awq_jax.adapt.layout import Layout
from awq_jax_convert.qwix_leaves import to_qwix

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix calls what newer versions of flax rename
HERE = importlib.util.find_spec("qwix") is not None
needs_qwix = pytest.mark.skipif(not HERE, reason="qwix is not installed; pip install qwix to try its inference path")
ASYMMETRIC, SYMMETRIC = QuantSpec(group_size=8), QuantSpec(group_size=8, symmetric=True)
SPECS = {
    "asymmetric": ASYMMETRIC,
    "symmetric": SYMMETRIC,
    "columns": QuantSpec(group_size=-1),
    "three bits": QuantSpec(bits=3, group_size=8),
    "bfloat16": QuantSpec(group_size=8, scale_dtype="bfloat16"),
}


class Mlp(nn.Module):
    """Two linears."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(24, name="down")(nn.relu(nn.Dense(32, name="up")(x)))


class Attention(nn.Module):
    """Kernels of three axes: heads are outputs of one and inputs of the other."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.DenseGeneral(24, axis=(-2, -1), name="o")(nn.DenseGeneral((4, 8), name="v")(x))


def params_of(module: nn.Module, x: Any) -> Any:
    return module.init(jax.random.key(0), x)["params"]


def served(module: nn.Module, provider: Any, params: Any, x: Any) -> np.ndarray:
    import qwix  # pyright: ignore[reportMissingImports]

    return np.asarray(qwix.quantize_model(module, provider).apply({"params": params}, x))


def rules(tile: int | None = 8, method: str = "minmax") -> list[Any]:
    import qwix  # pyright: ignore[reportMissingImports]

    return [qwix.QuantizationRule(weight_qtype=jnp.int4, tile_size=tile, weight_calibration_method=method)]


def with_kernels(params: Any, replace: Any) -> Any:
    return {name: {**leaf, "kernel": replace(leaf["kernel"])} for name, leaf in params.items()}


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@needs_qwix
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_qwix_computes_what_the_weights_stand_for(rng: np.random.Generator, spec: QuantSpec):
    import qwix  # pyright: ignore[reportMissingImports]

    module, x = Mlp(), jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)
    params = params_of(module, x)
    ours = with_kernels(params, lambda kernel: quantize(kernel, spec))
    dense = with_kernels(ours, dequantize)
    method = "absmax" if spec.symmetric else "minmax"
    provider = qwix.PtqProvider(rules(None if spec.group_size == -1 else 8, method))
    assert_close(served(module, provider, to_qwix(ours), x), np.asarray(module.apply({"params": dense}, x)))


@needs_qwix
@pytest.mark.parametrize(("method", "spec"), [("absmax", SYMMETRIC), ("minmax", ASYMMETRIC)])
def test_leaves_are_those_that_qwix_makes_itself(rng: np.random.Generator, method: str, spec: QuantSpec):
    import qwix  # pyright: ignore[reportMissingImports]

    module, x = Mlp(), jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)
    ours = to_qwix(with_kernels(params_of(module, x), lambda kernel: quantize(kernel, spec)))
    abstract = jax.eval_shape(
        qwix.quantize_model(module, qwix.PtqProvider(rules(method=method))).init, jax.random.key(0), x
    )
    assert jax.tree.structure(ours) == jax.tree.structure(abstract["params"])
    kinds = lambda tree: [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(tree)]
    assert kinds(ours) == kinds(abstract["params"])


@needs_qwix
def test_an_nnx_module_takes_them(rng: np.random.Generator):
    import qwix  # pyright: ignore[reportMissingImports]

    module, x = nnx.Linear(16, 24, rngs=nnx.Rngs(0)), jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)
    kernel = quantize(module.kernel[...], ASYMMETRIC)
    ptq = qwix.quantize_model(module, qwix.PtqProvider(rules()), x)
    nnx.update(ptq, nnx.to_pure_dict(nnx.state(to_qwix({"kernel": kernel}))))
    assert_close(np.asarray(ptq(x)), np.asarray(x @ dequantize(kernel)))


def attention_kernels(params: Any, spec: QuantSpec) -> Any:
    layouts = {
        "v": Layout(shape=(16, 4, 8), factors=(16, 4, 8), contract=(0,), out=(1, 2)),
        "o": Layout(shape=(4, 8, 24), factors=(4, 8, 24), contract=(0, 1), out=(2,)),
    }
    return {
        name: {
            **leaf,
            "kernel": QKernel(
                weight=quantize(layouts[name].matrix(leaf["kernel"]), spec), layout=layouts[name], dtype="float32"
            ),
        }
        for name, leaf in params.items()
    }


@needs_qwix
@pytest.mark.parametrize("group", [4, 8, 16])
def test_kernels_of_three_axes(rng: np.random.Generator, group: int):
    import qwix  # pyright: ignore[reportMissingImports]

    module, x = Attention(), jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
    ours = attention_kernels(params_of(module, x), QuantSpec(group_size=group))
    dense = with_kernels(ours, lambda kernel: kernel.dense())
    made = to_qwix(ours)
    assert made["o"]["kernel"].array.scale.shape == {4: (4, 2, 24), 8: (4, 1, 24), 16: (2, 1, 24)}[group]
    provider = qwix.PtqProvider(rules(group))
    assert_close(served(module, provider, made, x), np.asarray(module.apply({"params": dense}, x)))


@needs_qwix
def test_weights_that_keep_a_scale_for_their_inputs(rng: np.random.Generator):
    from qwix.contrib import awq  # pyright: ignore[reportMissingImports]

    module, x = nn.Dense(24), jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)
    params = params_of(module, x)
    inverse = jnp.asarray(rng.uniform(0.5, 2, 16), jnp.float32)
    layout = Layout(shape=(16, 24), factors=(16, 24), contract=(0,), out=(1,))
    weight = quantize(params["kernel"] / inverse[:, None], SYMMETRIC)
    kernel = QKernel(weight=weight, inverse=inverse, layout=layout, dtype="float32")
    got = served(module, awq.AwqInferenceProvider(rules(method="absmax")), to_qwix({**params, "kernel": kernel}), x)
    assert_close(got, np.asarray(module.apply({"params": {**params, "kernel": kernel.dense()}}, x)))


@needs_qwix
def test_what_qwix_has_no_scales_for_is_refused():
    weight = quantize(jnp.ones((24, 8)), QuantSpec(group_size=8))
    across = Layout(shape=(4, 6, 8), factors=(4, 6, 8), contract=(0, 1), out=(2,))
    with pytest.raises(ValueError, match="groups of 8 rows lie across the axes of a kernel of shape"):
        to_qwix(QKernel(weight=weight, layout=across, dtype="float32"))
    cut = Layout(shape=(24, 8), factors=(24, 2, 4), contract=(0,), out=(1, 2))
    with pytest.raises(ValueError, match="is reshaped before its product"):
        to_qwix(QKernel(weight=weight, layout=cut, dtype="float32"))
    small = QTensor(packed=weight.packed, scale=weight.scale * 1e-30)
    with pytest.raises(ValueError, match="a scale leaves the range of float16"):
        to_qwix(small, dtype="float16")


@pytest.mark.skipif(HERE, reason="qwix is installed")
def test_without_qwix_the_error_says_what_to_install():
    with pytest.raises(ImportError, match="pip install qwix"):
        to_qwix({"kernel": quantize(jnp.ones((16, 8)), QuantSpec(group_size=8))})
    assert to_qwix({"scale": 1.0}) == {"scale": 1.0}  # nothing that needs it
