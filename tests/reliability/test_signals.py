# SPDX-License-Identifier: Apache-2.0
"""The command line under signals: what is finished is kept, and the same command goes on from there."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from awq_jax.cli.stopping import stoppable
from tests.reliability.job import contents, make_source

ARGUMENTS = [
    "--group-size",
    "32",
    "--rules",
    "paper",
    "--grid",
    "3",
    "--samples",
    "4",
    "--seq-len",
    "24",
    "--batch",
    "2",
]
# Sends itself a signal when the first layer of three is reported.
SIGNALLED = """
import os, sys
import awq_jax.layer_loop as loop
real = loop.layer_report
def report(index, *rest):
    if index == 1:
        os.kill(os.getpid(), {number})
    return real(index, *rest)
loop.layer_report = report
from awq_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_source(tmp_path_factory.mktemp("source") / "model", layers=3)
    ids = [[random.Random(i).randrange(512) for _ in range(24)] for i in range(4)]
    (path.parent / "calib.jsonl").write_text("\n".join(f'{{"input_ids": {row}}}' for row in ids))
    return path


def command(source: Path, out: Path, *options: str) -> list[str]:
    return ["quantize", str(source), str(out), "--calib", str(source.parent / "calib.jsonl"), *ARGUMENTS, *options]


def run(code: str, arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


MAIN = "import sys; from awq_jax.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_layer_at_hand_finish(source: Path, tmp_path: Path, number: signal.Signals):
    done = run(SIGNALLED.format(number=int(number)), command(source, tmp_path / "out"))
    assert done.returncode == 130, done.stderr
    assert "stopping after the layer at hand" in done.stderr
    assert "finished layers are kept in" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.resume"]
    again = run(MAIN, command(source, tmp_path / "out", "--resume", "required"))
    assert again.returncode == 0, again.stderr
    assert "2 layers were finished by an earlier run" in again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Interrupted while the device computes the first layer: there is nothing worth finishing.
COMPUTING = f"""
import os, sys
import awq_jax.streams as streams
real = streams._awaited
def awaited(outcome):
    os.kill(os.getpid(), {int(signal.SIGINT)})
    return real(outcome)
streams._awaited = awaited
from awq_jax.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_an_interrupt_while_the_device_computes_ends_the_program_in_words(source: Path, tmp_path: Path):
    done = run(COMPUTING, command(source, tmp_path / "out"))
    assert done.returncode == 130, done.stderr  # and not a crash of the interpreter's end
    assert "interrupted; nothing was left behind." in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_kills_at_random_moments_cost_nothing(source: Path, tmp_path: Path):
    begun = time.monotonic()
    assert run(MAIN, command(source, tmp_path / "whole")).returncode == 0
    whole = time.monotonic() - begun
    numbers = random.Random(0)
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", MAIN, *command(source, tmp_path / "out")], stderr=subprocess.PIPE
        )
        try:
            child.wait(numbers.uniform(0.3, 1) * whole)
        except subprocess.TimeoutExpired:
            child.kill()
        child.communicate()
    if not (tmp_path / "out").exists():
        done = run(MAIN, command(source, tmp_path / "out"))
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_the_first_signal_waits_for_a_good_moment(capsys: pytest.CaptureFixture[str]):
    before = signal.getsignal(signal.SIGTERM)
    with stoppable() as stop:
        with pytest.raises(KeyboardInterrupt):  # nothing is at hand
            os.kill(os.getpid(), signal.SIGTERM)
        stop.between()
        os.kill(os.getpid(), signal.SIGTERM)
        assert "once more to stop at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.between()
    assert signal.getsignal(signal.SIGTERM) is before
