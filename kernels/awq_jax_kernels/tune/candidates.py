# SPDX-License-Identifier: Apache-2.0
"""Which configs are worth compiling."""

from collections.abc import Iterator

from awq_jax_kernels.chips import TPUS, Tpu
from awq_jax_kernels.int4_matmul.config import WHOLE, BlockConfig, Variant, vmem_bytes

__all__ = ["candidates"]

_BLOCK_BYTES = (1 << 19, 3 << 20)  # smaller steps cost more than they bring, larger ones end later than they need


def candidates(generation: str, m: int, k: int, n: int, g: int = 128) -> list[BlockConfig]:
    """Configs that fit the sizes and the chip, a handful.

    Raises:
      ValueError: nothing fits.
    """
    tpu = TPUS[generation]
    for bm in (512, 256, 128, 64, 32, 16):  # all rows in one block, so that the weight is fetched once
        found = [
            config
            for variant in _variants(tpu, m)
            for config in _cuts(tpu, variant, bm, m, k, n)
            if vmem_bytes(config, m, k, n, g) <= config.vmem_mib << 20
        ]
        if found:
            return found
    raise ValueError(f"no block size fits m={m}, k={k}, n={n} into {tpu.vmem_mib} MiB of {tpu.name}'s VMEM.")


def _variants(tpu: Tpu, m: int) -> list[Variant]:
    if tpu.fp8_mxu:
        return ["D"] if m <= 16 else ["D", "E"] if m <= 32 else ["E"]
    if tpu.bf16_vpu:
        return ["E", "G"] if 64 < m <= 256 else ["E"]
    return ["A"] if m <= 64 else ["A", "F"]


def _cuts(tpu: Tpu, variant: Variant, bm: int, m: int, k: int, n: int) -> Iterator[BlockConfig]:
    cores = tpu.cores
    chunk = next(c for c in (512, 256, 128) if k % c == 0)
    for bn in (128, 256, 512, 768, 1024, 1536, 2048):
        low, high = _BLOCK_BYTES
        if n % (bn * cores) or not low <= k * bn // 2 <= high:
            continue
        steps = n // cores // bn
        # The last share of y is written when nothing else is left to do; a large one had better be short. A loop of one
        # turn is unrolled into the share, where its bundles can't be told apart: without a profile, take two at least.
        turns = 1 if tpu.profiled else 2
        most = max(s for s in (1, 2, 3, 4, 6, 7, 8) if steps % s == 0 and (s == 1 or steps // s > turns))
        tiles = {min(bn, tile) for tile in (256, 512) if bn % min(bn, tile) == 0}
        for tile, splits in {(tile, s) for tile in tiles for s in ({1, most} if m <= 32 else {most})}:
            yield BlockConfig(
                variant,
                bm=bm,
                bn=bn,
                tile=tile,
                chunk=chunk,
                by_tile=m <= 16 and splits == cores == 1 and steps <= 8,  # more steps than that end soon enough
                splits=splits,
                cores=cores,
                vmem_mib=tpu.vmem_mib * 7 // 8,
            )
    share = n // cores
    if m <= 16 and tpu.profiled and n % (128 * cores) == 0 and k * share // 2 <= WHOLE:
        for tile in (t for t in (256, 512, 1024, share) if share % t == 0 and share // t <= 8):
            yield BlockConfig(
                variant,
                bm=bm,
                bn=share,
                tile=tile,
                chunk=chunk,
                by_tile=True,
                buffers=1,
                cores=cores,
                vmem_mib=tpu.vmem_mib * 7 // 8,
            )
