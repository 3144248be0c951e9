# SPDX-License-Identifier: Apache-2.0
"""Packages that serving alone needs: the extra "serve"."""

__all__ = ["missing"]


def missing(what: str, package: str | None) -> ValueError:
    """What to say where one of them is not installed."""
    return ValueError(f"{what} {package}: pip install 'awq-jax[serve]', or '.[serve]' in a checkout.")
