# SPDX-License-Identifier: Apache-2.0
"""What is unusual but legal works; what is not is refused in words, and never costs the user a file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from awq_jax import QuantSpec
from awq_jax.cli import main
from tests.tiny_models import Oracle

# Every weight in floating point: nothing is compiled but the embedding, and all of the files are handled.
COPY = ["--override", "*=float", "--samples", "2", "--seq-len", "32", "--quiet"]


def quantize(source: Path, out: Path, *options: str) -> int:
    return main(["quantize", str(source), str(out), "--calib", str(source / "text.txt"), *COPY, *options])


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("format", ["autoawq", "native"])
def test_files_beside_the_weights_are_copied_byte_for_byte(damaged: Path, tmp_path: Path, format: str):
    contents = {"tokenizer.model": b"\x0a\x0e\xff\xfe\x80", "merges.txt": b"a b\r\nc d\r\n"}
    for name, content in contents.items():
        (damaged / name).write_bytes(content)
    assert quantize(damaged, tmp_path / "out", "--format", format) == 0
    for name, content in contents.items():
        assert (tmp_path / "out" / name).read_bytes() == content


def test_a_link_out_of_the_source_is_not_copied(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "secret").write_text("{}")
    (damaged / "generation_config.json").unlink(missing_ok=True)
    (damaged / "generation_config.json").symlink_to(tmp_path / "secret")
    assert quantize(damaged, tmp_path / "out") == 2
    assert "generation_config.json is a link to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_link_out_of_the_source_is_not_read(damaged: Path, tmp_path: Path, capsys, name: str):
    (damaged / name).rename(tmp_path / name)
    (damaged / name).symlink_to(tmp_path / name)
    assert quantize(damaged, tmp_path / "out") == 2
    assert f"{name} is a link to" in capsys.readouterr().err


def test_a_comparison_does_not_replace_its_source(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for out in (damaged / "compared", tmp_path):
        assert main(["compare", str(damaged), str(out), "--overwrite", "--quiet"]) == 2
        assert "the source" in capsys.readouterr().err


def test_the_layout_of_the_hub_cache_is_read(llama: Oracle, tmp_path: Path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(llama.path, tmp_path / "models--a--b" / "blobs")
    for path in llama.path.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert quantize(snapshot, tmp_path / "out") == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (llama.path / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("place", ["inside", "below-a-file"])
@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_where_no_output_may_be_made(damaged: Path, tmp_path: Path, place: str, command: str, capsys):
    (tmp_path / "file").write_text("")
    out = {"inside": damaged / "int4", "below-a-file": tmp_path / "file" / "out"}[place]
    before = set(tmp_path.rglob("*"))
    if command == "convert":
        code = main(["convert", str(damaged), str(out), "--to", "native", "--quiet"])
    else:
        code = quantize(damaged, out)
    said = capsys.readouterr().err
    assert code == 2 and set(tmp_path.rglob("*")) == before
    assert {"inside": "lies in the source", "below-a-file": f"{tmp_path / 'file'}: not a directory"}[place] in said


@pytest.mark.parametrize("place", ["same", "parent", "through-a-link"])
def test_overwriting_never_takes_the_source_away(damaged: Path, tmp_path: Path, place: str, capsys):
    (tmp_path / "link").symlink_to(damaged)
    out = {"same": damaged, "parent": damaged.parent, "through-a-link": tmp_path / "link" / ".." / damaged.name}[place]
    (out / "awq_jax_manifest.json").write_text('{"format_version": 1, "files": {}}')  # awq-jax wrote it
    before = {path: path.read_bytes() for path in damaged.iterdir()}
    assert quantize(damaged, out, "--overwrite") == 2
    assert "choose another name" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in damaged.iterdir()} == before


def test_names_that_look_like_markup(llama: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "ü [" / "red] [" / "bold]"
    arguments = ["quantize", str(llama.path), str(out), "--calib", str(llama.path / "text.txt"), *COPY]
    arguments.remove("--quiet")
    assert main(arguments) == 0
    assert out.is_dir()
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert "ü[/red][/bold]:llama" in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", "129"], r"longer than the 128 positions"),
        (["--seq-len", "129", "--dry-run"], r"longer than the 128 positions"),
        (["--override", "*=bits:²"], "expected GLOB=float"),
        (["--override", "*=bits:--3"], "expected GLOB=float"),
    ],
)
def test_quantize_refuses(llama: Oracle, tmp_path: Path, options: list[str], message: str, capsys):
    assert quantize(llama.path, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err


def test_samples_that_no_text_bounds(llama: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bounded = ["--samples", "99999999999", "--dry-run"]
    assert quantize(llama.path, tmp_path / "out", *bounded) == 0  # as many as the text has
    fitting = ["--group-size", "32", "--seq-len", "32"]
    assert main(["quantize", str(llama.path), str(tmp_path / "out"), *fitting, *bounded]) == 2
    assert "--samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "-1"], "tokens is -1"),
        (["--batch", "0"], "batch is 0"),
        (["--ctx", "129"], "has 128 positions"),
    ],
)
def test_eval_refuses(llama: Oracle, options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(llama.path), "--text", str(llama.path / "text.txt"), *options]) == 2
    assert message in capsys.readouterr().err


def test_one_window_has_no_standard_error_and_a_batch_is_never_larger_than_the_text(llama: Oracle, capsys):
    arguments = ["eval", str(llama.path), "--text", str(llama.path / "text.txt"), "--ctx", "32", "--tokens", "40"]
    assert main([*arguments, "--batch", "1000000", "--json", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "NaN" not in said
    assert json.loads(said)["perplexity_stderr"] is None


@pytest.mark.parametrize("size", [1e5, 1e30])
def test_a_perplexity_that_is_not_finite_is_an_error(damaged: Path, size: float, capsys: pytest.CaptureFixture[str]):
    tensors = load_file(damaged / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * np.float32(size)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    assert main(["eval", str(damaged), "--text", str(damaged / "text.txt"), "--ctx", "32", "--tokens", "64"]) == 2
    assert "is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("eos", [2**40, "2", [[1]], {"a": 1}, 1.5])
def test_what_ends_a_text_must_be_ids(damaged: Path, eos: object, capsys: pytest.CaptureFixture[str]):
    edit_config(damaged, eos_token_id=eos)
    assert main(["generate", str(damaged), "--prompt", "The", "--max-new-tokens", "1"]) == 2
    assert "eos_token_id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"), [(["--prompt", "a\udcff"], "surrogate"), (["--seed", str(2**70)], "--seed")]
)
def test_generate_refuses(llama: Oracle, options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", str(llama.path), "--prompt", "The", "--max-new-tokens", "1", *options]) == 2
    assert message in capsys.readouterr().err


def test_an_odd_width_is_not_told_to_use_what_it_used():
    with pytest.raises(ValueError, match=r"dimension 45 is odd.*override") as refused:
        QuantSpec(group_size=-1).rows_per_group(45)
    assert "group_size" not in str(refused.value)


@pytest.mark.parametrize(("error", "said"), [(RuntimeError("no GPU"), "no GPU"), (MemoryError(), "out of memory")])
def test_an_error_of_jax_is_a_message(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys):
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("awq_jax.run.generate_text", fail)
    assert main(["generate", "anything", "--prompt", "a"]) == 1
    assert capsys.readouterr().err == f"awq-jax generate: {said}\n"


def test_what_failed_beside_an_error_is_told(monkeypatch: pytest.MonkeyPatch, capsys):
    def fail(*args: object, **options: object) -> None:
        error = OSError(28, "No space left on device", "out/layer_3")
        error.add_note("What was done behind it failed too: OSError: disk full")
        raise error

    monkeypatch.setattr("awq_jax.run.generate_text", fail)
    assert main(["generate", "anything", "--prompt", "a"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "awq-jax generate: out/layer_3: No space left on device" and second.startswith("What was done")


def test_what_jax_left_out_of_a_traceback_is_not_told(monkeypatch: pytest.MonkeyPatch, capsys):
    def fail(*args: object, **options: object) -> None:
        def refuse(x: jax.Array) -> jax.Array:
            raise ValueError("the reason")

        jax.jit(refuse)(1.0)

    monkeypatch.setattr("awq_jax.run.generate_text", fail)
    assert main(["generate", "anything", "--prompt", "a"]) == 2
    assert capsys.readouterr().err == "awq-jax generate: the reason\n"


def test_a_reader_that_leaves_is_not_an_error_message(llama: Oracle):
    code = "import sys, time; from awq_jax.cli import main; time.sleep(0.2); sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, "inspect", str(llama.path), "--json"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 1
