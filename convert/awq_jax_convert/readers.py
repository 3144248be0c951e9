# SPDX-License-Identifier: Apache-2.0
"""What transformers does not read of an AutoAWQ directory, by family: who writes one is told what to write instead.

Measured with real clients (docs/formats.md, "Other programs, each family"; ``pytest -m clients``). vLLM reads them.
"""

__all__ = ["unread"]

_EXPERTS = "replaces single linears alone and leaves experts random"
_FACTORS = "expects factors of activations that vLLM has no place for, and computes NaN"
_UNREAD = {
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_neox": _FACTORS,
    "bloom": _FACTORS,
    "falcon": _FACTORS,
    "falcon-new": _FACTORS,
    "gpt2": "does not replace its Conv1D, in no format",
}


def unread(format: str, family: str) -> tuple[str, ...]:
    """A warning where transformers can't read what is about to be written, else nothing.

    >>> unread("autoawq", "llama")
    ()
    >>> unread("autoawq", "bloom")[0].partition(":")[0]
    'transformers does not read bloom in this format'
    """
    if format != "autoawq" or family not in _UNREAD:
        return ()
    instead = "" if family == "gpt2" else ". For transformers write compressed-tensors (--format, or convert --to)"
    return (f"transformers does not read {family} in this format: its AWQ loader {_UNREAD[family]}{instead}",)
