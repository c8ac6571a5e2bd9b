"""Reading files: every kind, every place named, every bad row reported at once."""

import json

import pytest
from test_data_helpers import write_lines

from qlora.data import read_rows
from qlora.errors import DataError

QA = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(4)]


def contents(rowset):
    return [tuple(message["content"] for message in row.messages) for row in rowset.rows]


def error_of(path, **options):
    with pytest.raises(DataError) as caught:
        read_rows(str(path), **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    write_lines(tmp_path / "a.jsonl", QA)
    write_lines(tmp_path / "lines.json", QA)
    (tmp_path / "array.json").write_text(json.dumps(QA, indent=2))
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": QA}, indent=2))
    (tmp_path / "comma.csv").write_text("question,answer\n" + "".join(f"q{i},a{i}\n" for i in range(4)))
    (tmp_path / "semicolon.csv").write_bytes(
        b"\xef\xbb\xbfquestion;answer\r\n" + b"".join(b"q%d;a%d\r\n" % (i, i) for i in range(4))
    )
    (tmp_path / "tab.tsv").write_text("question\tanswer\n" + "".join(f'"q{i}"\ta{i}\n' for i in range(4)))
    parquet(tmp_path / "p.parquet", QA)
    expected = [(f"q{i}", f"a{i}") for i in range(4)]
    files = sorted(path for path in tmp_path.iterdir())
    for path in files:
        rowset = read_rows(str(path))
        assert (contents(rowset), rowset.format) == (expected, "question_answer"), path
        assert rowset.size_bytes == path.stat().st_size
    (tmp_path / "LICENSE").write_text("x")
    folder = read_rows(str(tmp_path))
    assert folder.files == [str(path) for path in files] and contents(folder) == expected * len(files)
    assert folder.num_duplicates == 4 * (len(files) - 1) and "LICENSE" in folder.notes[0]


def test_csv_keeps_quotes_commas_and_line_breaks_and_counts_physical_lines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('question,answer\n"a, ""b""","x\ny"\n\nlast,one\n')
    rows = read_rows(str(path)).rows
    assert [row.messages[0]["content"] for row in rows] == ['a, "b"', "last"]
    assert rows[0].messages[1]["content"] == "x\ny" and [row.line for row in rows] == [2, 5]


def test_csv_complaints_name_the_line(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'question,answer\nok,fine\ntoo,many,cells\nfew\nx,\xff\nempty, \nopen,"never closed\nmore,rows\n')
    text = error_of(path)
    for line, reason in (
        (3, "3 cells, but the header has 2"),
        (4, "1 cells"),
        (5, "not valid UTF-8"),
        (6, "answer is empty"),
        (7, "never closed"),
    ):
        assert any(f"t.csv:{line}: " in part and reason in part for part in text.splitlines()), (line, text)
    path.write_text("question,question\na,b\n")
    assert "twice" in error_of(path)


def test_every_bad_row_is_reported_in_one_error(tmp_path):
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    user = {"role": "user", "content": "a"}

    def row(*messages):
        return json.dumps({"messages": list(messages)})

    bad = {
        "not valid JSON": "{oops",
        "the row is a list": "[1]",
        "list of messages is empty": row(),
        "message 1 has no role": row({"content": "a"}),
        "unknown role": row({"role": "alien", "content": "a"}),
        "message 2 has no content": row(user, {"role": "assistant", "content": None}),
        "is a number (5)": row(user, {"role": "assistant", "content": 5}),
        "no assistant turn": row(user),
        "the answer in message 2 is empty": row(user, {"role": "assistant", "content": " "}),
        "message 1 is text": row("hello"),
    }
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([good, "", *bad.values(), good]) + "\n")
    lines = error_of(path).splitlines()
    assert lines[0].startswith("10 rows of 12")
    for number, (reason, line) in enumerate(zip(bad, lines[1:]), start=3):
        assert line.strip().startswith(f"{path}:{number}: ") and reason in line
    rowset = read_rows(str(path), on_bad_row="skip")
    assert [row.line for row in rowset.rows] == [1, 13] and len(rowset.bad_rows) == 10


