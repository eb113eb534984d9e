from datetime import datetime

import pytest
from byte_tokenizer import BOS, EOS, byte_level_tokenizer

from router.chat import ChatTemplate, ChatTemplateError

SPECIAL_TOKENS = {"bos_token": BOS, "eos_token": EOS}
MESSAGES = [("system", " be brief\n"), ("user", 'a <b> & "é" \U0001f600'), ("assistant", "{{ 1 }}")]

# The things that templates of well-known models do.
CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if tools is not none or documents is not none %}tools{% endif %}
{% set ns = namespace(turns=0) %}
{%- for message in messages %}
    {%- if loop.index0 > 7 %}{% break %}{% endif %}
    {% set ns.turns = ns.turns + 1 %}
    <{{ message.role }}> {{ message.content | tojson }} {{ message | tojson(indent=2) }}
    {% generation %}{{ ns.turns ~ eos_token }}{% endgeneration %}
    {{ dict(a=1) | tojson(separators=(',', ':')) }} {{ pad_token }} {{ message.name is defined }}
{% endfor %}
{% macro turn(who) %}<{{ who }}>{% endmacro %}
{{ turn('assistant') if add_generation_prompt }}
"""


def render(source: str, messages: list[tuple[str, str]] | None = None) -> str:
    return ChatTemplate(source, SPECIAL_TOKENS).render(messages or [("user", "hello")])


@pytest.mark.parametrize("source", [CHATML, LLAMA])
def test_renders_what_transformers_renders(source: str) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), chat_template=source, **SPECIAL_TOKENS
    )
    chat = [{"role": role, "content": content} for role, content in MESSAGES]
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert render(source, MESSAGES) == expected


def test_chatml() -> None:
    assert render(CHATML) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_may_ask_for_the_date() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b') }}", {}, now=lambda: datetime(2024, 7, 26))
    assert template.render([("user", "hello")]) == "26 Jul"


def test_a_message_is_never_read_as_a_template() -> None:
    hostile = "{{ bos_token }}{% raise %}"
    assert render("{{ messages[0].content }}", [("user", hostile)]) == hostile


def test_a_refusal_of_the_template_is_told() -> None:
    source = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('start with\\nuser') }}{% endif %}"
    )
    assert render(source) == ""
    with pytest.raises(
        ChatTemplateError, match=r"^the model's chat template refuses: start with user$"
    ):
        render(source, [("system", "x")])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].content.nothing.more }}", "UndefinedError: .*nothing"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include 'other' %}", "TypeError"),
        ("{{ messages[0] | tojson(indent=messages[0].content) }}{{ ''|nosuch }}", "nosuch"),
    ],
)
def test_any_failure_is_one_line(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message) as failure:
        render(source)
    assert "\n" not in str(failure.value)


def test_a_template_that_is_no_template_is_refused_at_once() -> None:
    with pytest.raises(ChatTemplateError, match=r"^the model's chat template: TemplateSyntaxError"):
        ChatTemplate("{% for %}", {})
