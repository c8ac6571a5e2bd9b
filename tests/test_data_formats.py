"""Formats: found by themselves, sayable, and mapped by hand."""

import json

import pytest
from test_data_helpers import write_lines

from qlora.data import read_rows
from qlora.errors import DataError

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FROM_U, FROM_A = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}

CASES = {
    "messages": ({"messages": [U, A]}, "messages", [U, A]),
    "messages under another name": ({"conversation": [U, A]}, "messages", [U, A]),
    "messages beside a prompt": ({"prompt": "q", "messages": [U, A]}, "messages", [U, A]),
    "prompt and completion lists": ({"prompt": [U], "completion": [A]}, "messages", [U, A]),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]},
        "messages",
        [U, A],
    ),
    "sharegpt": (
        {"conversations": [FROM_U, FROM_A], "system": "s"},
        "sharegpt",
        [{"role": "system", "content": "s"}, U, A],
    ),
    "alpaca": (
        {"instruction": "do", "input": "this", "output": "a"},
        "alpaca",
        [{"role": "user", "content": "do\n\nthis"}, A],
    ),
    "alpaca without input": ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [U, A]),
    "alpaca with history": ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, "alpaca", [U, A, U, A]),
    "self-instruct": ({"instruction": "q", "instances": [{"input": "", "output": "a"}]}, "alpaca", [U, A]),
    "question and answer": ({"question": "q", "answer": "a"}, "question_answer", [U, A]),
    "Q and A": ({"Q": "q", "A": "a", "label": "0"}, "question_answer", [U, A]),
    "query and response": ({"Query": "q", "response": "a"}, "question_answer", [U, A]),
    "prompt and response": ({"prompt": "q", "response": "a"}, "question_answer", [U, A]),
}


@pytest.mark.parametrize("case", CASES)
def test_formats_are_found_from_the_columns(case, tmp_path):
    values, format, messages = CASES[case]
    rowset = read_rows(write_lines(tmp_path / "r.jsonl", [values]))
    assert rowset.format == format and list(rowset.rows[0].messages) == messages
    assert all(column in rowset.format_reason for column in values)
    again = read_rows(write_lines(tmp_path / "r.jsonl", [values]), format=format)
    assert again.rows == rowset.rows


def test_raw_formats_stay_raw(tmp_path):
    row = read_rows(write_lines(tmp_path / "p.jsonl", [{"prompt": "a ", "completion": " b\n"}])).rows[0]
    assert (row.prompt, row.completion, row.messages, row.text) == ("a ", " b\n", None, None)
    row = read_rows(write_lines(tmp_path / "l.jsonl", [{"prompt": "[1, 2]", "completion": '[{"a": 1}]'}])).rows[0]
    assert (row.prompt, row.completion) == ("[1, 2]", '[{"a": 1}]')  # text that looks like a list is text
    row = read_rows(write_lines(tmp_path / "t.jsonl", [{"text": "a", "id": 1}])).rows[0]
    assert (row.text, row.messages, row.prompt) == ("a", None, None)


@pytest.mark.parametrize(
    "format, columns, values, expected",
    [
        (
            "question_answer",
            {"question": "Frage", "answer": "Antwort"},
            {"Frage": "q", "Antwort": "a", "text": "x"},
            [U, A],
        ),
        ("question_answer", {"answer": "solution2"}, {"question": "q", "solution2": "a"}, [U, A]),
        ("alpaca", {"instruction": "task", "output": "result"}, {"task": "q", "result": "a"}, [U, A]),
        ("messages", {"messages": "chat"}, {"chat": [U, A]}, [U, A]),
        ("messages", {"messages": "chosen"}, {"chosen": [U, A], "rejected": [U]}, [U, A]),
        ("messages", {"messages": "dump"}, {"dump": [FROM_U, FROM_A]}, [U, A]),
        ("sharegpt", {"conversations": "dump"}, {"dump": [FROM_U, FROM_A]}, [U, A]),
    ],
)
def test_a_mapping_says_the_format_too(format, columns, values, expected, tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [values])
    for asked in ("auto", format):
        rowset = read_rows(path, columns=columns, format=asked)
        assert rowset.format == format and list(rowset.rows[0].messages) == expected


def test_raw_mappings(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [{"body": "b", "head": "h"}])
    assert read_rows(path, columns={"text": "body"}).rows[0].text == "b"
    row = read_rows(path, columns={"prompt": "head", "completion": "body"}).rows[0]
    assert (row.prompt, row.completion) == ("h", "b")


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "columns: {question: foo, answer: bar}"),
        ({}, "has the columns foo, bar, n"),
        ({"format": "alpaca"}, "needs instruction and output or instruction and instances"),
        ({"columns": {"question": "nope", "answer": "bar"}}, 'the column "nope"'),
        ({"columns": {"frage": "foo"}}, '"frage", which is not a field'),
        ({"columns": {"text": "foo", "answer": "bar"}}, "mixes fields"),
    ],
)
def test_what_cannot_be_matched_lists_the_columns_and_shows_a_mapping(options, said, tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [{"foo": "x", "bar": "y", "n": 1}])
    with pytest.raises(DataError) as caught:
        read_rows(path, **options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"id": 1, "question": [[U]], "function": [TOOL]}, "BFCL"),
        ({"id": 1, "ground_truth": [{"f": {"a": [1]}}]}, "possible_answer"),
        ({"turns": ["a", "b"], "category": "c"}, "MT-bench"),
        ({"chosen": [U, A], "rejected": [U, A]}, "{messages: chosen}"),
    ],
)
def test_data_without_answers_is_refused_with_a_way_out(values, said, tmp_path):
    with pytest.raises(DataError) as caught:
        read_rows(write_lines(tmp_path / "r.json", [values]))
    assert said in str(caught.value) and caught.value.fix


def test_tool_calls_of_both_kinds_become_the_same_row(tmp_path):
    openai = {
        "messages": [
            U,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "content": "2"},
            A,
        ],
        "tools": [{"type": "function", "function": TOOL}],
    }
    sharegpt = {
        "conversations": [
            FROM_U,
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            FROM_A,
        ],
        "tools": json.dumps([TOOL]),
    }
    (first,) = read_rows(write_lines(tmp_path / "o.jsonl", [openai])).rows
    (second,) = read_rows(write_lines(tmp_path / "s.jsonl", [sharegpt])).rows
    assert first.key == second.key
    assert first.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert first.tools == ({"type": "function", "function": TOOL},)


def test_words_and_parallel_calls_of_one_turn_are_one_message(tmp_path):
    call = {"from": "function_call", "value": json.dumps(CALL["function"])}
    row = read_rows(
        write_lines(tmp_path / "s.jsonl", [{"conversations": [FROM_U, FROM_A, call, call], "tools": "[]"}])
    ).rows[0]
    assert (
        row.messages[1:] == ({"role": "assistant", "content": "a", "tool_calls": [CALL, CALL]},) and row.tools is None
    )


@pytest.mark.parametrize(
    "turn, said",
    [
        ({"from": "function_call", "value": "{oops"}, "not valid JSON"),
        ({"from": "function_call", "value": "{}"}, "has no name"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "not an object",
        ),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "its role is user"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "other than text"),
    ],
)
def test_broken_turns_are_bad_rows(turn, said, tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [{"messages": [U, turn, A]}])
    with pytest.raises(DataError, match=r"r\.jsonl:1: .*" + said):
        read_rows(path)
