# SPDX-License-Identifier: Apache-2.0
"""Tables of a user's own: the files of docs/families.md on random models in Hugging Face's layout."""

import contextlib
import io
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from awq_jax._spec import QuantSpec, Recipe
from awq_jax.cli import COMMANDS, main
from awq_jax.families import FAMILIES
from awq_jax.prepare import open_planned
from awq_jax_convert.family_file import FAMILY_FILE, open_table, parse_table, table_beside
from awq_jax_convert.formats import open_checkpoint
from tests.e2e.conftest import save_text_tools
from tests.models.families import SIZES, Tiny
from tests.tiny_models import Oracle, logits_of, rounding, save_oracle, some_tokens

RENAMED, AFTER = re.findall(r"```toml\n(.*?)```", Path("docs/families.md").read_text(), re.DOTALL)
WIDE = {**SIZES, "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
NAMES = {
    "model.embed_tokens": "decoder.embed",
    "self_attn.q_proj": "attn.wq",
    "self_attn.o_proj": "attn.wo",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "model.norm": "decoder.norm",
    "model.layers": "decoder.blocks",
    "lm_head": "decoder.head",
}
ATTRIBUTES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "d_ff",
}


def rename(oracle: Oracle, out: Path) -> Path:
    """The model of docs/families.md: a Llama with other names, k and v in one tensor."""
    tensors = {}
    for name, array in load_file(oracle.path / "model.safetensors").items():
        for theirs, other in NAMES.items():
            name = name.replace(theirs, other)
        tensors[name] = array
    for layer in range(2):
        attn = f"decoder.blocks.{layer}"
        parts = [tensors.pop(f"{attn}.self_attn.{part}_proj.weight") for part in "kv"]
        tensors[f"{attn}.attn.wkv.weight"] = np.concatenate(parts)
    config = json.loads((oracle.path / "config.json").read_text())
    config = {ATTRIBUTES.get(key, key): value for key, value in config.items()}
    config |= {"architectures": ["MyModelForCausalLM"], "model_type": "mymodel", "auto_map": {"AutoConfig": "evil.py"}}
    config |= {"resid_pdrop": 0.1, "use_cache_quantization": None}
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    save_text_tools(out)
    return out


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return save_oracle(Tiny("llama", "to-rename", {}, WIDE), tmp_path_factory.mktemp("own") / "llama")


@pytest.fixture(scope="module")
def source(oracle: Oracle) -> Path:
    return rename(oracle, oracle.path.parent / "renamed")


@pytest.fixture(scope="module")
def table(oracle: Oracle) -> Path:
    path = oracle.path.parent / "my_table.toml"
    path.write_text(RENAMED)
    return path


