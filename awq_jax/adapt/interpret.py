# SPDX-License-Identifier: Apache-2.0
"""Run a traced program, and act where a parameter meets a product.

The program is the user's own, traced by `jax.make_jaxpr`: whatever framework wrote it, what is left are equations. Each
parameter is followed through casts, transposes and reshapes, into `jit`, `remat` and `scan`, until a `dot_general` uses
it. What happens there is the caller's `Act`; every other equation runs as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.extend import core

from awq_jax.adapt.columns import Piece, carried, whole
from awq_jax.adapt.product import Product, product_of
from awq_jax.adapt.views import View, follow

__all__ = ["Act", "interpret", "traced"]


@runtime_checkable
class Act(Protocol):
    """What to do with parameters."""

    collected: dict[str, Any]

    def fork(self) -> "Act":
        """The same with nothing collected, for the body of a loop."""
        ...

    def product(self, view: View, product: Product, x: Any, usual: Callable[[], Any]) -> Any:
        """The program's result of a product; ``usual`` computes it as written."""
        ...

    def produced(self, view: View, product: Product, y: Any) -> Any:
        """The result as the program goes on with it: the array, or a `Piece` to see where it is cut."""
        ...

    def other(self, view: View, primitive: str) -> Any:
        """The array that any other operation reads."""
        ...

    def gather(self, collected: dict[str, Any], scanned: set[str] | None) -> None:
        """Take over what an inner program collected.

        ``scanned`` is None where it ran once; else everything has a new first axis, which the paths in it keep.
        """
        ...


def traced(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """(closed jaxpr, tree of output shapes) of a function of arrays."""
    return jax.make_jaxpr(function, return_shape=True)(*args)


_INLINED = ("jit", "pjit", "closed_call", "core_call")


def interpret(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], act: Act) -> list[Any]:
    """Evaluate a jaxpr whose arguments may be `View`s or `Piece`s; results may be too."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else env[atom]
    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        results = _run(eqn, operands, act)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _run(eqn: Any, operands: list[Any], act: Act) -> list[Any]:
    name = eqn.primitive.name
    if name not in _INLINED and any(isinstance(operand, Piece) for operand in operands):
        return carried(eqn, operands, _run(eqn, [whole(operand) for operand in operands], act))
    if not any(isinstance(operand, View | Piece) for operand in operands):
        return _bind(eqn, operands)
    if name in _INLINED:
        inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
        return interpret(inner.jaxpr, inner.consts, operands, act)
    if name in ("checkpoint", "remat", "remat2"):
        return _rematerialized(eqn, operands, act)
    if name == "scan":
        return _scanned(eqn, operands, act)
    if name == "dot_general" and isinstance(operands[0], View) != isinstance(operands[1], View):
        return [_product(eqn, operands, act)]
    if len(operands) == 1 and isinstance(view := operands[0], View):
        value = None if view.value is None else _bind(eqn, [view.value])[0]
        moved = follow(name, view, eqn.params, value)
        if moved is not None:
            return [moved]
    return _bind(eqn, _plain(operands, name, act))


def _bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # a pair before jax 0.10.2
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*functions, *operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _plain(operands: Sequence[Any], primitive: str, act: Act) -> list[Any]:
    return [act.other(operand, primitive) if isinstance(operand, View) else whole(operand) for operand in operands]


def _product(eqn: Any, operands: list[Any], act: Act) -> Any:
    kernel_first = isinstance(operands[0], View)
    view, x = operands if kernel_first else operands[::-1]
    dtype = eqn.outvars[0].aval.dtype
    product = product_of(view, x.shape, eqn.params["dimension_numbers"], dtype, kernel_first=kernel_first)
    if product is None:
        return _bind(eqn, _plain(operands, "a product without outputs", act))[0]

    def usual() -> Any:
        return _bind(eqn, [view.value, x] if kernel_first else [x, view.value])[0]

    y = act.product(view, product, x, usual).astype(dtype)
    return act.produced(view, product, y)


def _rematerialized(eqn: Any, operands: list[Any], act: Act) -> list[Any]:
    """Inlined under `jax.checkpoint` again, so that training keeps the memory that the user asked for."""
    inner, body = act.fork(), eqn.params["jaxpr"]
    through: dict[int, Any] = {}

    def run(*args: Any) -> Any:
        results = _handed_through(interpret(body, (), args, inner), args, operands, through)
        return _plain(results, "the result of a rematerialized function", inner), inner.collected

    policy, prevent_cse = eqn.params.get("policy"), eqn.params.get("prevent_cse", True)
    results, collected = jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)(*operands)
    act.gather(collected, None)
    return [through.get(i, result) for i, result in enumerate(results)]


def _handed_through(results: list[Any], inside: Sequence[Any], outside: Sequence[Any], found: dict[int, Any]) -> Any:
    """Results without the parameters that a body returns as it got them, as NNX's do with a module; noted in found."""
    names = {id(arg): operand for arg, operand in zip(inside, outside, strict=True) if isinstance(arg, View)}
    found.update((i, names[id(result)]) for i, result in enumerate(results) if id(result) in names)
    return [None if i in found else result for i, result in enumerate(results)]


def _scan_counts(params: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carried, _ = params["ft_in"].unpack()  # since jax 0.12
    return len(consts), len(carried)


def _scanned(eqn: Any, operands: list[Any], act: Act) -> list[Any]:
    """A scan again; parameters among its slices are stacked layers, those among its constants are shared by them."""
    p = eqn.params
    body, (consts, carries) = p["jaxpr"], _scan_counts(p)
    fixed, start, slices = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]
    start = _plain(start, "a loop's carried value", act)
    slices = [
        act.other(s, "a scan over one axis of several in one") if isinstance(s, View) and not s.may_scan() else s
        for s in slices
    ]
    stacked = {s.path for s in slices if isinstance(s, View)}
    inner = act.fork()
    through: dict[int, Any] = {}

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], Any]:
        here = inner.fork()
        xs = [x.scanned() if isinstance(x, View) else x for x in xs]
        results = interpret(body.jaxpr, body.consts, [*fixed, *carry, *xs], here)
        made = _handed_through(results[carries:], xs, slices, through)
        results = _plain([*results[:carries], *made], "a loop's result", here)
        return results[:carries], (results[carries:], here.collected)

    end, (ys, collected) = jax.lax.scan(
        step, start, slices, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    act.gather(collected, stacked)
    return [*end, *(through.get(i, y) for i, y in enumerate(ys))]
