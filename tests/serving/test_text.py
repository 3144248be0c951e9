# SPDX-License-Identifier: Apache-2.0
"""Text that comes in pieces, templates that come from strangers, bodies that come from clients."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_jax.demo import MODEL as TINY_LM
from awq_jax.serving.engine import start_of
from awq_jax.serving.protocol import Refusal, parse
from awq_jax.serving.template import ChatTemplate
from awq_jax.serving.text import TextStream

PIECES = st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=30)


def as_bytes(ids):
    """A decoder in which one token is one byte: the hardest case for characters of several."""
    return bytes(ids).decode("utf-8", errors="replace")


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40), st.data())
def test_pieces_join_to_the_whole(whole, data):
    raw = list(whole.encode("utf-8", errors="replace"))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    stream = TextStream(as_bytes)
    made = "".join(stream.push(raw[a:b]) for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True))
    assert made + stream.finish() == as_bytes(raw)


@settings(deadline=None, max_examples=200)
@given(st.text("abE", max_size=30), st.integers(1, 4))
def test_a_stop_string_ends_the_text_wherever_it_is_cut(whole, size):
    stream = TextStream(as_bytes, stops=("aE", "bbE"))
    raw = list(whole.encode())
    made = "".join(stream.push(raw[at : at + size]) for at in range(0, len(raw), size)) + stream.finish()
    ends = [whole.index(stop) for stop in ("aE", "bbE") if stop in whole]
    # Pieces may end before the whole is seen: what counts is the first stop that is complete.
    assert whole.startswith(made) and (made in {whole[:end] for end in ends} if ends else made == whole)


MESSAGES = [{"role": "user", "content": "hello"}]


def test_a_template_renders_messages():
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}[assistant]{% endif %}"
    pytest.importorskip("jinja2", reason="chat templates need the extra [serve]")
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES) == "<s>[user]hello[assistant]"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content / 2 }}",
    ],
)
def test_a_template_gets_no_further_than_its_sandbox(source):
    pytest.importorskip("jinja2", reason="chat templates need the extra [serve]")
    with pytest.raises(ValueError, match="does not take these messages"):
        ChatTemplate(source, {}).render(MESSAGES)


def test_a_damaged_template_is_refused_when_it_is_read():
    pytest.importorskip("jinja2", reason="chat templates need the extra [serve]")
    with pytest.raises(ValueError, match="can't be read"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        ("completion", b"{", "not JSON"),
        ("completion", b"[]", "JSON object"),
        ("completion", b"[" * 100_000, "not JSON"),
        ("completion", b"{}", "prompt is missing"),
        ("completion", b'{"prompt": "a", "echo": true}', "echo=true is not implemented"),
        ("completion", b'{"prompt": "a", "n": 2}', "n=2 is not implemented"),
        ("completion", b'{"prompt": "a", "frobnicate": 1}', "frobnicate=1 is not implemented"),
        ("completion", b'{"prompt": "a", "max_tokens": "9"}', "max_tokens must be a whole number"),
        ("completion", b'{"prompt": "a", "max_tokens": true}', "max_tokens must be a whole number"),
        ("completion", b'{"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}', "at most four"),
        ("completion", b'{"prompt": "a", "stop": [""]}', "at most four"),
        ("chat", b'{"messages": []}', "at least one"),
        ("chat", b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "only text"),
        ("chat", b'{"messages": [{"role": "user"}]}', "must be text"),
        ("chat", b'{"messages": [{"role": "wizard", "content": "a"}]}', 'role "wizard" is none of system, developer'),
    ],
)
def test_bodies_that_are_refused(kind, body, said):
    with pytest.raises(Refusal, match=said) as caught:
        parse(kind, body)
    assert caught.value.status == 400
    assert caught.value.body()["error"]["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_accepted():
    body = {"prompt": "a", "n": 1, "logprobs": None, "presence_penalty": 0, "seed": -1, "temperature": 0}
    asked = parse("completion", json.dumps(body).encode())
    assert asked.options == {"temperature": 0, "seed": 2**32 - 1}


def test_numbers_of_any_size_are_understood():
    asked = parse("completion", json.dumps({"prompt": "a", "top_k": 10**30, "seed": 10**30}).encode())
    assert start_of(asked.request((1,), 10, ())).sampling.top_k[0] == 2**31 - 1
    with pytest.raises(Refusal, match="ordinary size"):
        parse("completion", b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-1.0, 101.0, math.nan, math.inf)),
        *(("top_p", value) for value in (0.0, -0.5, 1.5, math.nan, math.inf)),
        *(("top_k", 0), ("top_k", -(10**30)), ("max_tokens", 0), ("max_tokens", -5)),
    ],
)
def test_numbers_out_of_range_are_refused_by_their_names(field, value):
    asked = parse("completion", json.dumps({"prompt": "a", field: value}).encode())  # NaN as Python's json writes it
    with pytest.raises(Refusal, match=f"{field} is {value}; it must") as caught:
        asked.request((1,), 10, ())
    assert caught.value.status == 400


def test_a_template_that_is_a_link_out_of_the_checkpoint_is_not_read(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"chat_template.jinja is a link to .*; it is not followed"):
        ChatTemplate.of_checkpoint(tmp_path / "model")


def test_a_system_message_without_a_template_is_refused(capsys):
    from awq_jax.cli import main

    assert main(["chat", str(TINY_LM), "--system", "be brief"]) == 2
    assert "has no chat template, so a system message has no place" in capsys.readouterr().err
