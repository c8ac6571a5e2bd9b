"""What is trained, to the token: every answer with its end-of-turn, and nothing else."""

import random

import pytest
from test_data_helpers import (
    CHATML,
    END_ONCE,
    ENDLESS,
    EOS_ONCE,
    GEMMA,
    LLAMA3,
    MARKED,
    MARKED_IN_PARTS,
    MISTRAL,
    QWEN3,
    REASONER,
    RETURNING,
    SEPARATED,
    byte_tokenizer,
    chat_file,
    stories_tokenizer,
    trained_text,
    write_lines,
)

from qlora.data import generation_samples, prepare, read_rows, set_chat_template, set_special_tokens, tokenise
from qlora.errors import DataError

STYLES = {
    "chatml": (CHATML, {}, lambda content, last: f"{content}<|im_end|>"),
    "marked": (MARKED, {}, lambda content, last: f"{content}<|im_end|>"),
    "llama3": (
        LLAMA3,
        {"bos": "<s>", "adds_bos": True, "eos": "<|eot_id|>"},
        lambda content, last: f"{content.strip()}<|eot_id|>",
    ),
    "qwen3": (QWEN3, {}, lambda content, last: ("<think>\n\n</think>\n\n" if last else "") + f"{content}<|im_end|>"),
    "reasoner": (REASONER, {"bos": "<s>", "eos": "<|endoftext|>"}, lambda content, last: f"{content}<|endoftext|>"),
    "gemma": (GEMMA, {"bos": "<s>", "adds_bos": True}, lambda content, last: f"{content.strip()}<end_of_turn>"),
    "mistral": (
        MISTRAL,
        {"bos": "<s>", "adds_bos": True, "eos": "<|endoftext|>"},
        lambda content, last: f" {content}<|endoftext|>",
    ),
    "end_once": (END_ONCE, {"eos": "<|endoftext|>"}, lambda content, last: content + ("<|endoftext|>" if last else "")),
    "marked in parts": (MARKED_IN_PARTS, {}, lambda content, last: f"{content}<|im_end|>"),
    "eos_once": (
        EOS_ONCE,
        {"eos": "<|endoftext|>"},
        lambda content, last: f"{content}<|end|>" + ("\n<|endoftext|>" if last else ""),
    ),
    "returning": (
        RETURNING,
        {"eos": "<|return|>"},
        lambda content, last: content + ("<|return|>" if last else "<|end|>"),
    ),
    "endless": (ENDLESS, {"eos": "<|endoftext|>"}, lambda content, last: content),
    "separated": (SEPARATED, {"eos": "<|endoftext|>"}, lambda content, last: content + ("" if last else "<|end|>")),
    "default chatml": (None, {}, lambda content, last: f"{content}<|im_end|>"),
    "default plain": (
        None,
        {"special": ["<|endoftext|>"], "eos": "<|endoftext|>"},
        lambda content, last: f" {content}<|endoftext|>",
    ),
}
WORDS = [
    "hello",
    "Answer",
    "the answer is",
    "한국어",
    "42",
    "naïve\ncafé",
    "User: hi",
    "assistant",
    "a",
    "  two",
    "x\n\ny",
    "🙂",
]


def rows_of(tmp_path, *conversations):
    return read_rows(chat_file(tmp_path / "rows.jsonl", *conversations)).rows


