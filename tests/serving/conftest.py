# SPDX-License-Identifier: Apache-2.0
import dataclasses
import importlib.resources
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from awq_jax import QuantSpec, dequantize, quantize
from awq_jax._tree import leaves, put
from awq_jax.serving.fuse import fuse
from awq_jax_convert.formats import open_writer
from awq_jax_convert.hf import HFCheckpoint
from awq_jax_convert.keymap import theirs

TINY_LM = Path(str(importlib.resources.files("awq_jax"))) / "tiny_lm"


@dataclasses.dataclass(frozen=True)
class Shipped:
    """The shipped model, its layers rounded to INT4; ``packed`` is fused, ``params`` is not."""

    checkpoint: HFCheckpoint
    params: Any
    packed: Any
    dense: Any

    @property
    def config(self) -> Any:
        return self.checkpoint.config

    def oracle(self) -> Any:
        """transformers' PyTorch model with the dequantized weights."""
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(TINY_LM), attn_implementation="eager", dtype=torch.float32
        ).eval()
        state = {}
        for path, leaf in leaves(self.dense):
            name, transposed = theirs(self.checkpoint.family, path)
            state[name] = torch.from_numpy(np.array(leaf.T if transposed else leaf))
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        return model


@pytest.fixture(scope="session")
def shipped() -> Shipped:
    checkpoint = HFCheckpoint.open(TINY_LM)
    packed = dense = checkpoint.params()
    for path, kernel in leaves(packed):
        if path.startswith("layers/") and path.endswith("/kernel"):
            weight = quantize(jnp.asarray(kernel), QuantSpec(scale_dtype="float32"))
            packed, dense = put(packed, path, weight), put(dense, path, np.asarray(dequantize(weight)))
    return Shipped(checkpoint, packed, fuse(packed), dense)


CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="session")
def native(shipped: Shipped, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a directory in our own format, with its tokenizer and a chat template."""
    out = tmp_path_factory.mktemp("native") / "tiny-int4"
    stem = {key: node for key, node in shipped.params.items() if key != "layers"}
    host = lambda tree: jax.tree.map(np.asarray, tree)
    with open_writer("native", shipped.checkpoint, out, group_size=128) as writer:
        writer.write_stem(host(stem))
        for index, layer in shipped.params["layers"].items():
            writer.write_layer(int(index), host(layer))
    shutil.copy(TINY_LM / "tokenizer.json", out)
    (out / "chat_template.jinja").write_text(CHAT)
    return out


@pytest.fixture(scope="session")
def prompts(shipped: Shipped) -> list[tuple[int, ...]]:
    """Texts of different lengths, as ids."""
    from awq_jax_convert.tokenizer import Tokenizer

    encode = Tokenizer.from_file(TINY_LM / "tokenizer.json").encode
    texts = ["The easiest way to open a file is", "Return", "If the list is empty, an exception of this kind is raised"]
    return [tuple(encode(text)) for text in (*texts, " ".join(texts))]
