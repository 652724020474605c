"""Chat templates as Jinja text: the one that our models carry, and rendering with the one a checkpoint
brings."""

import json
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pensar.base.errors import DataError, ModelError
from pensar.text.conversation import Conversation, Message

if TYPE_CHECKING:
    import jinja2

TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
"""What Qwen3 models have been trained to read around the function schemas in the system turn."""

CHAT_TEMPLATE = r"""{#- Turns are <|im_start|>role, a line feed, the body and <|im_end|>. -#}
{%- macro turn(role, body) -%}
  {{- '<|im_start|>' ~ role ~ '\n' ~ body ~ '<|im_end|>\n' -}}
{%- endmacro -%}

{#- What the assistant thought is repeated only after the last question that a person asked. -#}
{%- set asked = namespace(at=messages | length) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {%- set body = message.content or '' -%}
    {%- if not (body.startswith('<tool_response>') and body.endswith('</tool_response>')) -%}
      {%- set asked.at = loop.index0 -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}

{%- set instructed = messages[0].role == 'system' -%}
{%- if tools -%}
  {{- '<|im_start|>system\n' -}}
  {%- if instructed -%}{{- messages[0].content ~ '\n\n' -}}{%- endif -%}
  {{- TOOLS_BEFORE -}}
  {%- for tool in tools -%}{{- '\n' ~ (tool | tojson) -}}{%- endfor -%}
  {{- TOOLS_AFTER ~ '<|im_end|>\n' -}}
{%- elif instructed -%}
  {{- turn('system', messages[0].content) -}}
{%- endif -%}

{%- for message in messages -%}
  {%- set body = message.content or '' -%}
  {%- if message.role == 'user' or (message.role == 'system' and loop.index0 > 0) -%}
    {{- turn(message.role, body) -}}
  {%- elif message.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\n<tool_response>\n' ~ body ~ '\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
  {%- elif message.role == 'assistant' -%}
    {%- set thought = '' -%}
    {%- if message.reasoning_content is string -%}
      {%- set thought = message.reasoning_content -%}
    {%- elif '</think>' in body -%}
      {%- set parts = body.split('</think>') -%}
      {%- set thought = parts[0].rstrip('\n').split('<think>')[-1] -%}
      {%- set body = parts[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > asked.at and (thought or loop.last) -%}
      {{- '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ body.lstrip('\n') -}}
    {%- else -%}
      {{- body -}}
    {%- endif -%}
    {%- for item in message.tool_calls or [] -%}
      {%- set wanted = item.function or item -%}
      {%- set values = wanted.arguments -%}
      {%- if body or not loop.first -%}{{- '\n' -}}{%- endif -%}
      {{- '<tool_call>\n{"name": "' ~ wanted.name ~ '", "arguments": ' -}}
      {{- (values if values is string else (values | tojson)) ~ '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}
    {{- '<think>\n\n</think>\n\n' -}}
  {%- endif -%}
{%- endif -%}
""".replace("TOOLS_BEFORE", json.dumps(TOOLS_BEFORE)).replace("TOOLS_AFTER", json.dumps(TOOLS_AFTER))
"""The template saved with our models; it gives the tokens of `pensar.text.chat` in any engine that reads
Jinja."""


def render_template(
    template: str, conversation: Conversation, *, prompt: bool, thinking: bool | None = None
) -> str:
    """The conversation as `template` writes it, with the beginning of a reply when `prompt`.

    `thinking` reaches the template as `enable_thinking` unless it is None. Templates come with downloaded
    models, so they run in Jinja's sandbox with the names that transformers offers: the filter `tojson`,
    `raise_exception`, `strftime_now`, loop controls. Raises ModelError when the template itself is at fault
    and DataError when it refuses the conversation.
    """
    import jinja2

    values: dict[str, Any] = {
        "messages": [message_as_dict(message) for message in conversation.messages],
        "tools": list(conversation.tools) or None,
        "add_generation_prompt": prompt,
    }
    if thinking is not None:
        values["enable_thinking"] = thinking
    try:
        return _compiled(template).render(values)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template is no valid Jinja (line {error.lineno}: {error.message})"
        ) from error
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise ModelError(f"the chat template cannot render this conversation ({error})") from error


def message_as_dict(message: Message) -> dict[str, Any]:
    """The message in OpenAI's shape; arguments of tool calls stay objects, as templates expect them."""
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning_content is not None:
        row["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        row["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.name is not None:
        row["name"] = message.name
    if message.tool_call_id is not None:
        row["tool_call_id"] = message.tool_call_id
    return row


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as transformers writes it in a template: unescaped Unicode and no HTML escapes, unlike Jinja's
    own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@lru_cache(maxsize=8)  # compiling takes many times as long as rendering
def _compiled(template: str) -> "jinja2.Template":
    return _environment().from_string(template)


def _environment() -> "jinja2.Environment":
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the trained part for other software; here its body is rendered as it
        stands."""

        tags = {"generation"}  # noqa: RUF012 - the base class declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(reason: str) -> None:
        raise DataError(f"the model's chat template refuses the conversation: {reason}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
