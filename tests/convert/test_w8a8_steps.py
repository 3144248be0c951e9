# SPDX-License-Identifier: Apache-2.0
"""W8A8 files have no step for dynamic activations: what compressed-tensors' PyTorch code takes, and what we take.

`emulated` is compressed-tensors 0.20.0 in numpy (``quantization/utils/helpers.py``: ``calculate_qparams``, symmetric;
``quantization/lifecycle/forward_helpers.py``: ``_quantize_dequantize``): clamp to -128 and 127, round half to even,
times the step, zero point 0, all in the dtype of x. Their step is ``max|x| / 127.5``, half the range of an int8; ours
is ``max|x| / 127``, which vLLM's kernel takes too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from awq_jax import matmul
from awq_jax.cli import main
from awq_jax.run import load_model, logits
from awq_jax_convert.codecs import codec_of
from awq_jax_convert.int_quantized import IntQuantized
from tests.convert.test_int_quantized import STATIC, config, parts_of
from tests.fixtures.tiny import TOKENS as PROMPTS
from tests.fixtures.tiny import calibration, logits_of, make_dense
from tests.kernels.contract import UNIT

OURS, THEIRS = 127.0, 127.5
K, N, TOKENS = 64, 32, 512


def steps_of(x, top):
    return np.abs(x).max(1, keepdims=True) / x.dtype.type(top)


def emulated(x, steps):
    """What inputs are rounded to, in their dtype."""
    return np.rint(np.clip(x / steps, -128, 127)) * steps


def near_ties(x, steps):
    """Inputs as far from a tie as float32 can't tell: two divisions, one of which may be a product."""
    place = np.asarray(x, np.float64) / steps
    inside = (place > -128.25) & (place < 127.25)  # what is cut off is cut off on both sides of its tie
    return inside & (np.abs(np.abs(place) % 1 - 0.5) < 4 * UNIT["float32"] * np.abs(place))


def floats(parts):
    """What a file's codes stand for, float64 ``[k, n]``."""
    return parts["weight"].T * np.float64(parts["weight_scale"].T)


def read(parts, step=None):
    """The weight as we read it from a file, with a static step or none."""
    parts = parts | ({} if step is None else {"input_scale": np.array([step], np.float32)})
    codec = codec_of(config(None if step is None else STATIC))
    assert isinstance(codec, IntQuantized)
    return jax.tree.map(jnp.asarray, codec.decode("m", parts))


def assert_is(y, x, steps, w):
    """Outputs are those of the emulation in float64 but for ties, which may fall to either side."""
    exact = emulated(x, steps) @ w
    either = (near_ties(x, steps) * steps) @ np.abs(w)
    limit = 6 * UNIT["float32"] * 1.001 * (np.abs(exact) + either) + either
    assert (np.abs(np.asarray(y, np.float64) - exact) <= limit).all()
    assert (either == 0).mean() > 0.9, "nearly all outputs are held to float32 rounding"


def inputs(rng, positive=False):
    x = rng.standard_normal((TOKENS, K)).astype(np.float32)
    largest = np.abs(x).argmax(1)
    sign = np.sign(x[np.arange(TOKENS), largest])[:, None]
    return x * (sign if positive else -sign)


def test_the_step_is_the_whole_difference(rng):
    """With the steps that they take our product is theirs; with none it is the emulation with ``max / 127``."""
    x = inputs(rng, positive=True)
    parts = parts_of(rng, K, N)
    w = floats(parts)
    assert_is(matmul(jnp.asarray(x), read(parts)), np.float64(x), steps_of(np.float64(x), OURS), w)
    x = x[:32]
    steps = steps_of(x, THEIRS)
    each = [matmul(jnp.asarray(row), read(parts, step.item())) for row, step in zip(x[:, None], steps, strict=True)]
    assert_is(np.concatenate(each), np.float64(x), np.float64(steps), w)


def test_static_steps_are_the_files(rng):
    """A number of the file: both sides take it as it is, and cut off what is larger."""
    x, step, parts = inputs(rng), np.float32(0.02), parts_of(rng, K, N)
    assert np.abs(x).max() > 128 * step
    y = matmul(jnp.asarray(x), read(parts, step))
    assert_is(y, np.float64(x), np.full((TOKENS, 1), np.float64(step)), floats(parts))


