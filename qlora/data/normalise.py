"""Turn one raw row of a known layout into the rows the rest of the program knows.

Alpaca, question/answer, ShareGPT and OpenAI-like rows all become messages. A row that breaks a rule raises Unusable
with the rule in words; nothing is repaired by guessing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlora.data.files import RawRow, describe
from qlora.data.formats import REQUIRED, Layout, message_list, parse_list
from qlora.data.rows import Row, Unusable

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}


def normalise(raw: RawRow, layout: Layout) -> list[Row]:
    """The rows in `raw`: one, or as many as an Alpaca-like row has instances.

    Raises:
        Unusable: with the reason.
    """
    values = {field: raw.values.get(column) for field, column in layout.columns.items()}
    _check_columns(raw.values, layout)
    if layout.format == "text":
        return [_raw_row(raw, text=_text(values["text"], layout.columns["text"]))]
    if layout.format in ("messages", "prompt_completion") and "prompt" in values:
        return [_prompt_completion(raw, values)]
    conversations = {"alpaca": _alpaca, "question_answer": _question_answer}.get(layout.format, _turns)(values)
    tools = _tools(values.get("tools"))
    return [_chat_row(raw, messages, tools) for messages in conversations]


def _check_columns(values: Mapping[str, Any], layout: Layout) -> None:
    choices = [fields for fields in REQUIRED[layout.format] if all(field in layout.columns for field in fields)]
    missing = [[layout.columns[field] for field in fields if layout.columns[field] not in values] for fields in choices]
    if all(missing):
        raise Unusable(
            f"no column {' and no column '.join(missing[0])} (its columns: {', '.join(map(str, values)) or 'none'})"
        )


def _raw_row(raw: RawRow, prompt: str | None = None, completion: str | None = None, text: str | None = None) -> Row:
    return _readable(Row(None, prompt, completion, text, None, raw.file, raw.line))


def _chat_row(raw: RawRow, messages: list[dict], tools: tuple[dict, ...] | None) -> Row:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise Unusable("no assistant turn, so there is nothing to learn")
    if all(answer.get("weight") == 0 for answer in answers):
        raise Unusable("every assistant turn has weight 0, so there is nothing to learn")
    return _readable(Row(tuple(messages), None, None, None, tools, raw.file, raw.line))


def _readable(row: Row) -> Row:
    try:
        row.key
    except UnicodeEncodeError:
        raise Unusable(
            "the text holds half of a surrogate pair (such as \\ud83d), which is not valid Unicode"
        ) from None
    return row


# --- formats ----------------------------------------------------------------------------------------------------------


def _prompt_completion(raw: RawRow, values: Mapping[str, Any]) -> Row:
    """Strings stay raw; lists of messages are one conversation cut in two."""
    prompt, completion = message_list(values["prompt"]), message_list(values["completion"])
    if prompt is None or completion is None:
        text = _text(values["prompt"], "prompt", may_be_empty=True)
        return _raw_row(
            raw, prompt=text, completion=_text(values["completion"], "completion", empty="the completion is empty")
        )
    # What the assistant says in the prompt is there to be read: only the completion is learnt.
    given = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in prompt]
    return _chat_row(raw, _messages([*given, *completion]), _tools(values.get("tools")))


def _question_answer(values: Mapping[str, Any]) -> list[list[dict]]:
    question = _text(values["question"], "question")
    answer = _text(values["answer"], "answer", empty="the answer is empty")
    return [[*_system(values), _message("user", question), _message("assistant", answer)]]


def _alpaca(values: Mapping[str, Any]) -> list[list[dict]]:
    instances = values.get("instances")
    if instances is None:
        instances = [{"input": values.get("input"), "output": values.get("output")}]
    if not isinstance(instances, list) or not instances or not all(isinstance(item, dict) for item in instances):
        raise Unusable("instances is not a list of {input, output}")
    instruction = _text(values["instruction"], "instruction", may_be_empty=True)
    conversations = []
    for item in instances:
        given = "" if item.get("input") is None else _text(item["input"], "input", may_be_empty=True)
        question = "\n\n".join(part for part in (instruction, given) if part.strip())
        if not question:
            raise Unusable("the instruction is empty")
        answer = _text(item.get("output"), "output", empty="the answer (output) is empty")
        conversations.append(
            [
                *_system(values),
                *_history(values.get("history")),
                _message("user", question),
                _message("assistant", answer),
            ]
        )
    return conversations


def _history(value: Any) -> list[dict]:
    """Earlier turns of an Alpaca row: a list of [question, answer]."""
    if value in (None, "", []):
        return []
    if not isinstance(value, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        raise Unusable("history is not a list of [question, answer] pairs")
    return [
        _message(role, _text(text, f"history ({role})"))
        for pair in value
        for role, text in zip(("user", "assistant"), pair)
    ]


def _turns(values: Mapping[str, Any]) -> list[list[dict]]:
    field = "messages" if "messages" in values else "conversations"
    turns = parse_list(values[field])
    if turns is None:
        raise Unusable(f"{field} is {describe(values[field])}, not a list of messages")
    messages = _messages(turns)
    return [messages if messages[0]["role"] == "system" else [*_system(values), *messages]]


def _system(values: Mapping[str, Any]) -> list[dict]:
    value = values.get("system")
    text = "" if value is None else _text(value, "system", may_be_empty=True)
    return [_message("system", text)] if text.strip() else []


# --- messages ---------------------------------------------------------------------------------------------------------


def _message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _messages(turns: list) -> list[dict]:
    """Checked messages from OpenAI-like (role, content) or ShareGPT (from, value) ones."""
    if not turns:
        raise Unusable("the list of messages is empty")
    messages: list[dict] = []
    for number, turn in enumerate(turns, start=1):
        message = _turn(turn, f"message {number}")
        if message["role"] == "system" and not message["content"].strip():
            continue
        # ShareGPT writes one assistant turn as several entries: words, then each call.
        if messages and message.get("tool_calls") and not message["content"] and messages[-1]["role"] == "assistant":
            words = messages.pop()
            message = {**words, "tool_calls": [*words.get("tool_calls", ()), *message["tool_calls"]]}
        messages.append(message)
    if not messages:
        raise Unusable("there is nothing but an empty system message")
    return messages


def _turn(turn: Any, name: str) -> dict:
    if not isinstance(turn, dict):
        raise Unusable(f"{name} is {describe(turn)}, not an object with role and content")
    role_name = turn.get("role", turn.get("from"))
    if role_name is None:
        raise Unusable(f"{name} has no role")
    role = _ROLES.get(role_name) if isinstance(role_name, str) else None
    if role is None:
        raise Unusable(f'{name} has the unknown role "{role_name}"; known are {", ".join(_ROLES)}')
    content = turn.get("content", turn.get("value"))
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, name)}
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if calls and role != "assistant":
        raise Unusable(f"{name} has tool_calls, but its role is {role_name}")
    what = {"user": f"{name} (user)", "assistant": f"the answer in {name}"}.get(role, name)
    message = _message(
        role,
        _content(content, name, what, may_be_empty=bool(calls) or role in ("system", "tool"), may_be_null=bool(calls)),
    )
    if calls:
        message["tool_calls"] = _calls(calls, name)
    if role == "assistant" and (turn.get("weight") == 0 or turn.get("train") is False):  # OpenAI's and Axolotl's words
        message["weight"] = 0
    for extra in ("reasoning_content", "name", "tool_call_id"):
        if isinstance(turn.get(extra), str):
            message[extra] = turn[extra]
    return message


def _content(value: Any, name: str, what: str, *, may_be_empty: bool, may_be_null: bool) -> str:
    if value is None:
        if may_be_null:
            return ""
        raise Unusable(f"{name} has no content (null is allowed only beside tool_calls)")
    if isinstance(value, list):  # OpenAI's parts
        if not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in value
        ):
            raise Unusable(f"the content of {name} is a list with something other than text parts in it")
        value = "".join(part["text"] for part in value)
    return _text(value, f"the content of {name}", may_be_empty=may_be_empty, empty=f"{what} is empty")


def _text(value: Any, name: str, *, may_be_empty: bool = False, empty: str = "") -> str:
    if not isinstance(value, str):
        raise Unusable(f"{name} is {describe(value)}, not text")
    if not may_be_empty and not value.strip():
        raise Unusable(empty or f"{name} is empty")
    return value


# --- tools ------------------------------------------------------------------------------------------------------------


def _calls(value: Any, name: str) -> list[dict]:
    """Calls as [{"type": "function", "function": {"name", "arguments": dict}}], from a list, one call, or JSON text."""
    if isinstance(value, str):
        value = _from_json(value, f"the function call in {name}")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable(f"a function call in {name} has no name")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = (
                _from_json(arguments, f"the arguments of {function['name']} in {name}") if arguments.strip() else {}
            )
        if not isinstance(arguments, dict):
            raise Unusable(f"the arguments of {function['name']} in {name} are {describe(arguments)}, not an object")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not calls:
        raise Unusable(f"{name} is a function call without a call in it")
    return calls


def _tools(value: Any) -> tuple[dict, ...] | None:
    """JSON-schema tools in the {"type": "function", "function": {...}} form that chat templates expect."""
    if isinstance(value, str) and value.strip():
        value = _from_json(value, "tools")
    if value in (None, "", [], {}) or isinstance(value, str):
        return None
    tools = value if isinstance(value, list) else [value]
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("tools is not a list of functions with names")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{what} is not valid JSON: {error}") from None
