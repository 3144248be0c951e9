# SPDX-License-Identifier: Apache-2.0
"""The second model of the accuracy table: another family, another text, another seed; trained in minutes on a CPU.

    python -m benchmarks.second_model DIR          # DIR/model, DIR/calib.txt, DIR/text.txt; nothing if they are there

A Qwen 3 of three layers learns the source of the standard library's top-level modules with the loop of
`examples/train_tiny_lm.py`. Modules are divided as their documentation is: what it is calibrated on and measured on are
modules that it never saw. The text is small and seen many times, so that the weights are used to their last bits.
"""

import argparse
import importlib.util
import json
import pathlib
import sysconfig
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awq_jax.evaluate import cut_windows, evaluate
from awq_jax.families import by_architecture
from awq_jax.models import config_from_hf
from awq_jax.stdlib_text import Split, digest, split_of

MODEL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}
CHARACTERS = 400_000  # of training text, whole modules in the order of their hashes
STEPS = 1200  # a number, not a time: a model that depends on the machine's load can't be measured twice


def trainer() -> Any:
    """`examples/train_tiny_lm.py` as a module; examples are files to run, not a package."""
    path = pathlib.Path(__file__).resolve().parents[1] / "examples" / "train_tiny_lm.py"
    spec = importlib.util.spec_from_file_location("train_tiny_lm", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules(split: Split) -> list[str]:
    """Source of the top-level modules of a split, in the order of their names' hashes."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = sorted((path for path in root.glob("*.py") if split_of(path.stem) == split), key=lambda p: digest(p.stem))
    return [path.read_text(encoding="utf-8", errors="replace") for path in found]


def training_text() -> str:
    """As many whole modules as `CHARACTERS` holds."""
    taken, size = [], 0
    for text in modules("train"):
        if size + len(text) <= CHARACTERS:
            taken.append(text)
            size += len(text)
    return "\n".join(taken)


def make_second_model(home: pathlib.Path, steps: int = STEPS) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """Model, calibration text and held-out text in a directory; trained unless they are there.

    Args:
      home: created if it is missing.
      steps: of training.
    """
    model, calib, text = home / "model", home / "calib.txt", home / "text.txt"
    if (model / "model.safetensors").is_file():
        return model, calib, text
    begun, tiny = time.perf_counter(), trainer()
    model.mkdir(parents=True, exist_ok=True)
    calib.write_text("\n".join(modules("calibration")), encoding="utf-8")
    text.write_text("\n".join(modules("heldout")), encoding="utf-8")
    learned = training_text()
    tokenizer = tiny.train_tokenizer(MODEL["vocab_size"], [learned])
    encode = lambda words: np.asarray(tokenizer.encode(words).ids, np.uint16)
    seen = encode(learned)
    tokens = {"docs": seen, "source": seen, "calibration": encode(calib.read_text(encoding="utf-8"))[:8192]}
    held = encode(text.read_text(encoding="utf-8")[: 16 * 20_000])
    print({"train": seen.size, "calibration": tokens["calibration"].size, "held out": held.size}, flush=True)
    run = tiny.Run(steps, batch=8, length=128, rate=3e-3, warmup=50, decay=0.1, docs=0.5, chunk=20, seed=1)
    config = config_from_hf(by_architecture(MODEL["architectures"][0]), MODEL)
    params, log = tiny.fit(run, config, tokens, tiny.NoCheckpoints(), 0.0, begun)
    tiny.export(model, MODEL, params, tokenizer.to_str())
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    windows = cut_windows(held, vocab_size=config.vocab_size)
    found = evaluate(tiny.make_apply(config, jnp.float32), rounded, windows, batch=8)
    record = {
        "steps": log[-1]["step"],
        "tokens_seen": log[-1]["step"] * run.batch * run.length,
        "train_loss": log[-1]["loss"],
        "heldout_perplexity": found.perplexity,
        "digest_train": digest(learned),
        "seconds": time.perf_counter() - begun,
        "log": log,
    }
    (model / "training_log.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in record.items() if name != "log"}), flush=True)
    return model, calib, text


def main() -> None:
    """Train it, unless it is there."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("home", type=pathlib.Path, metavar="DIR")
    p.add_argument("--steps", type=int, default=STEPS, help="of training (%(default)s)")
    a = p.parse_args()
    make_second_model(a.home, a.steps)


if __name__ == "__main__":
    main()
