# SPDX-License-Identifier: Apache-2.0
"""Whether a file format can hold a model's linears as they are to be quantized: told from shapes, before any work."""

from collections.abc import Iterable, Iterator, Mapping

from awq_jax_convert.autoawq import AutoAWQ
from awq_jax_convert.keymap import home, theirs
from awq_jax_convert.scheme import Scheme, form
from awq_jax_convert.source import Checkpoint

__all__ = ["NATIVE", "fused", "refuse_unwritable"]

Schemes = Mapping[str, Scheme | None]
NATIVE = "(--format native, or convert --to native)"
_NATIVE = f"or write the native format {NATIVE}."


def _said(path: str, scheme: Scheme | None) -> str:
    if scheme is None:
        return f"{path.removesuffix('/kernel')} in floating point"
    kind = form(scheme.bits, scheme.group_size, symmetric=scheme.symmetric, activations=scheme.activations)
    return f"{path.removesuffix('/kernel')} {kind}"


def _refuse_mixed(schemes: Schemes, paths: tuple[str, ...], why: str) -> None:
    """Refuse weights that must have one number format and don't."""
    if len({schemes.get(path) for path in paths}) > 1:
        listed = ", ".join(_said(path, schemes.get(path)) for path in paths)
        raise ValueError(f"{why}, but they are to have different formats: {listed}. Give them one override, {_NATIVE}")


def _fused_by_loaders(schemes: Schemes) -> Iterator[tuple[str, ...]]:
    """Linears that vLLM makes one of when it loads a model: q, k, v; gate, up; all that stacked experts have."""
    found: dict[str, list[str]] = {}
    for path in schemes:
        parent, _, leaf = path.removesuffix("/kernel").rpartition("/")
        kind = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}.get(leaf, leaf)
        found.setdefault(parent if parent.endswith("/experts") else f"{parent}/{kind}", []).append(path)
    yield from map(tuple, found.values())


def fused(source: Checkpoint, paths: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Weights that must have one number format in Hugging Face's formats: of one tensor, or of one weight in vLLM.

    Args:
      source: the checkpoint that the new one is made from.
      paths: of linears in layers, ``layers/0/attn/q/kernel``.
    """
    schemes = dict.fromkeys(paths)
    yield from (home(source.family, path)[1].paths for path in schemes)
    yield from _fused_by_loaders(schemes)


def _refuse_widths(schemes: Schemes) -> None:
    """AutoAWQ has codes of four bits; where all are of another width, no weight is to blame."""
    odd = [path for path, scheme in schemes.items() if scheme is not None and scheme.bits != 4]
    if odd and len(odd) < sum(scheme is not None for scheme in schemes.values()):
        raise ValueError(
            f"AutoAWQ files hold 4 bits, and {_said(odd[0], schemes[odd[0]])} is one of {len(odd)} weights that are to "
            f"have others. Write compressed-tensors or the native format {NATIVE}."
        )


def _refuse_outputs(source: Checkpoint, schemes: Schemes) -> None:
    """AutoAWQ packs outputs in eights."""
    for path in (path for path, scheme in schemes.items() if scheme is not None):
        name, place = home(source.family, path)
        outputs = sum(source.shape(each)[-1] for each in place.paths)
        if outputs % 8:
            raise ValueError(
                f"{name!r} ({path.removesuffix('/kernel')}) has {outputs} outputs; AutoAWQ files need a multiple of 8. "
                f"Leave it unquantized with an override, {_NATIVE}"
            )


def refuse_unwritable(format: str, source: Checkpoint, schemes: Schemes) -> None:
    """Refuse what a writer would refuse in the middle of its work, or what loaders of the files would.

    Args:
      format: one of `awq_jax_convert.formats.FORMATS`.
      source: the checkpoint that the new one is made from; headers are enough.
      schemes: by path, ``layers/0/attn/q/kernel``, the format of every linear in a layer; None stays dense.

    Raises:
      ValueError: a number of outputs that the format can't pack; different formats in what is one tensor in the
        checkpoint or becomes one in vLLM; or a linear whose staying dense the format can't say. Each names the weight.
    """
    if format not in ("autoawq", "compressed-tensors"):
        return
    for path in schemes:
        name, place = home(source.family, path)
        _refuse_mixed(schemes, place.paths, f"{name!r} is one tensor in this checkpoint")
    for paths in _fused_by_loaders(schemes):
        _refuse_mixed(schemes, paths, "vLLM makes one weight of these when it loads them")
    if format == "autoawq":
        _refuse_widths(schemes)
        _refuse_outputs(source, schemes)
        module = lambda path: theirs(source.family, path)[0].rpartition(".")[0]
        dense = [module(path) for path, scheme in schemes.items() if scheme is None]
        quantized = [module(path) for path, scheme in schemes.items() if scheme is not None]
        AutoAWQ(-1).skipping([module("lm_head/kernel"), *dense], quantized)
