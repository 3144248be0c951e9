# SPDX-License-Identifier: Apache-2.0
"""Pages are whole documents that fetch nothing, escape what they are given and leave nothing out."""

from html.parser import HTMLParser
from typing import Any

import pytest

from awq_jax._spec import Recipe
from awq_jax.compare import Compared, to_markdown
from awq_jax.pages import comparison_page, quantization_page
from awq_jax.pages.charts import Series, bars, curves, stems

VOID = {"meta", "line", "rect", "circle", "polyline", "path"}


class Strict(HTMLParser):
    """Every tag that is opened is closed in order; collects text and whatever would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset")]
        assert tag not in ("script", "link", "img", "iframe")
        self.open.append(tag)
        if tag == "meta":
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(page: str) -> str:
    parser = Strict()
    parser.feed(page)
    assert not parser.open and not parser.fetched
    return " ".join(parser.words)


def a_report(method: str = "awq") -> dict[str, Any]:
    import dataclasses

    recipe = dataclasses.asdict(Recipe(method=method))
    candidates = len(Recipe(method=method).searches.candidates)
    group = {
        "sinks": ["layers/0/attn/q", "layers/0/attn/k"],
        "producer": "layers/0/input_norm",
        "rule": "paper" if candidates > 1 else "identity",
        "power": 0.5,
        "loss": 0.5,
        "rtn_loss": 1.0,
        "losses": [1.0, *(0.5 + 0.01 * i if i % 7 else None for i in range(1, candidates))],
        "written_loss": 0.25,
        "channels": list(range(10)),
        "activation": [1.0] * 9 + [50.0],
        "weight": [0.1] * 9 + [None],
        "scale": [1.0] * 9 + [4.0],
    }
    linear = {"path": "layers/0/attn/q", "method": "rtn", "reason": "activations <are> not finite", "bits": 4}
    layer = {"index": 0, "error": None, "rtn_error": 0.1, "fell_back": True, "groups": [group], "linears": [linear]}
    return {
        "layers": [layer, {**layer, "index": 1, "error": 0.05, "fell_back": False}],
        "outside": [{"path": "lm_head", "reason": "kept"}],
        "recipe": recipe,
        "calibration": {"source": "a<b.txt", "samples": 3, "tokens": 99, "sha256": "f" * 64},
        "seconds": {"quantize": 1.5},
        "peak_memory_bytes": 10**9,
        "bytes_before": 8_000_000,
        "bytes_after": 2_000_000,
        "warnings": ["take <care>"],
        "coverage": {"rtn": 1},
    }


@pytest.mark.parametrize("method", ["minmax", "awq", "gptq", "awq+gptq"])
def test_the_page_of_a_quantization(method: str):
    words = read(quantization_page("a <model>", a_report(method), measured=[("0.1", "KL to dense")]))
    for said in (
        "a <model>",
        "activations <are> not finite",
        "lm_head",
        "take <care>",
        "a<b.txt",
        "4.00 times",
        "Layer 1",
    ):
        assert said in words
    assert "round to nearest was written" in words and method in words
    assert "channel 9: mean |x| 50.0, mean |w| None, scale 4.0" in words  # the salient channel is named


def rows() -> list[Compared]:
    make = lambda bits, method, kl: Compared(
        bits=bits,
        method=method,
        kl=kl,
        perplexity=9.0,
        perplexity_stderr=0.5,
        top1=0.9,
        nbytes=10**6,
        seconds=1.0,
        layers=() if method == "dense" else (0.1, None),
    )
    return [
        make(16, "dense", 0.0),
        *(make(b, m, k) for b, m, k in ((4, "minmax", 0.2), (4, "awq", 0.1), (3, "awq", 0.4))),
    ]


def test_the_page_of_a_comparison_and_its_table():
    import dataclasses

    words = read(comparison_page("a <model>", [dataclasses.asdict(row) for row in rows()], "99 tokens"))
    assert "lowest KL at INT4: awq" in words and "lowest KL at INT3: awq" in words and "0.50" in words
    lines = to_markdown(rows()).splitlines()
    assert len(lines) == 2 + 4
    assert [line.split(" | ")[3] for line in lines[2:]] == ["–", "1.00", "0.50", "–"]  # no minmax at 3 bits


def test_charts_of_nothing_and_of_gaps_are_still_charts():
    made = bars([], [Series("a", [])], label="x") + bars(["0"], [Series("a", [None]), Series("b", [0.0])], label="x")
    made += curves([], None, label="x") + curves([("a", [0.5], [None])], (0.5, 1.0), label="x")
    made += stems([], [], [], [], salient=set(), label="x") + stems([3], [0.0], [[None]], ["t"], salient={0}, label="x")
    assert "nan" not in made and made.count('role="img"') == 6 and made.count("<svg") == made.count("</svg>")


def test_a_layer_that_is_as_it_was_was_not_helped():
    report = a_report("minmax")
    assert "1 of 2 layers where the method helped" in " ".join(read(quantization_page("x", report)).split())
    report["layers"][1]["error"] = report["layers"][1]["rtn_error"]
    assert "0 of 2 layers where the method helped" in " ".join(read(quantization_page("x", report)).split())


def test_values_that_would_run_into_each_other_are_left_to_the_pointer():
    draw = lambda value: bars(list("abcdefgh"), [Series(name, [value] * 8) for name in "xy"], label="x")
    assert draw(0.02).count(">0.02</text>") >= 16
    long = draw(0.00706)
    assert ">0.00706</text>" not in long and long.count("0.00706</title>") == 16


def test_what_is_far_above_round_to_nearest_leaves_the_picture_and_is_not_drawn_as_level():
    """A line along the upper edge would say that all large exponents cost the same."""
    picture = curves([("a", [0.0, 0.5, 1.0], [0.9, 5.0, 50.0])], (0.0, 0.9), label="x")
    line = picture.split('<polyline points="')[1].split('"')[0]
    heights = [float(point.split(",")[1]) for point in line.split()]
    top = float(picture.split("<svg y=")[1].split('"')[1])
    assert heights[0] > top > heights[1] > heights[2]
