# SPDX-License-Identifier: Apache-2.0
"""The harness on a local task, beside its own Hugging Face model; needs ``pip install lm_eval accelerate``."""

import json

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

from awq_jax.demo import MODEL
from awq_jax.lm_eval import HarnessModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # the harness's own
]
TEXTS = (
    ("Return a list of the", " names of all"),
    ("", "The module defines"),
    ("If the file does not exist, ", "an exception is raised. " * 40),
    ("word " * 900, "more"),
)


@pytest.fixture(scope="module")
def ours():
    return HarnessModel(MODEL, batch_size=3)


@pytest.fixture(scope="module")
def theirs():
    return HFLM(str(MODEL), device="cpu", dtype="float32", batch_size=1)


def asked(kind, *arguments):
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def test_log_likelihoods_are_those_of_the_harness(ours, theirs):
    requests = asked("loglikelihood", *TEXTS)
    for (got, greedy), (want, wanted) in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-3)
        assert greedy == wanted


def test_rolling_log_likelihoods_are_those_of_the_harness(ours, theirs):
    requests = asked("loglikelihood_rolling", ("The default is to read until the end. " * 80,), ("One.",))
    got, want = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests)
    assert got == pytest.approx(want, rel=1e-4, abs=1e-3)


def test_continuations_are_those_of_the_harness(ours, theirs):
    options = {"until": ["\n\n", "."], "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", ("Return a list of", options), ("The argument must be", options))
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_a_local_task(ours, tmp_path):
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

    rows = [{"q": "Raises a", "choices": [" ValueError", " banana"], "answer": 0}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    found = simple_evaluate(ours, tasks=[task], bootstrap_iters=0)
    assert found["results"]["local"]["acc,none"] == 1.0
