# SPDX-License-Identifier: Apache-2.0
"""Matrix products with INT4 weights. Arrays in, arrays out: no QTensor, no models, no checkpoints.

One folder per operation; in each, `reference.py` is the definition and every other file a faster way to
compute the same thing. `nibbles.py` is the one place that defines how codes lie in bytes.
"""
