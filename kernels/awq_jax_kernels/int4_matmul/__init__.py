from awq_jax_kernels.int4_matmul.reference import int4_matmul as int4_matmul
