# SPDX-License-Identifier: Apache-2.0
"""Train a small Llama on the text that every Python carries along, and export it as Hugging Face would.

    python examples/train_tiny_lm.py --out tiny --steps 400               # minutes on a CPU
    python examples/train_tiny_lm.py --out tiny --steps 400 --resume      # go on where it was stopped
    python examples/train_tiny_lm.py --out tiny --time-limit 300          # as many steps as fit, on a GPU

A byte-level BPE tokenizer is trained first, then the model with Flax and optax: AdamW, warmup and cosine, bfloat16
matrix products on float32 weights. All tokens live on the device and fifty steps are one dispatch. The `heldout`
documentation is never seen and measured once, at the end; choices are made on the `calibration` split. A model that has
seen its text many times over uses its weights to the last bits: that is what makes rounding them hurt.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from awq_jax import stdlib_text
from awq_jax._tree import leaves
from awq_jax.evaluate import cut_windows, evaluate, with_error
from awq_jax.families import by_architecture
from awq_jax.models import Decoder, config_from_hf, params_of
from awq_jax.stdlib_text import Piece
from awq_jax_convert.keymap import theirs

END = "<|endoftext|>"  # stands between source files

# Every input width is a multiple of 128, the usual group size; the embedding is also the output head.
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}
SMOKE = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}


@dataclasses.dataclass(frozen=True)
class Run:
    """How to train. `docs` is the share of windows drawn from documentation, the rest is source."""

    steps: int = 20_000
    batch: int = 64
    length: int = 512
    rate: float = 3e-3
    warmup: int = 200
    decay: float = 0.5  # high: the text is small and seen many times
    docs: float = 0.1
    chunk: int = 50  # steps a dispatch
    seed: int = 0


# ---- Text and tokens -------------------------------------------------------------------------------------------------


def train_tokenizer(vocab_size: int, texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every text round-trips, and no id is ever unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def other_library(python: str) -> tuple[list[Piece], list[Piece]]:
    """Documentation and source to train on, of another Python; `awq_jax.stdlib_text` needs nothing but the library."""
    code = "import json; from awq_jax.stdlib_text import *; print(json.dumps([pieces('train'), source()]))"
    root = str(pathlib.Path(__file__).resolve().parents[1])
    done = subprocess.run([python, "-c", code], env={"PYTHONPATH": root}, check=True, capture_output=True)
    docs, files = json.loads(done.stdout)
    return [Piece(*piece) for piece in docs], [Piece(*piece) for piece in files]


def version_of(python: str) -> str:
    """For example 3.13.0."""
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def training_text(others: list[str]) -> tuple[list[str], list[str]]:
    """Documentation and source files: this Python's, then what others have that was not there before."""
    docs, files = list(stdlib_text.pieces("train")), list(stdlib_text.source())
    apart = [*stdlib_text.pieces("heldout"), *stdlib_text.pieces("calibration")]
    for python in others:
        more_docs, more_files = other_library(python)
        docs += stdlib_text.unseen(more_docs, [*docs, *apart])
        files += stdlib_text.unseen(more_files, [*files, *apart])
    return [f"{name}\n\n{text}" for name, text in docs], [text for _, text in files]


def tokenize(vocab_size: int, others: list[str], *, smoke: bool) -> dict[str, np.ndarray]:
    """Train the tokenizer and encode the splits: what `--tokens` reads back, uint16, with how it came about."""
    pages, files = training_text(others)
    docs = {"train": "\n\n".join(pages)}
    docs |= {split: stdlib_text.documentation(split) for split in ("calibration", "heldout")}
    if smoke:
        docs, files = {split: text[:60_000] for split, text in docs.items()}, files[:10]
    # Documentation is what the model is judged by, so its words count more often.
    tokenizer = train_tokenizer(vocab_size, [docs["train"]] * 4 + files)
    encode = lambda text: np.asarray(tokenizer.encode(text).ids, np.uint16)
    coded = [np.asarray([0, *found.ids], np.uint16) for found in tokenizer.encode_batch(files)]
    origin = {
        "python": [platform.python_version(), *map(version_of, others)],
        "digest_train_docs": stdlib_text.digest(docs["train"]),
        "digest_train_source": stdlib_text.digest("\0".join(files)),
        "digest_heldout": stdlib_text.digest(docs["heldout"]),
        "characters": {**{split: len(text) for split, text in docs.items()}, "source": sum(map(len, files))},
    }
    return {
        "docs": encode(docs["train"]),
        "source": np.concatenate(coded),
        "calibration": encode(docs["calibration"]),
        "heldout": encode(docs["heldout"]),
        "tokenizer": np.frombuffer(tokenizer.to_str().encode(), np.uint8),
        "origin": np.frombuffer(json.dumps(origin).encode(), np.uint8),
    }


