# SPDX-License-Identifier: Apache-2.0
"""What kernels for Hopper GPUs share: a few words of MLIR, sums over lanes and blocks, asking the cache for bytes ahead.

`registers` has constants, pointers and single instructions, `lanes` vectors of a thread and sums over many, `ahead` the
weights that what follows will read, `device` which GPUs this is for.
"""
