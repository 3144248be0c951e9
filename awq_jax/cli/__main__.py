# SPDX-License-Identifier: Apache-2.0
"""``python -m awq_jax.cli``."""

import sys

from awq_jax.cli import main

sys.exit(main())
