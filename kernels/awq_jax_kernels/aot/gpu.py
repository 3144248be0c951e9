# SPDX-License-Identifier: Apache-2.0
"""Compile programs for an NVIDIA GPU that is not here, and read what the assembler made of their Pallas kernels.

XLA takes the device's description instead of asking a driver; Mosaic GPU leaves its PTX behind, which ptxas and
nvdisasm turn into registers, spills and machine instructions. A child compiles, because the dump folder is read once,
when the plugin loads. Needs a CUDA plugin of JAX and the packages with ptxas and nvdisasm; no GPU, no driver.
"""

import glob
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from awq_jax_kernels.aot import sass
from awq_jax_kernels.aot.program import Program

__all__ = ["GPUS", "Compiled", "Gpu", "Kernel", "compile_program", "missing"]


@dataclass(frozen=True)
class Gpu:
    """What XLA and the bounds need to know of a GPU, from the vendor's data sheet.

    Attributes:
      device_kind: what ``jax.Device.device_kind`` says.
      hbm_gb_s: bytes per nanosecond.
      bf16_tflop_s: dense.
      memory_gib: of the device.
    """

    device_kind: str
    hbm_gb_s: float
    bf16_tflop_s: float
    memory_gib: int

    @property
    def target_config(self) -> str:
        """XLA's description of the device, text format."""
        return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
          core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
          block_dim_limit_z: 65535 memory_bandwidth: {int(self.hbm_gb_s * 1e9)} l2_cache_size: 52428800
          clock_rate_ghz: 1.98 device_memory_size: {self.memory_gib << 30}
          cuda_compute_capability {{ major: 9 minor: 0 }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536 }} platform_name: "CUDA"
          dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}
          device_description_str: "{self.device_kind}" """


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 3350.0, 989.0, 79),
    "h200": Gpu("NVIDIA H200", 4800.0, 989.0, 139),
}


@dataclass(frozen=True)
class Kernel:
    """One Pallas kernel after assembly.

    Attributes:
      name: of the entry.
      registers: a thread's, at launch.
      spill_bytes: stored to and loaded from local memory.
      ptx: text.
      loop: machine instructions of the innermost loop that holds matrix instructions, by opcode; loads and stores
        carry their width in bits, as in ``LDS.128``.
      products: the operands of the loop's matrix instructions, as the listing writes them.
    """

    name: str
    registers: int
    spill_bytes: int
    ptx: str = field(repr=False)
    loop: dict[str, int]
    products: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Compiled:
    """One program: why it failed, or its memory beside operands and results, and its kernels."""

    error: str = ""
    temp_bytes: int = 0
    kernels: tuple[Kernel, ...] = ()


def missing() -> str | None:
    """What this environment lacks to compile for a GPU, or None."""
    plugins = [name for name in ("xla_cuda12", "xla_cuda13") if _site(f"jax_plugins/{name}")]
    if not plugins:
        return "needs jax-cuda12-plugin or jax-cuda13-plugin"
    return None if _tool("ptxas") and _tool("nvdisasm") else "needs nvidia-cuda-nvcc and nvidia-cuda-nvdisasm"


def compile_program(program: Program, gpu: str = "h100", *, timeout_s: float = 300.0) -> Compiled:
    """Compile a program for one GPU.

    Args:
      program: what to compile.
      gpu: a key of `GPUS`.
      timeout_s: of the child.

    Raises:
      KeyError: a GPU that is not in the table.
      RuntimeError: the environment lacks something, see `missing`.
    """
    GPUS[gpu]
    if (lack := missing()) is not None:
        raise RuntimeError(f"cannot compile for {gpu}: {lack}.")
    with tempfile.TemporaryDirectory(prefix="awq_jax_aot_") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps({"gpu": gpu, "program": asdict(program)}))
        (folder / "dump").mkdir()
        environment = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",  # what the caller wants of its own programs
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from the cache leaves no dump
            "MOSAIC_GPU_DUMP_TO": str(folder / "dump"),
        }
        command = [sys.executable, "-m", "awq_jax_kernels.aot.gpu", name]
        try:
            settings = {"capture_output": True, "text": True, "timeout": timeout_s, "check": False}
            done = subprocess.run(command, env={**os.environ, **environment}, **settings)
        except subprocess.TimeoutExpired:
            return Compiled(error=f"no result in {timeout_s:g} s")
        answer = folder / "answer.json"
        if not answer.exists():
            return Compiled(error=f"the compiler died: {done.stderr.strip().splitlines()[-1:]}")
        record = json.loads(answer.read_text())
        texts = [Path(path).read_text() for path in sorted(glob.glob(str(folder / "dump" / "*.ptx")))]
        return Compiled(**record, kernels=tuple(_assemble(text) for text in texts))


def _site(pattern: str) -> list[str]:
    """Paths below the installed packages, newest toolkit first."""
    found = [path for root in site.getsitepackages() for path in glob.glob(os.path.join(root, pattern))]
    return sorted(found, key=lambda path: "cuda_nvcc" in path)


def _tool(name: str) -> str | None:
    return next(iter(_site(f"nvidia/*/bin/{name}")), shutil.which(name))


def _assemble(ptx: str) -> Kernel:
    """Run the assembler and the disassembler on one kernel."""
    with tempfile.TemporaryDirectory(prefix="awq_jax_ptx_") as folder:
        source, cubin = os.path.join(folder, "kernel.ptx"), os.path.join(folder, "kernel.cubin")
        said = _ptxas(ptx, source, cubin)
        command = [str(_tool("nvdisasm")), "-c", cubin]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used, name = re.search(r"Used (\d+) registers", said), re.search(r"entry function '(\w+)'", said)
    return Kernel(
        name=name[1] if name else "",
        registers=int(used[1]) if used else 0,
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        ptx=ptx,
        loop=sass.count(loop := sass.main_loop(listing)),
        products=tuple(operands for opcode, operands in loop if opcode.startswith("HGMMA")),
    )


def _ptxas(ptx: str, source: str, cubin: str) -> str:
    """Assemble, and return what the assembler says of registers and spills.

    JAX's compiler stamps its text with the newest version it knows, which an older ptxas refuses although it knows
    every instruction: then the stamp is lowered to the one that it asks for.

    Raises:
      RuntimeError: the text does not assemble.
    """
    Path(source).write_text(ptx)
    command = [str(_tool("ptxas")), "-v", "-arch", "sm_90a", source, "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if wanted := re.search(r"Unsupported .version [\d.]+; current version is '([\d.]+)'", done.stderr):
        Path(source).write_text(re.sub(r"^\.version .*$", f".version {wanted[1]}", ptx, count=1, flags=re.M))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas refused a kernel: {done.stderr.strip()[:1000]}")
    return done.stdout + done.stderr


def _serve(folder: Path) -> None:
    """The child: compile the program of the request."""
    request = json.loads((folder / "request.json").read_text())
    try:
        record = _compile(Program(**request["program"]), GPUS[request["gpu"]])
    except Exception as error:  # a program that does not compile is a result
        record = {"error": f"{type(error).__name__}: {error}"[:4000]}
    (folder / "answer.json").write_text(json.dumps(record))


def _compile(program: Program, gpu: Gpu) -> dict[str, Any]:
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(platform="cuda", target_config=gpu.target_config, topology="1x1x1")
    function, shapes = program.build()
    sharding = SingleDeviceSharding(topology.devices[0])
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    traced = jax.jit(function).trace(*jax.tree.map(place, shapes))
    compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    memory: Any = compiled.memory_analysis()
    return {"temp_bytes": memory.temp_size_in_bytes}


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
