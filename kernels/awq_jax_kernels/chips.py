# SPDX-License-Identifier: Apache-2.0
"""What the performance model and the block sizes need to know about a TPU generation."""

from dataclasses import dataclass

__all__ = ["TPUS", "Tpu", "tpu_of"]


@dataclass(frozen=True)
class Tpu:
    """Constants of one JAX device: one core, or the two of a megacore.

    Attributes:
      name: as in "v5e".
      device_kind: what ``jax.Device.device_kind`` says, lower case.
      topology: what `jax.experimental.topologies` calls the smallest slice.
      single_chip: the topology can be narrowed to one chip.
      clock_ghz: of the core.
      hbm_gb_s: bytes per nanosecond, from the vendor's data sheet.
      bf16_tflop_s: of the matrix units.
      vmem_mib: per core.
      cores: of the device that the topology yields; they share a "parallel" grid axis.
      megacore: a device of this generation may be two cores, whatever the topology yields.
      mxu_depth: rows of the contraction that the matrix unit takes at once.
      bf16_vpu: the vector unit computes in bfloat16.
      fp8_mxu: the matrix unit takes bfloat16 times float8.
      profiled: libtpu profiles kernels for it; there is none for v4, and the one for v7x aborts on most programs.
    """

    name: str
    device_kind: str
    topology: str
    single_chip: bool
    clock_ghz: float
    hbm_gb_s: float
    bf16_tflop_s: float
    vmem_mib: int
    cores: int
    mxu_depth: int
    megacore: bool = False
    bf16_vpu: bool = False
    fp8_mxu: bool = False
    profiled: bool = True


# Rates: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm. A v7x chip is two devices of
# half a chip each, and so is a v4 as the topology shows it.
TPUS = {
    tpu.name: tpu
    for tpu in (
        Tpu("v4", "tpu v4", "v4:2x2x1", False, 1.050, 614.0, 137.5, 16, 1, 128, megacore=True, profiled=False),
        Tpu("v5e", "tpu v5 lite", "v5e:1x1", True, 1.503, 819.0, 197.0, 128, 1, 128),
        Tpu("v5p", "tpu v5", "v5p:2x2x1", False, 1.751, 2765.0, 459.0, 64, 2, 128, megacore=True),
        Tpu("v6e", "tpu v6 lite", "v6e:1x1", True, 1.751, 1640.0, 918.0, 128, 1, 256, bf16_vpu=True),
        Tpu(
            "v7x",
            "tpu7x",
            "tpu7x:2x2x1",
            False,
            2.200,
            3700.0,
            1155.0,
            64,
            1,
            256,
            bf16_vpu=True,
            fp8_mxu=True,
            profiled=False,
        ),
    )
}


def tpu_of(device_kind: str) -> Tpu | None:
    """The record of a ``device_kind``, or None for a device that is none of these.

    >>> tpu_of("TPU v6 lite").name
    'v6e'
    """
    kind = device_kind.lower()
    aliases = {"tpu v5e": "tpu v5 lite", "tpu v5p": "tpu v5", "tpu v6e": "tpu v6 lite", "tpu 7x": "tpu7x"}
    kind = aliases.get(kind, kind)
    return next((tpu for tpu in TPUS.values() if tpu.device_kind == kind), None)
