# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of quantizing models of growing depth, and what the dry run says of them before.

    python -m benchmarks.memory --layers 4 16 64 --json benchmarks/results/memory.json --svg docs/memory.svg

Each depth is a random Llama-shaped checkpoint, quantized in a process of its own. Time is the processor's, of all
cores, which other work on the machine changes little.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import threading
from typing import Any

import ml_dtypes
import numpy as np

from awq_jax.families import FAMILIES
from awq_jax.models import config_from_hf, param_shapes
from awq_jax_convert.keymap import theirs
from awq_jax_convert.writer import DirectoryWriter
from benchmarks.memory_plot import plot

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


def quantize(src: pathlib.Path, out: pathlib.Path, samples: int = 16, *options: str) -> dict[str, Any]:
    """Quantize in a process of its own; its report."""
    calib = src.with_suffix(".jsonl")
    rng = np.random.default_rng(1)
    lines = [json.dumps({"input_ids": rng.integers(0, VOCAB, 128).tolist()}) for _ in range(samples)]
    calib.write_text("\n".join(lines), encoding="utf-8")
    return _cli("quantize", str(src), str(out), "--calib", str(calib), "--samples", str(samples), "--quiet", *options)


def predict(src: pathlib.Path, samples: int = 16, *options: str) -> dict[str, Any]:
    """What the dry run says of `quantize`."""
    sizes = ["--samples", str(samples), "--seq-len", "128"]
    return _cli("quantize", str(src), "unused", *sizes, "--dry-run", *options)


def _cli(*arguments: str) -> dict[str, Any]:
    # A device of its own: the eight fake ones of a test run would share the work out differently.
    command = [sys.executable, "-m", "awq_jax.cli", *arguments, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    )
    return json.loads(done.stdout)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Watched:
    """The most bytes that lay under a directory while the block ran, looked at twenty times a second.

    Args:
      home: of the output and of what is kept beside it.
      but: a folder in it that does not count.
    """

    def __init__(self, home: pathlib.Path, but: pathlib.Path) -> None:
        self.peak = 0
        self._home, self._but, self._ended = home, but, threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watched":
        self._watcher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            found = 0
            for folder, names, files in os.walk(self._home):
                names[:] = [name for name in names if pathlib.Path(folder, name) != self._but]
                for name in files:
                    with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                        found += os.lstat(os.path.join(folder, name)).st_size
            self.peak = max(self.peak, found)


def measure(
    layers: int, hidden: int = HIDDEN, inner: int = INNER, samples: int = 16, where: str = "device"
) -> dict[str, Any]:
    """Peak memory, seconds and bytes of one depth, and the memory that was foretold."""
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        size = make_checkpoint(home / "src", layers, hidden, inner)
        options = ("--hidden-states", where)
        said = predict(home / "src", samples, *options)
        begun = _children_s()
        with Watched(home, home / "src") as disk:
            report = quantize(home / "src", home / "out", samples, *options)
        used = _children_s() - begun
    return {
        "layers": layers,
        "samples": samples,
        "hidden_states": where,
        "bytes": size,
        "bytes_per_layer": size // layers,
        "peak_memory_bytes": report["peak_memory_bytes"],
        "predicted_bytes": said["peak_memory_bytes"],
        "peak_disk_bytes": disk.peak,
        "predicted_disk_bytes": said["disk_bytes"],
        "cpu_s": round(used, 1),
        "seconds": report["seconds"],
    }


def main() -> None:
    """Measure every depth and print one line each."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    p.add_argument("--hidden", type=int, default=HIDDEN)
    p.add_argument("--inner", type=int, default=INNER)
    p.add_argument("--samples", type=int, default=16, help="of 128 tokens")
    p.add_argument("--hidden-states", nargs="+", default=["device"], help="device, host, disk; each is measured")
    p.add_argument("--json", type=pathlib.Path, help="also write the figures there")
    p.add_argument("--svg", type=pathlib.Path, help="also draw them there")
    args = p.parse_args()
    rows = []
    for layers, where in itertools.product(args.layers, args.hidden_states):
        rows.append(measure(layers, args.hidden, args.inner, args.samples, where))
        print(json.dumps(rows[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.svg:
        args.svg.write_text(plot(rows))


if __name__ == "__main__":
    main()