# ---- Training --------------------------------------------------------------------------------------------------------


def learning_rate(run: Run, step: jax.Array, total: jax.Array) -> jax.Array:
    """Linear warmup, then a cosine to a hundredth at ``total``, which is traced: it may change while training runs."""
    done = jnp.clip((step - run.warmup) / jnp.maximum(total - run.warmup, 1.0), 0.0, 1.0)
    cosine = 0.01 + 0.99 * (1.0 + jnp.cos(jnp.pi * done)) / 2.0
    return run.rate * jnp.minimum(1.0, (step + 1.0) / run.warmup) * cosine


def make_optimizer(run: Run) -> optax.GradientTransformation:
    """AdamW less its learning rate, which `train_chunk` applies; matrices decay, gains do not."""
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(run.decay, mask=matrices),
    )


def draw(run: Run, key: jax.Array, docs: jax.Array, source: jax.Array) -> jax.Array:
    """Windows at random offsets, int32 ``[batch, length + 1]``; the first few are documentation."""
    count = round(run.batch * run.docs)
    width = jnp.arange(run.length + 1)
    key_docs, key_source = jax.random.split(key)
    from_docs = jax.random.randint(key_docs, (count, 1), 0, docs.size - run.length - 1)
    from_source = jax.random.randint(key_source, (run.batch - count, 1), 0, source.size - run.length - 1)
    return jnp.concatenate([docs[from_docs + width], source[from_source + width]]).astype(jnp.int32)


def make_apply(config: Any, dtype: Any) -> Any:
    """``(params, tokens) -> float32 logits``; matrix products in ``dtype``, norms and the loss in float32."""

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        matrices = jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)
        return Decoder.from_params(config, matrices)(tokens)

    return apply


def make_chunk(run: Run, config: Any, dtype: Any) -> Any:
    """``(params, moments, step, total, docs, source) -> (params, moments, losses [chunk])``, compiled once."""
    optimizer = make_optimizer(run)

    apply = make_apply(config, dtype)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, tokens[:, :-1]), tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_chunk(params: Any, moments: Any, first: Any, total: Any, docs: jax.Array, source: jax.Array) -> Any:
        def one(carry: Any, step: jax.Array) -> Any:
            params, moments = carry
            key = jax.random.fold_in(jax.random.key(run.seed), step)
            value, grads = jax.value_and_grad(loss)(params, draw(run, key, docs, source))
            updates, moments = optimizer.update(grads, moments, params)
            rate = learning_rate(run, step.astype(jnp.float32), total)
            return (jax.tree.map(lambda p, u: p - rate * u, params, updates), moments), value

        steps = first + jnp.arange(run.chunk)
        (params, moments), losses = jax.lax.scan(one, (params, moments), steps)
        return params, moments, losses

    return train_chunk


