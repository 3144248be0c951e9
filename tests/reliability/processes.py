# SPDX-License-Identifier: Apache-2.0
"""Processes that quantize one model together, on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

MAIN = "import sys; from awq_jax.cli import main; sys.exit(main(sys.argv[1:]))"
ARGUMENTS = tuple("--group-size 32 --rules paper --grid 3 --samples 4 --seq-len 24 --batch 4".split())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    count: int, source: Path, out: Path, *options: str, code: str = MAIN, devices: int = 1, timeout: float = 300
) -> "list[subprocess.Popen[str]]":
    """So many processes with the same command; each has its standard streams."""
    where = f"127.0.0.1:{free_port()}"
    flags = f"--xla_force_host_platform_device_count={devices}"
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-c", code, "quantize", str(source), str(out), *ARGUMENTS),
                *("--calib", str(source.parent / "calib.jsonl"), "--host-timeout", str(timeout)),
                *("--coordinator", where, "--processes", str(count), "--process", str(index), *options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )
        for index in range(count)
    ]


def ended(processes: "list[subprocess.Popen[str]]", limit_s: float = 600) -> list[tuple[int, str, str]]:
    """Exit code, standard output and error of each; none is left running."""
    try:
        said = [process.communicate(timeout=limit_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(processes, said, strict=True)]


def writers(part: Path) -> set[str]:
    """Processes of which the disk has bytes, by the names that orbax gives their folders."""
    return {path.name for path in part.glob("ocdbt.process_*") if any((path / "d").iterdir())}
