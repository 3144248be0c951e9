# SPDX-License-Identifier: Apache-2.0
"""The step that quantizes a layer, compiled by libtpu for slices of TPUs that nobody needs to have.

    python benchmarks/tpu_step.py --json benchmarks/results/tpu_step.json 8B:v5e:data=2,model=4 70B:v5e:model=8

For each SHAPE:CHIP:MESH: bytes that one chip holds, by the compiler's count, against its HBM, and the operations of the
whole layer. 128 samples of 512 tokens, 8 at a time. Each is compiled in a process of its own, for minutes.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

SHAPES = {  # hidden, inner, heads, heads of keys and values, chunks of samples
    "tiny": (256, 512, 4, 2),
    "8B": (4096, 14_336, 32, 8),
    "70B": (8192, 28_672, 64, 8),
}
# Eight chips of v5e and v6e are one host's; a v5p host has four. GiB of HBM that libtpu gives to programs.
SLICES: dict[str, tuple[str, list[int] | None, float]] = {
    "v5e": ("v5e:2x4", [2, 4, 1], 15.75),
    "v6e": ("v6e:2x4", [2, 4, 1], 31.25),
    "v5p": ("v5p:2x2x1", None, 95.74),
}
CHUNKS = {"tiny": (2, 8, 32), "8B": (16, 8, 512), "70B": (16, 8, 512)}
DEFAULT = ("8B:v5e:data=2,model=4", "8B:v6e:data=2,model=4", "8B:v5p:model=4")
DEFAULT += ("70B:v5e:model=8", "70B:v6e:model=8", "70B:v5p:model=4")
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",  # the rest keep libtpu from looking for the host that it is not on
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def compile_step(case: str, limit_s: float = 3600.0) -> dict[str, Any]:
    """What libtpu says of one SHAPE:CHIP:MESH, compiled in a child.

    Args:
      case: for example ``8B:v5e:data=2,model=4``.
      limit_s: for the child.

    Returns:
      ``held_bytes`` and its parts, ``flops``; or ``error``.
    """
    command = [sys.executable, __file__, "--child", case]
    # libtpu's threads print on both streams; the answer is the last line.
    done = subprocess.run(
        command, env={**os.environ, **_ENVIRONMENT}, capture_output=True, text=True, timeout=limit_s, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"case": case, "error": (done.stderr or done.stdout)[-4000:]}
    return json.loads(lines[-1])


def _layer(name: str) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Config of a Llama with one layer, and the shapes of the layer's parameters."""
    from awq_jax.families import FAMILIES
    from awq_jax.models import config_from_hf, param_shapes

    hidden, inner, heads, kv_heads = SHAPES[name]
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
    }
    config = config_from_hf(FAMILIES["llama"], hf)
    prefix = "layers/0/"
    shapes = {path.removeprefix(prefix): s for path, s in param_shapes(config).items() if path.startswith(prefix)}
    return config, shapes


def _child(case: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from awq_jax import Recipe, SearchSpec
    from awq_jax._plan import plan_layers
    from awq_jax._tie import Tie
    from awq_jax._tree import nested
    from awq_jax.dry_run import layer_flops
    from awq_jax.families import FAMILIES
    from awq_jax.gram_memory import gram_bytes, limit_of
    from awq_jax.layer_step import quantize_and_measure
    from awq_jax.sharding import Layout, parse_mesh
    from awq_jax.streams import MEASURED

    shape, chip, mesh = case.split(":")
    topology, bounds, gib = SLICES[chip]
    hbm = int(gib * 2**30)
    narrow = {"chips_per_host_bounds": bounds} if bounds else {}
    layout = Layout(parse_mesh(mesh), topologies.get_topology_desc(topology, platform="tpu", **narrow).devices)
    config, shapes = _layer(shape)
    kernels = {path.removesuffix("/kernel"): s for path, s in shapes.items() if path.endswith("/kernel")}
    widths = {path: s[0] for path, s in kernels.items()}
    tie = Tie(kv_heads=config.num_kv_heads, repeats=config.num_heads // config.num_kv_heads)
    recipe = Recipe(search=SearchSpec(gram_limit=limit_of(hbm)))
    (plan,) = plan_layers(FAMILIES["llama"], recipe, 1, widths, tie)
    tree = nested((path, jax.ShapeDtypeStruct(s, jnp.float32)) for path, s in shapes.items())
    chunks = CHUNKS[shape]
    tokens = chunks[0] * chunks[1] * chunks[2]
    traced = quantize_and_measure.trace(
        layout.layer(tree),
        layout.hidden(jax.ShapeDtypeStruct((*chunks, config.hidden_size), jnp.float32)),
        layout.activations(jax.ShapeDtypeStruct(chunks, jnp.bool_)),
        None,
        config=config.of_layer(0),
        plan=plan,
        measured=max(1, round(MEASURED / (chunks[1] * chunks[2]))),
        tokens=tokens,
        placing=layout.placing,
    )
    begun = time.perf_counter()
    memory: Any = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    parts = {
        "arguments_bytes": memory.argument_size_in_bytes,
        "results_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    return {
        "case": case,
        "held_bytes": sum(parts.values()) - memory.alias_size_in_bytes,
        **parts,
        "hbm_bytes": hbm,
        "gram_bytes": gram_bytes(plan, kernels),
        "gram_rows": {tap: plan.gram_block(tap, widths[tap]) for tap in plan.taps},
        "flops": layer_flops(plan, kernels, tokens, min(tokens, MEASURED), chunks[2]),
        "compile_s": round(time.perf_counter() - begun, 1),
        "jax": jax.__version__,
    }


def row(found: dict[str, Any]) -> str:
    """One line of the table."""
    shape, chip, mesh = found["case"].split(":")
    if "error" in found:
        return f"| {shape} | {chip} | {mesh} | does not compile: {found['error'].splitlines()[-1][:80]} | | | |"
    rows = found["gram_rows"]["mlp/down"]
    cut = f", `down` in blocks of {rows}" if rows < SHAPES[shape][1] else ""
    grams = f"{found['gram_bytes'] / 1e9:.2f}{cut}"
    return (
        f"| {shape} | {chip} | `{mesh}` | {found['held_bytes'] / 1e9:.2f} | {found['temporary_bytes'] / 1e9:.2f} | "
        f"{found['hbm_bytes'] / 1e9:.1f} | {grams} | {found['flops'] / 1e12:.0f} |"
    )


def main() -> int:
    """Compile every case and print a row for each; 1 if one does not fit."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("cases", nargs="*", default=list(DEFAULT), metavar="SHAPE:CHIP:MESH")
    p.add_argument("--json", type=pathlib.Path, help="also keep the figures there, beside those of other cases")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        print("\n" + json.dumps(_child(args.child)), flush=True)
        return 0
    kept = (
        {found["case"]: found for found in json.loads(args.json.read_text())}
        if args.json and args.json.exists()
        else {}
    )
    print("| block | chip | mesh | held, GB | of it temporary | HBM | Gram matrices, GB | TFLOP |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    bad = 0
    for case in args.cases:
        found = compile_step(case)
        bad += "error" in found or found["held_bytes"] > found["hbm_bytes"]
        print(row(found), flush=True)
        if args.json:
            if args.json.exists():
                kept |= {old["case"]: old for old in json.loads(args.json.read_text())}
            kept[case] = found
            args.json.write_text(json.dumps(list(kept.values()), indent=1) + "\n")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
