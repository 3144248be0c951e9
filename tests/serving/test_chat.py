# SPDX-License-Identifier: Apache-2.0
"""A conversation holds what was answered, and nothing else."""

import pytest

from awq_jax.serving.chat import Chat

TEMPLATE = """{% for m in messages %}{% if (m.role == "user") != (loop.index0 % 2 == 0) %}
{{ raise_exception("roles must alternate") }}{% endif %}{{ m.content }}
{% endfor %}"""


@pytest.fixture
def chat(native, tmp_path):
    pytest.importorskip("jinja2", reason="chat templates need the extra [serve]")
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return Chat(native, chat_template=tmp_path / "template.jinja", max_len=96, max_new_tokens=8)


def test_both_sides_are_kept(chat):
    said = "".join(chat.say("Return a list of"))
    assert chat.messages == [{"role": "user", "content": "Return a list of"}, {"role": "assistant", "content": said}]
    assert "".join(chat.say("and"))
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_a_line_that_is_too_long_is_not_kept(chat):
    with pytest.raises(ValueError, match="a slot 96 positions"):
        list(chat.say("word " * 200))
    assert not chat.messages
    assert "".join(chat.say("Return a list of"))


def test_an_answer_that_is_not_read_on_gives_its_slot_back(chat):
    wanted = "".join(chat.say("Return a list of"))
    chat.messages = []
    unread = chat.say("If the file")
    next(unread)
    unread.close()
    assert not chat.messages
    assert "".join(chat.say("Return a list of")) == wanted