def test_the_documented_table_reads_quantizes_and_goes_with_the_result(
    oracle: Oracle, source: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokens = some_tokens(320)
    found = open_checkpoint(source, table)
    theirs = oracle.logits(tokens)
    ours = logits_of(found.config, jax.tree.map(jnp.asarray, found.params()), tokens)
    assert np.abs(ours - theirs).max() <= rounding(found.config) * np.abs(theirs).max()

    out, text = tmp_path / "out", source / "text.txt"
    calibration = [
        "--calib",
        str(text),
        "--samples",
        "8",
        "--seq-len",
        "48",
        "--group-size",
        "16",
        "--rules",
        "identity",
        "--no-clip",
        "--quiet",
    ]
    assert main(["quantize", str(source), str(out), "--family", str(table), *calibration]) == 0
    assert (out / FAMILY_FILE).read_text() == RENAMED
    assert "decoder.blocks.1.attn.wkv.qweight" in load_file(out / "model.safetensors")
    # Nobody says again which table it is.
    assert main(["convert", str(out), str(tmp_path / "native"), "--to", "native", "--quiet"]) == 0
    assert main(["inspect", str(tmp_path / "native")]) == 0
    assert "mymodel, 2 layers" in capsys.readouterr().out
    first, second = (
        logits_of(each.config, jax.tree.map(jnp.asarray, each.params()), tokens)
        for each in map(open_checkpoint, (out, tmp_path / "native"))
    )
    np.testing.assert_array_equal(first, second)
    assert 1e-3 < np.abs(first - theirs).max() / np.abs(theirs).max() < 1  # the rounding is visible


QUICK, SLOW = ("inspect", "eval", "convert"), ("chat", "compare", "export", "generate")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in ("inspect", "eval", "convert", *SLOW)
    ],
)
def test_the_refusal_says_how_and_the_option_helps(
    command: str,
    source: Path,
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    text = str(source / "text.txt")
    more = {
        "inspect": [],
        "eval": ["--text", text, "--ctx", "16", "--tokens", "64"],
        "convert": [str(tmp_path / "out"), "--to", "dense"],
        "generate": ["--prompt", "The quick", "--max-new-tokens", "2"],
        "chat": ["--max-len", "64", "--max-new-tokens", "2"],
        "export": [str(tmp_path / "out"), "--platform", "cpu", "--batch", "1", "--max-len", "16", "--steps", "2"],
        "compare": [
            str(tmp_path / "out"),
            *"--methods minmax --bits 4 --group-size 16 --samples 2 --seq-len 32 --tokens 600 --quiet".split(),
            *("--calib", text, "--text", text),
        ],
    }
    monkeypatch.setattr("sys.stdin", io.StringIO("The quick\n\n"))
    assert main([command, str(source), *more[command]]) == 2
    said = capsys.readouterr().err
    assert "'MyModelForCausalLM' is not supported" in said
    assert "--family my_table.toml" in said and "docs/families.md" in said
    assert main([command, str(source), *more[command], "--family", str(table)]) == 0


def test_every_command_that_reads_a_checkpoint_takes_the_option(
    source: Path, table: Path, capsys: pytest.CaptureFixture[str]
):
    for command in COMMANDS:
        if command not in ("families", "demo"):
            with pytest.raises(SystemExit):
                main([command, "--help"])
            assert "--family NAME|FILE" in capsys.readouterr().out, command
    # A server would not end: one without slots gets as far as reading the model.
    assert main(["serve", str(source), "--port", "0", "--slots", "0", "--family", str(table)]) == 2
    assert "not supported" not in (said := capsys.readouterr().err) and "slots" in said


def test_a_name_reads_a_model_that_is_one_of_ours_under_another(oracle: Oracle, tmp_path: Path):
    copy = tmp_path / "other"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((oracle.path / "model.safetensors").read_bytes())
    config = json.loads((oracle.path / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["OtherForCausalLM"]}))
    assert main(["convert", str(copy), str(tmp_path / "out"), "--to", "dense", "--family", "llama", "--quiet"]) == 0
    assert open_checkpoint(tmp_path / "out").family.name == "llama"
    with pytest.raises(ValueError, match="family 'gpt2' does not know attention_bias"):
        open_checkpoint(copy, "gpt2")


def test_the_second_documented_table_is_olmo2(tmp_path: Path):
    row = Tiny("olmo2", "by-a-table", {}, WIDE)
    oracle = save_oracle(row, tmp_path / "olmo2")
    (tmp_path / "after.toml").write_text(AFTER)
    found = open_checkpoint(oracle.path, tmp_path / "after.toml")
    want, got = FAMILIES["olmo2"], found.family
    strip = lambda groups: [(g.producer, g.sinks) for g in groups]
    assert strip(got.groups) == strip(want.groups)
    tokens = some_tokens(320)
    theirs = oracle.logits(tokens)
    ours = logits_of(found.config, jax.tree.map(jnp.asarray, found.params()), tokens)
    assert np.abs(ours - theirs).max() <= rounding(found.config) * np.abs(theirs).max()
    open_planned(oracle.path, Recipe(quant=QuantSpec(group_size=16)), "native", family=tmp_path / "after.toml")