@pytest.mark.parametrize("style", STYLES)
def test_every_answer_is_trained_to_its_end_of_turn_and_nothing_else(style, tmp_path):
    template, options, expected = STYLES[style]
    tokenizer = byte_tokenizer(template, **options)
    set_chat_template(tokenizer, None)
    # Awkward on purpose: answers that repeat the question, that look like roles, that begin or end with white space.
    rng = random.Random(7)
    conversations = [
        [
            (
                "user" if turn % 2 == 0 else "assistant",
                " ".join(rng.sample(WORDS, rng.randint(1, 3))) + rng.choice(["", "", " ", "\n"]),
            )
            for turn in range(2 * rng.randint(1, 4))
        ]
        for _ in range(60)
    ]
    conversations.append([("user", "same"), ("assistant", "same"), ("user", "same"), ("assistant", "same")])
    rows = rows_of(tmp_path, *conversations)
    for row, turns in zip(tokenise(rows, tokenizer), conversations):
        answers = [content for role, content in turns if role == "assistant"]
        wanted = [expected(content, number == len(answers) - 1) for number, content in enumerate(answers)]
        assert trained_text(row, tokenizer) == wanted, tokenizer.decode(row.input_ids)
        if options.get("adds_bos"):
            assert row.input_ids[0] == tokenizer.bos_token_id and row.input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("style", [style for style in STYLES if style != "reasoner"])
def test_prompts_for_generation_begin_the_training_tokens(style, tmp_path):
    template, options, _ = STYLES[style]
    tokenizer = byte_tokenizer(template, **options)
    set_chat_template(tokenizer, None)
    rows = rows_of(
        tmp_path,
        [("user", "hello world"), ("assistant", "the answer"), ("user", "한국어?"), ("assistant", "예 42")],
        [("user", "hi "), ("assistant", "x")],
    )
    trained = tokenise(rows, tokenizer)
    samples = generation_samples(rows, tokenizer, limit=5)
    assert [sample.reference for sample in samples] == ["예 42", "x"]
    for row, sample in zip(trained, samples):
        end = max(index for index, label in enumerate(row.labels) if label != -100)
        begin = max(index for index, label in enumerate(row.labels[:end]) if label == -100) + 1
        assert sample.prompt_ids == row.input_ids[:begin]


def test_thinking_is_trained_where_the_template_keeps_it(tmp_path):
    tokenizer = byte_tokenizer(QWEN3)
    thought = "<think>\nhow are you\n</think>\n\nfine"
    rows = rows_of(tmp_path, [("user", "a"), ("assistant", thought), ("user", "b"), ("assistant", thought)])
    assert trained_text(tokenise(rows, tokenizer)[0], tokenizer) == ["fine<|im_end|>", thought + "<|im_end|>"]
    # The made-up answer that the place is found with must not be one that the row has.
    rows = rows_of(
        tmp_path, [("user", "Qzxvanswer"), ("assistant", thought), ("user", "b"), ("assistant", "Qzxvanswer")]
    )
    assert trained_text(tokenise(rows, tokenizer)[0], tokenizer)[0] == "fine<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED, MARKED_IN_PARTS])
def test_only_the_completion_is_trained_and_answers_of_weight_zero_are_read(template, tmp_path):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    rows = read_rows(write_lines(tmp_path / "c.jsonl", [{"prompt": turns[:3], "completion": turns[3:]}])).rows
    assert trained_text(tokenise(rows, byte_tokenizer(template))[0], byte_tokenizer()) == ["d<|im_end|>"]
    turns[3]["weight"] = 0
    rows = read_rows(write_lines(tmp_path / "w.jsonl", [{"messages": turns}])).rows
    assert trained_text(tokenise(rows, byte_tokenizer(template))[0], byte_tokenizer()) == ["b<|im_end|>"]


# Writes an answer differently by what it says: no prompt, no prefix, no frame around it holds.
FICKLE = (
    "{% if messages | length > 2 and messages[1].content[0] != 'Q' %}odd {% endif %}{% for m in messages %}"
    "{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}?{% endif %}"
)
# Drops all thinking and ends no turn: nothing at all is left of an answer that only thinks.
DROPPING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("template, answer", [(FICKLE, "answer"), (DROPPING, "<think>hm</think>")])
def test_an_answer_that_cannot_be_located_is_refused_and_not_guessed(template, answer, tmp_path):
    rows = rows_of(tmp_path, [("user", "a"), ("assistant", answer), ("user", "b"), ("assistant", "c")])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the answer in message 2 cannot be located exactly"):
        tokenise(rows, byte_tokenizer(template))


