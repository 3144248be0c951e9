# SPDX-License-Identifier: Apache-2.0
"""Checkpoint directories in google-tunix's models: its forward and sampler on our packed weights.

The first tests run anywhere; the others in an environment of their own:

pip install google-tunix==0.1.7 jax flax jaxtyping beartype pytest
PYTHONPATH=kernels:convert python -m pytest tests/adapters/test_tunix_serving.py
"""

import functools
import importlib
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from awq_jax import QuantSpec, Recipe, quantize_checkpoint
from awq_jax.models import generate, param_shapes
from awq_jax.run import load_model, logits
from awq_jax.serving import tunix
from awq_jax.serving.tunix_families import FAMILIES
from awq_jax.serving.tunix_proof import small
from awq_jax_convert.hf_config import read_config
from awq_jax_convert.keymap import theirs

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("their_promotion")]
installed = importlib.util.find_spec("tunix") is not None
needs_tunix = pytest.mark.skipif(not installed, reason="google-tunix is not installed; it wants its own environment")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": None,
}
TIED = {"tie_word_embeddings": True}
WINDOW = {"query_pre_attn_scalar": 16, "sliding_window": 5, **TIED}
ROTATIONS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
MODELS = {
    "llama": ("LlamaForCausalLM", {"rope_theta": 1e6, "rms_norm_eps": 1e-5}),
    "llama-tied": ("LlamaForCausalLM", {"rope_theta": 1e6, **TIED}),
    "qwen2": ("Qwen2ForCausalLM", {"rope_theta": 1e6}),
    "qwen3-tied": ("Qwen3ForCausalLM", {"rope_theta": 1e6, **TIED}),
    "gemma": ("GemmaForCausalLM", TIED),
    "gemma-one-kv-head": ("GemmaForCausalLM", {"num_key_value_heads": 1, **TIED}),
    "gemma-all-kv-heads": ("GemmaForCausalLM", {"num_key_value_heads": 4, **TIED}),
    "gemma2": ("Gemma2ForCausalLM", WINDOW),
    "gemma3": (
        "Gemma3ForCausalLM",
        {**WINDOW, "num_hidden_layers": 6, "sliding_window_pattern": 6, "rope_parameters": ROTATIONS},
    ),
}


