# SPDX-License-Identifier: Apache-2.0
"""`int4_matmul`: one function, several implementations, and the rule that picks among them.

An implementation is a module with two functions over 2-d operands::

    supports(x, packed, scale, zero=None, *, config=None) -> str | None    # why not, from shapes and dtypes alone
    int4_matmul(x, packed, scale, zero=None, *, config=None) -> y          # y has the dtype of x

`supports` takes anything with a shape and a dtype. What is common to all of them stands here: checks, leading axes,
batching and the gradient.
"""

import functools
import importlib
from types import ModuleType
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int8

from awq_jax_kernels.int4_matmul import backward

__all__ = ["IMPLEMENTATIONS", "Implementation", "int4_matmul", "refusal"]

Implementation = Literal["tpu", "gpu", "xla", "reference"]

IMPLEMENTATIONS: dict[str, str] = {
    "tpu": "awq_jax_kernels.int4_matmul.pallas_tpu",
    "gpu": "awq_jax_kernels.int4_matmul.pallas_gpu",
    "xla": "awq_jax_kernels.int4_matmul.xla",
    "reference": "awq_jax_kernels.int4_matmul.reference",
}

_EIGHT_BITS = "packed has a byte for each row of x, codes of eight bits; int8_matmul multiplies these"


def int4_matmul(
    x: Float[Array, "..."],
    packed: Int8[Array, "*b k2 n"],
    scale: Float[Array, "*b groups n"],
    zero: Int8[Array, "*b groups n"] | None = None,
    *,
    implementation: Implementation | None = None,
    config: Any = None,
    settled: bool = False,
) -> Float[Array, "..."]:
    """Multiply activations by an INT4 weight, ``y = x @ ((q - zero) * scale)``, without building the dense weight.

    Args:
      x: ``[*b, m, k]``, float32, bfloat16 or float16. For a weight without leading axes, any ``[..., k]``.
      packed: int8 ``[*b, k/2, n]``, the layout of `awq_jax_kernels.nibbles`.
      scale: floating ``[*b, k/g, n]``; the group size g is ``k // scale.shape[-2]``.
      zero: int8 codes 0..15 ``[*b, k/g, n]``; None is 8 everywhere, a symmetric weight.
      implementation: "tpu", "gpu", "xla" or "reference"; a refusal is then an error. None takes the kernel of the
        platform that the program is lowered for, where it accepts the operands, and XLA's grouped product elsewhere.
      config: block sizes for the implementation named; None takes the tuned or the derived ones.
      settled: the weight was in memory before the program began, as a served model's is. A GPU's kernel then reads its
        first bytes while the operations in front are still running; a weight that one of them makes would be read
        half made.

    Returns:
      ``[*b, m, n]`` or ``[..., n]`` in the dtype of x. The gradient with respect to x is defined; the weight is
      frozen: `packed` and `zero` get float0 cotangents, and that of `scale` is zero.

    Raises:
      ValueError: shapes that disagree, an implementation that refuses, or a config without an implementation.

    >>> import jax.numpy as jnp
    >>> packed = jnp.full((1, 1), 0x21 ^ 0x88 - 256, jnp.int8)  # codes 1 and 2, down one column
    >>> scale, zero = jnp.full((1, 1), 0.5), jnp.zeros((1, 1), jnp.int8)
    >>> int4_matmul(jnp.array([[10.0, 100.0]]), packed, scale, zero).item()
    105.0
    """
    _check(x, packed, scale, zero)
    if config is not None and implementation is None:
        raise ValueError("config belongs to one implementation: name it, such as implementation='tpu'.")
    if packed.ndim > 2:
        # Leading axes are mapped one by one, so that an implementation sees two dimensions and nothing else.
        each = functools.partial(int4_matmul, implementation=implementation, config=config, settled=settled)
        return jax.vmap(each)(x, packed, scale, zero)
    rows = x.reshape(-1, x.shape[-1])
    _refuse(rows, packed, scale, zero, implementation, config)
    y = _product(implementation, config, settled, rows, packed, scale, zero)
    return y.reshape(*x.shape[:-1], packed.shape[-1])


def refusal(
    implementation: Implementation, x: Any, packed: Any, scale: Any, zero: Any = None, *, config: Any = None
) -> str | None:
    """Why an implementation can't take these 2-d operands (anything with a shape and a dtype), or None if it can."""
    if x.shape[-1] == packed.shape[-2]:
        return _EIGHT_BITS
    module = _module(implementation)
    return module if isinstance(module, str) else module.supports(x, packed, scale, zero, config=config)


