"""The bodies of requests, as OpenAI's API has them, and what this server adds."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_TEXTS = 256
"""Texts of one request for labels."""


class _Request(BaseModel):
    """What all requests share; fields that are not known are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str
    # Fields of OpenAI's that say nothing about the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, fields: Any) -> Any:
        # To OpenAI a null is a field that is left out, whatever the field.
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class StreamOptions(BaseModel):
    """Settings of a stream."""

    include_usage: bool = False


class _Sampled(_Request):
    """Settings of a text's tokens."""

    temperature: float = Field(default=1.0, ge=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=0)
    n: int = Field(default=1, ge=1, le=16)
    stop: list[str] = Field(default_factory=list, max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float = Field(default=0, ge=0, le=0)
    frequency_penalty: float = Field(default=0, ge=0, le=0)

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        if value is None:
            return []
        return [value] if isinstance(value, str) else value


class CompletionRequest(_Sampled):
    """The body of ``/v1/completions``: a prompt is continued as it stands."""

    prompt: str | list[str]
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: Literal[False] = False
    suffix: None = None
    best_of: Literal[1] | None = None


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _of_parts(cls, value: Any) -> Any:
        """The text of a list of parts that are texts."""
        if not isinstance(value, list):
            return value
        are_texts = all(isinstance(part, dict) and part.get("type") == "text" for part in value)
        return "".join(str(part.get("text", "")) for part in value) if are_texts else value


class ChatRequest(_Sampled):
    """The body of ``/v1/chat/completions``: the chat template renders the conversation."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)


class LabelRequest(_Request):
    """The body of ``/v1/label``: texts, or rows where a task has other fields than a text."""

    task: str
    texts: list[str] = Field(default_factory=list, max_length=MAX_TEXTS)
    rows: list[dict[str, Any]] = Field(default_factory=list, max_length=MAX_TEXTS)
