# SPDX-License-Identifier: Apache-2.0
import pytest

from awq_jax_convert.hf import HFCheckpoint
from tests.models.families import TINY
from tests.tiny_models import Oracle, save_oracle


@pytest.fixture(scope="session", params=TINY, ids=lambda row: row.id)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Each tiny model in turn, saved in float32 as one file."""
    return save_oracle(request.param, tmp_path_factory.mktemp(request.param.id))


@pytest.fixture(scope="session")
def checkpoint(oracle: Oracle) -> HFCheckpoint:
    """The oracle's directory, opened by us."""
    return HFCheckpoint.open(oracle.path)