@functools.cache
def _module(implementation: str) -> ModuleType | str:
    """The module of an implementation, imported on first use, or why there is none."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; choose from {', '.join(IMPLEMENTATIONS)}.")
    try:
        return importlib.import_module(IMPLEMENTATIONS[implementation])
    except ModuleNotFoundError as error:
        if error.name == IMPLEMENTATIONS[implementation]:
            return "not built"
        return f"needs {error.name}, which is not installed"


def _check(x: Any, packed: Any, scale: Any, zero: Any) -> None:
    """Raise where shapes disagree, naming them all."""
    shapes = f"x {x.shape}, packed {packed.shape}, scale {scale.shape}, zero {None if zero is None else zero.shape}"
    *b, k2, n = packed.shape
    if x.shape[-1] == k2:
        raise ValueError(f"int4_matmul takes no such weight: {_EIGHT_BITS}: {shapes}.")
    if x.shape[-1] != 2 * k2:
        raise ValueError(f"x must have {2 * k2} columns, two for each row of packed: {shapes}.")
    if scale.shape[:-2] != tuple(b) or scale.shape[-1] != n or not scale.shape[-2] or 2 * k2 % scale.shape[-2]:
        raise ValueError(f"scale must be {(*b, 'k/g', n)}, with k/g a divisor of {2 * k2}: {shapes}.")
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"zero must have the shape of scale: {shapes}.")
    if b and (x.ndim != packed.ndim or x.shape[:-2] != tuple(b)):
        raise ValueError(f"x must have the leading axes of the weight, {(*b, 'm', 2 * k2)}: {shapes}.")


def _refuse(x: Any, packed: Any, scale: Any, zero: Any, implementation: Implementation | None, config: Any) -> None:
    """Raise with every reason if nothing can run."""
    names: tuple[Implementation, ...] = ("tpu", "gpu", "xla") if implementation is None else (implementation,)
    # Without a name the program may be lowered for any platform, and "xla" is the only one that runs on all of them.
    if refusal(names[-1], x, packed, scale, zero, config=config) is not None:
        reasons = {name: refusal(name, x, packed, scale, zero, config=config) for name in names}
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        raise ValueError(
            f"no implementation of int4_matmul takes x {x.dtype}{list(x.shape)}, packed {list(packed.shape)}, "
            f"scale {scale.dtype}{list(scale.shape)}: {listed}. implementation='reference' takes everything."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(
    implementation: Implementation | None, config: Any, settled: bool, x: Any, packed: Any, scale: Any, zero: Any
) -> Any:
    """The product of 2-d operands."""
    return _batched(implementation, config, settled)(x, packed, scale, zero)


def _forward(
    implementation: Any, config: Any, settled: bool, x: Any, packed: Any, scale: Any, zero: Any
) -> tuple[Any, Any]:
    return _differentiable(implementation, config, settled, x, packed, scale, zero), (packed, scale, zero)


def _backward(implementation: Any, config: Any, settled: bool, residuals: Any, dy: Any) -> tuple[Any, Any, Any, Any]:
    packed, scale, zero = residuals
    return backward.input_cotangent(dy, packed, scale, zero), *backward.frozen(packed, scale, zero)


_differentiable.defvjp(_forward, _backward)
_product = jax.jit(_differentiable, static_argnums=(0, 1, 2))


@functools.cache
def _batched(implementation: Implementation | None, config: Any, settled: bool) -> Any:
    """The chosen function with a batching rule: rows of x that share a weight are rows of one product."""

    @jax.custom_batching.custom_vmap
    def product(x: Any, packed: Any, scale: Any, zero: Any) -> Any:
        return _choose(implementation, config, settled, x, packed, scale, zero)

    @product.def_vmap
    def _(size: int, mapped: Any, x: Any, packed: Any, scale: Any, zero: Any) -> tuple[Any, bool]:
        over_x, *over_weight = mapped
        if any(jax.tree.leaves(over_weight)):
            axes = (0 if over_x else None, *jax.tree.map(lambda m: 0 if m else None, tuple(over_weight)))
            choose = functools.partial(_choose, implementation, config, settled)
            return jax.vmap(choose, in_axes=axes, axis_size=size)(x, packed, scale, zero), True
        # Mapping a kernel would fetch the weight once per row of the batch.
        y = product(x.reshape(-1, x.shape[-1]), packed, scale, zero)
        return y.reshape(size, -1, packed.shape[-1]), True

    return product


def _choose(
    implementation: Implementation | None, config: Any, settled: bool, x: Any, packed: Any, scale: Any, zero: Any
) -> Any:
    """Run the implementation named, or stage one per platform and let lowering pick.

    The platform is that of the lowering, not of this process: a program exported for a TPU on a CPU gets the kernel.
    Staging the GPU's takes seconds, so only a process that has a GPU does.
    """
    more = lambda name: {"settled": settled} if name == "gpu" else {}
    if implementation is not None:
        return _run(implementation, x, packed, scale, zero, config=config, **more(implementation))
    kernels: dict[str, Implementation] = {"tpu": "tpu"}
    if jax.default_backend() == "gpu":
        kernels["cuda"] = "gpu"
    branches = {
        platform: functools.partial(_run, kernel, **more(kernel))
        for platform, kernel in kernels.items()
        if refusal(kernel, x, packed, scale, zero) is None
    }
    otherwise = functools.partial(_run, "xla")
    if not branches:
        return otherwise(x, packed, scale, zero)
    return jax.lax.platform_dependent(x, packed, scale, zero, default=otherwise, **branches)


def _run(implementation: str, x: Any, packed: Any, scale: Any, zero: Any, **options: Any) -> Any:
    module: Any = _module(implementation)
    return module.int4_matmul(x, packed, scale, zero, **options)
