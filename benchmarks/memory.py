# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of quantizing models of growing depth: both are flat per layer.

    python benchmarks/memory.py --layers 4 16 64

Each depth is a random Llama-shaped checkpoint, quantized in a process of its own.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import ml_dtypes
import numpy as np

from awq_jax.families import FAMILIES
from awq_jax.models import config_from_hf, param_shapes
from awq_jax_convert.keymap import theirs
from awq_jax_convert.writer import DirectoryWriter

HIDDEN, INNER, VOCAB = 512, 2048, 512


def make_checkpoint(out: pathlib.Path, layers: int, hidden: int = HIDDEN, inner: int = INNER) -> int:
    """A random checkpoint in shards of a layer each; returns the bytes of its tensors."""
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    family, rng, total = FAMILIES["llama"], np.random.default_rng(0), 0
    with DirectoryWriter(out, max_shard_bytes=1 << 22) as writer:
        writer.write_json("config.json", hf)
        for path, shape in param_shapes(config_from_hf(family, hf)).items():
            name, transpose = theirs(family, path)
            array = rng.standard_normal(shape, np.float32) * shape[0] ** -0.5 if len(shape) > 1 else np.ones(shape)
            array = array.astype(ml_dtypes.bfloat16)
            writer.add(name, array.T if transpose else array)
            writer.flush_if_full()
            total += array.nbytes
    return total


def quantize(src: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """Quantize in a process of its own; its report."""
    calib = src.with_suffix(".jsonl")
    rng = np.random.default_rng(1)
    lines = [json.dumps({"input_ids": rng.integers(0, VOCAB, 128).tolist()}) for _ in range(16)]
    calib.write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "awq_jax.cli", "quantize", str(src), str(out), "--calib", str(calib)]
    done = subprocess.run([*command, "--json", "--quiet"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure(layers: int) -> dict[str, Any]:
    """Peak memory, seconds and bytes of one depth."""
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        size = make_checkpoint(home / "src", layers)
        report = quantize(home / "src", home / "out")
    return {
        "layers": layers,
        "bytes": size,
        "bytes_per_layer": size // layers,
        "peak_memory_bytes": report["peak_memory_bytes"],
        "seconds": report["seconds"],
    }


def main() -> None:
    """Measure every depth and print one line each."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    for layers in p.parse_args().layers:
        print(json.dumps(measure(layers)), flush=True)


if __name__ == "__main__":
    main()