def test_only_ten_bad_rows_are_shown_and_the_rest_counted(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("{\n" * 25 + json.dumps(QA[0]) + "\n")
    lines = error_of(path).splitlines()
    assert len([line for line in lines if "many.jsonl:" in line]) == 10 and "and 15 more" in lines[-2]
    path.write_text("{\n" * 25)
    assert "no usable row" in error_of(path, on_bad_row="skip")


def test_bytes_that_are_not_utf8_and_half_surrogates_are_bad_rows(tmp_path):
    path = tmp_path / "u.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n{"text": "\\ud83d"}\n')
    text = error_of(path)
    assert "u.jsonl:2: not valid UTF-8" in text and "u.jsonl:3: the text holds half of a surrogate pair" in text


def test_rows_that_lack_a_column_say_which(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [QA[0], {"question": "q", "reply": "r"}])
    assert "c.jsonl:2: no column answer (its columns: question, reply)" in error_of(path)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("e.jsonl", "", "the file is empty"),
        ("e.json", "[]", "the file is empty"),
        ("e.csv", "question,answer\n", "the file is empty"),
        ("e.txt", "x", 'ends in ".txt"'),
        ("e.json", "[{]", "e.json:1: not valid JSON"),
        ("e.parquet", "x", "not a readable Parquet"),
    ],
)
def test_files_without_rows(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    assert said in error_of(tmp_path / name)


def test_folders_without_data_and_missing_files(tmp_path):
    (tmp_path / "README.md").write_text("x")
    assert "README.md" in error_of(tmp_path)
    write_lines(tmp_path / "train.jsonl", QA)
    assert f"Did you mean {tmp_path / 'train.jsonl'}?" in error_of(tmp_path / "trian.jsonl")
    assert "There is no data at 'no-such-file.jsonl'" in error_of("no-such-file.jsonl")  # and not a Hub id of that name
    (tmp_path / "utf16.csv").write_text("question,answer\na,b\n", encoding="utf-16")
    assert "UTF-16" in error_of(tmp_path / "utf16.csv")


@pytest.mark.parametrize(
    "path", ["", "/dev/null", "~no-such-user/x.jsonl", "x" * 5000, "https://example.org/x.jsonl", "a b", "a/b/c"]
)
def test_odd_paths_are_our_errors(path):
    assert error_of(path)


def test_hub_ids_are_named_when_the_hub_cannot_be_reached():
    text = error_of("someone/some-data")  # tests run offline
    assert '"someone/some-data" is no local file or folder' in text and "HF_HUB_OFFLINE" in text


def test_hub_data_sets_are_read_like_files(tmp_path):
    # The Hub cannot be here; `datasets` reads a local folder through the very same call and builder.
    from qlora.data import hub_rows

    parquet(tmp_path / "train-0.parquet", QA)
    rows = list(hub_rows.read_hub(str(tmp_path), "train"))
    assert [(row.values, row.line) for row in rows] == [(values, i) for i, values in enumerate(QA, 1)]
    with pytest.raises(DataError, match='no split "test"'):
        list(hub_rows.read_hub(str(tmp_path), "test"))


def test_max_rows_draws_with_the_seed_and_keeps_the_order(tmp_path):
    path = write_lines(tmp_path / "n.jsonl", [{"text": str(i)} for i in range(50)])
    drawn = [int(row.text) for row in read_rows(path, max_rows=10, seed=1).rows]
    assert drawn == sorted(drawn) and len(drawn) == 10
    assert drawn == [int(row.text) for row in read_rows(path, max_rows=10, seed=1).rows]
    assert drawn != [int(row.text) for row in read_rows(path, max_rows=10, seed=2).rows]
    assert len(read_rows(path, max_rows=99).rows) == 50


def test_null_fields_that_arrow_adds_are_dropped(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    other = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "g", "arguments": {"b": 2}}}]}
    user = {"role": "user", "content": "x"}
    parquet(tmp_path / "t.parquet", [{"messages": [user, call]}, {"messages": [user, other]}])
    arguments = [
        row.messages[1]["tool_calls"][0]["function"]["arguments"] for row in read_rows(str(tmp_path / "t.parquet")).rows
    ]
    assert arguments == [{"a": 1}, {"b": 2}]
