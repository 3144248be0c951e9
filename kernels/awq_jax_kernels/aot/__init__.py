# SPDX-License-Identifier: Apache-2.0
"""Compile for a TPU that this machine does not have, and read what the compiler knows of the cost.

`program` is what to compile, `tpu.compile_programs` runs libtpu in a child process, `schedule` reads its dumps.
"""
