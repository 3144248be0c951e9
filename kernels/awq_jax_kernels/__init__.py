# SPDX-License-Identifier: Apache-2.0
"""Matrix products with quantized weights. Arrays in, arrays out: no QTensor, no models, no checkpoints.

One folder per operation; in each, `reference.py` is the definition and every other file a faster way to
compute the same thing. `nibbles.py` defines how codes of up to four bits lie in bytes, `layout.py` those of eight.
"""
