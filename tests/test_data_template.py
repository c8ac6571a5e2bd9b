"""Which chat template is used, which special tokens, and what becomes of tools the template does not know."""

import json

import pytest
from test_data_helpers import CHATML, GEMMA, MISTRAL, byte_tokenizer, chat_file, trained_text, write_lines

from qlora.data import named_templates, prepare, read_rows, set_chat_template, set_special_tokens, tokenise
from qlora.errors import DataError

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"name": "add", "arguments": {"a": 1, "b": "é"}}
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "sum?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ],
    "tools": [TOOL],
}
# Mistral-like: refuses calls and results that have no id of nine characters.
WITH_IDS = (
    "{{ bos_token }}{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('bad id') }}{% endif %}"
    "[RESULT] {{ m.content }}"
    "{% elif m.tool_calls %}[CALLS] {% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('bad id') }}{% endif %}"
    "{{ c.function | tojson }} {{ c.id }}{% endfor %}{{ eos_token }}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def tool_rows(tmp_path):
    return read_rows(write_lines(tmp_path / "tools.jsonl", [TOOL_ROW])).rows


def codes(data):
    return {finding.code for finding in data.findings}


def test_the_choice_and_its_reason():
    own = set_chat_template(byte_tokenizer(CHATML), None)
    assert (own.name, own.source) == ("tokenizer", "tokenizer")
    with_tokens, without = byte_tokenizer(), byte_tokenizer(special=["<|endoftext|>"], eos="<|endoftext|>")
    assert set_chat_template(with_tokens, None).name == "chatml" and with_tokens.chat_template
    choice = set_chat_template(without, None)
    assert choice.name == "plain" and "<|im_start|>" in choice.reason and "<|endoftext|>" in choice.reason
    asked = byte_tokenizer(CHATML)
    assert set_chat_template(asked, "plain").reason == "data.chat_template says so" and "User" in asked.chat_template
    assert named_templates() == ["chatml", "plain"]


def test_a_template_file(tmp_path):
    tokenizer = byte_tokenizer()
    path = tmp_path / "my.jinja"
    path.write_text(CHATML)
    assert set_chat_template(tokenizer, str(path)).source == str(path) and tokenizer.chat_template == CHATML
    path.write_text("a\n{% for %}")
    with pytest.raises(DataError, match=r"my\.jinja:2: not a valid chat template"):
        set_chat_template(tokenizer, str(path))
    with pytest.raises(DataError, match="Named templates: chatml, plain"):
        set_chat_template(tokenizer, "alpaca")


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_named_templates_travel_with_the_adapter_and_write_bos_once(name, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = byte_tokenizer(bos="<s>", adds_bos=True)
    set_chat_template(tokenizer, name)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = read_rows(chat_file(tmp_path / "r.jsonl", [("user", "hi"), ("assistant", "hello")])).rows
    # A program that knows nothing of ours gets the very tokens that were trained.
    assert loaded.apply_chat_template(messages, return_dict=True)["input_ids"] == tokenise(rows, tokenizer)[0].input_ids
    assert tokenise(rows, tokenizer)[0].input_ids.count(tokenizer.bos_token_id) == 1


def test_pad_token_and_eos():
    known = byte_tokenizer(pad=None, special=["<|endoftext|>", "<pad>", "<|im_end|>"])
    assert "by its name" in set_special_tokens(known)[0].text and known.pad_token == "<pad>"
    none = byte_tokenizer(pad=None)
    assert "its eos token" in set_special_tokens(none)[0].text and none.pad_token == "<|im_end|>"
    assert set_special_tokens(byte_tokenizer()) == []
    with pytest.raises(DataError, match="no end-of-text"):
        set_special_tokens(byte_tokenizer(eos=None))


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_named_templates_write_tools_calls_and_results(name, tmp_path):
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer, name)
    (row,) = tokenise(tool_rows(tmp_path), tokenizer)
    call = json.dumps(CALL, ensure_ascii=False)
    wanted = {
        "chatml": [f"<tool_call>{call}</tool_call><|im_end|>", "It is 2.<|im_end|>"],
        "plain": [f" {call}<|im_end|>", " It is 2.<|im_end|>"],
    }[name]
    assert trained_text(row, tokenizer) == wanted
    text = tokenizer.decode(row.input_ids)
    assert text.count('"description": "Adds."') == 1 and text.index("Adds.") < text.index("sum?") < text.index(call)


def test_calls_that_a_template_does_not_write_become_text_and_it_is_said(tmp_path):
    tokenizer = byte_tokenizer(CHATML)
    data = prepare(write_lines(tmp_path / "t.jsonl", [TOOL_ROW]), tokenizer)
    assert trained_text(data.train[0], tokenizer) == [
        json.dumps(CALL, ensure_ascii=False) + "<|im_end|>",
        "It is 2.<|im_end|>",
    ]
    assert {"tool_calls_as_text", "tools_not_shown"} <= codes(data) and "tool_results_as_user" not in codes(data)


def test_results_that_a_template_rejects_become_the_users(tmp_path):
    tokenizer = byte_tokenizer(GEMMA, bos="<s>")
    data = prepare(write_lines(tmp_path / "t.jsonl", [TOOL_ROW]), tokenizer)
    assert "tool_results_as_user" in codes(data)
    assert "<start_of_turn>user\n2<end_of_turn>" in tokenizer.decode(data.train[0].input_ids)


def test_a_template_that_wants_ids_gets_them(tmp_path):
    tokenizer = byte_tokenizer(WITH_IDS, bos="<s>", eos="<|endoftext|>")
    twice = {**TOOL_ROW, "messages": TOOL_ROW["messages"] * 2}
    row, second = tokenise(tool_rows(tmp_path) + read_rows(write_lines(tmp_path / "2.jsonl", [twice])).rows, tokenizer)
    call = json.dumps(CALL, ensure_ascii=False)
    assert trained_text(second, tokenizer)[2] == f"[CALLS] {call} call00001<|endoftext|>"
    assert trained_text(row, tokenizer) == [f"[CALLS] {call} call00000<|endoftext|>", " It is 2.<|endoftext|>"]
    assert "[RESULT] 2" in tokenizer.decode(row.input_ids)


def test_a_template_that_wants_arguments_as_text_gets_them(tmp_path):
    template = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + '=' + c.function.arguments }}{% endfor %}",
    )
    tokenizer = byte_tokenizer(template)
    (row,) = tokenise(tool_rows(tmp_path), tokenizer)
    assert trained_text(row, tokenizer)[0] == "add=" + json.dumps(CALL["arguments"], ensure_ascii=False) + "<|im_end|>"


