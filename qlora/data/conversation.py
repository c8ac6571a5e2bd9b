"""Write conversations through the tokenizer's chat template, and find in the text what the assistant says.

Where an answer begins and ends is never guessed. The begin is where the template's own generation prompt ends; the end
is where the template's text for that turn ends, up to and including its end-of-turn marker. A template that renders a
turn differently once more turns follow (Qwen3 drops the thinking of earlier turns) is asked again with a made-up answer
in that one place: what stays the same around it is the template's, what differs is the answer. Where none of this
holds exactly, the row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora.data.rows import Row, Unusable
from qlora.data.tool_style import MARK, ToolStyle, probe_tool_style, restyle
from qlora.errors import DataError

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A whole conversation as text, and [start, end) of each of the assistant's turns in it, in characters."""

    text: str
    spans: list[tuple[int, int]]


class ChatWriter:
    """One tokenizer's way of writing conversations.

    Attributes:
        end_of_turn: the text that ends the last answer, "" where the template writes none.
        end_between: the text that ends an answer that is followed by more turns; mostly the same.
        style: what becomes of tool calls and results.

    Raises:
        DataError: a template that cannot write a question and its answer.
    """

    def __init__(self, tokenizer: Any, rows: Sequence[Row]):
        import jinja2

        self._tokenizer = tokenizer
        # What a template can raise: its own raise_exception, undefined names, and Python's for unexpected values.
        self._errors = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
        self._after_answer = self._probe_end()
        self.end_of_turn = self._after_answer.rstrip()
        self.end_between = self._probe_end_between()
        self.style: ToolStyle = probe_tool_style(rows, self._try)

    def conversation(self, row: Row) -> Rendered:
        """The row as text, with the place of every answer.

        Raises:
            Unusable: the template rejects the row, or an answer cannot be located exactly.
        """
        messages, only_read = self._messages(row)
        try:
            text = self._render(messages, row.tools)
        except self._errors as error:
            raise Unusable(self._rejection(messages, row.tools, error)) from None
        template = self._tokenizer.get_chat_template(tools=self._tools(row.tools))
        has_marks = _GENERATION_TAG.search(template) is not None
        spans: dict[int, tuple[int, int]] = {}
        position = 0
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and (not has_marks or index in only_read):
                spans[index] = self._locate(messages, row.tools, index, text, position)
                position = spans[index][1]
        if not has_marks:
            return Rendered(text, [span for index, span in spans.items() if index not in only_read])
        marked = self._marked_spans(messages, row.tools, template, text)
        return Rendered(
            text,
            [mark for mark in marked if not any(start < mark[1] and mark[0] < end for start, end in spans.values())],
        )

    def prompt(self, row: Row) -> str | None:
        """The text that a chat program would send to get the row's last answer; None where nothing comes before it.

        Raises:
            Unusable: the template rejects the row.
        """
        messages, _ = self._messages(row)
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        if last == 0:
            return None
        try:
            return self._render(messages[:last], row.tools, add_generation_prompt=True)
        except self._errors as error:
            raise Unusable(self._rejection(messages, row.tools, error)) from None

    def reference(self, row: Row) -> str:
        """The content of the row's last answer; a tool call as JSON text."""
        answers = [message for message in row.messages if message["role"] == "assistant"]
        return restyle(answers[-1:], ToolStyle(calls="text"))[0]["content"]

    def _messages(self, row: Row) -> tuple[list[dict], set[int]]:
        """The messages as the template gets them, and which of them are only read."""
        messages = restyle(row.messages, self.style)
        only_read = {index for index, message in enumerate(messages) if message.get("weight") == 0}
        return [{key: value for key, value in message.items() if key != "weight"} for message in messages], only_read

    # --- the template -------------------------------------------------------------------------------------------------

    def _tools(self, tools: tuple[dict, ...] | None) -> list[dict] | None:
        return list(tools) if tools else None

    def _render(self, messages: list[dict], tools: tuple[dict, ...] | None, add_generation_prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tools=self._tools(tools), tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _try(
        self, messages: list[dict], tools: tuple[dict, ...] | None, add_generation_prompt: bool = False
    ) -> str | None:
        try:
            return self._render(messages, tools, add_generation_prompt)
        except self._errors:
            return None

    def _probe_end(self) -> str:
        """What the template writes after the last answer, white space included."""
        answer = f"{MARK}answer"
        try:
            text = self._render(
                [{"role": "user", "content": f"{MARK}question"}, {"role": "assistant", "content": answer}], None
            )
        except self._errors as error:
            raise DataError(
                f"The chat template cannot write a question and an answer: {error}",
                "Set data.chat_template: chatml, plain or a .jinja file.",
            ) from None
        if text.count(answer) != 1 or f"{MARK}question" not in text:
            found = (
                "leaves the answer or the question out" if answer not in text else "changes the question or the answer"
            )
            raise DataError(
                f"The chat template {found}, so it cannot be trained with.",
                "Set data.chat_template: chatml, plain or a .jinja file.",
            )
        return text.partition(answer)[2]

    def _probe_end_between(self) -> str:
        """What ends an answer in the middle of a conversation, for templates where that is not what ends the last one.

        Phi-3 writes its end-of-text token once, at the very end; gpt-oss ends the last turn with a token of its own.
        Such an end is the token right after the answer, unless that token already opens the next message: then it
        stands before the first question too, and not after it.
        """
        words = [f"{MARK}{number}" for number in range(4)]
        roles = ("user", "assistant", "user", "assistant")
        text = self._try([{"role": role, "content": word} for role, word in zip(roles, words)], None)
        if text is None or any(text.count(word) != 1 for word in words):
            return self.end_of_turn
        before, between, after = (
            text.partition(words[0])[0],
            *(text.partition(words[number])[2].partition(words[number + 1])[0] for number in (0, 1)),
        )
        if after.startswith(self.end_of_turn) and self.end_of_turn:
            return self.end_of_turn
        tokens = [token for token in self._tokenizer.get_added_vocab() if after.startswith(token)]
        token = max(tokens, key=len, default="")
        return token if token in between or token not in before else ""

    def _rejection(self, messages: list[dict], tools: tuple[dict, ...] | None, error: Exception) -> str:
        """What the template has against a row, found by trying what is usually at fault."""
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        without_system = [message for message in messages if message["role"] != "system"]
        if len(without_system) < len(messages) and without_system and self._try(without_system, tools) is not None:
            return f'the chat template rejects the system role ("{said}")'
        roles = [message["role"] for message in without_system]
        for number, (first, second) in enumerate(zip(roles, roles[1:]), start=1):
            if first == second:
                place = number + len(messages) - len(without_system)
                return f'the chat template rejects messages {place} and {place + 1}, both by the {first} ("{said}")'
        if roles and roles[0] != "user":
            return f'the chat template rejects a conversation that the {roles[0]} begins ("{said}")'
        return f'the chat template rejects the row ("{said}")'

    # --- spans --------------------------------------------------------------------------------------------------------

    def _marked_spans(
        self, messages: list[dict], tools: tuple[dict, ...] | None, template: str, text: str
    ) -> list[tuple[int, int]]:
        """Spans from the template's own {% generation %} marks, with the end-of-turn marker where it follows."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, marks = render_jinja_template(
            conversations=[messages],
            tools=self._tools(tools),
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        if rendered[0] != text or not marks[0]:
            raise Unusable("the chat template has {% generation %} marks, but marks none of the answers in this row")
        return [(start, self._with_marker(text, end)) for start, end in sorted(marks[0])]

    def _with_marker(self, text: str, end: int) -> int:
        """`end` moved behind the end-of-turn marker, where one follows."""
        for marker in (self.end_of_turn, self.end_between):
            if marker and text.startswith(marker, end):
                return end + len(marker)
        return end

    def _locate(
        self, messages: list[dict], tools: tuple[dict, ...] | None, index: int, text: str, position: int
    ) -> tuple[int, int]:
        """[start, end) of the assistant's message `index`, at or after `position`."""
        before_and_after = None  # of a made-up answer in this place; rendered only when it is needed
        prompt = self._try(messages[:index], tools, add_generation_prompt=True) if index else None
        if prompt is not None and text.startswith(prompt) and len(prompt) >= position:
            start = len(prompt)
        else:
            before_and_after = self._around(messages, tools, index, text)
            start = len(before_and_after[0])
        is_last = index == len(messages) - 1
        until_here = text if is_last else self._try(messages[: index + 1], tools)
        if until_here is not None and len(until_here) > start and text.startswith(until_here):
            if until_here.endswith(self._after_answer):
                end = len(until_here) - len(self._after_answer) + len(self.end_of_turn)
                end = end if self.end_of_turn else self._with_marker(text, end)
            else:  # a turn that ends in a way of its own, such as a tool call: all that the template wrote for it
                end = len(until_here.rstrip())
        else:
            before_and_after = before_and_after or self._around(messages, tools, index, text)
            end = self._with_marker(text, len(text) - len(before_and_after[1]))
        if not position <= start < end:
            raise Unusable(
                f"the answer in message {index + 1} cannot be located exactly in what the chat template writes"
            )
        return start, end

    def _around(self, messages: list[dict], tools: tuple[dict, ...] | None, index: int, text: str) -> tuple[str, str]:
        """The text before and after the answer in message `index`."""
        made_up = f"{MARK}answer"
        while made_up in text:
            made_up += "z"
        replaced = [*messages[:index], {"role": "assistant", "content": made_up}, *messages[index + 1 :]]
        before, found, after = (self._try(replaced, tools) or "").partition(made_up)
        if not found or not text.startswith(before) or not text.endswith(after) or len(before) + len(after) > len(text):
            raise Unusable(
                f"the answer in message {index + 1} cannot be located exactly in what the chat template writes"
            )
        return before, after
