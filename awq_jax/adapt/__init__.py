# SPDX-License-Identifier: Apache-2.0
"""The method on anybody's model: a pure function of a tree of parameters, whatever framework wrote it.

`propose` finds what shares a scale and what absorbs it, `observe` takes statistics, `quantize` searches, folds and
rounds, `serve` runs the user's own function on the result. `awq_jax.nnx` and `awq_jax.linen` are these verbs on Flax
modules.
"""

from awq_jax.adapt.candidates import find_weights as find_weights
from awq_jax.adapt.columns import Columns as Columns
from awq_jax.adapt.coverage import Coverage as Coverage
from awq_jax.adapt.kernel import QKernel as QKernel
from awq_jax.adapt.layout import Layout as Layout
from awq_jax.adapt.observe import merge_tree as merge_tree
from awq_jax.adapt.observe import observe as observe
from awq_jax.adapt.observe import observing as observing
from awq_jax.adapt.propose import propose as propose
from awq_jax.adapt.quantize import Outcome as Outcome
from awq_jax.adapt.quantize import quantize as quantize
from awq_jax.adapt.quantize import quantize_params as quantize_params
from awq_jax.adapt.serve import serve as serve
from awq_jax.adapt.table import Group as Group
from awq_jax.adapt.table import Table as Table
from awq_jax.adapt.verify import verify as verify
