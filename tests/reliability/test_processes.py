# SPDX-License-Identifier: Apache-2.0
"""Several processes make the checkpoint of one; what happens to one of them the others say by name, and end."""

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from awq_jax import hosts
from awq_jax._manifest import verify
from awq_jax.cli import main
from awq_jax.hosts import Hosts, ProcessLost
from awq_jax.sharding import Layout
from tests.reliability.job import contents, make_source, moved_codes
from tests.reliability.processes import ARGUMENTS, MAIN, ended, free_port, start, writers


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_source(tmp_path_factory.mktemp("source") / "model")
    for name in ("calib", "other"):
        numbers = random.Random(name)
        ids = [[numbers.randrange(512) for _ in range(24)] for _ in range(4)]
        (path.parent / f"{name}.jsonl").write_text("\n".join(f'{{"input_ids": {row}}}' for row in ids))
    return path


@pytest.fixture(scope="module")
def single(source: Path) -> Path:
    out = source.parent / "single"
    calib = str(source.parent / "calib.jsonl")
    assert main(["quantize", str(source), str(out), *ARGUMENTS, "--calib", calib, "--quiet"]) == 0
    return out


def test_two_processes_make_the_checkpoint_of_one_and_each_writes_its_share(source: Path, single: Path, tmp_path: Path):
    started = start(2, source, tmp_path / "out", "--json", "--format", "native")
    (code, said, error), (other, silence, quiet) = ended(started)
    assert (code, other) == (0, 0), error + quiet
    assert not any("wrote the checkpoint alone" in words for words in json.loads(said)["warnings"])
    assert json.loads(said)["inputs"]["devices"].startswith("cpu data=2 over 2 processes,")
    assert "layer 1" in error and not silence
    codes, moved = moved_codes(single, tmp_path / "out")
    print(f"2 processes: {moved} of {codes} codes differ")
    assert moved <= codes // 1000
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert verify(tmp_path / "out") and not list((tmp_path / "out").glob("writing-*"))
    for part in ("stem", "layer-00000", "layer-00001"):
        assert writers(tmp_path / "out" / part) == {"ocdbt.process_0", "ocdbt.process_1"}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["autoawq", "native"])
def test_four_processes_with_a_model_axis_within_each(source: Path, single: Path, tmp_path: Path, format: str):
    done = ended(start(4, source, tmp_path / "out", "--json", "--format", format, devices=2))
    assert [code for code, _, _ in done] == [0] * 4, "\n".join(error for _, _, error in done)
    assert json.loads(done[0][1])["inputs"]["devices"].startswith("cpu data=4,model=2 over 4 processes,")
    codes, moved = moved_codes(single, tmp_path / "out")
    print(f"4 processes of 2 devices: {moved} of {codes} codes differ")
    assert moved <= codes // 1000
    for part in (tmp_path / "out").glob("layer-*"):
        assert writers(part) == {f"ocdbt.process_{index}" for index in range(4)}


@pytest.mark.slow
def test_two_processes_write_an_interchange_format_through_the_first(source: Path, single: Path, tmp_path: Path):
    done = ended(start(2, source, tmp_path / "out"))
    assert [code for code, _, _ in done] == [0, 0], "\n".join(error for _, _, error in done)
    codes, moved = moved_codes(single, tmp_path / "out")
    assert moved <= codes // 1000


