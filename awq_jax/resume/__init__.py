# SPDX-License-Identifier: Apache-2.0
"""What a killed run leaves and the next one goes on from: finished layers, kept by the digest of their content."""

from awq_jax.resume.fingerprint import fingerprint as fingerprint
from awq_jax.resume.session import MODES as MODES
from awq_jax.resume.session import Session as Session
from awq_jax.resume.session import refuse_output as refuse_output
from awq_jax.resume.session import resuming as resuming
from awq_jax.resume.session import store_of as store_of
