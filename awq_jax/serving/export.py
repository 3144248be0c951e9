# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode as artefacts that need neither this package nor flax to run: StableHLO, weights, a manifest."""

import errno
import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from awq_jax._publish import published, write_bytes, write_file
from awq_jax._version import __version__
from awq_jax.serving import loader
from awq_jax.serving.abstract import traced_for
from awq_jax.serving.engine import MAX_STOPS, buckets_for
from awq_jax.serving.extra import missing
from awq_jax.serving.load import ServingModel, load
from awq_jax.serving.loader import VERSION
from awq_jax.serving.sampling import Sampling
from awq_jax.serving.steps import Start, decode, empty_slots, prefill
from awq_jax_convert.hf_config import FamilyChoice
from awq_jax_kernels.chips import TPUS

__all__ = ["PLATFORMS", "export"]

PLATFORMS = ("tpu", "cuda", "cpu")
POSITIONS = 1024  # of a sequence, unless asked for more: the cache is an argument of every call


def export(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    platform: str,
    batch: int = 8,
    max_len: int | None = None,
    steps: int = 8,
    chip: str | None = None,
    int8_cache: bool = False,
    int4_head: bool = False,
    family: FamilyChoice = None,
) -> dict[str, Any]:
    """Write a checkpoint's steps for a platform that need not be at hand.

    Args:
      directory: of the checkpoint, dense or quantized.
      out: the directory to create: ``manifest.json``, ``weights.bin``, ``decode.bin``, a ``prefill_<bucket>.bin`` for
        each length that prompts are padded to, and ``loader.py``.
      platform: that runs them.
      batch: sequences at a time.
      max_len: positions of each, prompt and answer; None takes the model's, at most 1024.
      steps: tokens for each call of decode.
      chip: TPU generation whose tuned block sizes the kernels take; any TPU runs the ones taken without it.
      int8_cache, int4_head, family: as in `awq_jax.serving.http.engine_of`.

    Returns:
      The manifest.

    Raises:
      FileExistsError: ``out`` exists.
      ValueError: a number, the platform or the chip is none of those there are.
    """
    try:
        import flatbuffers  # noqa: F401 - jax writes with it, once all is compiled
    except ModuleNotFoundError as error:
        raise missing("exporting needs", error.name) from error
    out = Path(out)
    if os.path.lexists(out):  # before the weights are read
        raise FileExistsError(errno.EEXIST, "the output exists; choose another name", str(out))
    if platform not in PLATFORMS:
        raise ValueError(f"platform {platform!r}; choose from {', '.join(PLATFORMS)} (--platform).")
    if chip is not None and (platform != "tpu" or chip not in TPUS):
        raise ValueError(f"chip {chip!r} of platform {platform!r}; TPUs are {', '.join(TPUS)} (--chip).")
    if batch < 1 or steps < 1:
        raise ValueError(f"batch {batch} and steps {steps} must be at least 1.")
    wide = jnp.float32 if platform == "cpu" else jnp.bfloat16
    model = load(directory, dtype=wide, int4_head=int4_head, family=family, stored_order=True)
    positions = model.config.max_position_embeddings
    max_len = min(POSITIONS, positions) if max_len is None else max_len
    if not 2 <= max_len <= positions:
        raise ValueError(f"max_len is {max_len}; the model has {positions} positions (--max-len).")
    dtype = jnp.int8 if int8_cache else model.dtype
    slots = jax.eval_shape(lambda: empty_slots(model.config, batch, max_len, dtype=dtype, stops=MAX_STOPS))
    around = functools.partial(traced_for, chip) if chip else lambda function: function
    leaves, places = _laid_out(model.params)
    with published(out, expected_bytes=sum(place["nbytes"] for place in places)) as work:
        names = {}
        for bucket in buckets_for(max_len):
            names[bucket] = f"prefill_{bucket}.bin"
            write_bytes(work / names[bucket], _prefill(model, slots, bucket, platform, around))
        write_bytes(work / "decode.bin", _decode(model, slots, steps, platform, around))
        write_file(work / "weights.bin", _pieces(leaves), sum(leaf.nbytes for leaf in leaves))
        write_bytes(work / "loader.py", Path(loader.__file__).read_bytes())
        manifest = {
            "version": VERSION,
            "awq_jax": __version__,
            "jax": jax.__version__,
            "platform": platform,
            "product": _product(platform),
            "chip": chip,
            "batch": batch,
            "max_len": max_len,
            "steps": steps,
            "stops": MAX_STOPS,
            "vocab_size": model.config.vocab_size,
            "stop_tokens": list(model.checkpoint.hf.stop_tokens),
            "decode": "decode.bin",
            "prefill": {str(bucket): name for bucket, name in names.items()},
            "params": places,
            "slots": _initial(model, batch, max_len, dtype),
        }
        write_bytes(work / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def _product(platform: str) -> str:
    """What multiplies by INT4 weights in the artefacts: "kernel", or "xla" for XLA's grouped product.

    TPU kernels are staged on any machine. The GPU's is staged only where a GPU is: there alone its choice of tiles and
    its compilation can be had.
    """
    here = platform == "tpu" or (platform == "cuda" and jax.default_backend() == "gpu")
    return "kernel" if here else "xla"


def _laid_out(params: Any) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Leaves in order, and where each lies in the file."""
    leaves, places, offset = [], [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = {"dtype": str(array.dtype), "shape": list(array.shape)}
        places.append({"name": name, **shape, "offset": offset, "nbytes": array.nbytes})
        leaves.append(array)
        offset += -(-array.nbytes // 64) * 64
    return leaves, places


def _pieces(leaves: Iterable[np.ndarray]) -> Iterable[bytes]:
    for array in leaves:
        yield array.tobytes()
        yield bytes(-array.nbytes % 64)


def _initial(model: ServingModel, batch: int, max_len: int, dtype: Any) -> list[dict[str, Any]]:
    """The idle slots as one value for each leaf."""
    tiny = jax.tree.leaves(empty_slots(model.config, 1, 2, dtype=dtype, stops=MAX_STOPS))
    shapes = jax.tree.leaves(
        jax.eval_shape(lambda: empty_slots(model.config, batch, max_len, dtype=dtype, stops=MAX_STOPS))
    )
    return [
        {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "value": np.asarray(one).ravel()[0].item()}
        for leaf, one in zip(shapes, tiny, strict=True)
    ]


def _prefill(model: ServingModel, slots: Any, bucket: int, platform: str, around: Any) -> bytes:
    of = lambda shape, kind: jax.ShapeDtypeStruct(shape, jnp.dtype(kind))
    rows = [of((1,), kind) for kind in ("int32", "float32", "int32", "float32", "uint32")]
    names = ("temperature", "top_k", "top_p", "seed")
    start = Start(
        budget=rows[0],
        stops=of((1, MAX_STOPS), "int32"),
        sampling=Sampling(**dict(zip(names, rows[1:], strict=True))),
    )
    step = lambda params, slots, *rest: prefill(model.config, params, slots, *rest)
    return _exported(step, platform, around, model.params, slots, of((1, bucket), "int32"), rows[0], rows[0], start)


def _decode(model: ServingModel, slots: Any, steps: int, platform: str, around: Any) -> bytes:
    return _exported(functools.partial(decode, model.config, steps=steps), platform, around, model.params, slots)


def _exported(function: Any, platform: str, around: Any, *args: Any) -> bytes:
    """The serialized step over flat lists of leaves: no type of ours is in its signature."""
    shapes, tree = jax.tree.flatten(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args))

    def flat(*leaves: Any) -> Any:
        slots, tokens = function(*jax.tree.unflatten(tree, leaves))
        return (*jax.tree.leaves(slots), tokens)

    exported = jax.export.export(jax.jit(around(flat)), platforms=[platform])(*shapes)
    return bytes(exported.serialize())
