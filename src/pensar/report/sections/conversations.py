"""Sample conversations, thinking apart from the answer."""

import json
from typing import Any

from pensar.report.contents import Report, Sampled
from pensar.report.html import Child, Markup, element
from pensar.report.numbers import plural, words
from pensar.report.sections.frame import fold, lead, pending, section

TITLE = "Conversations"


def conversations(report: Report) -> Markup:
    """What the final model said, as it was sampled in the evaluation; nothing is chosen by hand."""
    found = report.conversations
    if not found:
        return section(
            "conversations", TITLE, pending("evaluate", "sample conversations with the final model")
        )
    scored = [one for one in found if one.score is not None]
    right = sum(one.score == 1 for one in scored)
    said = [
        f"{plural(len(found), 'conversation')}, the first of each benchmark and mode, as they were sampled.",
        f"The verifiers accept {right} of them." if scored else None,
        "Thinking is folded; open it to read.",
    ]
    return section(
        "conversations",
        TITLE,
        lead(*said),
        element("div", [_conversation(one) for one in found], class_="talks"),
    )


def _conversation(one: Sampled) -> Markup:
    verdict = None
    if one.score is not None:
        verdict = element("span", "accepted" if one.score == 1 else "not accepted", class_="verdict")
    badge = element("span", words(one.mode), class_=f"badge {one.mode}") if one.mode else None
    head = element("h3", words(one.title), " ", badge, " ", verdict)
    return element("article", head, [_message(message) for message in one.messages], class_="talk")


def _message(message: dict[str, Any]) -> Markup:
    role = str(message.get("role", ""))
    parts: list[Child] = []
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning.strip():
        summary = f"thinking, {plural(len(reasoning.strip()), 'character')}"
        parts.append(fold(summary, element("div", reasoning.strip(), class_="said"), class_="thought"))
    content = _text(message.get("content"))
    if content:
        parts.append(element("div", content, class_="said"))
    for call in message.get("tool_calls") or ():
        parts.append(element("div", _call(call), class_="said call"))
    return element(
        "div",
        element("span", role, class_="role"),
        element("div", parts, class_="parts"),
        class_=f"message {_known(role)}",
    )


def _known(role: str) -> str:
    return role if role in ("system", "user", "assistant", "tool") else "other"


def _text(content: Any) -> str:
    """A message's text; OpenAI's shape allows a list of parts as well."""
    if isinstance(content, list):
        return "\n".join(
            str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content
        )
    return "" if content is None else str(content)


def _call(call: Any) -> str:
    """`name(arguments)`, from OpenAI's shape or ours."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return f"{function.get('name', '')}({arguments})"
