"""What a client may ask a reply to look like: OpenAI's `response_format`, vLLM's `structured_outputs`
and its older `guided_…` keys. All become one `Grammar`; more than one at a time is refused.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from herdbook.engine.grammar import Grammar
from herdbook.errors import RequestError

OBJECT: dict[str, Any] = {"type": "object"}


class Named(BaseModel):
    """`{"name": "…", "schema": {…}}`; `strict` is always true here."""

    model_config = ConfigDict(strict=True, extra="ignore")
    schema_: Any = Field(None, alias="schema")


class Format(BaseModel):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Named | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Format:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError('needs "json_schema": {"name": …, "schema": …}')
        return self


class Outputs(BaseModel):
    """vLLM's `structured_outputs`: one of these."""

    model_config = ConfigDict(strict=True, extra="forbid")
    json_: Any = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Structured(BaseModel):
    """The keys of a request that ask for a form."""

    response_format: Format | None = None
    structured_outputs: Outputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    _grammar: Grammar | None = PrivateAttr(None)

    @property
    def grammar(self) -> Grammar | None:
        """What the reply must be, if anything."""
        return self._grammar

    @model_validator(mode="after")
    def _read_form(self) -> Structured:
        asked = self._asked()
        if len(asked) > 1:
            raise ValueError("ask for one form of the reply, not for " + " and ".join(asked))
        for name, (kind, value) in asked.items():
            try:
                self._grammar = _grammar(kind, value)
            except RequestError as error:
                raise ValueError(f"{name!r}: {error.what} {error.rule}") from error
        return self

    def _asked(self) -> dict[str, tuple[str, Any]]:
        """What is asked for, by the key that asks: (kind, value)."""
        asked: dict[str, tuple[str, Any]] = {}
        form, outputs = self.response_format, self.structured_outputs
        if form is not None and form.type == "json_object":
            asked["response_format"] = "json", OBJECT
        if form is not None and form.json_schema is not None and form.type == "json_schema":
            schema = form.json_schema.schema_
            asked["response_format"] = "json", {} if schema is None else schema
        for kind in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{kind}")) is not None:
                asked[f"guided_{kind}"] = kind, value
            value = getattr(outputs, "json_" if kind == "json" else kind, None)
            if value is not None:
                asked[f"structured_outputs.{kind}"] = kind, value
        if outputs is not None and outputs.json_object:
            asked["structured_outputs.json_object"] = "json", OBJECT
        return asked


def _grammar(kind: str, value: Any) -> Grammar:
    if kind == "json":
        return Grammar.schema(value)
    if kind == "choice":
        return Grammar.choice(value)
    return Grammar("regex" if kind == "regex" else "lark", value)
