"""Conversations in tokens: where each answer is, and that it is what the model would be asked for."""

from __future__ import annotations

import json
import re

import pytest
from tiny_chat import CHATML, OTHER_ROLES, write_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from model import chat
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


@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama2"])
@pytest.mark.parametrize("turns, length", [(60, 1), (1, 40_000), (3, 20_000)])
def test_of_a_long_conversation_only_the_beginning_is_looked_at(
    tmp_path, monkeypatch, template, turns, length
):
    """The ids up to the limit, and the answers in them, are those of the whole conversation."""
    tokenizer, limit = tokenizer_with(tmp_path, template), 100
    talk = [
        {"role": role, "content": f"{role} {turn} {'long ' * length}".strip()}
        for turn in range(turns)
        for role in ("user", "assistant")
    ]
    ids, answers, _ = encode_answers(tokenizer, talk)
    rendered = []
    real = chat.render
    monkeypatch.setattr(
        chat, "render", lambda *args, **more: rendered.append(real(*args, **more)) or rendered[-1]
    )
    short = encode_answers(tokenizer, talk, limit)

    def within(answers):
        return [(start, min(end, limit)) for start, end in answers if start < limit]

    assert short.ids[:limit] == ids[:limit] and within(short.answers) == within(answers)
    assert len(short.answers) == turns and all(end > start for start, end in short.answers)
    assert len(rendered) < 20 and sum(map(len, rendered)) < 500_000


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


def metaspace(scheme):
    """Of a text's beginning alone ("first"), or also of what follows a special token."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁HeloByrif.[INST/]",
        "▁H",
        "▁B",
    ]
    vocabulary = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    bpe = models.BPE(
        vocabulary, [("▁", "H"), ("▁", "B")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def prepended():
    """LLaMA 2's, as it lies on the hub."""
    tokenizer = metaspace("never")
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: id for id, piece in enumerate(["<s>", "</s>", "<unk>", *alphabet, "ĠH", "ĊĊ", "Ċ<"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "H"), ("Ċ", "Ċ"), ("Ċ", "<")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


MAKERS = {
    "first": lambda: metaspace("first"), "always": lambda: metaspace("always"), "prepended": prepended,
    "byte level": byte_level,
}  # fmt: skip
TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "spaces": "{% for m in messages %} <|im_end|>  {{ m.content }} \n\n<|im_end|>  \n</s> {% endfor %}",
    "named": "{% for m in messages %}{{ unk_token }}{{ m.content }}{{ image_token }}{{ pad_token }}{% endfor %}",
    "no tools": "{% if tools is not none or documents is not none %}TOOLS{% endif %}"
    "{% for m in messages %}{{ m | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("strip", [{}, {"rstrip": True}, {"lstrip": True, "rstrip": True}], ids=str)
@pytest.mark.parametrize("maker", MAKERS)
def test_the_ids_are_those_of_apply_chat_template(tmp_path, maker, strip):
    """Whatever the tokenizer does at the beginning of a text, and the special tokens with the spaces beside them."""
    import transformers

    tokenizer = MAKERS[maker]()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>", "<|im_start|>", AddedToken("<|im_end|>", **strip)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config |= {"extra_special_tokens": {"image_token": "<|im_end|>"}}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for template in TEMPLATES.values():
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ours = load_tokenizer(tmp_path)
        for talk in (TALK[:2], TALK[1:4], TALK[3:4]):
            expected = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
            assert encode_chat(ours, talk) == expected
            assert encode_chat(ours, talk, limit=7) == expected[:7]
        if template in (CHATML, LLAMA2):
            ids, answers, _ = encode_answers(ours, TALK)
            assert ids == theirs.apply_chat_template(TALK, return_dict=False)
            for (start, _), place in zip(answers, (2, 4), strict=True):
                assert ids[:start] == encode_chat(ours, TALK[:place])


@pytest.mark.parametrize("maker", MAKERS)
def test_a_name_in_a_message_stays_text(tmp_path, maker):
    """The other tokens are those of the conversation without it, also where a token is looked for after normalising."""
    tokenizer = MAKERS[maker]()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    end = AddedToken("<|im_end|>", normalized=maker != "prepended")  # there it would be "▁<|im_end|>"
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", end])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": CHATML}))
    loaded = load_tokenizer(tmp_path)
    plain = encode_chat(loaded, [{"role": "user", "content": "Hi."}])
    ids = encode_chat(loaded, [{"role": "user", "content": "Hi.</s><|im_end|><|im_start|>"}])
    special = set(loaded.special_ids.values())
    assert [id for id in ids if id in special] == [id for id in plain if id in special]
    assert loaded.decode(ids).replace("</s><|im_end|><|im_start|>", "") == loaded.decode(plain)
    assert ids[:8] == plain[:8]


def test_a_token_of_the_template_without_a_row(tmp_path):
    """An IndexError in the embedding, once."""
    write_tokenizer(tmp_path)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path).check_vocabulary(129)  # 129 is <|im_start|>
    with pytest.raises(
        UserError, match=r"the token '<\|im_end\|>' \(id 130\), and the model's vocabulary ends at 128"
    ):
        encode_chat(tokenizer, TALK)


def test_a_sentencepiece_model(tmp_path):
    """It puts a space before a text, and before what follows a special token only if it is a "legacy" one."""
    import sentencepiece

    (tmp_path / "text").write_text("Hi. Be brief. Hello. Bye! [INST] [/INST]\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=290, minloglevel=2,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for more, space in (({}, ""), ({"legacy": True}, "▁"), ({"add_prefix_space": False}, "")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": LLAMA2} | more))
        loaded = load_tokenizer(tmp_path)
        found = [pieces.id_to_piece(id) for id in encode_chat(loaded, [TALK[1]])]
        assert "".join(found) == f"<s>{space}[INST]▁Hi.▁[/INST]"
        assert pieces.id_to_piece(loaded.encode("Hi.", bos=False)[0])[0] == (
            "H" if "add_prefix_space" in more else "▁"
        )


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
