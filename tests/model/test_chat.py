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
