# SPDX-License-Identifier: Apache-2.0
"""Find block sizes for TPUs that are not here: compile candidates, rank them by the compiler's own schedule.

python -m awq_jax_kernels.tune --gen v6e --shape 4096x14336 --m 16,64
"""