# Kills itself when it has found the first layer of two; process 0 has kept it by the time that the second is begun.
DYING = f"""
import os, sys
import awq_jax.layer_loop as loop
real, victim = loop.layer_report, sys.argv[-1]
def report(index, *rest):
    if index == 1 and sys.argv[sys.argv.index("--process") + 1] == victim:
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return real(index, *rest)
loop.layer_report = report
from awq_jax.cli import main
sys.exit(main(sys.argv[1:-1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_others_end_and_what_was_kept_is_used(source: Path, tmp_path: Path, victim: int):
    done = ended(start(2, source, tmp_path / "out", str(victim), code=DYING))  # sooner than their patience ends
    assert done[victim][0] == -signal.SIGKILL
    code, _, error = done[1 - victim]
    # Of the coordinator's end jax itself may tell first, and aborts.
    assert code == 1 or (victim == 0 and code == -signal.SIGABRT), error
    assert f"process {victim}" in error or (victim == 0 and "leader" in error), error
    assert not (tmp_path / "out").exists()
    again = ended(start(2, source, tmp_path / "out", "--resume", "required", "--json"))
    assert [code for code, _, _ in again] == [0, 0], "\n".join(error for _, _, error in again)
    assert json.loads(again[0][1])["resumed_layers"] == 1
    whole = ended(start(2, source, tmp_path / "whole"))
    assert [code for code, _, _ in whole] == [0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Kills itself within orbax's save of the second layer, when the first is in its place.
DYING_WRITER = f"""
import os, sys
from orbax.checkpoint import PyTreeCheckpointHandler as handler
real, victim = handler.save, sys.argv[-1]
def save(self, directory, *rest, **options):
    if "layer-00001" in str(directory) and sys.argv[sys.argv.index("--process") + 1] == victim:
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return real(self, directory, *rest, **options)
handler.save = save
from awq_jax.cli import main
sys.exit(main(sys.argv[1:-1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_in_writing_nothing_appears(source: Path, tmp_path: Path, victim: int):
    done = ended(start(2, source, tmp_path / "out", "--format", "native", str(victim), code=DYING_WRITER))
    assert done[victim][0] == -signal.SIGKILL
    code, _, error = done[1 - victim]
    assert code == 1 or (victim == 0 and code == -signal.SIGABRT), error
    assert not (tmp_path / "out").exists()
    again = ended(start(2, source, tmp_path / "out", "--format", "native", "--resume", "required", "--json"))
    assert [code for code, _, _ in again] == [0, 0], "\n".join(error for _, _, error in again)
    assert json.loads(again[0][1])["resumed_layers"] == 1
    assert writers(tmp_path / "out" / "layer-00000") != writers(tmp_path / "out" / "layer-00001")  # kept: by one
    assert [code for code, _, _ in ended(start(2, source, tmp_path / "whole", "--format", "native"))] == [0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
def test_who_does_not_see_the_directory_leaves_it_to_the_first(source: Path, single: Path, tmp_path: Path):
    code = "import awq_jax_convert.native_writer as n, sys; n._SEEN_S = 0.1\n"
    code += (
        "if sys.argv[sys.argv.index('--process') + 1] == '1': n.working_directory = lambda out: n.Path('/nowhere')\n"
    )
    done = ended(start(2, source, tmp_path / "out", "--format", "native", "--json", code=code + MAIN))
    assert [code for code, _, _ in done] == [0, 0], "\n".join(error for _, _, error in done)
    said = [words for words in json.loads(done[0][1])["warnings"] if "wrote the checkpoint alone" in words]
    assert said and "processes 1 do not see its directory" in said[0]
    codes, moved = moved_codes(single, tmp_path / "out")
    assert moved <= codes // 1000


@pytest.mark.slow
def test_an_error_in_one_ends_the_others_with_its_words(source: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").touch()
    (code, _, error), (other, _, told) = ended(start(2, source, tmp_path / "out"))
    assert code == 2 and "the output exists" in error
    assert other == 1 and "process 0 failed" in told and "the output exists" in told


@pytest.mark.slow
def test_processes_with_other_text_are_refused(source: Path, tmp_path: Path):
    code = "import sys; sys.argv = [a.replace('calib.', 'other.') if sys.argv[-1] == '1' else a for a in sys.argv]; "
    done = ended(start(2, source, tmp_path / "out", code=code + MAIN))
    assert [code for code, _, _ in done] == [2, 2]
    assert all("processes 0 and 1 were given other calibration" in error for _, _, error in done)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "SLURM (SLURM_JOB_ID is not set; a step of srun has all)"),
        ({"SLURM_JOB_ID": "7"}, "SLURM (SLURM_JOB_ID is set, SLURM_STEP_NODELIST and SLURM_PROCID not;"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "Open MPI (OMPI_COMM_WORLD_RANK is set, OMPI_MCA_orte_hnp_uri not;"),
    ],
)
def test_where_there_is_no_cluster_it_is_said_what_was_looked_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, variables: dict[str, str], said: str
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def initialize(**where: Any) -> None:
        assert where == {"initialization_timeout": 630}
        raise ValueError("coordinator_address should be defined.")  # jax's words

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--distributed"]) == 2
    heard = capsys.readouterr().err
    assert said in heard and "--coordinator HOST:PORT --processes N --process I" in heard
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_who_finds_nobody_says_so(source: Path, tmp_path: Path, index: int):
    """The real thing: no cluster, and a coordinator's address where nobody comes."""
    command = [sys.executable, "-c", MAIN, "quantize", str(source), str(tmp_path / "out")]
    alone = subprocess.run([*command, "--distributed"], capture_output=True, text=True, check=False, timeout=60)
    assert alone.returncode == 2 and "no cluster says who the other processes are" in alone.stderr
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process", str(index)]
    late = subprocess.run(
        [*command, *where, "--host-timeout", "3"], capture_output=True, text=True, check=False, timeout=90
    )
    assert late.returncode == 1, late.stderr
    assert "the processes did not meet at 127.0.0.1:" in late.stderr and "Traceback" not in late.stderr


def test_a_port_that_is_taken_is_named(source: Path, tmp_path: Path, capsys: Any):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        where = ["--coordinator", address, "--processes", "2", "--process", "0"]
        assert main(["quantize", str(source), str(tmp_path / "out"), *where]) == 1
    assert f"{address}: process 0 can't listen there (Address already in use)" in capsys.readouterr().err


class Store:
    """The key-value store of `jax.distributed`, within a process."""

    def __init__(self) -> None:
        self.rows: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite
        self.rows[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in dict(self.rows).items() if key.startswith(folder)]


def two(monkeypatch: pytest.MonkeyPatch, limit_s: float = 5.0) -> list[Hosts]:
    """Two processes' views of each other; they do not beat unless told to."""
    monkeypatch.setattr(hosts, "_runs", iter([0, 0]))
    store = Store()
    return [Hosts(index, 2, store, limit_s) for index in range(2)]


def both(work: Any, pair: list[Hosts]) -> list[Any]:
    """What each says when both do it at once; an exception is an answer."""
    said: list[Any] = [None, None]

    def one(index: int) -> None:
        try:
            said[index] = work(pair[index])
        except Exception as error:
            said[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


def test_all_that_meet_know_what_each_said(monkeypatch: pytest.MonkeyPatch):
    pair = two(monkeypatch)
    assert both(lambda host: host.meet("here", f"I am {host.index}"), pair) == [["I am 0", "I am 1"]] * 2
    assert both(lambda host: host.share("it", "mine" if host.first else None), pair) == ["mine", "mine"]
    assert both(lambda host: host.agree({"weights": "a"}), pair) == [None, None]


def test_inputs_that_differ_are_named_to_all(monkeypatch: pytest.MonkeyPatch):
    inputs = lambda host: {"weights": "same", "recipe": f"r{host.index}"}
    for error in both(lambda host: host.agree(inputs(host)), two(monkeypatch)):
        assert isinstance(error, ValueError)
        assert "processes 0 and 1 were given other recipe (recipe r0 and r1)" in str(error)


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch):
    first, _ = two(monkeypatch, limit_s=0.05)
    with pytest.raises(ProcessLost, match=r"process 0 waited 0.05 s for process 1 at 'layer 3' \(--host-timeout\)"):
        first.meet("layer 3")


def test_who_failed_is_named_to_who_waits(monkeypatch: pytest.MonkeyPatch):
    first, second = two(monkeypatch)
    second._part(ValueError("bad weight"))
    first._look()
    with pytest.raises(ProcessLost, match="process 1 failed: bad weight"):
        first.meet("layer 0")
    hosts._parted.clear()


def test_who_is_silent_is_named(monkeypatch: pytest.MonkeyPatch):
    first, second = two(monkeypatch)
    first._silence_s = 0.01
    second._set("beat/1", "0")
    first._look()
    time.sleep(0.02)
    second._set("beat/1", "1")  # alive, however late
    first._look()
    assert not first._problem
    time.sleep(0.02)
    first._look()
    assert first._problem == "process 1 has given no sign of life for 0.01 s"


def test_a_broken_collective_is_put_down_to_who_broke_it(monkeypatch: pytest.MonkeyPatch):
    first, second = two(monkeypatch)
    second._part(KeyboardInterrupt())
    first._look()
    broken = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    assert str(first._why(broken)) == "process 1 failed: interrupted"
    own = ValueError("zero tokens were seen")
    assert first._why(own) is own
    hosts._parted.clear()


def test_a_jax_without_the_store_where_it_is_looked_for_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jax._src.distributed.global_state.client", object())
    with pytest.raises(RuntimeError, match=r"jax [0-9.]+ does not have the key-value store of jax.distributed"):
        hosts._client()


class Device:
    def __init__(self, process_index: int) -> None:
        self.process_index, self.device_kind = process_index, "cpu"


def test_a_mesh_takes_as_many_devices_of_each_process():
    devices = [Device(0), Device(0), Device(1), Device(1)]
    with pytest.raises(ValueError, match=r"mesh of 3 devices \(data=3\) does not take as many of each of 2 processes"):
        Layout({"data": 3}, devices)
    with pytest.raises(ValueError, match=r"mesh of 4 devices .* of 2 processes, which have 1, 3"):
        Layout({"data": 4}, [Device(0), Device(1), Device(1), Device(1)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--coordinator", "127.0.0.1:1"], "--processes, --process missing"),
        (["--coordinator", "here", "--processes", "2", "--process", "0"], "expected HOST:PORT"),
        (["--coordinator", "127.0.0.1:99999", "--processes", "2", "--process", "0"], "expected HOST:PORT"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "--process 2 of --processes 2"),
        (["--host-timeout", "0"], "--host-timeout is 0"),
    ],
)
def test_options_that_do_not_say_who_the_others_are(source: Path, tmp_path: Path, capsys: Any, options, said: str):
    assert main(["quantize", str(source), str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