def test_real_sentencepiece_like_tokenizer(shared, tmp_path):
    tokenizer = stories_tokenizer(shared)
    set_special_tokens(tokenizer)
    assert set_chat_template(tokenizer, None).name == "plain"
    rows = rows_of(
        tmp_path,
        [("system", "Be kind."), ("user", "안녕"), ("assistant", "네 hi"), ("user", "a\nb"), ("assistant", "c ")],
    )
    (row,) = tokenise(rows, tokenizer)
    assert (
        tokenizer.decode(row.input_ids)
        == "<s> System: Be kind.\nUser: 안녕\nAssistant: 네 hi</s> \nUser: a\nb\nAssistant: c </s>"
    )
    assert trained_text(row, tokenizer) == ["네 hi</s>", "c </s>"]  # decoding drops the first space
    (sample,) = generation_samples(rows, tokenizer, 1)
    assert sample.prompt_ids == row.input_ids[: len(sample.prompt_ids)]
    assert row.labels[len(sample.prompt_ids)] != -100 and row.labels[len(sample.prompt_ids) - 1] == -100


@pytest.mark.parametrize(
    "prompt, completion", [("Q: hi\nA:", " hello"), ("Q: hi\nA: ", "hello"), ("Q: hi\nA:\n", "한국어")]
)
def test_raw_completion_is_trained_with_its_first_word_and_eos(prompt, completion, tmp_path, shared):
    rows = read_rows(write_lines(tmp_path / "r.jsonl", [{"prompt": prompt, "completion": completion}])).rows
    for tokenizer in (byte_tokenizer(), stories_tokenizer(shared)):
        (row,) = tokenise(rows, tokenizer)
        assert "".join(trained_text(row, tokenizer)).strip() == completion.strip() + tokenizer.eos_token
        assert tokenizer.decode(row.input_ids).endswith(prompt + completion + tokenizer.eos_token)


def test_text_trains_everything_but_bos_and_appends_eos_once(tmp_path):
    tokenizer = byte_tokenizer(bos="<s>", adds_bos=True)
    rows = read_rows(
        write_lines(tmp_path / "t.jsonl", [{"text": "hello"}, {"text": "hello<|im_end|>"}, {"text": "<s>hello"}])
    ).rows
    for row in tokenise(rows, tokenizer):
        assert tokenizer.decode(row.input_ids) == "<s>hello<|im_end|>"
        assert row.labels == [-100, *row.input_ids[1:]]


def test_train_on_all_counts_every_token_but_bos(tmp_path):
    tokenizer = byte_tokenizer(LLAMA3, bos="<s>", adds_bos=True, eos="<|eot_id|>")
    (row,) = tokenise(rows_of(tmp_path, [("user", "hello"), ("assistant", "hi")]), tokenizer, train_on="all")
    assert row.labels == [-100, *row.input_ids[1:]]


def test_labels_do_not_look_at_the_pad_id(tmp_path):
    tokenizer = byte_tokenizer(CHATML, pad="<|im_end|>")
    data = prepare(chat_file(tmp_path / "p.jsonl", [("user", "hello"), ("assistant", "hi")]), tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert trained_text(data.train[0], tokenizer) == ["hi<|im_end|>"]


def test_pieces_join_to_the_whole_text(tmp_path, shared):
    for tokenizer in (byte_tokenizer(CHATML), stories_tokenizer(shared)):
        data = prepare(
            chat_file(tmp_path / "p.jsonl", [("user", "a b"), ("assistant", "c d"), ("user", "e"), ("assistant", "f")]),
            tokenizer,
        )
        pieces = data.pieces(0)
        assert "".join(text for text, _ in pieces) == tokenizer.decode(data.train[0].input_ids)
        assert [text.strip().split("<")[0] for text, trained in pieces if trained] == ["c d", "f"]
