# SPDX-License-Identifier: Apache-2.0
"""Eight devices make the checkpoint that one makes, and groups are whole on the devices that will serve them."""

from pathlib import Path

import pytest

from awq_jax import QuantSpec, Recipe
from awq_jax.sharding import Layout, parse_mesh
from tests.reliability.job import contents, make_source, moved_codes, run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def single(source: Path) -> Path:
    run(source, source.parent / "single")
    return source.parent / "single"


@pytest.mark.slow  # compiling for eight devices takes a minute
@pytest.mark.parametrize("axes", [{"data": 2, "model": 4}, {"data": 2}, {"fsdp": 2}], ids=str)
def test_a_mesh_makes_the_checkpoint_of_one_device(source: Path, single: Path, tmp_path: Path, axes: dict[str, int]):
    run(source, tmp_path / "out", mesh=axes)
    codes, moved = moved_codes(single, tmp_path / "out")
    print(f"{axes}: {moved} of {codes} codes differ")
    assert moved <= codes // 1000


@pytest.mark.slow
def test_an_unfinished_run_does_not_go_on_with_other_devices(source: Path, tmp_path: Path):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", progress=stop)
    with pytest.raises(ValueError, match=r"other devices \(devices cpu x1.*now cpu data=2,"):
        run(source, tmp_path / "out", mesh={"data": 2})
    run(source, tmp_path / "out")
    assert (tmp_path / "out").is_dir() and contents(tmp_path / "out")


def test_meshes_that_are_refused():
    with pytest.raises(ValueError, match=r"mesh of 16 devices was asked for \(data=4,model=4\), and there are 8"):
        Layout({"data": 4, "model": 4})
    with pytest.raises(ValueError, match=r"batches of 3 samples do not spread over 2 devices.*--batch 4"):
        Layout({"data": 2}).refuse_batch(3)


@pytest.mark.parametrize("text", ["", "data", "data=0", "data=2,data=2", "rows=2", "data=-1", "data=two", "data=²"])
def test_what_is_no_mesh(text: str):
    with pytest.raises(ValueError, match="expected axes of data, fsdp, model with sizes, such as data=2,model=4"):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("serve_tp", "group", "said"),
    [
        (
            4,
            64,
            r"groups of 64 rows of layers/0/attn/o straddle devices: 128 rows over 4 devices are 32 each.*"
            r"group sizes that work: 16 \(--group-size\)",
        ),
        (2, -1, r"groups of 128 rows of layers/0/attn/o straddle.*group sizes that work: 32, 16"),
        (64, 32, r"over 64 devices are 2 each.*no group size works"),
        (0, 32, r"serve_tp is 0; it must be at least 1"),
    ],
)
def test_groups_are_whole_on_the_devices_that_will_serve_them(source: Path, tmp_path: Path, serve_tp, group, said: str):
    with pytest.raises(ValueError, match=said):
        run(source, tmp_path / "out", recipe=Recipe(quant=QuantSpec(group_size=group)), serve_tp=serve_tp)
    assert not list(tmp_path.iterdir())