def test_results_of_parallel_calls_keep_their_order(tmp_path):
    call = TOOL_ROW["messages"][1]["tool_calls"][0]
    user, calling, _, answer = TOOL_ROW["messages"]
    messages = [
        user,
        {**calling, "tool_calls": [call, call]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
        answer,
    ]
    rows = read_rows(write_lines(tmp_path / "p.jsonl", [{"messages": messages}])).rows
    tokenizer = byte_tokenizer(WITH_IDS, bos="<s>", eos="<|endoftext|>")
    text = tokenizer.decode(tokenise(rows, tokenizer)[0].input_ids)
    assert text.index("call00000") < text.index("call00001") < text.index("[RESULT] one[RESULT] two")
    tokenizer = byte_tokenizer(GEMMA, bos="<s>")  # roles must alternate: both results are one message of the user's
    assert "<start_of_turn>user\none\ntwo<end_of_turn>" in tokenizer.decode(tokenise(rows, tokenizer)[0].input_ids)


@pytest.mark.parametrize(
    "template, turns, said",
    [
        (GEMMA, [("system", "s"), ("user", "a"), ("assistant", "b")], "rejects the system role"),
        (MISTRAL, [("system", "s"), ("user", "a"), ("assistant", "b")], "rejects the system role"),
        (GEMMA, [("user", "a"), ("user", "b"), ("assistant", "c")], "messages 1 and 2, both by the user"),
        (GEMMA, [("assistant", "hi"), ("user", "b"), ("assistant", "c")], "the assistant begins"),
    ],
)
def test_rows_that_a_template_rejects_are_named(template, turns, said, tmp_path):
    good = [("user", "a"), ("assistant", "b")]
    path = chat_file(tmp_path / "r.jsonl", good, turns, good)
    tokenizer = byte_tokenizer(template, bos="<s>")
    with pytest.raises(DataError) as caught:
        tokenise(read_rows(path).rows, tokenizer)
    assert f"{path}:2: the chat template" in str(caught.value) and said in str(caught.value)
    assert "1 of 3 rows" in str(caught.value) and "data.chat_template" in caught.value.fix
    data = prepare(path, tokenizer, on_bad_row="skip")
    assert len(data.train) == 2 and [bad.line for bad in data.bad_rows] == [2]


def test_templates_that_cannot_be_trained_with(tmp_path):
    rows = read_rows(chat_file(tmp_path / "r.jsonl", [("user", "a"), ("assistant", "b")])).rows
    for template, said in (("{{ raise_exception('no') }}", "cannot write a question"), ("fixed", "leaves the answer")):
        with pytest.raises(DataError, match=said):
            tokenise(rows, byte_tokenizer(template))
