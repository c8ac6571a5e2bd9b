"""Real data sets through a real tokenizer: every answer of every row, to the character."""

import pytest
from test_data_helpers import CHATML, QWEN3, byte_tokenizer, stories_tokenizer, trained_text

from qlora.data import prepare, read_rows
from qlora.errors import DataError

# folder or file -> format, rows, duplicates (counted apart from the program)
DATA = {
    "gsm8k/test.jsonl": ("question_answer", 1319, 0),
    "korean_chatbot/ChatbotData.csv": ("question_answer", 11823, 73),
    "llamafactory_glaive/glaive_toolcall_en_demo.json": ("sharegpt", 300, 35),
    "llamafactory_glaive/identity.json": ("alpaca", 91, 0),
    "self_instruct": ("alpaca", 427, 0),
    "fastchat/dummy_conversation.json": ("sharegpt", 500, 0),
}


@pytest.mark.parametrize("name", DATA)
def test_real_files_are_read(name, shared):
    rowset = read_rows(str(shared / "data" / name))
    assert (rowset.format, len(rowset.rows), rowset.num_duplicates) == DATA[name]


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", ["stories", "chatml", "own chatml", "qwen3"])
def test_real_answers_are_trained_exactly(name, kind, shared):
    tokenizer = (
        stories_tokenizer(shared) if kind == "stories" else byte_tokenizer({"chatml": CHATML, "qwen3": QWEN3}.get(kind))
    )
    data = prepare(str(shared / "data" / name), tokenizer, max_length=100_000, max_rows=120)
    end = "</s>" if kind == "stories" else "<|im_end|>"
    rows = data.train + data.validation
    assert len(rows) == min(120, DATA[name][1])
    for row in rows:
        answers = [message for message in row.row.messages if message["role"] == "assistant"]
        texts = trained_text(row, tokenizer)
        assert len(texts) == len(answers)
        for number, (text, answer) in enumerate(zip(texts, answers)):
            if answer.get("tool_calls"):
                name_, arguments = answer["tool_calls"][0]["function"].values()
                assert text.endswith(end) and name_ in text and all(key in text for key in arguments)
                continue
            think = "<think>\n\n</think>\n\n" if kind == "qwen3" and answer is row.row.messages[-1] else ""
            # The byte-fallback tokenizer drops one space at the begin of a text when it decodes.
            assert text == think + answer["content"] + end
    assert all(sample.prompt_ids for sample in data.samples) and len(data.samples) == 3
    assert not [finding for finding in data.findings if finding.code == "prompt_boundary"]


def test_tool_calls_of_real_rows_reach_the_model(shared):
    path = str(shared / "data" / "llamafactory_glaive" / "glaive_toolcall_en_demo.json")
    data = prepare(path, byte_tokenizer(), max_length=100_000)
    calls = sum(len(message.get("tool_calls", ())) for row in data.train for message in row.row.messages)
    written = sum("".join(trained_text(row, data.tokenizer)).count("<tool_call>{") for row in data.train)
    assert calls == written > 100
    assert not [finding for finding in data.findings if finding.code in ("tool_calls_as_text", "tools_not_shown")]


@pytest.mark.parametrize(
    "name",
    [
        "bfcl",
        "bfcl/BFCL_v4_multi_turn_base.json",
        "bfcl/possible_answer_BFCL_v4_multiple.json",
        "fastchat/mt_bench_question.jsonl",
    ],
)
def test_benchmarks_without_answers_are_refused(name, shared):
    with pytest.raises(DataError) as caught:
        read_rows(str(shared / "data" / name))
    assert "nothing to train on" in str(caught.value) and caught.value.fix


def test_the_real_tokenizer_learns_to_stop_and_is_given_what_it_lacks(shared):
    data = prepare(str(shared / "data" / "gsm8k" / "test.jsonl"), stories_tokenizer(shared), context_limit=512)
    assert data.max_length == 512 and data.template.name == "plain" and data.tokenizer.pad_token == "<unk>"
    eos = data.tokenizer.eos_token_id
    whole = [row for row in data.train if len(row.input_ids) < 512]
    assert (
        whole
        and all(row.labels[-1] == eos for row in whole)
        and all(row.input_ids[0] == 1 != row.input_ids[1] for row in data.train)
    )
