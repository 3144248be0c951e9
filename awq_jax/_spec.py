# SPDX-License-Identifier: Apache-2.0
"""What to do: the frozen records that decide a quantization. They hold no arrays and are hashable."""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from awq_jax_kernels.codes import middle, per_byte

__all__ = [
    "METHODS",
    "WEIGHT_METHODS",
    "GPTQSpec",
    "QuantSpec",
    "Recipe",
    "RefineSpec",
    "ScaleRule",
    "SearchSpec",
    "SmoothSpec",
    "rule",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """The number format of a quantized weight.

    Attributes:
      bits: 2, 3, 4 or 8; codes lie in nibbles up to four bits, of eight each has its byte.
      group_size: rows (along the contraction axis) that share one scale and zero; -1 is the whole column.
      symmetric: zero point fixed at the middle of the range, or one zero code per group.
      scale_dtype: "float16", "bfloat16" or "float32", what scales are stored in; codes are rounded against the *stored*
        scale.
      activations: what multiplies the weight: "float" is the activations as they come; "token" is their int8 codes with
        a step for each token, found as it comes; "tensor" int8 codes with one step for all, from the calibration text.

    Raises:
      ValueError: a field is outside its range, or int8 activations meet a weight that an int8 product can't take.

    >>> QuantSpec().levels, QuantSpec(bits=3).levels
    (15, 7)
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    scale_dtype: str = "float16"
    activations: str = "float"

    @classmethod
    def w8a8(cls, activations: str = "token", *, scale_dtype: str = "float16") -> "QuantSpec":
        """Eight-bit weights, symmetric, one scale a column, and int8 activations: the product sums in int32.

        >>> QuantSpec.w8a8().group_size
        -1
        """
        return cls(bits=8, group_size=-1, symmetric=True, scale_dtype=scale_dtype, activations=activations)

    def __post_init__(self) -> None:
        if self.activations not in ("float", "token", "tensor"):
            raise ValueError(f"QuantSpec.activations is {self.activations!r}; use 'float', 'token' or 'tensor'.")
        if self.activations != "float" and (self.bits, self.group_size, self.symmetric) != (8, -1, True):
            kind = "symmetric" if self.symmetric else "asymmetric"
            raise ValueError(
                "int8 activations multiply symmetric weights of 8 bits with one scale a column (group_size=-1), not "
                f"{kind} ones of {self.bits} bits with group_size={self.group_size}: sums of int8 products know no "
                "groups and no zeros. Use QuantSpec.w8a8(), or activations='float'; an override can leave a weight in "
                "floating point."
            )
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"QuantSpec.bits is {self.bits}; supported are 2, 3, 4 and 8.")
        if self.group_size != -1 and (self.group_size < 2 or self.group_size % 2):
            raise ValueError(
                f"QuantSpec.group_size is {self.group_size}; it must be an even number of rows, "
                "usually 32, 64 or 128, or -1 for the whole column."
            )
        if self.scale_dtype not in ("float16", "bfloat16", "float32"):
            raise ValueError(f"QuantSpec.scale_dtype is {self.scale_dtype!r}; use float16, bfloat16 or float32.")

    @property
    def levels(self) -> int:
        """The largest code, ``2**bits - 1``."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code that is zero in a symmetric weight: 8, and 128 of eight bits."""
        return middle(self.bits)

    def nbytes(self, *shape: int) -> int:
        """Bytes of a quantized weight ``[*b, k, n]``: codes, a scale and at most a byte of zero for each group.

        >>> QuantSpec().nbytes(256, 10)
        1340
        """
        *batch, k, n = shape
        scale = 4 if self.scale_dtype == "float32" else 2
        groups = k // self.rows_per_group(k)
        step = 4 * n if self.activations == "tensor" else 0
        return math.prod(batch) * (k * n // per_byte(self.bits) + (scale + 1) * n * groups + step)

    def rows_per_group(self, k: int, name: str = "weight") -> int:
        """Group size for a contraction axis of length k.

        Raises:
          ValueError: the group size does not divide k, or k is odd and two codes share a byte.
        """
        g = k if self.group_size == -1 else self.group_size
        odd = k % per_byte(self.bits) != 0
        if k % g or odd:
            fits = [c for c in (128, 64, 32, 16, 8) if k % c == 0]
            remedy = f"Use one that divides it ({', '.join(map(str, fits))})" if fits else "Use group_size=-1"
            if odd:
                raise ValueError(
                    f"Cannot quantize {name!r}: its contraction dimension {k} is odd, and two codes share a byte. "
                    "Leave it unquantized with an override."
                )
            raise ValueError(
                f"Cannot quantize {name!r}: its contraction dimension {k} is not a multiple of "
                f"group_size={g}. {remedy}, or leave it unquantized with an override."
            )
        return g


Statistic = Literal["mean", "max", "percentile"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleRule:
    """One family of scale candidates: ``t = a**p * w**-q`` for each ``p`` of a grid.

    ``a`` is a statistic of |x| and ``w`` one of |W|, both per input channel. ``t`` multiplies the rows of the weight
    and divides the producer of the activations; it is normalised by ``sqrt(max(t) * min(t))``.

    Attributes:
      name: shown in reports.
      powers: ``(p, q)`` pairs, one candidate each.
      statistic: of |x|: its mean (the AWQ paper), its maximum, or a percentile (the article).
      percentile: which one, where ``statistic="percentile"``.
      weight_statistic: "group" is the mean over outputs of |w| / group maximum (AutoAWQ's), "max" is max|w|.
      salient_fraction: scale only this fraction of channels, the ones with the largest statistic; others get 1.

    Use `rule` for the named ones.
    """

    name: str
    powers: tuple[tuple[float, float], ...]
    statistic: Statistic = "mean"
    percentile: float = 99.9
    weight_statistic: Literal["group", "max"] = "group"
    salient_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not self.powers:
            raise ValueError(f"ScaleRule {self.name!r} has no candidates: give at least one (p, q) pair.")
        if not all(math.isfinite(power) for pair in self.powers for power in pair):
            raise ValueError(f"ScaleRule {self.name!r} has powers that are no numbers: {self.powers}.")
        if self.statistic not in get_args(Statistic):
            raise ValueError(f"ScaleRule.statistic is {self.statistic!r}; use {', '.join(get_args(Statistic))}.")
        if self.weight_statistic not in ("group", "max"):
            raise ValueError(f"ScaleRule.weight_statistic is {self.weight_statistic!r}; use 'group' or 'max'.")
        if not 0 < self.salient_fraction <= 1:
            raise ValueError(f"ScaleRule.salient_fraction is {self.salient_fraction}; it must lie in (0, 1].")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"ScaleRule.percentile is {self.percentile}; it must lie in (0, 100].")


WEIGHT_METHODS = ("minmax", "awq", "gptq", "awq+gptq")
METHODS = (*WEIGHT_METHODS, "smoothquant")
RULES = ("identity", "paper", "duo", "article", "article-literal", "smoothquant")


def rule(name: str, *, n_grid: int = 20, **options: Any) -> ScaleRule:
    """A named scale rule.

    ``identity``: t = 1, round to nearest. ``paper``: ``a**r``, r on a grid over [0, 1] (AWQ, section 3.2). ``duo``:
    ``a**r / w**(1-r)`` (AutoAWQ). ``smoothquant``: the same of maxima (Xiao et al. 2022). ``article``: ``max|x|**alpha
    / max|w|`` with alpha from 0.5 to 1, as a multiplier of the weight. ``article-literal``: the same formula dividing
    the weight, as the article writes it; it shrinks the salient weights and is here to be measured.

    Args:
      name: one of the above.
      n_grid: candidates on the grid.
      **options: fields of `ScaleRule` to replace, for example ``statistic="percentile"``.

    Raises:
      ValueError: unknown name, or ``n_grid < 1``.

    >>> rule("paper", n_grid=3).powers
    ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0))
    """
    if n_grid < 1:
        raise ValueError(f"n_grid is {n_grid}; a grid needs at least one point.")
    unit = tuple(float(v) for v in np.linspace(0.0, 1.0, n_grid).round(6)) if n_grid > 1 else (0.5,)
    upper = tuple(0.5 + v / 2 for v in unit)
    made: Mapping[str, ScaleRule] = {
        "identity": ScaleRule(name="identity", powers=((0.0, 0.0),)),
        "paper": ScaleRule(name="paper", powers=tuple((r, 0.0) for r in unit)),
        "duo": ScaleRule(name="duo", powers=tuple((r, 1.0 - r) for r in unit)),
        "smoothquant": _smoothing(unit),
        "article": ScaleRule(
            name="article", powers=tuple((a, 1.0) for a in upper), statistic="max", weight_statistic="max"
        ),
        "article-literal": ScaleRule(
            name="article-literal",
            powers=tuple((-a, -1.0) for a in upper),
            statistic="max",
            weight_statistic="max",
        ),
    }
    if name not in made:
        raise ValueError(f"unknown scale rule {name!r}; the named rules are {', '.join(RULES)}.")
    return dataclasses.replace(made[name], **options)


def _smoothing(alphas: tuple[float, ...]) -> ScaleRule:
    """``max|x|**alpha / max|w|**(1-alpha)``."""
    powers = tuple((alpha, round(1.0 - alpha, 6)) for alpha in alphas)
    return ScaleRule(name="smoothquant", powers=powers, statistic="max", weight_statistic="max")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """How scales and clipping thresholds are looked for.

    Attributes:
      rules: whose candidates compete; identity is always added.
      objective: "gram" scores the exact output error of the linears that share an input, ``tr(D' G D)``; "block"
        scores the output of the attention or MLP they belong to.
      clip_ratios: candidates for the threshold of each (group, output); empty means no clipping. 1 is always added.
      tokens_per_channel: a Gram matrix ``[k, k]`` is estimated from at least this many tokens for each of its k
        channels; of longer calibration texts every second, third, … token is taken. None takes all.
      expert_tokens: an expert that fewer calibration tokens reach shares the scale of its input with the others, but
        its last linear is rounded to nearest, and the report names it.
      gram_limit: bytes that the Gram matrix of one input may take, those of all experts together. Of a larger one the
        diagonal blocks that fit are kept, down to single quantization groups, and errors are scored as if inputs of
        different blocks were uncorrelated. None keeps all; `quantize_checkpoint` then takes an eighth of a device's
        memory.
    """

    rules: tuple[ScaleRule, ...] = dataclasses.field(default_factory=lambda: (rule("paper"), rule("duo")))
    objective: str = "gram"
    clip_ratios: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
    tokens_per_channel: int | None = 16
    expert_tokens: int = 32
    gram_limit: int | None = None

    def __post_init__(self) -> None:
        if self.objective not in ("gram", "block"):
            raise ValueError(f"SearchSpec.objective is {self.objective!r}; use 'gram' or 'block'.")
        if any(not 0 < r <= 1 for r in self.clip_ratios):
            raise ValueError(f"SearchSpec.clip_ratios must lie in (0, 1]; got {self.clip_ratios}.")
        if self.gram_limit is not None and self.gram_limit < 0:
            raise ValueError(f"SearchSpec.gram_limit is {self.gram_limit}; it must not be negative, or None.")
        if self.tokens_per_channel is not None and self.tokens_per_channel < 1:
            raise ValueError(f"SearchSpec.tokens_per_channel is {self.tokens_per_channel}; it must be at least 1.")

    def stride(self, tokens: int, k: int) -> int:
        """Which tokens a Gram matrix of k channels is estimated from: every stride-th.

        >>> SearchSpec().stride(65_536, 256), SearchSpec().stride(65_536, 4096)
        (16, 1)
        """
        return 1 if self.tokens_per_channel is None else max(1, tokens // (self.tokens_per_channel * k))

    @property
    def identity_only(self) -> "SearchSpec":
        """The same without rules: identity is measured, nothing competes with it."""
        return dataclasses.replace(self, rules=())

    @property
    def candidates(self) -> tuple[tuple[ScaleRule, float, float], ...]:
        """(rule, p, q) of every candidate, identity first."""
        identity = rule("identity")
        listed = [(identity, 0.0, 0.0)]
        listed += [(r, p, q) for r in self.rules for p, q in r.powers if r.name != "identity"]
        return tuple(listed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQSpec:
    """How GPTQ rounds.

    Attributes:
      damping: added to the diagonal of the Gram matrix, as a fraction of its mean.
      order: round the rows that meet the largest activations first. Grids are fixed before, so this costs no format
        anything.
      sweeps: passes of coordinate descent after it; each lowers the same error further.
    """

    damping: float = 0.01
    order: bool = True
    sweeps: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.damping < 10:
            raise ValueError(f"GPTQSpec.damping is {self.damping}; it must lie in (0, 10), usually 0.01.")
        if self.sweeps < 0:
            raise ValueError(f"GPTQSpec.sweeps is {self.sweeps}; it must not be negative.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothSpec:
    """How SmoothQuant shares the difficulty of rounding between activations and weights.

    Attributes:
      alphas: exponents that compete with identity in every group, on the output error of what is computed in int8: 0
        leaves activations as they are, 1 makes all their channels equally large. One alone is the paper's form, usually
        0.5.

    >>> SmoothSpec(alphas=(0.5,)).rule.powers
    ((0.5, 0.5),)
    """

    alphas: tuple[float, ...] = tuple(round(i / 20, 6) for i in range(21))

    def __post_init__(self) -> None:
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise ValueError(f"SmoothSpec.alphas is {self.alphas}; give at least one number from 0 to 1.")

    @property
    def rule(self) -> ScaleRule:
        """The candidates, as a rule of the search."""
        return _smoothing(self.alphas)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineSpec:
    """How codes and scales are trained once a method has found them, layer by layer.

    Attributes:
      steps: of Adam.
      rate: largest step of a code, in codes; it rises over a tenth of the steps and falls to nothing along a cosine.
      samples: of the calibration set that a step looks at, drawn at random.
      seed: of the draw.
    """

    steps: int = 200
    rate: float = 0.005
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"RefineSpec.steps is {self.steps}; it must be at least 1, usually 200.")
        if not 0 < self.rate <= 0.5:
            raise ValueError(f"RefineSpec.rate is {self.rate}; it must lie in (0, 0.5], in codes a step.")
        if self.samples < 1:
            raise ValueError(f"RefineSpec.samples is {self.samples}; it must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a quantization.

    Attributes:
      quant: the number format.
      method: "minmax" rounds to nearest; "awq" searches scales and thresholds, then rounds to nearest; "gptq" rounds
        with error feedback; "awq+gptq" searches, then rounds with error feedback; "smoothquant" searches scales for
        weights and activations of eight bits (``quant=QuantSpec.w8a8()``), then rounds to nearest.
      search: how scales and thresholds are found, where the method searches.
      gptq: how codes are chosen, where the method feeds errors back.
      smooth: which scales compete, where the method is "smoothquant".
      propagate: "dense" quantizes each layer on the float model's activations; "quantized" on those that have passed
        through the layers before it as they are written, and moves each weight so that it still makes the float
        model's outputs of them.
      refine: how codes and scales are trained after that; None leaves them as the method found them.
      overrides: ``(glob, spec or None)`` pairs over weight paths such as ``layers/*/mlp/down``; the first match wins,
        None leaves the weight in floating point. A glob that matches nothing is an error.
    """

    quant: QuantSpec = dataclasses.field(default_factory=QuantSpec)
    method: str = "awq"
    search: SearchSpec = dataclasses.field(default_factory=SearchSpec)
    gptq: GPTQSpec = dataclasses.field(default_factory=GPTQSpec)
    smooth: SmoothSpec = dataclasses.field(default_factory=SmoothSpec)
    propagate: str = "dense"
    refine: RefineSpec | None = None
    overrides: tuple[tuple[str, QuantSpec | None], ...] = ()

    def __post_init__(self) -> None:
        globs = [glob for glob, _ in self.overrides]
        if twice := [glob for glob in globs if globs.count(glob) > 1]:
            raise ValueError(f"override {twice[0]!r} is given twice, and the first wins; leave one out.")
        if self.propagate not in ("dense", "quantized"):
            raise ValueError(f"Recipe.propagate is {self.propagate!r}; use 'dense' or 'quantized'.")
        if self.method == "minmax" and self.propagate != "dense":
            raise ValueError("Recipe.method 'minmax' looks at no activations, so there is nothing to propagate.")
        if self.method not in METHODS:
            raise ValueError(f"Recipe.method is {self.method!r}; the methods are {', '.join(METHODS)}.")
        self._refuse_int8_activations()

    def _refuse_int8_activations(self) -> None:
        """Where activations are int8 the method must know, and what trains or searches weights alone must not run."""
        specs = [self.quant, *(spec for _, spec in self.overrides if spec is not None)]
        rounded = any(spec.activations != "float" for spec in specs)
        if self.method == "smoothquant" and self.quant.activations == "float":
            raise ValueError(
                "Recipe.method 'smoothquant' is for int8 activations, and the recipe's number format has none. Use "
                "quant=QuantSpec.w8a8()."
            )
        if rounded and self.method not in ("minmax", "smoothquant"):
            raise ValueError(
                f"Recipe.method {self.method!r} scores weights alone, and the recipe has int8 activations. Use "
                "'smoothquant', or 'minmax' for none of it."
            )
        if rounded and (self.propagate != "dense" or self.refine is not None or self.search.objective != "gram"):
            raise ValueError(
                "int8 activations go neither with propagate='quantized' nor with refinement nor with the block "
                "objective: these score weights alone. Leave them out."
            )

    def spec_of(self, *names: str) -> tuple[str | None, QuantSpec | None]:
        """The override that decides for a weight, by any of its names, and the weight's format.

        >>> Recipe(overrides=(("*/o", None),)).spec_of("attn/o")
        ('*/o', None)
        """
        for glob, spec in self.overrides:
            if any(fnmatch.fnmatchcase(name, glob) for name in names):
                return glob, spec
        return None, self.quant

    @property
    def searches(self) -> SearchSpec:
        """What the method looks for: nothing but identity, where it does not search."""
        if "awq" in self.method:
            return self.search
        if self.method == "smoothquant":
            return dataclasses.replace(self.search, rules=(self.smooth.rule,), clip_ratios=())
        return dataclasses.replace(self.search.identity_only, clip_ratios=())

    @property
    def feedback(self) -> GPTQSpec | None:
        """How the method feeds errors back; None rounds to nearest."""
        return self.gptq if "gptq" in self.method else None
