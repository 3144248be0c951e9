# SPDX-License-Identifier: Apache-2.0
"""Files that run code when they are opened: named, never read."""

from pathlib import Path

__all__ = ["refuse_pickle", "refuse_pickles"]

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FOREIGN = (*_PICKLED, ".msgpack", ".h5")


def refuse_pickle(path: Path) -> None:
    """Refuse a single pickled file; any other path passes.

    Raises:
      ValueError: saying how to convert it where it is trusted.
    """
    if path.is_file() and path.suffix in _PICKLED:
        raise ValueError(
            f"{path} is a pickle, which can run code and is never opened. Weights: load them where you trust them and "
            "write safetensors, for example `AutoModelForCausalLM.from_pretrained(src).save_pretrained(dst)`. Search "
            "results of llm-awq: apply them there and save the model, or let `awq-jax quantize` search anew."
        )


def refuse_pickles(directory: Path) -> None:
    """Refuse a directory whose only weights are pickles or of other frameworks; any other one passes.

    Raises:
      ValueError: saying how to convert them.
    """
    found = sorted(path.name for path in directory.iterdir() if path.suffix in _FOREIGN)
    if found:
        raise ValueError(
            f"{directory} has no safetensors, only {', '.join(found[:5])}: pickled weights can run code and are never "
            "opened. Convert them where you trust them, for example with transformers: "
            "`AutoModelForCausalLM.from_pretrained(src).save_pretrained(dst)` writes safetensors."
        )
