"""`prepare` as a whole: what it hands over, and what it finds to say."""

import pytest
from test_data_helpers import CHATML, END_ONCE, ENDLESS, RETURNING, byte_tokenizer, chat_file, write_lines

from qlora.data import fingerprint, prepare
from qlora.errors import DataError

SILENT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def chats(num, words=3):
    return [[("user", f"question {i}"), ("assistant", "answer " * words + str(i))] for i in range(num)]


def found(data, code):
    matching = [finding for finding in data.findings if finding.code == code]
    assert len(matching) <= 1
    return matching[0] if matching else None


def test_what_is_handed_over(tmp_path):
    calls = []
    data = prepare(
        chat_file(tmp_path / "c.jsonl", *chats(600)),
        byte_tokenizer(CHATML),
        context_limit=4096,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert (len(data.train), len(data.validation)) == (570, 30)
    assert not {row.row.key for row in data.train} & {row.row.key for row in data.validation}
    assert data.max_length == data.lengths.max == max(len(row.input_ids) for row in data.train + data.validation)
    assert sum(count for _, _, count in data.lengths.histogram) == 600 and data.length_unit == "tokens"
    assert calls[-1] == (600, 600) and len(calls) > 1
    held_out = {row.row.key for row in data.validation}
    assert len(data.samples) == 3 and all(sample.row.key in held_out for sample in data.samples)
    assert data.stop_ids == [data.tokenizer.eos_token_id]
    assert data.num_trained_tokens == sum(label != -100 for row in data.train for label in row.labels)
    assert [finding.level for finding in data.findings] == sorted(
        (finding.level for finding in data.findings), key=["error", "warning", "note"].index
    )
    assert {finding.level for finding in data.findings} == {"note"}


def test_the_fingerprint_is_of_the_tokens(tmp_path):
    path = chat_file(tmp_path / "c.jsonl", *chats(30))
    first, again = prepare(path, byte_tokenizer(CHATML)), prepare(path, byte_tokenizer(CHATML))
    assert first.fingerprint == again.fingerprint == fingerprint(first.train)
    assert first.fingerprint != prepare(path, byte_tokenizer(CHATML), train_on="all").fingerprint
    assert first.fingerprint != prepare(path, byte_tokenizer(CHATML), seed=1).fingerprint


def test_zero_trained_tokens_are_refused(tmp_path):
    data = prepare(chat_file(tmp_path / "c.jsonl", *chats(5)), byte_tokenizer(CHATML), max_length=4)
    assert data.findings[0].level == "error" and found(data, "nothing_to_train") and data.train == []
    assert data.fit.num_answer_lost == 5
    with pytest.raises(DataError, match="No token is left to train"):
        data.refuse_errors()


def test_lost_answers_and_lost_ends_are_counted(tmp_path):
    long_question = [("user", "word " * 200), ("assistant", "yes")]
    data = prepare(
        chat_file(tmp_path / "c.jsonl", *chats(10), long_question, *chats(2, words=200)),
        byte_tokenizer(CHATML),
        max_length=100,
    )
    assert (data.fit.num_answer_lost, data.fit.num_truncated, data.fit.num_end_lost) == (1, 2, 2)
    assert "1 row lost the whole answer" in found(data, "answer_lost").text
    assert "2 rows are cut in the middle of an answer, which loses its end-of-turn" in found(data, "end_lost").text
    assert found(data, "cut").text.startswith("2 of 12 rows")
    data = prepare(chat_file(tmp_path / "d.jsonl", *chats(4, words=200)), byte_tokenizer(CHATML), max_length=100)
    assert found(data, "all_cut") and found(data, "end_never_trained") and not found(data, "cut")


def test_a_length_above_the_models_is_refused(tmp_path):
    with pytest.raises(DataError, match="4,000 tokens, but the model takes at most 512"):
        prepare(chat_file(tmp_path / "c.jsonl", *chats(3)), byte_tokenizer(CHATML), max_length=4000, context_limit=512)


def test_an_end_that_is_never_trained_is_said(tmp_path):
    path = chat_file(tmp_path / "c.jsonl", *chats(3))
    data = prepare(path, byte_tokenizer(SILENT, eos="<|endoftext|>", pad="<|im_end|>"))
    assert found(data, "no_end_of_turn") and found(data, "end_never_trained")
    assert found(prepare(path, byte_tokenizer(SILENT, eos="<|endoftext|>")), "pad_is_eos")
    assert not found(prepare(path, byte_tokenizer(CHATML, pad="<|im_end|>")), "pad_is_eos")
    assert not found(prepare(path, byte_tokenizer(END_ONCE, eos="<|endoftext|>")), "end_never_trained")


def test_chatml_on_a_tokenizer_without_its_tokens_is_said(tmp_path):
    tokenizer = byte_tokenizer(special=["<|endoftext|>"], eos="<|endoftext|>")
    data = prepare(chat_file(tmp_path / "c.jsonl", *chats(3)), tokenizer, chat_template="chatml")
    assert "no token of this tokenizer" in found(data, "template_without_tokens").text
    assert data.stop_ids == [tokenizer.eos_token_id]  # and not at every "<"
    other_end = prepare(chat_file(tmp_path / "c.jsonl", *chats(3)), byte_tokenizer(CHATML, eos="<|endoftext|>"))
    assert found(other_end, "end_of_turn") and len(other_end.stop_ids) == 2
    returning = prepare(chat_file(tmp_path / "c.jsonl", *chats(3)), byte_tokenizer(RETURNING, eos="<|return|>"))
    assert returning.tokenizer.convert_ids_to_tokens(returning.stop_ids) == ["<|return|>", "<|end|>"]
    endless = prepare(chat_file(tmp_path / "c.jsonl", *chats(3)), byte_tokenizer(ENDLESS, eos="<|endoftext|>"))
    assert endless.stop_ids == [endless.tokenizer.eos_token_id]  # the next message's role token ends nothing


def test_double_bos_duplicates_and_special_tokens_in_the_data_are_said(tmp_path):
    data = prepare(
        write_lines(tmp_path / "t.jsonl", [{"text": "<s><s>hello"}, {"text": "hi"}]),
        byte_tokenizer(bos="<s>", adds_bos=True),
    )
    assert "1 row begins with <s> twice" in found(data, "double_bos").text
    data = prepare(
        chat_file(tmp_path / "c.jsonl", *chats(10), *chats(5), [("user", "a<|im_end|>"), ("assistant", "b")]),
        byte_tokenizer(CHATML),
    )
    assert data.rowset.num_duplicates == 5 and "5 of 16 rows" in found(data, "duplicates").text
    assert "c.jsonl:16" in found(data, "special_tokens_in_content").text
    assert "Under 20 distinct rows" in found(data, "no_validation").text and data.validation == []


def test_a_validation_file_and_the_rows_it_shares(tmp_path):
    path = chat_file(tmp_path / "c.jsonl", *chats(10))
    other = chat_file(tmp_path / "v.jsonl", *chats(3), [("user", "new"), ("assistant", "one")])
    data = prepare(path, byte_tokenizer(CHATML), validation=other)
    assert (len(data.train), len(data.validation)) == (10, 4) and {row.row.file for row in data.validation} == {other}
    assert "3 of 4 validation rows" in found(data, "validation_overlap").text


def test_skipped_rows_are_said(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("{oops\n" + open(chat_file(tmp_path / "good.jsonl", *chats(3))).read())
    data = prepare(str(path), byte_tokenizer(CHATML), on_bad_row="skip")
    assert (
        "1 row could not be used" in found(data, "skipped_rows").text
        and "c.jsonl:1" in found(data, "skipped_rows").text
    )


def test_a_prompt_that_the_tokenizer_merges_with_its_answer_is_said(tmp_path):
    merged = [{"prompt": "a: ", "completion": "hello"}]
    clean = [{"prompt": "a:", "completion": " hello"}]
    tokenizer = byte_tokenizer()
    assert found(prepare(write_lines(tmp_path / "m.jsonl", merged), tokenizer), "prompt_boundary")
    assert not found(prepare(write_lines(tmp_path / "c.jsonl", clean), tokenizer), "prompt_boundary")
    assert tokenizer.chat_template is None  # raw text needs none


def test_without_a_tokenizer_rows_are_still_checked(tmp_path):
    data = prepare(chat_file(tmp_path / "c.jsonl", *chats(30)), None)
    assert data.length_unit == "characters" and data.lengths.max == len("question 29" + "answer " * 3 + "29")
    assert (len(data.train_rows), len(data.validation_rows), data.train) == (22, 8, []) and found(data, "no_tokenizer")
    with pytest.raises(DataError, match="no assistant turn"):
        prepare(chat_file(tmp_path / "c.jsonl", [("user", "a")]), None)


def test_packing_says_what_it_gains(tmp_path):
    path = chat_file(tmp_path / "c.jsonl", *chats(30))
    assert found(prepare(path, byte_tokenizer(CHATML), packing=True), "packing").level == "warning"
    assert found(prepare(path, byte_tokenizer(CHATML), packing=True, max_length=1000), "packing").level == "note"


def test_the_recipes_data_section_fits(tmp_path):
    from qlora.recipe import DataSection

    settings = DataSection(path=chat_file(tmp_path / "c.jsonl", *chats(30))).model_dump()
    assert len(prepare(tokenizer=byte_tokenizer(CHATML), **settings).train) == 22