def fit(run: Run, config: Any, tokens: dict[str, np.ndarray], keep: Any, time_limit: float, begun: float) -> Any:
    """Train from `keep`'s last checkpoint or from scratch; returns params and the log."""
    from flax import nnx

    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    params = params_of(Decoder(config, rngs=nnx.Rngs(run.seed)))
    moments = make_optimizer(run).init(params)
    state, log = keep.latest({"params": params, "moments": moments, "step": 0, "total": run.steps})
    params, moments, step, total = state["params"], state["moments"], int(state["step"]), int(state["total"])
    docs, source = jnp.asarray(tokens["docs"]), jnp.asarray(tokens["source"])
    windows = cut_windows(tokens["calibration"], vocab_size=config.vocab_size)
    chunk, apply, started = make_chunk(run, config, dtype), make_apply(config, dtype), step
    while step < total:
        now = time.perf_counter()
        params, moments, losses = chunk(params, moments, step, float(total), docs, source)
        losses = np.asarray(losses)
        seconds, step = time.perf_counter() - now, step + run.chunk
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"the loss became {losses[-1]} before step {step}; lower the learning rate.")
        if time_limit and step == started + 2 * run.chunk:  # the first chunk compiled, this one only ran
            left = time_limit - (time.perf_counter() - begun)
            total = min(run.steps, step + int(left / (seconds * 1.02)) * run.chunk)
        entry: dict[str, Any] = {"step": step, "loss": float(losses.mean()), "seconds": round(seconds, 3)}
        if step >= total or (step // run.chunk) % 20 == 2:
            entry["validation"] = math.log(evaluate(apply, params, windows, batch=min(len(windows), 32)).perplexity)
            keep.save({"params": params, "moments": moments, "step": step, "total": total}, [*log, entry])
        log.append(entry)
        print(json.dumps({**entry, "of": total}), flush=True)
    return params, log


class NoCheckpoints:
    """Stands in for `Checkpoints` where orbax is not installed or not wanted."""

    def latest(self, state: Any) -> tuple[Any, list[Any]]:
        """A start from scratch."""
        return state, []

    def save(self, state: Any, log: list[Any]) -> None:
        """Nothing."""


class Checkpoints(NoCheckpoints):
    """Orbax checkpoints in a directory: arrays by orbax, the log as JSON beside them."""

    def __init__(self, folder: pathlib.Path, *, resume: bool) -> None:
        import orbax.checkpoint as ocp

        self.args = ocp.args
        self.manager = ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2))
        if not resume and self.manager.latest_step() is not None:
            raise SystemExit(f"{folder} holds checkpoints; add --resume to go on from them, or choose another --out.")

    def latest(self, state: Any) -> tuple[Any, list[Any]]:
        """The newest state and log; those given if there is none."""
        step = self.manager.latest_step()
        if step is None:
            return state, []
        restore = self.args.Composite(state=self.args.StandardRestore(state), log=self.args.JsonRestore())
        found = self.manager.restore(step, args=restore)
        return found["state"], found["log"]["entries"]

    def save(self, state: Any, log: list[Any]) -> None:
        """Write state and log; returns when they are on disk, since the next step reuses the memory."""
        args = self.args.Composite(state=self.args.StandardSave(state), log=self.args.JsonSave({"entries": log}))
        self.manager.save(state["step"], args=args)
        self.manager.wait_until_finished()


# ---- Export ----------------------------------------------------------------------------------------------------------


def export(out: pathlib.Path, hf: dict[str, Any], params: Any, tokenizer: str) -> None:
    """The Hugging Face layout: bfloat16 weights as ``[out, in]`` under Hugging Face's names, config, tokenizer."""
    family, tensors = by_architecture(hf["architectures"][0]), {}
    for path, leaf in leaves(params):
        name, transpose = theirs(family, path)
        array = np.asarray(leaf).astype(ml_dtypes.bfloat16)
        tensors[name] = np.ascontiguousarray(array.T if transpose else array)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    words = {"bos_token": END, "eos_token": END, "pad_token": END}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": hf["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **words,
    }
    write_json(out / "config.json", hf)
    write_json(out / "generation_config.json", {"do_sample": False, **ends})
    write_json(out / "tokenizer_config.json", tokenizer_config)
    (out / "tokenizer.json").write_text(tokenizer, encoding="utf-8")


def write_json(path: pathlib.Path, content: Any) -> None:
    """JSON as Hugging Face indents it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def provenance(run: Run, record: dict[str, Any]) -> str:
    """Where the weights come from, in words."""
    origin, characters = record["origin"], record["origin"]["characters"]
    seen = (
        f"{record['steps']:,} steps of {run.batch} x {run.length} tokens, {record['tokens_seen'] / 1e6:,.0f} M in all"
    )
    loss = with_error(record["heldout_perplexity"], record["heldout_perplexity_stderr"], places=3)
    rows = {
        "text": f"the library of CPython {', '.join(origin['python'])}: {characters['train']:,} characters of "
        f"documentation, {characters['source']:,} of source",
        "sha256 of the training documentation": f"`{origin['digest_train_docs']}`",
        "sha256 of the training source": f"`{origin['digest_train_source']}`",
        "sha256 of the held-out documentation": f"`{origin['digest_heldout']}`",
        "parameters": f"{record['parameters']:,}",
        "training": f"{seen}, {100 * run.docs:.0f} % documentation",
        "optimizer": f"AdamW, rate {run.rate}, weight decay {run.decay}, seed {run.seed}",
        "training loss at the end": f"{record['train_loss']:.4f} nats a token",
        "held-out perplexity": f"{loss}, {record['heldout_tokens']:,} tokens, windows of 192, weights as shipped",
        "device, seconds": f"{record['device']}, {record['seconds']:.0f}",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# Where this model comes from

Trained from scratch by `examples/train_tiny_lm.py` of awq-jax on the Python standard library's own text, and on nothing
else. The text itself is not part of this repository. The weights are under the project's licence, Apache-2.0; Python
and its library are under the PSF licence. Of several Pythons, the held-out and calibration text is the first one's.

| | |
|---|---|
{table}
"""