@pytest.mark.parametrize("positive", [True, False])
def test_their_largest_input_is_half_a_step_off(rng, positive):
    """``max / 127.5`` puts the largest magnitude of every token midway between codes; with ours it is a code."""
    x = np.float64(inputs(rng, positive))
    largest = np.abs(x) == np.abs(x).max(1, keepdims=True)
    for top, off in ((OURS, 0.0), (THEIRS, 1 / 255)):
        steps = steps_of(x, top)
        error = np.asarray(np.abs(emulated(x, steps) - x) / np.abs(x))[largest]
        np.testing.assert_allclose(error, off, rtol=1e-9, atol=1e-12)


def test_the_difference_is_as_large_as_what_rounding_costs(rng):
    """Neither is nearer to the product without rounding: two roundings of one input, each a fresh error."""
    x, w = np.float64(inputs(rng)), floats(parts_of(rng, K, N))
    ours, theirs = (emulated(x, steps_of(x, top)) @ w for top in (OURS, THEIRS))
    size = lambda y: np.linalg.norm(y) / np.linalg.norm(x @ w)
    costs = size(ours - x @ w), size(theirs - x @ w)
    assert 0.9 < costs[0] / costs[1] < 1.1
    assert 0.7 * costs[0] < size(ours - theirs) < np.sqrt(2) * 1.1 * costs[0]


def test_their_step_depends_on_the_last_bit(rng):
    """Where the largest magnitude is negative they round -127.5, and the dtype decides which way."""
    x = inputs(rng)
    largest = np.arange(TOKENS), np.abs(x).argmax(1)
    code = lambda values, top: np.rint(values / steps_of(values, top))[largest]
    assert (code(x, OURS) == -127).all() and (code(np.float64(x), OURS) == -127).all()
    narrow, wide = code(x, THEIRS), code(np.float64(x), THEIRS)
    assert set(narrow) == set(wide) == {-127, -128}
    flipped = narrow != wide
    assert 0.02 < flipped.mean() < 0.5
    apart = np.abs(emulated(x, steps_of(x, THEIRS)) - emulated(np.float64(x), steps_of(np.float64(x), THEIRS)))
    one_step = (apart / np.abs(x).max(1, keepdims=True)).max(1)[flipped]
    np.testing.assert_allclose(one_step, 1 / THEIRS, rtol=4 * 128 * UNIT["float32"])


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_logits_of_transformers_with_compressed_tensors(activations, tmp_path, monkeypatch):
    """The table of docs/formats.md: as it is, and with our step in their code."""
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward", reason="CONTRIBUTING.md")
    made, text = tmp_path / "made", tmp_path / "text.txt"
    make_dense(tmp_path / "dense")
    text.write_text(" ".join(f"w{token}" for row in calibration(64) for token in row))
    options = "--bits 8 --group-size -1 --symmetric --format compressed-tensors --scale-dtype float32 --quiet".split()
    few = ["--calib", str(text), "--samples", "4", "--seq-len", "32", "--resume", "never"]
    said = ["--method", "minmax", "--activations", activations, *options, *few]
    assert main(["quantize", str(tmp_path / "dense"), str(made), *said]) == 0
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(made, dtype=torch.float32, attn_implementation="eager").eval()
    ours, stock = np.asarray(logits(load_model(made), PROMPTS)), logits_of(theirs)
    found = forward.compute_dynamic_scales_and_zp

    def with_our_step(**given):
        scale, zero = found(**given)
        return scale * (THEIRS / OURS), zero

    monkeypatch.setattr(forward, "compute_dynamic_scales_and_zp", with_our_step)
    off = [float(np.abs(each - ours).max() / np.abs(ours).max()) for each in (stock, logits_of(theirs))]
    print(f"measured W8A8 by {activations} {off[0]:.1e}, with our step {off[1]:.1e}")
    assert off[1] <= 1e-5 and (off[0] <= 1e-5) == (activations == "tensor")
