# SPDX-License-Identifier: Apache-2.0
"""What the products cost.

python -m awq_jax_kernels.bench --static --gen v5e,v6e    # by the compiler, for TPUs that are not here
python -m awq_jax_kernels.bench                           # timed on this machine's accelerator
python -m awq_jax_kernels.bench --interpret               # the same code on a CPU; its times mean nothing
"""
