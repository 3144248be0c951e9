# SPDX-License-Identifier: Apache-2.0
"""Reports as HTML pages that need nothing but a browser: no script, no font, no file beside them."""

from awq_jax.pages.comparison import comparison_page
from awq_jax.pages.quantization import quantization_page

__all__ = ["comparison_page", "quantization_page"]
