# SPDX-License-Identifier: Apache-2.0
"""Which memory a quantization ran out of, and which of its options would lower that."""

import argparse
import contextlib
import pathlib
from collections.abc import Iterator

__all__ = ["explained"]


@contextlib.contextmanager
def explained(args: argparse.Namespace, store: pathlib.Path) -> Iterator[None]:
    """Say of an error of memory whose it was and what to change.

    Args:
      args: of `awq-jax quantize`.
      store: where finished layers are kept.

    Raises:
      MemoryError: the host had too little.
      RuntimeError: a device had too little.
    """
    try:
        yield
    except MemoryError as error:
        raise MemoryError(_said("the host", error, _on_host(args), store)) from error
    except RuntimeError as error:  # jax's own is one, and importing jax to name it takes a second
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RuntimeError(_said("a device", error, _on_device(args), store)) from error


def _said(whose: str, error: Exception, remedies: list[str], store: pathlib.Path) -> str:
    reason = (str(error).splitlines() or [""])[0].rstrip(".")  # jax goes on with a table of allocations
    said = f"{whose} ran out of memory{f' ({reason})' if reason else ''}. Less is taken with {', '.join(remedies)}. "
    said += "--dry-run says how much it would be."
    if store.is_dir():
        said += f" The finished layers in {store} serve the same options; --resume never discards them for others."
    return said


def _may_wait(args: argparse.Namespace) -> bool:
    """Whether hidden states may be elsewhere than on the device; see `awq_jax.hidden_states.refuse_whole`."""
    several = args.distributed or args.coordinator is not None
    return not (args.propagate == "quantized" or args.refine or args.budget is not None or several)


def _fewer(args: argparse.Namespace) -> list[str]:
    named = {"--samples": args.samples, "--seq-len": args.seq_len, "--batch": args.batch}
    return [f"{name} below {value}" for name, value in named.items() if value > 1]


def _on_device(args: argparse.Namespace) -> list[str]:
    whole = args.hidden_states == "device"
    places = ["--hidden-states host or disk"] if whole and _may_wait(args) else []
    fewer = _fewer(args) if whole else [text for text in _fewer(args) if "--samples" not in text]  # it holds two chunks
    return [*places, *fewer, "--gram-limit", "--mesh over more devices"]


def _on_host(args: argparse.Namespace) -> list[str]:
    places = ["--hidden-states disk"] if args.hidden_states != "disk" and _may_wait(args) else []
    keeping = ["--resume never"] if args.resume != "never" else []  # to be kept, hidden states pass through the host
    return [*places, *keeping, *_fewer(args), "--gram-limit"]
