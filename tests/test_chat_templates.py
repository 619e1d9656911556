"""Promises on templates that come with a tokenizer: rendered, in bounded time and memory."""

from __future__ import annotations

import json
import resource
import threading
from time import monotonic

import pytest

from codd_hf.text import chat_templates
from codd_hf.text.chat_templates import bounded_templates
from codd_hf.text.encoding import encode_chats
from tiny_pipeline import tiny_pipeline

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "7", "tool_calls": [{"name": "add", "arguments": {"a": 3}}]},
    {"role": "user", "content": "And 5?"},
]
ABSURD = {
    "loops": "{% set r = range(90000) %}{% for a in r %}{% for b in r %}"
    "{% for c in r %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "text in loops": "{% for a in range(90000) %}{% for b in range(90000) %}xyz{% endfor %}"
    "{% endfor %}",
    "text in a block": "{% set t %}{% for a in range(90000) %}{{ 'x' * 900 }}{% endfor %}"
    "{% endset %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a product": "{{ 'a' * 10**11 }}",
    "a product of a list": "{{ ([0] * 10**11)|length }}",
    "doubling": "{% set n = namespace(s='ab') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}",
    "doubling by plus": "{% set n = namespace(s=[1, 2]) %}{% for a in range(99) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "squares": "{% set n = namespace(i=7) %}{% for a in range(99) %}"
    "{% set n.i = n.i * n.i %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a filter": "{{ 'a'|center(10000000000) }}",
    "indents": "{{ ('a\n' * 90000)|indent(90000) }}",
    "batches": "{{ [1]|batch(10000000000, 1)|list|length }}",
    "a field": "{{ '%010000000000d' % 1 }}",
    "a field by format": "{{ '{:>10000000000}'.format(1) }}",
    "a field by a filter": "{{ '%010000000000d'|format(1) }}",
    "a method": "{{ 'a'.ljust(10000000000) }}",
    "replacing": "{{ ('a' * 90000).replace('a', 'b' * 90000) }}",
    "joining": "{{ (['a'] * 90000)|join('b' * 90000) }}",
    "laughs": "{% set n = namespace(s=['lol']) %}{% for a in range(9) %}{% set n.s = [n.s] * 90 %}"
    "{% endfor %}{{ n.s }}",
    "laughs in JSON": "{% set n = namespace(s=['lol']) %}{% for a in range(9) %}"
    "{% set n.s = [n.s] * 90 %}"
    "{% endfor %}{{ n.s|tojson }}",
    "bytes": "{{ (5).to_bytes(10000000000, 'big')|length }}",
    "lorem ipsum": "{{ lipsum(n=1000000) }}",
    "its own length": "{# " + "x" * (1 << 22) + " #}",
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def limited_memory():
    """Asking for gigabytes is an error in this process, not the end of the machine."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize("what", ABSURD)
def test_template_that_never_ends_or_takes_all_memory_is_refused(
    what, pipe, monkeypatch, limited_memory
):
    monkeypatch.setattr(chat_templates, "SECONDS", 0.5)
    monkeypatch.setattr(pipe.tokenizer, "chat_template", ABSURD[what])
    began, peak = monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"cannot be written in the chat template") as caught:
        pipe(messages=CHAT[1:2], gen_length=4, num_inference_steps=4, block_length=4)
    assert "\n" not in str(caught.value)
    assert monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 20  # a gigabyte


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m.role }}>{{ m['content']|trim }}{% endfor %}",
        "{% for m in messages %}{{ loop.index0 }}/{{ loop.length }}{{ ',' if not loop.last }}"
        "{% if loop.first %}!{% endif %}{% if m.tool_calls %}{{ m.tool_calls|tojson(indent=2) }}"
        "{% endif %}{% else %}none{% endfor %}",
        "{% macro show(m, n) %}{{ m.role ~ ': ' + m.content }}{{ '-' * n }}{% endmacro %}"
        "{% for m in messages if m.role != 'system' %}{{ show(m, 3)|indent(2) }}{% endfor %}",
        "{%- set ns = namespace(found=false, text='') -%}{%- for m in messages[::-1] -%}"
        "{%- if m.role == 'user' and not ns.found -%}{%- set ns.found = true -%}"
        "{%- set ns.text = '%s|%5d|{}'|format(m.content, 42) -%}{%- endif -%}{%- endfor -%}"
        "{{ ns.text.replace('?', '!').upper().split('|')|join(';') }}",
        "{% set t %}{% for m in messages %}{{ m.content.strip()[:4] }}{% endfor %}{% endset %}"
        "{{ t|length }} {{ 7 % 3 }} {{ 2 ** 8 }} {{ 3 * 4 + 1 }} {{ 2147483648 * 2 }} {{ none }}"
        "{{ true }} {{ messages|map(attribute='role')|list }} {{ 'a{}'.format(1) }}",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v|string }}{% if loop.index > 1 %}"
        "{% break %}{% endif %}{% endfor %}"
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endif %}{% endfor %}{{ eos_token }}{{ add_generation_prompt }}",
    ],
)
def test_template_within_bounds_writes_what_transformers_writes(template, pipe, monkeypatch):
    expected = chat_templates.chat_template_utils._cached_compile_jinja_template(template)
    tokenizer = pipe.tokenizer
    expected = expected.render(
        messages=CHAT,
        tools=None,
        documents=None,
        add_generation_prompt=True,
        **tokenizer.special_tokens_map,
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with bounded_templates():
        inside = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    outside = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert inside == outside == expected


def test_long_conversation_is_written(pipe):
    chat = [{"role": "user", "content": "word " * 20_000}] * 20
    rows, faults = encode_chats([chat], pipe.tokenizer)
    assert not faults
    assert len(rows[0]) > 20 * 20_000


def test_bounds_hold_for_the_thread_that_asked_for_them(pipe, monkeypatch):
    monkeypatch.setattr(pipe.tokenizer, "chat_template", "{{ 'a' * 5000000 }}")
    written = []
    with bounded_templates():
        thread = threading.Thread(
            target=lambda: written.append(pipe.tokenizer.apply_chat_template(CHAT, tokenize=False))
        )
        thread.start()
        thread.join()
    assert len(written[0]) == 5_000_000


def test_template_of_a_folder_is_bounded_in_a_pipeline_of_it(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 0.5)
    pipe.save_pretrained(tmp_path)
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(ABSURD["loops"])
    loaded = type(pipe).from_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["tokenizer"]
    with pytest.raises(ValueError, match="takes longer than"):
        loaded("Hello", gen_length=4, num_inference_steps=4, block_length=4)
