# SPDX-License-Identifier: Apache-2.0
"""The version, alone, so that a build can read it without importing jax."""

__version__ = "0.1.0"
