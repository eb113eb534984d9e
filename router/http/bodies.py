"""Owns what clients may send: OpenAI's request bodies with vLLM's usual extras.

Types are checked here; ranges are the front door's (router/admission.py). A field that would change
the answer and is not supported is refused when its value asks for something; one that changes
nothing is taken and ignored.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from router.admission import DEFAULT_LIMITS
from router.http.errors import invalid

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]  # one error of a million is enough


def _most(length: int) -> Any:
    """Of a list; no more of it are looked at."""
    return Field(max_length=length)


# They change nothing in the answer.
HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Not supported, and the values that ask for nothing; null is one of them everywhere.
NOT_SUPPORTED: Mapping[str, Collection[Any]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
CHAT_NOT_SUPPORTED = {**NOT_SUPPORTED, "logprobs": (False,), "top_logprobs": (0,)}
COMPLETION_NOT_SUPPORTED = {
    **NOT_SUPPORTED,
    "echo": (False,),
    "logprobs": (),  # 0 asks for those of the tokens chosen
    "suffix": ("",),
}
MESSAGE_HARMLESS = frozenset({"name"})
# A client sends answers back as it got them, with all the fields that were empty.
MESSAGE_NOT_SUPPORTED: Mapping[str, Collection[Any]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning_content": ("",),
    "refusal": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
}


def _described(
    not_supported: Mapping[str, Collection[Any]], harmless: Collection[str]
) -> Callable[[dict[str, Any]], None]:
    """Adds to a schema what `check_extras` lets pass."""

    def describe(schema: dict[str, Any]) -> None:
        for name, values in not_supported.items():
            schema["properties"][name] = {"enum": [None, *values], "description": "Not supported."}
        for name in sorted(harmless):
            schema["properties"][name] = {"description": "Taken and ignored."}
        schema["additionalProperties"] = False

    return describe


class _Received(BaseModel):
    # What is not a field is kept, for `check_extras`.
    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Received):
    include_usage: bool | None = Field(None, description="A last chunk tells the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Every chunk tells it so far.")
    include_obfuscation: bool | None = Field(None, description="Taken and ignored.")


class TextPart(_Received):
    type: Literal["text"]
    text: str


def _content_form(value: object) -> str | None:
    if value is None:
        return "none"
    return "text" if isinstance(value, str) else "parts" if isinstance(value, list) else None


# The words in the tags of such unions; no field has one of these names.
FORMS = frozenset({"form text", "form parts", "form none", "form texts", "form ids", "form lists"})


def _form(tag: str) -> Tag:
    return Tag(f"form {tag}")


def _tagged(form: str | None) -> str | None:
    return None if form is None else f"form {form}"


Content = Annotated[
    Annotated[str, _form("text")]
    | Annotated[Many[TextPart], _most(DEFAULT_LIMITS.content_parts_max), _form("parts")]
    | Annotated[None, _form("none")],
    Discriminator(
        lambda value: _tagged(_content_form(value)),
        custom_error_type="content",
        custom_error_message="needs a string or a list of text parts",
    ),
]


class ChatMessage(_Received):
    model_config = ConfigDict(json_schema_extra=_described(MESSAGE_NOT_SUPPORTED, MESSAGE_HARMLESS))

    role: str
    content: Content = None

    @property
    def text(self) -> str:
        """The text parts are joined with a line break."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


def _prompt_form(value: object) -> str | None:
    if type(value) is str:
        return "text"
    if not isinstance(value, list) or not value:
        return None
    return {str: "texts", int: "ids", list: "lists"}.get(type(value[0]))


Prompt = Annotated[
    Annotated[str, _form("text")]
    | Annotated[Many[str], _most(DEFAULT_LIMITS.choices_max), _form("texts")]
    | Annotated[Many[int], _form("ids")]
    | Annotated[Many[Many[int]], _most(DEFAULT_LIMITS.choices_max), _form("lists")],
    Discriminator(
        lambda value: _tagged(_prompt_form(value)),
        custom_error_type="prompt",
        custom_error_message="needs a string, a list of token ids, or a list of either",
    ),
]


