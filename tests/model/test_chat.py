"""Conversations in tokens: where each answer is, and that it is what the model would be asked for."""

from __future__ import annotations

import re

import pytest
from tiny_chat import CHATML, OTHER_ROLES, write_tokenizer

from model.chat import SpecialTokenInText, encode_answers, encode_chat, render
from model.errors import UserError
from model.tokenizer import load_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "Bye!"},
]
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }} "
    "</s>{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)
MARKED = CHATML.replace(
    "{{ message['content'] }}<|im_end|>",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}",
)


def tokenizer_with(tmp_path, template):
    write_tokenizer(tmp_path, template)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, MARKED], ids=["chatml", "llama2", "marked"])
def test_each_answer_is_what_the_model_is_asked_for(tmp_path, template):
    """The tokens before an answer are those of `encode_chat` for the messages before it."""
    tokenizer = tokenizer_with(tmp_path, template)
    ids, answers, ended = encode_answers(tokenizer, TALK)
    assert ended and len(answers) == 2
    for (start, end), place in zip(answers, (2, 4), strict=True):
        assert ids[:start] == encode_chat(tokenizer, TALK[:place])
        assert TALK[place]["content"] == tokenizer.decode(ids[start:end]).strip()
        assert ids[end - 1] in tokenizer.special_ids.values()
    text = render(tokenizer, TALK, answer=False)
    assert tokenizer.decode(ids) == re.sub("<s>|</s>|<.im_start.>|<.im_end.>", "", text)


BIG = "{% set big = 'a' * 9999999 %}"
BAD = {
    "other roles": (OTHER_ROLES,
                    "leaves out or changes the message of the role 'system' (it names the roles bot, human)"),
    "drops answers": (CHATML.replace("{{ message['content'] }}", "{{ message['content'] if message.role == 'user' }}"),
                      "leaves out or changes the message of the role 'system'"),
    "forgets": (CHATML.replace("in messages %}",
                               "in messages %}{% if loop.last or message.role == 'user' %}x{% endif %}"),
                "renders a message otherwise when another follows it"),
    "refuses": ("{{ raise_exception('no system role') }}", "cannot be rendered: no system role."),
    "long range": ("{% for i in range(10 ** 12) %}{% endfor %}", "gives a function a number above 16,777,216"),
    "loops": (3 * "{% for i in range(99999) %}" + 3 * "{% endfor %}", "does not end within 1,000,000 steps"),
    "long text": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 16,777,216 characters"),
    "times": ("{{ 'a' * 10 ** 10 }}", "text or list of more than 16,777,216"),
    "list times": ("{{ (10 ** 10 * [1])[0] }}", "text or list of more than 16,777,216"),
    "power": ("{{ 10 ** 99999 }}", "more than 65,536 bits"),
    "squares": ("{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
                "more than 65,536 bits"),
    "doubled": ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
                "text or list of more than 16,777,216"),
    "filter": ("{{ 'a' | center(10 ** 10) }}", "gives a function a number above 16,777,216"),
    "method": ("{{ 'a'.ljust(10 ** 10) }}", "gives a function a number above 16,777,216"),
    "wide %": ("{{ '%999999999d' % 1 }}", "text or list of more than 16,777,216"),
    "wide %.": ("{{ '%.999999999f' % 1 }}", "text or list of more than 16,777,216"),
    "wide %*": ("{{ '%*d' % (999999999, 1) }}", "text or list of more than 16,777,216"),
    "many %": ("{{ ('%9999999d' * 999) % ((1,) * 999) }}", "text or list of more than 16,777,216"),
    "one % often": (BIG + "{{ ('%(a)s' * 999) % {'a': big} }}", "text or list of more than 16,777,216"),
    "bytes %": ("{{ '%999999999d'.encode() % 1 }}", "text or list of more than 16,777,216"),
    "format filter": ("{{ '%999999999d' | format(1) }}", "text or list of more than 16,777,216"),
    "format": ("{{ '{:999999999}'.format(1) }}", "text or list of more than 16,777,216"),
    "format_map": ("{{ '{a:999999999}'.format_map({'a': 1}) }}", "text or list of more than 16,777,216"),
    "format in format": ("{{ '{:{}}'.format(1, '999999999') }}", "text or list of more than 16,777,216"),
    "one field often": (BIG + "{{ ('{0}' * 999).format(big) }}", "text or list of more than 16,777,216"),
    "replace": (BIG + "{{ big.replace('a', big) }}", "text or list of more than 16,777,216"),
    "replace filter": (BIG + "{{ big | replace('a', big) }}", "text or list of more than 16,777,216"),
    "replace nothing": (BIG + "{{ big.replace('', big) }}", "text or list of more than 16,777,216"),
    "join": (BIG + "{{ big.join(big) }}", "text or list of more than 16,777,216"),
    "join filter": (BIG + "{{ big[:99999] | list | join(big) }}", "text or list of more than 16,777,216"),
    "join map": (BIG + "{{ range(999) | map('string') | join(big) }}", "text or list of more than 16,777,216"),
    "map replace": (BIG + "{{ [big] | map('replace', 'a', big) | list }}", "text or list of more than 16,777,216"),
    "translate": (BIG + "{{ big.translate({97: big}) }}", "text or list of more than 16,777,216"),
    "expandtabs": ("{{ ('\t' * 9999999).expandtabs(9999999) }}", "text or list of more than 16,777,216"),
    "indent": ("{{ ('\n' * 999999) | indent(9999999) }}", "text or list of more than 16,777,216"),
    "wordwrap": (BIG + "{{ big | wordwrap(1, wrapstring=big) }}", "text or list of more than 16,777,216"),
    "urlize": (BIG + "{{ ('a.com ' * 99999) | urlize(target=big) }}", "text or list of more than 16,777,216"),
    "tojson": ("{{ (['a'] * 99999) | tojson(indent=9999999) }}", "text or list of more than 16,777,216"),
    "sum": ("{{ ([[1] * 99999] * 99999) | sum(start=[]) }}", "text or list of more than 16,777,216"),
    "printed": (BIG + "{{ [big] * 999999 }}", "text or list of more than 16,777,216"),
    "string filter": (BIG + "{{ ([big] * 999999) | string }}", "text or list of more than 16,777,216"),
    "~": (BIG + "{% set x = ([big] * 999999) ~ 'a' %}", "text or list of more than 16,777,216"),
    "nested": ("{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
               "text or list of more than 16,777,216"),
    "set": (BIG + "{% set x %}{% for i in range(99999) %}{{ big }}{% endfor %}{% endset %}",
            "text or list of more than 16,777,216"),
    "macro": (BIG + "{% macro m() %}{% for i in range(99999) %}{{ big }}{% endfor %}{% endmacro %}{{ m() }}",
              "text or list of more than 16,777,216"),
    "many texts": ("{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = n.x + ['a' * 9999999] %}"
                   "{% endfor %}", "take more than 536,870,912 bytes"),
    "many slices": (BIG + "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = n.x + [big[i:]] %}"
                    "{% endfor %}", "take more than 536,870,912 bytes"),
    "escapes": ("{{ messages.__class__.__mro__ }}", "cannot be rendered"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_templates_that_cannot_be_trained_on(tmp_path, kind):
    template, message = BAD[kind]
    with pytest.raises(UserError) as error:
        encode_answers(tokenizer_with(tmp_path, template), TALK)
    assert message in str(error.value)


def test_a_special_token_in_a_message_is_refused(tmp_path):
    talk = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "x"}]
    with pytest.raises(SpecialTokenInText, match="holds '<|im_end|>'".replace("|", r"\|")):
        encode_answers(tokenizer_with(tmp_path, CHATML), talk)


