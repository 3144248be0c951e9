# SPDX-License-Identifier: Apache-2.0
"""A checkpoint directory as google-tunix's model with packed weights: their forward and sampler, our product.

    from awq_jax.serving import tunix
    model = tunix.load("Qwen3-4B-int4")
    Sampler(model, tokenizer, cache_config)(["The easiest way"], max_generation_steps=64)

tunix is imported when `load` is called and is no dependency of this package.
"""

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from awq_jax import nnx as awq
from awq_jax._qtensor import QTensor
from awq_jax._tree import leaves
from awq_jax.adapt import QKernel
from awq_jax.serving.tunix_families import FAMILIES, TunixFamily
from awq_jax.serving.tunix_proof import prove
from awq_jax_convert.formats import open_checkpoint
from awq_jax_convert.source import Checkpoint

__all__ = ["TunixModel", "load"]


class TunixModel(awq.Quantized):
    """A tunix model that holds packed weights: called as the original, its other attributes are the original's.

    Attributes:
      model: the original's structure, holding the parameters.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the original returns, ``(logits, cache)``; arguments are the original's."""
        names = tuple(options)
        return self.run(functools.partial(_called, len(args), names), *args, *options.values())

    def __getattr__(self, name: str) -> Any:
        # Only reached for what this module lacks: config, init_cache, num_embed and whatever else samplers look for.
        if name.startswith("_") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)


def _called(positional: int, names: tuple[str, ...], model: Any, *args: Any) -> Any:
    return model(*args[:positional], **dict(zip(names, args[positional:], strict=True)))


def load(path: str | os.PathLike[str], *, config: Any = None, dtype: Any = jnp.bfloat16) -> TunixModel:
    """Read a checkpoint into tunix's model of its family; quantized weights stay packed.

    The checkpoint's mechanisms are tried first on a small random model, ours against tunix's, so that a model whose
    config tunix does not follow is refused and not served wrong. The host holds one layer at a time, and one device
    all of it.

    Args:
      path: of the directory; Llama, Qwen 2 and 3, Gemma 1 to 3.
      config: a tunix ``ModelConfig`` of yours, for example with flash attention; its sizes must be the checkpoint's.
        None makes one.
      dtype: of dense parameters, and where tunix's config knows it, of activations.

    Raises:
      FileNotFoundError, ValueError: as `awq_jax_convert.formats.open_checkpoint`.
      ImportError: tunix is not installed.
      ValueError: a family that is not in the table, a config of other sizes, weights that tunix holds in one array and
        that were quantized in different ways, or a mechanism that tunix does not have; the message names it.
    """
    checkpoint = open_checkpoint(path)
    name = checkpoint.family.name
    if name not in FAMILIES:
        raise ValueError(
            f"{path} is a {name!r}, and the table has tunix's {', '.join(FAMILIES)}. `awq_jax.serving.load` serves "
            "every family."
        )
    family = FAMILIES[name]
    module = _module(family)
    wanted = family.config(checkpoint.config, module, jnp.dtype(dtype))
    config = _config(module, wanted, config)
    place = functools.partial(_filled, family, module)
    prove(name, family, module, checkpoint.config, config, place)
    return place(config, _read(checkpoint, dtype))


def _module(family: TunixFamily) -> Any:
    try:
        return importlib.import_module(family.module)
    except ImportError as error:
        raise ImportError(
            f"cannot import {family.module} ({error}); `pip install google-tunix==0.1.7` in an environment of its own."
        ) from error


def _config(module: Any, wanted: Mapping[str, Any], given: Any) -> Any:
    """The config to build with: the caller's, if it says the same of the sizes."""
    if given is None:
        return module.ModelConfig(**wanted)
    free = ("dtype", "param_dtype")
    wrong = [
        f"{name} is {getattr(given, name)!r}, the checkpoint's is {value!r}"
        for name, value in wanted.items()
        if name not in free and getattr(given, name) != value
    ]
    if wrong:
        raise ValueError(f"this ModelConfig is of another model: {'; '.join(wrong)}.")
    return given


def _read(checkpoint: Checkpoint, dtype: Any) -> dict[str, Any]:
    """{path: leaf} of all parameters, on the device."""
    found = dict(leaves(jax.tree.map(jnp.asarray, checkpoint.stem(dtype))))
    for index in range(checkpoint.num_layers):
        layer = jax.tree.map(jnp.asarray, checkpoint.layer(index, dtype))
        found |= {f"layers/{index}/{path}": leaf for path, leaf in leaves(layer)}
    return found


def _filled(family: TunixFamily, module: Any, config: Any, params: Mapping[str, Any]) -> TunixModel:
    """tunix's model with our parameters; none of its own is ever made."""
    build: Callable[[], Any] = lambda: getattr(module, family.model)(config, rngs=nnx.Rngs(0))
    abstract = nnx.eval_shape(build)
    left = dict(params)
    filled = {path: _leaf(family, path, value, left) for path, value in awq.params_of(abstract).items()}
    if left:
        raise ValueError(
            f"tunix's {family.model} has no place for {', '.join(sorted(left)[:5])} of the checkpoint; it would be "
            "another model without."
        )
    held = awq.serve(abstract, filled)
    return TunixModel(held.model, held.call)


def _leaf(family: TunixFamily, path: str, expected: Any, left: dict[str, Any]) -> Any:
    """One of tunix's parameters, made of ours, which are taken out of ``left``."""
    matches = ((row, row.match(path)) for row in family.rows)
    row, layer = next(((row, layer) for row, layer in matches if layer is not None), (None, ""))
    if row is None:
        raise ValueError(
            f"tunix's {family.model} has a parameter {path!r} that the table does not know; it was read in 0.1.7, this "
            f"is {importlib.metadata.version('google-tunix')}."
        )
    ours = [name.replace("*", layer) for name in row.ours]
    if missing := [name for name in ours if name not in left]:
        raise ValueError(f"tunix's {path!r} is made of {', '.join(missing)}, which the checkpoint does not have.")
    matrix = _side_by_side(path, ours, [left.pop(name) for name in ours])
    shape = tuple(expected.shape)
    layout = row.layout(shape) if row.axes else None
    if tuple(matrix.shape) != (shape if layout is None else (layout.k, layout.n)):
        what = "" if layout is None else f", {layout.describe()} as a matrix"
        raise ValueError(f"{' + '.join(ours)} is {tuple(matrix.shape)}, tunix's {path!r} is {shape}{what}.")
    if layout is None:
        return matrix
    if isinstance(matrix, QTensor):
        return QKernel(weight=matrix, layout=layout, dtype=str(np.dtype(expected.dtype)))
    return layout.kernel(matrix)


def _side_by_side(path: str, names: list[str], parts: list[Any]) -> Any:
    """Our parameters as one, along n."""
    if len(parts) == 1:
        return parts[0]
    forms = [_form(part) for part in parts]
    if len(set(forms)) > 1:
        kept = ", ".join(f"{name} is {form}" for name, form in zip(names, forms, strict=True))
        raise ValueError(
            f"tunix holds {path!r} in one array, but {kept}; quantize them alike, in groups of one size (--override)."
        )
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=-1), *parts)


def _form(leaf: Any) -> str:
    if not isinstance(leaf, QTensor):
        return str(leaf.dtype)
    kind = "symmetric" if leaf.zero is None else "with zero points"
    return f"int{leaf.bits} {kind} in groups of {leaf.group_size}, scales in {leaf.scale.dtype}"
