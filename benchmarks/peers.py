# SPDX-License-Identifier: Apache-2.0
"""Against llm-compressor, on the same model, the same calibration tokens and the same machine, one after the other.

    python -m venv llmc && llmc/bin/pip install torch==2.13.0 llmcompressor
    python benchmarks/peers.py --llmcompressor llmc/bin/python

Ours is timed as a user meets it: a fresh process, compilation, reading and writing included. The peer's figure is its
`oneshot` call alone, without imports, loading and saving. Writes benchmarks/results/peers.json.
"""

import argparse
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
from typing import Any

import jax

from awq_jax import stdlib_text
from awq_jax.demo import MODEL
from awq_jax.evaluate import cut_windows
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.tokenizer import Tokenizer

RESULTS = pathlib.Path(__file__).with_name("results") / "peers.json"
DOCUMENTS, CHARACTERS, LENGTH = 128, 1200, 512


def tokens_of(model: pathlib.Path) -> dict[str, Any]:
    """Calibration documents and evaluation windows, as ids."""
    encode = Tokenizer.from_file(model / "tokenizer.json").encode
    calibration = stdlib_text.documentation("calibration")
    documents = [encode(calibration[i * CHARACTERS : (i + 1) * CHARACTERS])[:LENGTH] for i in range(DOCUMENTS)]
    vocab = HFCheckpoint.open(model).config.vocab_size
    windows = cut_windows(encode(stdlib_text.documentation("heldout")), vocab_size=vocab)
    return {"calibration": documents, "windows": windows.tolist()}


def last_json(command: list[str]) -> dict[str, Any]:
    """The last line that a command prints, as JSON."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(model: pathlib.Path, home: pathlib.Path, documents: list[list[int]]) -> dict[str, Any]:
    """Through the command line, in a process of its own."""
    calib, text, out = home / "calib.jsonl", home / "heldout.txt", home / "out"
    calib.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents), encoding="utf-8")
    text.write_text(stdlib_text.documentation("heldout"), encoding="utf-8")
    awq_jax = [sys.executable, "-m", "awq_jax.cli"]
    report = last_json([*awq_jax, "quantize", str(model), str(out), "--calib", str(calib), "--json", "--quiet"])
    found = last_json([*awq_jax, "eval", str(out), "--text", str(text), "--base", str(model), "--json", "--quiet"])
    phases = report["seconds"]
    return {"seconds": sum(phases.values()), "phases": phases, "kl": found["kl"], "perplexity": found["perplexity"]}


def main() -> None:
    """Run both, in the order peer, ours."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("--model", type=pathlib.Path, default=MODEL)
    p.add_argument("--llmcompressor", required=True, metavar="PYTHON", help="of an environment that has llm-compressor")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS)
    a = p.parse_args()
    program = str(pathlib.Path(__file__).with_name("peer_llmcompressor.py"))
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        tokens = tokens_of(a.model)
        (home / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
        peer = last_json([a.llmcompressor, program, str(a.model), str(home / "tokens.json")])
        mine = ours(a.model, home, tokens["calibration"])
    record = {
        "model": a.model.name,
        "calibration_tokens": sum(map(len, tokens["calibration"])),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "llm-compressor": peer,
        "awq-jax": mine,
        "times_faster": peer["seconds"] / mine["seconds"],
        "kl_ratio": mine["kl"] / peer["kl"],
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