def test_the_ids_are_those_of_transformers(tmp_path):
    import transformers

    tokenizer = tokenizer_with(tmp_path, CHATML)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=CHATML
    )
    ids, _, _ = encode_answers(tokenizer, TALK)
    whole = theirs.apply_chat_template(TALK, return_dict=False)
    assert ids == whole


def test_a_template_file_with_a_byte_order_mark(tmp_path):
    """Windows' editors write one."""
    plain = render(tokenizer_with(tmp_path, CHATML), TALK)
    (tmp_path / "chat_template.jinja").write_text("X" + CHATML, encoding="utf-8-sig")
    assert render(load_tokenizer(tmp_path), TALK) == "X" + plain


def test_a_long_conversation_is_within_the_bounds(tmp_path):
    text = render(tokenizer_with(tmp_path, MARKED), TALK[1:3] * 2000)
    assert text.count("Hello.") == 2000


ORDINARY = """{%- set n = namespace(text='', tools=[]) -%}
{%- for m in messages -%}
{%- set n.text = n.text ~ '%-9s|%s|%.1f|' % (m.role, m['content'], loop.index) -%}
{%- set n.tools = n.tools + [{'name': m.role, 'of': [loop.index]}] -%}
{%- endfor -%}
{{ n.text[:40] }}{{ n.tools }}{{ n.tools | tojson(indent=2) }}{{ '{:>6}{}'.format(1, 'a') }}
{{ 'a b' | replace(' ', '--') }}
{{- messages | map(attribute='role') | join(', ') }}{{ 'x\ny' | indent(2) }}{{ ', '.join(['a', 'b']) }}
{{ [1, 2] | sum }}{{ '%s' | format('b') }}{{ 'a\tb'.expandtabs(4) }}{{ messages[1:][0].content[::-1] }}
{{ {'a': none} }}{{ n.missing }}"""


def test_what_templates_do_is_as_in_jinja(tmp_path):
    import json

    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    expected = plain.from_string(ORDINARY).render(messages=TALK)
    assert render(tokenizer_with(tmp_path, ORDINARY), TALK) == expected
