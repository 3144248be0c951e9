# SPDX-License-Identifier: Apache-2.0
"""Against other tools, on the same model, the same calibration tokens and the same machine, one after the other.

    python -m venv llmc && llmc/bin/pip install torch==2.13.0 llmcompressor
    python -m benchmarks.peers --score llmc/bin/python --peer llmcompressor=llmc/bin/python
    python -m benchmarks.peers … --planted --only awq-jax/awq llmcompressor/awq --bits 4

Ours is timed as a user meets it: a fresh process, imports, compilation, reading and writing included. A peer's figure
is its quantizing call alone, without imports, loading and saving. PyTorch's threads sleep while they wait for each
other, or they burn a busy machine's processor; on such a machine compare processor seconds. Everyone's weights, made
dense, are scored by Hugging Face's PyTorch model (`peer_score.py`). Writes benchmarks/results/peers.json; a row that is
measured again replaces the old one.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from awq_jax import stdlib_text
from awq_jax.demo import MODEL, plant_checkpoint
from awq_jax.evaluate import cut_windows
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.tokenizer import Tokenizer

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "peers.json"
DOCUMENTS, CHARACTERS, LENGTH = 128, 1200, 512

OURS = {
    "nearest": ["--method", "minmax"],
    "awq without clipping": ["--no-clip"],
    "awq": [],
    "awq, block objective": ["--objective", "block"],
    "gptq": ["--method", "gptq"],
    "awq+gptq": ["--method", "awq+gptq"],
    "awq+gptq, propagated": ["--method", "awq+gptq", "--propagate", "quantized"],
    "awq+gptq, propagated, refined": ["--method", "awq+gptq", "--propagate", "quantized", "--refine", "200"],
}
PEERS = {
    "llmcompressor": ("nearest", "awq", "gptq"),
    "autoawq": ("awq",),
    "gptqmodel": ("gptq",),
    "qwix": ("nearest", "awq", "gptq"),
}


def tokens_of(model: pathlib.Path) -> dict[str, Any]:
    """Calibration documents and evaluation windows, as ids."""
    encode = Tokenizer.from_file(model / "tokenizer.json").encode
    calibration = stdlib_text.documentation("calibration")
    documents = [encode(calibration[i * CHARACTERS : (i + 1) * CHARACTERS])[:LENGTH] for i in range(DOCUMENTS)]
    vocab = HFCheckpoint.open(model).config.vocab_size
    windows = cut_windows(encode(stdlib_text.documentation("heldout")), vocab_size=vocab)
    return {"calibration": documents, "windows": windows.tolist()}


def last_json(command: list[str], cwd: pathlib.Path | None = None) -> dict[str, Any]:
    """The last line that a command prints, as JSON; where it runs it may leave logs."""
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _children() -> float:
    """Processor seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ours(name: str, bits: int, src: pathlib.Path, calib: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """Through the command line, in a process of its own."""
    awq_jax = [sys.executable, "-m", "awq_jax.cli"]
    packed = out.with_name(f"{out.name}-packed")
    options = ["--calib", str(calib), "--bits", str(bits), "--json", "--quiet", *OURS[name]]
    begun = _children()
    report = last_json([*awq_jax, "quantize", str(src), str(packed), *options])
    spent = {"seconds": sum(report["seconds"].values()), "processor_seconds": _children() - begun}
    last_json([*awq_jax, "convert", str(packed), str(out), "--to", "dense", "--json", "--quiet"])
    return {**spent, "phases": report["seconds"]}


def arguments() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("--model", type=pathlib.Path, default=MODEL)
    p.add_argument("--planted", action="store_true", help="with planted outliers")
    p.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    p.add_argument("--score", required=True, metavar="PYTHON", help="of an environment with torch and transformers")
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--only", nargs="+", metavar="TOOL/METHOD", help="these alone")
    p.add_argument("--keep", type=pathlib.Path, metavar="DIR", help="for the checkpoints; must not exist")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS)
    return p.parse_args()


def main() -> None:
    """Run all, peers first, then ours."""
    a = arguments()
    pythons = dict(item.split("=", 1) for item in a.peer)
    old = json.loads(a.out.read_text(encoding="utf-8")) if a.out.is_file() else {}
    found = old.get("rows", [])
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        work, src = (a.keep or home / "made").resolve(), a.model.resolve()
        work.mkdir(parents=True)
        if a.planted:
            src = work / "planted"
            plant_checkpoint(a.model, src)
        tokens = tokens_of(src)
        given, calib = home / "tokens.json", home / "calib.jsonl"
        given.write_text(json.dumps(tokens), encoding="utf-8")
        lines = (json.dumps({"input_ids": ids}) + "\n" for ids in tokens["calibration"])
        calib.write_text("".join(lines), encoding="utf-8")
        runs = [(tool, method) for tool in pythons for method in PEERS[tool]] + [("awq-jax", name) for name in OURS]
        for tool, method in runs:
            if a.only and f"{tool}/{method}" not in a.only:
                continue
            out = work / f"{tool}-{method}-{a.bits}".replace(" ", "-").replace(",", "")
            if tool == "awq-jax":
                row = ours(method, a.bits, src, calib, out)
            else:
                program = str(HERE / f"peer_{tool}.py")
                row = last_json([pythons[tool], program, method, str(a.bits), str(src), str(given), str(out)], home)
            row |= last_json([a.score, str(HERE / "peer_score.py"), str(src), str(given), str(out)])
            place = {"tool": tool, "method": method, "model": "planted" if a.planted else "plain", "bits": a.bits}
            row = {**place, **row, "when": time.strftime("%Y-%m-%d %H:%M")}
            print(json.dumps(row), flush=True)
            found = [other for other in found if any(other[name] != row[name] for name in place)] + [row]
            versions = {**old.get("versions", {}), "python": platform.python_version(), "jax": jax.__version__}
            record = {**old, "versions": versions, "rows": found}
            a.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
