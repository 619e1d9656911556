"""Promises on templates that come with a tokenizer: rendered, in bounded time and memory."""

from __future__ import annotations

import resource

import pytest

from codd_hf.text import chat_templates
from codd_hf.text.encoding import encode_chats
from tiny_pipeline import tiny_pipeline

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "7", "tool_calls": [{"name": "add", "arguments": {"a": 3}}]},
    {"role": "user", "content": "And 5?"},
]
ABSURD = {
    "loops": "{% set r = range(90000) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a product": "{{ 'a' * 10**11 }}",
    "doubling": "{% set n = namespace(s='ab') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a field": "{{ '%010000000000d' % 1 }}",
    "laughs": "{% set n = namespace(s=['lol']) %}{% for a in range(9) %}{% set n.s = [n.s] * 90 %}"
    "{% endfor %}{{ n.s|tojson }}",
    "a long text": "{{ 'a' * 5000000 }}",
    "its own length": "{# " + "x" * (1 << 22) + " #}",
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.mark.parametrize("what", ABSURD)
def test_template_that_never_ends_or_takes_all_memory_is_refused(what, pipe, monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 1.0)
    monkeypatch.setattr(pipe.tokenizer, "chat_template", ABSURD[what])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"cannot be written in the chat template") as caught:
        pipe(messages=CHAT[1:2], gen_length=4, num_inference_steps=4, block_length=4)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 18
    monkeypatch.setattr(pipe.tokenizer, "chat_template", "{{ messages[0].content }}")
    rows, faults = encode_chats([CHAT], pipe.tokenizer)
    assert not faults  # a template after it is rendered
    assert pipe.tokenizer.decode(rows[0]) == "Be brief."


@pytest.mark.parametrize(
    "template",
    [
        chat_templates.CHAT_TEMPLATE,
        "{% for m in messages %}{{ loop.index0 }}{% if m.tool_calls %}{{ m.tool_calls|tojson }}"
        "{% endif %}{% else %}none{% endfor %}{{ eos_token }}{{ add_generation_prompt }}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endif %}{% endfor %}{{ tools|tojson }}{{ extra }}",
    ],
)
def test_template_writes_what_transformers_writes(template, pipe, monkeypatch):
    def add(a: int):
        """
        Adds.

        Args:
            a: A number.
        """

    monkeypatch.setattr(pipe.tokenizer, "chat_template", template)
    kwargs = {"add_generation_prompt": True, "tools": [add], "extra": "more"}
    expected = pipe.tokenizer.apply_chat_template(CHAT, tokenize=False, **kwargs)
    assert chat_templates.render_chat(pipe.tokenizer, CHAT, **kwargs) == expected


@pytest.mark.parametrize("kwargs", [{"x": lambda: 0}, {"tools": 3}, {"messages": 1}, {"self": 1}])
def test_argument_that_a_template_cannot_have_is_refused(kwargs, pipe, monkeypatch):
    monkeypatch.setattr(pipe.tokenizer, "chat_template", "{{ messages[0].content }}")
    with pytest.raises(ValueError, match="`messages` cannot be encoded: row 0"):
        pipe(messages=CHAT[1:2], gen_length=4, chat_template_kwargs=kwargs)


def test_long_conversation_is_written(pipe, monkeypatch):
    chat = [{"role": "user", "content": "word " * 20_000}] * 4
    for template in (chat_templates.CHAT_TEMPLATE, "{{ messages|map(attribute='content')|join }}"):
        monkeypatch.setattr(pipe.tokenizer, "chat_template", template)
        rows, faults = encode_chats([chat], pipe.tokenizer)
        assert not faults
        assert len(rows[0]) > 4 * 20_000
