"""Find out by trying what a chat template makes of tools, tool calls and tool results, and adapt the messages to it.

A template that leaves a call out would train the model on conversations with holes, without a word. So every part that
the data has is rendered once with a made-up name; what does not come back is written in another way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qlora.data.rows import Finding, Row

# Made-up words that no template and no data contains. Short, and without anything that a template could trim or escape.
MARK = "Qzxv"
_CALL = {"type": "function", "function": {"name": f"{MARK}name", "arguments": {"key": f"{MARK}value"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": f"{MARK}tool",
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "A key."}},
            "required": ["key"],
        },
    },
}
_ASK = {"role": "user", "content": "Question."}
_ANSWER = {"role": "assistant", "content": "Answer."}

Try = Callable[[list[dict], tuple | None], str | None]


@dataclass(frozen=True)
class ToolStyle:
    """How calls and results are handed to the template.

    Attributes:
        calls: "native" (tool_calls), "json_arguments" (the same, with the arguments as JSON text, as DeepSeek V3's
            template wants them), or "text" (the whole call as JSON in the content).
        with_ids: calls and results carry made-up ids, for templates that refuse them without (Mistral's).
        results: "tool" (a role of its own), or "user" (the result as a user's message).
    """

    calls: str = "native"
    with_ids: bool = False
    results: str = "tool"
    findings: list[Finding] = field(default_factory=list)


def probe_tool_style(rows: Sequence[Row], render: Try) -> ToolStyle:
    """The first style that this template writes out in full, for what the rows contain.

    Args:
        render: the conversation and tools as text, or None where the template raises.
    """
    messages = [message for row in rows for message in row.messages or ()]
    findings: list[Finding] = []
    tools = (_TOOL,) if any(row.tools for row in rows) else None
    if tools and f"{MARK}tool" not in (render([_ASK, _ANSWER], tools) or ""):
        findings.append(
            Finding(
                "warning",
                "tools_not_shown",
                "The chat template leaves the tools out: the model learns to call functions that it is not told about.",
                "Set data.chat_template: chatml (or plain), which write them.",
            )
        )
    if any(message.get("reasoning_content") for message in messages):
        thinking = [_ASK, {**_ANSWER, "reasoning_content": f"{MARK}thought"}]
        if f"{MARK}thought" not in (render(thinking, None) or ""):
            findings.append(
                Finding(
                    "warning",
                    "reasoning_not_shown",
                    "The chat template leaves reasoning_content out, so it is not trained.",
                    "Write it into the content, or use a template that knows it.",
                )
            )
    has_calls = any(message.get("tool_calls") for message in messages)
    has_results = any(message["role"] == "tool" for message in messages)
    style = _first_that_works(has_calls, has_results, tools, render)
    if has_calls and style.calls == "text":
        findings.append(
            Finding(
                "warning",
                "tool_calls_as_text",
                "The chat template does not write tool calls, so each is written as JSON text in "
                'the answer: {"name": ..., "arguments": ...}.',
                "Set data.chat_template to one that has tool calls if this model's tools are called in another form.",
            )
        )
    if has_results and style.results == "user":
        findings.append(
            Finding(
                "warning",
                "tool_results_as_user",
                "The chat template does not write messages of the role tool, so tool results are "
                "written as the user's.",
                "Set data.chat_template to one that has tool results.",
            )
        )
    return ToolStyle(style.calls, style.with_ids, style.results, findings)


def _first_that_works(has_calls: bool, has_results: bool, tools: tuple[dict, ...] | None, render: Try) -> ToolStyle:
    if not has_calls and not has_results:
        return ToolStyle()
    conversation = [_ASK, {"role": "assistant", "content": "", "tool_calls": [_CALL]} if has_calls else _ANSWER]
    wanted = [f"{MARK}name", f"{MARK}value"] if has_calls else []
    if has_results:
        conversation += [{"role": "tool", "content": f"{MARK}result"}, _ANSWER]
        wanted.append(f"{MARK}result")
    styles = [
        ToolStyle(calls, with_ids, results)
        for results in ("tool", "user")
        for calls in ("native", "json_arguments", "text")
        for with_ids in ((False, True) if calls != "text" else (False,))
    ]
    for style in styles:
        text = render(restyle(conversation, style), tools) or ""
        if all(word in text for word in wanted):
            return style
    return ToolStyle("text", False, "user")  # the rows themselves will say what the template rejects


def restyle(messages: Sequence[dict], style: ToolStyle) -> list[dict]:
    """The messages as this style writes them; a plain conversation comes back as it is."""
    restyled: list[dict] = []
    pending: list[str] = []  # ids of calls that wait for their result
    num_calls = 0
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            message = _restyle_calls(message, style, num_calls)
            num_calls += len(message.get("tool_calls", ()))
            pending = [call["id"] for call in message.get("tool_calls", ()) if "id" in call]
        elif message["role"] == "tool" and style.results == "user":
            if index and messages[index - 1]["role"] == "tool":  # of parallel calls: one message, as roles alternate
                message = {**message, "content": restyled.pop()["content"] + "\n" + message["content"]}
            message = {"role": "user", "content": message["content"]}
        elif message["role"] == "tool" and style.with_ids and pending:
            message = {**message, "tool_call_id": pending.pop(0)}
        restyled.append(message)
    return restyled


def _restyle_calls(message: dict, style: ToolStyle, num_before: int) -> dict:
    """An assistant's message with its calls as this style writes them; `num_before` calls went before in the row."""
    calls = message["tool_calls"]
    if style.calls == "text":
        parts = [message["content"]] if message["content"] else []
        parts += [json.dumps(call["function"], ensure_ascii=False) for call in calls]
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**kept, "content": "\n".join(parts)}
    if style.calls == "json_arguments":
        functions = [call["function"] for call in calls]
        texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
        calls = [{**call, "function": {**call["function"], "arguments": text}} for call, text in zip(calls, texts)]
    if style.with_ids:  # nine characters, as Mistral's templates demand
        calls = [{**call, "id": f"call{num_before + number:05d}"} for number, call in enumerate(calls)]
    return {**message, "tool_calls": calls}