def _stop_form(value: object) -> str | None:
    if value is None:
        return "none"
    return "text" if isinstance(value, str) else "texts" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[str, _form("text")]
    | Annotated[Many[str], _most(DEFAULT_LIMITS.stop_strings_max), _form("texts")]
    | Annotated[None, _form("none")],
    Discriminator(
        lambda value: _tagged(_stop_form(value)),
        custom_error_type="stop",
        custom_error_message="needs a string or a list of strings",
    ),
]


class Body(_Received):
    """What both kinds of request have. Unset and null are the same."""

    model: str | None = Field(None, description="A name from /v1/models; unset: the one served.")
    max_tokens: Int32 | None = Field(None, description="Unset: 256, or what room there is.")
    temperature: float | None = Field(None, description="0 to 2; 0 is greedy. Unset: 1.")
    top_p: float | None = Field(None, description="Over 0 to 1. Unset: 1.")
    n: Annotated[int, Field(ge=1, le=DEFAULT_LIMITS.n_max)] | None = Field(
        None, description="Answers to each prompt. The first is the one that n 1 gives."
    )
    stop: Stop = None
    seed: Seed | None = Field(None, description="Same request and seed, same tokens.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, description="-2 to 2.")
    frequency_penalty: float | None = Field(None, description="-2 to 2.")

    # vLLM's
    min_tokens: Int32 | None = None
    ignore_eos: bool | None = None
    top_k: Int32 | None = Field(None, description="0 and -1 keep all tokens.")
    min_p: float | None = Field(None, description="0 to 1.")
    repetition_penalty: float | None = Field(None, description="Over 0; 1 is none.")
    stop_token_ids: Annotated[Many[UInt32], _most(DEFAULT_LIMITS.stop_token_ids_max)] | None = None
    priority: Int32 | None = Field(None, description="Lower goes first.")

    # Our own
    ttft_deadline_ms: UInt32 | None = Field(
        None, description="Refused with 429 when the first token is not to be expected in time."
    )

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1


class ChatBody(Body):
    model_config = ConfigDict(json_schema_extra=_described(CHAT_NOT_SUPPORTED, HARMLESS))

    messages: Annotated[Many[ChatMessage], _most(DEFAULT_LIMITS.messages_max)]
    max_completion_tokens: Int32 | None = Field(None, description="Newer name of max_tokens.")

    def check_extras(self) -> None:
        """Raises HttpError for what we cannot do."""
        check_extras(self, CHAT_NOT_SUPPORTED, HARMLESS)
        for index, message in enumerate(self.messages):
            check_extras(message, MESSAGE_NOT_SUPPORTED, MESSAGE_HARMLESS, f"messages[{index}].")


class CompletionBody(Body):
    model_config = ConfigDict(json_schema_extra=_described(COMPLETION_NOT_SUPPORTED, HARMLESS))

    prompt: Prompt
    best_of: int | None = Field(None, description="As n, or unset.")

    def check_extras(self) -> None:
        """Raises HttpError for what we cannot do."""
        check_extras(self, COMPLETION_NOT_SUPPORTED, HARMLESS)
        if self.best_of not in (None, self.choices):
            raise invalid(f"best_of: {self.best_of}, only {self.choices} (as n) is supported")

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


def check_extras(
    received: BaseModel,
    not_supported: Mapping[str, Collection[Any]],
    harmless: Collection[str],
    where: str = "",
) -> None:
    """Raises HttpError for a field that is unknown, or whose value asks for what we cannot do."""
    for name, value in (received.model_extra or {}).items():
        if value is None or name in harmless:
            continue
        if name not in not_supported:
            shown = name if name.isascii() and name.isprintable() and len(name) <= 64 else "..."
            raise invalid(f"{where}{shown}: this field is not known here", "unknown_parameter")
        if value not in not_supported[name]:
            raise invalid(f"{where}{name}: not supported here", "unsupported_parameter")
