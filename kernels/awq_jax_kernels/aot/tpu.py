# SPDX-License-Identifier: Apache-2.0
"""Compile programs with libtpu in a child process.

libtpu reads its flags once, when it loads, and its profiler can abort, run for minutes or take all memory. So a child
compiles, with limits, and the parent reads a line of JSON per program. A child that dies is replaced; the program that
killed it is tried again without the profiler.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from awq_jax_kernels.aot import schedule
from awq_jax_kernels.aot.program import Program
from awq_jax_kernels.chips import TPUS, Tpu

__all__ = ["Compiled", "compile_programs", "environment"]


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program on one device.

    Attributes:
      error: why there is no figure; the others are then empty.
      temp_bytes: HBM held beside arguments and results: 0 for a fused kernel.
      argument_bytes: of the arguments.
      output_bytes: of the results.
      kernels: names of the operations that are Pallas kernels.
      bundles: instruction bundles of each operation by loop depth: once, per grid step, per step of a loop inside.
      cycles: static profile by operation; None where libtpu's profiler gives up.
      estimated_cycles: what XLA itself expects of its operations, without the kernels.
    """

    error: str = ""
    temp_bytes: int = 0
    argument_bytes: int = 0
    output_bytes: int = 0
    kernels: Sequence[str] = ()
    bundles: dict[str, list[int]] | None = None
    cycles: dict[str, int] | None = None
    estimated_cycles: int = 0


def compile_programs(
    programs: Sequence[Program],
    generation: str,
    *,
    profile: bool = True,
    timeout_s: float = 120.0,
    memory_mb: float = 6000.0,
) -> list[Compiled]:
    """Compile each program for one device of a TPU generation.

    Args:
      programs: what to compile.
      generation: a key of `awq_jax_kernels.chips.TPUS`.
      profile: ask for `Compiled.cycles`; v4 and v7x have none.
      timeout_s: for one program.
      memory_mb: of the child, resident.

    Returns:
      One record for each program, in order.

    Raises:
      KeyError: a generation that is not in the table.
    """
    tpu = TPUS[generation]
    profile = profile and tpu.profiled  # figures of two kinds can't be ranked
    results: list[Compiled] = []
    while len(results) < len(programs):
        results.extend(_child(programs[len(results) :], tpu, profile, timeout_s, memory_mb))
        if len(results) < len(programs):  # this one killed the child
            last = programs[len(results)]
            lost = [Compiled(error="the compiler died, ran too long or took too much memory")]
            results.extend(list(_child([last], tpu, False, timeout_s, memory_mb)) or lost)
    return results


def _child(
    programs: Sequence[Program], tpu: Tpu, profile: bool, timeout_s: float, memory_mb: float
) -> Iterator[Compiled]:
    """Results of one child, as long as it lives."""
    with tempfile.TemporaryDirectory(prefix="awq_jax_aot_") as folder:
        request = {"tpu": tpu.name, "profile": profile, "programs": [asdict(p) for p in programs]}
        Path(folder, "request.json").write_text(json.dumps(request))
        results, dump = Path(folder, "results.jsonl"), Path(folder, "dump")
        results.touch()
        with open(Path(folder, "log.txt"), "wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "awq_jax_kernels.aot.tpu", folder],
                env={**os.environ, **environment(dump, profile=profile)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield from _follow(child, results, len(programs), timeout_s, memory_mb)
        finally:
            child.kill()
            child.wait()


def _follow(child: Any, results: Path, count: int, timeout_s: float, memory_mb: float) -> Iterator[Compiled]:
    """Yield lines of the child's file until it ends, stalls or grows too large."""
    done, since = 0, time.monotonic()
    while done < count:
        alive = child.poll() is None
        lines = [line for line in results.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for line in lines[done:]:
            yield Compiled(**json.loads(line))
            done, since = done + 1, time.monotonic()
        if not alive and len(lines) == done:
            return
        if time.monotonic() - since > timeout_s or _resident_mb(child.pid) > memory_mb:
            return
        time.sleep(0.05)


def _resident_mb(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):  # it has ended, or the system has no /proc
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def environment(dump: Path, *, profile: bool) -> dict[str, str]:
    """What a process needs in order to compile with libtpu on a machine without a TPU, set before it loads.

    Args:
      dump: folder for schedules.
      profile: write static profiles there too.
    """
    flags = [f"--xla_jf_dump_to={dump}", "--xla_jf_dump_llo_text=true"]
    flags += ["--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"]
    flags += [f"--xla_jf_dump_static_llo_profile_to={dump}"] * profile
    return {
        "LIBTPU_INIT_ARGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # what the caller wants of its own programs
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from the cache leaves no dump
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        # Without these four libtpu looks for the TPU host that it is not on.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }


def _serve(folder: Path) -> None:
    """The child: compile every program of the request."""
    request = json.loads((folder / "request.json").read_text())
    dump = folder / "dump"
    with open(folder / "results.jsonl", "a") as results:
        for program in request["programs"]:
            dump.mkdir(exist_ok=True)
            try:
                record = _compile(Program(**program), TPUS[request["tpu"]], dump, request["profile"])
            except Exception as error:  # a program that does not compile is a result
                record = {"error": f"{type(error).__name__}: {error}"[:4000]}
            results.write(json.dumps(record) + "\n")
            results.flush()
            shutil.rmtree(dump, ignore_errors=True)  # tens of MB each


def _compile(program: Program, tpu: Tpu, dump: Path, profile: bool) -> dict[str, Any]:
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    narrow = {"chips_per_host_bounds": [1, 1, 1]} if tpu.single_chip else {}
    device = topologies.get_topology_desc(tpu.topology, platform="tpu", **narrow).devices[0]
    function, shapes = program.build()
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))
    traced = jax.jit(function).trace(*jax.tree.map(place, shapes))
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory: Any = compiled.memory_analysis()
    hlo = compiled.as_text() or ""
    return {
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "kernels": schedule.kernel_names(hlo),
        "estimated_cycles": schedule.estimated_cycles(hlo),
        "bundles": schedule.scheduled_bundles(dump),
        "cycles": schedule.profile_cycles(dump) if profile else None,
    }


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