def dense(path: Path, architecture: str, **changes: object) -> Path:
    """A random checkpoint in Hugging Face's layout."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], **SIZES, **changes}))
    hf = read_config(path)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in param_shapes(hf.decoder).items():
        key, transpose = theirs(hf.family, name)
        gain = name.endswith("scale") and not hf.decoder.norm_offset
        array = (rng.standard_normal(shape) * (shape[0] ** -0.5 if len(shape) > 1 else 0.3) + gain).astype(np.float32)
        tensors[key] = np.ascontiguousarray(array.T if transpose else array)
    save_file(tensors, str(path / "model.safetensors"))
    rows = [json.dumps({"input_ids": rng.integers(0, 96, 32).tolist()}) for _ in range(4)]
    (path / "calib.jsonl").write_text("\n".join(rows))
    return path


def packed(path: Path, name: str, *overrides: tuple[str, object], format: str = "autoawq", **changes: object) -> Path:
    """The same, quantized by the pipeline."""
    architecture, config = MODELS[name]
    source = dense(path / "source", architecture, **{**config, **changes})
    recipe = Recipe(quant=QuantSpec(group_size=32), overrides=overrides)  # pyright: ignore[reportArgumentType]
    few = {"calib": source / "calib.jsonl", "samples": 4, "seq_len": 32}
    quantize_checkpoint(source, path / "out", recipe=recipe, format=format, **few)  # pyright: ignore[reportArgumentType]
    return path / "out"


def mask_of(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    length = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    return positions, jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (*tokens.shape, length))


class Ids:
    """A tokenizer whose texts are numbers."""

    def encode(self, text: str, **_: object) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # falsy: none is put in front

    def eos_id(self) -> int:
        return 1000

    def pad_id(self) -> int:
        return 0


def test_other_families_are_refused_by_name(tmp_path):
    source = dense(tmp_path / "m", "MistralForCausalLM")
    with pytest.raises(ValueError, match=r"is a 'mistral'.*llama, qwen2, qwen3, gemma"):
        tunix.load(source)


@pytest.mark.skipif(installed, reason="google-tunix is installed")
def test_without_tunix_the_error_says_what_to_install(tmp_path):
    with pytest.raises(ImportError, match="pip install google-tunix"):
        tunix.load(dense(tmp_path / "m", "LlamaForCausalLM"))


@pytest.mark.parametrize("name", MODELS)
def test_the_table_has_a_place_for_every_parameter(tmp_path, name):
    """Of some form: Gemma holds q, k and v in one array or in two."""
    architecture, config = MODELS[name]
    hf = read_config(dense(tmp_path / "m", architecture, **config))
    rows = FAMILIES[hf.family.name].rows
    for path in param_shapes(hf.decoder):
        named = "/".join("*" if part.isdigit() else part for part in path.split("/"))
        assert any(named in row.ours for row in rows), path


@pytest.mark.parametrize("name", MODELS)
def test_the_small_model_keeps_what_decides(tmp_path, name):
    architecture, config = MODELS[name]
    whole = read_config(dense(tmp_path / "m", architecture, **config)).decoder
    tried = small(whole)
    for field in ("rope_theta", "norm_eps", "norm_offset", "qk_norm", "attn_softcap", "logit_softcap", "qkv_bias"):
        assert getattr(tried, field) == getattr(whole, field)
    assert (tried.num_heads == tried.num_kv_heads) == (whole.num_heads == whole.num_kv_heads)
    assert (tried.query_scalar == tried.head_dim) == (whole.query_scalar == whole.head_dim)
    assert tried.sliding_layers == whole.sliding_layers[: tried.num_layers]


@needs_tunix
@pytest.mark.parametrize("name", MODELS)
def test_its_forward_gives_our_logits(tmp_path, name):
    out = packed(tmp_path, name)
    model = tunix.load(out, dtype=jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 96, (2, 24)), jnp.int32)
    got = nnx.jit(lambda m, *args: m(*args)[0])(model, tokens, mask_of(tokens)[0], None, mask_of(tokens)[1])
    wanted = np.asarray(logits(load_model(out), tokens))
    assert np.abs(np.asarray(got) - wanted).max() <= 1e-4


@needs_tunix
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-tied", "gemma", "gemma2"])
def test_its_sampler_gives_our_greedy_tokens(tmp_path, name):
    sampling = importlib.import_module("tunix.generate.sampler")
    out = packed(tmp_path, name)
    held = sampling.CacheConfig(64, SIZES["num_hidden_layers"], 2, 16)
    sampler = sampling.Sampler(tunix.load(out, dtype=jnp.float32), Ids(), held)
    prompts = np.random.default_rng(2).integers(1, 96, (2, 8))
    made = sampler([" ".join(map(str, row)) for row in prompts], max_generation_steps=16)
    wanted = generate(load_model(out).decoder, jnp.asarray(prompts, jnp.int32), max_new_tokens=16)
    np.testing.assert_array_equal(np.stack(made.tokens)[:, :16], wanted)


@needs_tunix
def test_no_weight_of_a_product_is_dense(tmp_path):
    from awq_jax.adapt import QKernel
    from awq_jax.nnx import params_of

    held = params_of(tunix.load(packed(tmp_path, "gemma")))
    kernels = {path for path, leaf in held.items() if isinstance(leaf, QKernel)}
    assert {path for path in held if path.endswith(("kernel", "/w"))} == kernels


@needs_tunix
def test_a_base_that_tunix_does_not_take_is_refused_and_can_be_bound(tmp_path, monkeypatch):
    llama3 = importlib.import_module("tunix.models.llama3.model")
    out = packed(tmp_path, "llama", rope_theta=500000.0)
    with pytest.raises(ValueError, match=r"rope_theta=1000000.0 in the place of 500000.0. Bind it before"):
        tunix.load(out)
    monkeypatch.setattr(llama3, "apply_rope", functools.partial(llama3.apply_rope, rope_theta=500000.0))
    assert tunix.load(out).config.rope_theta == 500000.0


@needs_tunix
@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "agree with rope_scaling=None"),
        ("gemma", {"rms_norm_eps": 1e-3}, "agree with norm_eps=1e-06 in the place of 0.001"),
        ("gemma2", {"query_pre_attn_scalar": 20}, "agree with query_scalar=None in the place of 20"),
    ],
)
def test_mechanisms_that_tunix_lacks_are_refused_by_name(tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=message):
        tunix.load(packed(tmp_path, name, **changes))


@needs_tunix
def test_a_config_of_other_sizes_is_refused(tmp_path):
    out = packed(tmp_path, "qwen2")
    wrong = importlib.import_module("tunix.models.qwen2.model").ModelConfig.qwen2p5_0p5b()
    with pytest.raises(ValueError, match="num_layers is 24, the checkpoint's is 2; embed_dim is 896"):
        tunix.load(out, config=wrong)


@needs_tunix
def test_k_and_v_of_two_forms_do_not_fit_one_array(tmp_path):
    out = packed(tmp_path, "gemma", ("*/attn/v", None), format="native")
    with pytest.raises(
        ValueError, match=r"layers/0/attn/kv_einsum/w.*attn/k/kernel is int4.*attn/v/kernel is bfloat16"
    ):
        tunix.load(out)