# ---- The command -----------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("--out", type=pathlib.Path, required=True, help="directory of the exported model")
    p.add_argument("--steps", type=int, default=Run.steps)
    p.add_argument("--time-limit", type=float, default=0.0, metavar="SECONDS", help="end the schedule earlier, to fit")
    p.add_argument("--tokens", type=pathlib.Path, help="read tokens from this .npz, or write them there first")
    p.add_argument("--tokens-only", action="store_true", help="stop when --tokens is written")
    p.add_argument("--also", action="append", default=[], metavar="PYTHON", help="train on that Python's library too")
    p.add_argument("--docs", type=float, default=Run.docs, help="share of documentation in training")
    p.add_argument("--decay", type=float, default=Run.decay, help="weight decay")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    p.add_argument("--no-checkpoints", action="store_true", help="keep none; orbax is not needed then")
    p.add_argument("--smoke", action="store_true", help="thirty steps of a toy, to see that everything runs")
    return p.parse_args()


def get_tokens(a: argparse.Namespace, vocab_size: int) -> dict[str, np.ndarray]:
    """From `--tokens` if it is there; otherwise made, and left there."""
    if a.tokens and a.tokens.is_file():
        with np.load(a.tokens) as held:
            return dict(held)
    tokens = tokenize(vocab_size, a.also, smoke=a.smoke)
    if a.tokens:
        np.savez_compressed(a.tokens, allow_pickle=False, **tokens)
    return tokens


def main() -> None:
    """Text -> tokens -> training -> export -> the numbers of what was exported."""
    begun, a = time.perf_counter(), parse()
    hf = {**MODEL, **(SMOKE if a.smoke else {})}
    run = Run(a.steps, docs=a.docs, decay=a.decay)
    if a.smoke:
        run = Run(30, batch=4, length=64, warmup=5, chunk=10)
    if (a.out / "model.safetensors").exists():
        raise SystemExit(f"{a.out} holds a model; choose another --out.")
    a.out.mkdir(parents=True, exist_ok=True)
    tokens = get_tokens(a, hf["vocab_size"])
    print({name: array.size for name, array in tokens.items()}, flush=True)
    if a.tokens_only:
        return
    config = config_from_hf(by_architecture(hf["architectures"][0]), hf)
    keep = NoCheckpoints() if a.no_checkpoints else Checkpoints(a.out / "checkpoints", resume=a.resume)
    params, log = fit(run, config, tokens, keep, a.time_limit, begun)
    export(a.out, hf, params, tokens["tokenizer"].tobytes().decode())

    # What is measured is what was written: weights rounded to bfloat16, products in float32.
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    windows = cut_windows(tokens["heldout"], vocab_size=config.vocab_size)
    found = evaluate(make_apply(config, jnp.float32), rounded, windows, batch=min(len(windows), 32))
    record = {
        "origin": json.loads(tokens["origin"].tobytes()),
        "parameters": sum(leaf.size for _, leaf in leaves(params)),
        "steps": log[-1]["step"],
        "tokens_seen": log[-1]["step"] * run.batch * run.length,
        "train_loss": log[-1]["loss"],
        "heldout_perplexity": found.perplexity,
        "heldout_perplexity_stderr": found.perplexity_stderr,
        "heldout_tokens": found.tokens,
        "device": jax.devices()[0].device_kind,
        "seconds": time.perf_counter() - begun,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "tokenizers")},
        },
    }
    write_json(a.out / "training_log.json", {**record, "run": dataclasses.asdict(run), "log": log})
    (a.out / "PROVENANCE.md").write_text(provenance(run, record), encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