def test_families_lists_it_too(table: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["families", str(table), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["architectures"]) == ("mymodel", ["MyModelForCausalLM"])
    assert len(listed["groups"]) == 4


GROUPS = """
[[groups]]
norm = "layers/*/input_norm"
sinks = ["layers/*/attn/q", "layers/*/attn/k", "layers/*/attn/v"]
[[groups]]
linear = "layers/*/attn/v"
tie = "gqa"
sinks = ["layers/*/attn/o"]
[[groups]]
norm = "layers/*/post_norm"
sinks = ["layers/*/mlp/gate", "layers/*/mlp/up"]
[[groups]]
linear = "layers/*/mlp/up"
sinks = ["layers/*/mlp/down"]
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", ""),  # as it stands it passes
        ('/q", "layers/*/attn/k", ', '/q", ', "attn/k, attn/q, attn/v read one tensor, and are not one group"),
        (
            '"layers/*/input_norm"',
            '"layers/*/post_norm"',
            "a scale that goes from post_norm into attn/q, attn/k, attn/v",
        ),
        ('tie = "gqa"\n', "", 'heads v and o need tie = "gqa"'),
        ('"layers/*/mlp/up"\nsinks', '"layers/*/mlp/gate"\nsinks', "a scale that goes from mlp/gate into mlp/down"),
        ("[[groups]]\nlinear = ", "[[groups]]\nnorm = ", "is no norm of a layer"),
        ('"layers/*/post_norm"', '"layers/*/post_norm"\noffset = 1.0', "a norm's offset is missing, or something"),
        ('"layers/*/post_norm"', '"layers/*/mlp_out_norm"', "group of mlp/gate, mlp/up: no 'mlp_out_norm"),
    ],
)
def test_false_groups_are_refused_before_any_work(old: str, new: str, said: str, source: Path, tmp_path: Path):
    assert old in GROUPS
    path = tmp_path / "table.toml"
    path.write_text(RENAMED + GROUPS.replace(old, new, 1))
    recipe = Recipe(quant=QuantSpec(group_size=16))
    refused = pytest.raises(ValueError, match=re.escape(said)) if said else contextlib.nullcontext()
    with refused:
        open_planned(source, recipe, "native", family=path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base = ", "x is not TOML"),
        ("a = " + "[" * 5000, "x is not TOML"),
        ('base = "lama"', "base is 'lama'; it may be llama, mistral"),
        ("", "neither a base nor a name"),
        ('name = "x"', "no groups, or names no tensors"),
        ('base = "llama"\nkeys = []', "the file has 'keys'; it may have base, name"),
        ('base = "llama"\nlinears = [{ours = "layers/*/attn/q"}]', r"linears\[0\] lacks theirs"),
        ('base = "llama"\nlinears = [{theirs = "a.*", ours = "layers/*/attn/qq"}]', "'layers/./attn/qq' is no linear"),
        ('base = "llama"\nlinears = [{theirs = "a", ours = "layers/*/attn/q"}]', "'a' has 0 stars"),
        ('base = "llama"\nlinears = [{theirs = "a.*", ours = "layers/*/attn/q", layout = "odd"}]', "layout is 'odd'"),
        ('base = "llama"\ntensors = [{theirs = "a.*", ours = "layers/*/attn/q/gain"}]', "is no tensor"),
        ('base = "llama"\noptions.gated = 1', "options: gated is '1'"),
        ('base = "llama"\noptions.norm = "batch"', "options: norm is 'batch'"),
        ('base = "llama"\noptions.rope_scaling = 1', "options has 'rope_scaling'"),
        ('base = "llama"\nconfig.n = "layers"', "'layers' is no field"),
        ('base = "llama"\naccepts.x = true', "accepts.x is 'True'; it is a list"),
        ('base = "llama"\nno_clip = ["q"]', "no_clip names 'q'"),
        ('base = "llama"\nwithout = ["layers/*/extra"]', "without names layers/./extra"),
        ('base = "llama"\n[[groups]]\nsinks = ["layers/*/attn/q"]', r"has one of norm, linear and reason, not \[\]"),
        ('base = "llama"\n[[multiples]]\nfield = "a"\nfactor = 2\nof = "hidden_size"', "'a' is no field"),
    ],
)
def test_a_table_that_is_not_understood(text: str, said: str):
    with pytest.raises(ValueError, match=f"x.*{said}|{said}"):
        parse_table(text, "x")


def test_files_that_are_no_tables(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no family is called 'my_family\.py'; .* whose name ends in \.toml"):
        open_table("my_family.py")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.toml"):
        open_table(tmp_path / "missing.toml")
    (tmp_path / "big.toml").write_bytes(b"#" * (1 << 20) + b"##")
    with pytest.raises(ValueError, match="has more than 1048576 bytes"):
        open_table(tmp_path / "big.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        open_table(tmp_path / "binary.toml")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / FAMILY_FILE).symlink_to(tmp_path / "binary.toml")
    with pytest.raises(ValueError, match="outside its directory"):
        table_beside(tmp_path / "home")


def test_a_table_is_for_its_architectures(source: Path, tmp_path: Path):
    (tmp_path / "t.toml").write_text(RENAMED.replace("MyModelForCausalLM", "YourModelForCausalLM"))
    with pytest.raises(ValueError, match=r"'mymodel' is for YourModelForCausalLM; .* names .'MyModelForCausalLM'"):
        open_checkpoint(source, tmp_path / "t.toml")
