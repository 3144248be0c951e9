# SPDX-License-Identifier: Apache-2.0
"""What kernels for Hopper GPUs share.

`registers` has constants, pointers and single instructions of MLIR, `lanes` a thread's vectors and sums over many
threads, `launch` what starts a kernel, `device` which GPUs all this is for.
"""
