# SPDX-License-Identifier: Apache-2.0
"""A model of Llama 3 8B's shapes, from a dense checkpoint to tokens, on the GPU at hand.

    PYTHONPATH=kernels:convert:. python benchmarks/llama_8b.py make HOME       # 16 GB of random weights, with outliers
    PYTHONPATH=kernels:convert:. python benchmarks/llama_8b.py quantize HOME --method awq --json quantize.json
    PYTHONPATH=kernels:convert:. python benchmarks/llama_8b.py exact HOME --json exact.json

`quantize` runs the command line in a process of its own. `meshes` spreads it over devices, and `differ` compares two
results. `exact` compares every product of sampled layers of the packed checkpoint, as the device computes it, with
float64. ``--layers`` and ``--shrink`` make a model to rehearse with. `llama_8b_serve.py` times what serves.
"""

import argparse
import concurrent.futures
import contextlib
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import ml_dtypes
import numpy as np

from awq_jax_kernels.nibbles import unpack_numpy

OUTLIERS, FACTOR = 8, 32.0  # channels of every norm that stick out, and how far
SAMPLES, LENGTH = 128, 512


def main() -> None:
    """One stage."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", choices=("make", "quantize", "meshes", "differ", "exact"))
    p.add_argument("home", type=pathlib.Path)
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--shrink", type=int, default=1, help="divides every width")
    p.add_argument("--method", default="awq")
    p.add_argument("--mesh", action="append", default=[], metavar="AXIS=N,…", help="of stage meshes, in turn")
    p.add_argument("--unwritten", action="store_true", help="of stage meshes: each once more, nothing written")
    p.add_argument("--name", help="of the quantized model, int4-NAME in HOME (the method)")
    p.add_argument("--option", action="append", default=[], help="handed on to awq-jax quantize")
    p.add_argument("--json", type=pathlib.Path)
    a = p.parse_args()
    found = {"make": make, "quantize": quantize, "meshes": meshes, "differ": differ, "exact": exact}[a.stage](a)
    text = json.dumps(found, indent=1)
    print(text)
    if a.json:
        a.json.write_text(text + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- make


def config_of(a: argparse.Namespace) -> dict[str, Any]:
    """config.json."""
    s = a.shrink
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256 // s,
        "hidden_size": 4096 // s,
        "intermediate_size": 14336 // s,
        "num_hidden_layers": a.layers,
        "num_attention_heads": 32 // s,
        "num_key_value_heads": max(8 // s, 1),
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def make(a: argparse.Namespace) -> dict[str, Any]:
    """Write the dense checkpoint and calibration tokens, a shard to a layer."""
    from awq_jax_convert.shard import write_shard

    begun, c, dense = time.perf_counter(), config_of(a), a.home / "dense"
    dense.mkdir(parents=True)
    (dense / "config.json").write_text(json.dumps(c), encoding="utf-8")
    names = [f"model-{i:05}.safetensors" for i in range(c["num_hidden_layers"] + 1)]

    def write(index: int) -> dict[str, str]:
        tensors = shard_of(c, index)
        write_shard(dense / names[index], tensors)
        return dict.fromkeys(tensors, names[index])

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        parts = list(pool.map(write, range(len(names))))
    weight_map = {name: file for part in parts for name, file in part.items()}
    (dense / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    ids = np.random.default_rng(1).integers(0, c["vocab_size"], (SAMPLES, LENGTH))
    lines = "".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ids)
    (a.home / "calib.jsonl").write_text(lines, encoding="utf-8")
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "gb": sum(f.stat().st_size for f in dense.iterdir()) / 1e9,
    }


def shard_of(c: dict[str, Any], index: int) -> dict[str, np.ndarray]:
    """The tensors of one layer, or after the last those outside the layers."""
    rng = np.random.default_rng(index)
    d, inner, heads = c["hidden_size"], c["intermediate_size"], c["head_dim"] * c["num_attention_heads"]
    kv = c["head_dim"] * c["num_key_value_heads"]
    normal = lambda n, k, std: rng.standard_normal((n, k), np.float32) * np.float32(std)
    bf16 = lambda x: x.astype(ml_dtypes.bfloat16)
    if index == c["num_hidden_layers"]:
        ones, vocab = np.ones(d, np.float32), c["vocab_size"]
        tensors = {"model.embed_tokens": normal(vocab, d, 1.0), "lm_head": normal(vocab, d, 0.02), "model.norm": ones}
        return {f"{name}.weight": bf16(x) for name, x in tensors.items()}
    at, out = f"model.layers.{index}", {}
    readers = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    readers |= {"post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
    rows = {"self_attn.q_proj": heads, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    rows |= {"mlp.gate_proj": inner, "mlp.up_proj": inner}
    for norm, linears in readers.items():
        gain = np.ones(d, np.float32)
        gain[rng.choice(d, OUTLIERS, replace=False)] = FACTOR
        out[f"{at}.{norm}.weight"] = bf16(gain)
        for name in linears:
            out[f"{at}.{name}.weight"] = bf16(normal(rows[name], d, 1 / d**0.5) / gain)
    depth = (2 * c["num_hidden_layers"]) ** -0.5
    out[f"{at}.self_attn.o_proj.weight"] = bf16(normal(d, heads, depth / heads**0.5))
    out[f"{at}.mlp.down_proj.weight"] = bf16(normal(d, inner, depth / inner**0.5))
    return out


# ------------------------------------------------------------------------------------------------------ quantize


def quantize(a: argparse.Namespace) -> dict[str, Any]:
    """`awq-jax quantize` in a process of its own."""
    out = a.home / f"int4-{a.name or a.method}"
    command = [sys.executable, "-m", "awq_jax.cli", "quantize", str(a.home / "dense"), str(out), "--json", "--quiet"]
    command += ["--calib", str(a.home / "calib.jsonl"), "--method", a.method, "--overwrite", *a.option]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    report = json.loads(done.stdout.strip().splitlines()[-1])
    full = json.loads((out / "awq_jax_report.json").read_text(encoding="utf-8"))
    errors = [(layer["error"], layer["rtn_error"]) for layer in full["layers"]]
    return {
        "command": " ".join(command[2:]),
        **versions(),
        "wall_s": round(wall, 1),
        "seconds": report["seconds"],
        "peak_host_gb": full["peak_memory_bytes"] / 1e9,
        "peak_device_gb": full["peak_device_bytes"] / 1e9,
        "error_over_rtn": float(np.mean([e / r for e, r in errors])),
        "fell_back": sum(layer["fell_back"] for layer in full["layers"]),
        "warnings": full["warnings"],
    }


def meshes(a: argparse.Namespace) -> dict[str, Any]:
    """One quantization for each mesh, int4-MESH in HOME, and what a layer takes once everything is compiled.

    Peaks are of the process: give the mesh that holds least a device first.
    """
    import jax

    from awq_jax.pipeline import quantize_checkpoint
    from benchmarks.layer_seconds import Enough, medians, steps_timed, unwritten

    def run(text: str, steps: dict[str, list[float]], name: str, end: bool) -> dict[str, Any]:
        mesh = {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
        ends = [time.perf_counter()]

        def progress(_: Any, count: int) -> None:
            ends.append(time.perf_counter())
            if end and len(ends) > count:
                raise Enough

        report = None
        with contextlib.suppress(Enough):
            out = a.home / name
            report = quantize_checkpoint(
                a.home / "dense", out, calib=a.home / "calib.jsonl", mesh=mesh, resume="never", progress=progress
            )
        wall, each = time.perf_counter() - ends[0], np.diff(ends[1:])
        row = {"mesh": text, "wall_s": wall, "a_layer_s": float(np.median(each[1:])), "layers_s": each.tolist()}
        row |= {"seconds": report.seconds if report else None, "steps_s": medians(steps)}
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9 for device in jax.devices()]
        return {**row, "shards_s": steps.get("shard", []), "peaks_gb": peaks}

    rows = []
    for text in a.mesh:
        with steps_timed() as steps:
            rows.append(run(text, steps, f"int4-{text}", end=False))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if a.unwritten:
            with unwritten(), steps_timed() as steps:
                rows.append({"unwritten": True, **run(text, steps, "int4-unwritten", end=True)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if a.json:  # whatever ends the next mesh, this one is kept
            a.json.write_text(json.dumps({**versions(), "layers": a.layers, "rows": rows}, indent=1), encoding="utf-8")
    return {**versions(), "layers": a.layers, "rows": rows}


def differ(a: argparse.Namespace) -> dict[str, Any]:
    """How many codes of int4-NAME are others than those of int4-METHOD, and how many scales."""
    from awq_jax._tree import leaves
    from awq_jax_convert.formats import open_checkpoint

    one, other = (open_checkpoint(a.home / f"int4-{name}") for name in (a.method, a.name))

    def of_layer(index: int) -> list[int]:
        total = np.zeros(4, np.int64)
        pairs = zip(leaves(one.layer(index, None)), leaves(other.layer(index, None)), strict=True)
        for (_, left), (_, right) in pairs:
            if hasattr(left, "packed"):
                bits = left.packed.view(np.uint8) ^ right.packed.view(np.uint8)
                codes = int((bits & 15 > 0).sum() + (bits >> 4 > 0).sum())
                scales = int((left.scale != right.scale).sum())
                total += (codes, 2 * bits.size, scales, left.scale.size)
        return total.tolist()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(of_layer, range(one.num_layers)))
    codes, of_codes, scales, of_scales = map(sum, zip(*rows, strict=True))
    first = rows[0][0] / rows[0][1]
    return {"other_codes": codes / of_codes, "in_layer_0": first, "other_scales": scales / of_scales}


def versions() -> dict[str, str]:
    """Of what it ran on."""
    import jax

    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "date": time.strftime("%Y-%m-%d")}


# --------------------------------------------------------------------------------------------------------- exact


def exact(a: argparse.Namespace) -> dict[str, Any]:
    """Products of three layers' packed weights on the device against float64 of the same bfloat16 inputs."""
    import jax
    import jax.numpy as jnp

    from awq_jax import matmul
    from awq_jax._tree import leaves
    from awq_jax_convert.formats import open_checkpoint

    checkpoint = open_checkpoint(a.home / f"int4-{a.name or a.method}")
    last = checkpoint.num_layers - 1
    rng, rows = np.random.default_rng(3), []
    for index in sorted({0, last // 2, last}):
        for path, weight in leaves(checkpoint.layer(index, jnp.bfloat16)):
            if not hasattr(weight, "packed"):
                continue
            dense = float64_of(weight)
            for m in (1, 16, 128):
                x = jnp.asarray(rng.standard_normal((m, weight.shape[0])), jnp.bfloat16)
                y = jax.jit(matmul)(x, jax.tree.map(jnp.asarray, weight))
                wanted = np.asarray(x).astype(np.float64) @ dense
                row = {"layer": index, "path": path, "m": m, "error": relative(y, wanted)}
                rows.append({**row, "rounding_y_alone": relative(wanted.astype(ml_dtypes.bfloat16), wanted)})
    return {**versions(), "worst": max(row["error"] for row in rows), "rows": rows}


def relative(y: Any, wanted: np.ndarray) -> float:
    """Of the difference to the norm."""
    return float(np.linalg.norm(np.asarray(y).astype(np.float64) - wanted) / np.linalg.norm(wanted))


def float64_of(weight: Any) -> np.ndarray:
    """A packed weight, each code times its scale exactly."""
    scale, zero = (np.asarray(leaf).astype(np.float64) for leaf in (weight.scale, weight.zero))
    codes = unpack_numpy(np.asarray(weight.packed)).astype(np.float64)
    grouped = codes.reshape(len(scale), -1, scale.shape[1])
    return ((grouped - zero[:, None]) * scale[:, None]).reshape(codes.shape)


if __name__ == "__main__":
    main()
