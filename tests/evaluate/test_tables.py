"""Files of data come back as they were written, every text as it is, or are refused by name."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.errors import DataError
from miracle_hub.evaluate.tables import read_table

LIKE_NOTHING = ["NA", "N/A", "nan", "NaN", "null", "None", "", "#N/A", "-", "inf", "true", "007", "1e5"]
DATES = ["2020-01-01", "2020-01-01T00:00:00Z"]
ODD = [
    *LIKE_NOTHING,
    *DATES,
    " a ",
    "ä 漢 🙂",
    "x" * 200_000,
    "a\u2028b",
    "a\x0bb",
    "a\x00b",
    "\ufeffa",
    "it's",
]
QUOTED = ['"', '""', '"a"', 'say "hi"', '"a', "a,b", "a\tb", "a\nb", "a\r\nb", "\n"]


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["text", "label"], *([text, i % 2] for i, text in enumerate(texts))])


def write_lines(path: Path, texts: list[str], label: bool = True) -> None:
    lines = ["text\tlabel", *(f"{text}\t{i % 2}" for i, text in enumerate(texts))]
    path.write_bytes("".join(line + "\n" for line in lines).encode())


def write_jsonl(path: Path, texts: list[str]) -> None:
    rows = [json.dumps({"text": t, "label": i % 2}, ensure_ascii=i % 3 > 0) for i, t in enumerate(texts)]
    path.write_text("\n".join(rows), encoding="utf-8")


def write_json(path: Path, texts: list[str]) -> None:
    labels = [i % 2 for i in range(len(texts))]
    path.write_text(json.dumps({"text": texts, "label": labels}), encoding="utf-8")


WRITERS: dict[str, Any] = {
    "d.csv": write_csv, "d.tsv": write_lines, "d.jsonl": write_jsonl, "d.json": write_json,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_texts_that_look_like_something_else_are_texts(name: str, tmp_path: Path) -> None:
    texts = ODD if name == "d.tsv" else ODD + QUOTED
    WRITERS[name](tmp_path / name, texts)
    found = read_table(tmp_path / name)
    assert found["text"] == texts and list(map(int, found["label"])) == [i % 2 for i in range(len(texts))]


TEXTS = st.lists(
    st.one_of(st.sampled_from(LIKE_NOTHING + QUOTED), st.text(st.characters(exclude_categories=["Cs"]))),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS)
def test_any_texts_come_back_from_files_that_can_hold_them(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    for name in ("d.csv", "d.jsonl", "d.json"):
        WRITERS[name](folder / name, texts)
        assert read_table(folder / name)["text"] == texts
    lines = [text.replace("\r", " ").replace("\n", " ") for text in texts]
    (folder / "d.txt").write_bytes("".join(line + "\n" for line in lines).encode())
    if not lines[0].startswith("\ufeff"):
        assert read_table(folder / "d.txt")["text"] == lines


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS.map(lambda texts: [t.replace("\t", " ").replace("\n", " ") for t in texts]))
def test_a_tsv_has_its_texts_as_they_are_unless_its_quotes_may_be_those_of_csv(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("texts") / "d.tsv"
    write_lines(path, texts)
    try:
        assert read_table(path)["text"] == texts
    except DataError as error:
        assert '"' in "".join(texts) and "what may be quoting in line" in str(error)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS)
def test_a_tsv_that_a_writer_of_csv_made_is_right_or_refused(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("texts") / "d.tsv"
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        with path.open("w", encoding="utf-8", newline="") as stream:
            rows = [["text", "label"], *([text, i % 2] for i, text in enumerate(texts))]
            csv.writer(stream, delimiter="\t", quoting=quoting).writerows(rows)
        try:
            assert read_table(path)["text"] == texts
        except DataError as error:
            assert "quot" in str(error) or "save the file as jsonl" in str(error)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_are_of_no_text(ending: str, mark: str, tmp_path: Path) -> None:
    for name, separator in (("d.csv", ","), ("d.tsv", "\t")):
        lines = [f"text{separator}label", f"a b{separator}1", "", f"c{separator}0"]
        (tmp_path / name).write_bytes((mark + ending.join(lines) + ending).encode())
        assert read_table(tmp_path / name).columns == {"text": ["a b", "c"], "label": ["1", "0"]}
    (tmp_path / "d.txt").write_bytes((mark + ending.join(["a", "", "b"]) + ending).encode())
    assert read_table(tmp_path / "d.txt")["text"] == ["a", "", "b"]
    (tmp_path / "d.jsonl").write_bytes((mark + ending.join(['{"text": "a"}', "", '"b"'])).encode())
    assert read_table(tmp_path / "d.jsonl")["text"] == ["a", "b"]


def test_a_table_of_one_column_has_blank_texts_where_lines_are_blank(tmp_path: Path) -> None:
    for name in ("d.csv", "d.tsv"):
        (tmp_path / name).write_text("text\na\n\nb\n")
        assert read_table(tmp_path / name)["text"] == ["a", "", "b"]


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "empty": (
        "d.csv",
        b"",
        "expected a file (.csv, .tsv, .json, .jsonl, .txt) with rows, found an empty one",
    ),
    "blank": ("d.json", b" \n\n", "found an empty one; look at the file"),
    "long row": (
        "d.csv",
        b"text,label\na,1\nb,c,1\n",
        "line 3: expected 2 values, as line 1 has names, found 3",
    ),
    "short row": ("d.tsv", b"text\tlabel\nb\n", "line 2: expected 2 values, as line 1 has names, found 1"),
    "column twice": ("d.csv", b"text,text\na,b\n", "expected a name for every column, found 'text' twice"),
    "open quote": ("d.csv", b'text,label\n"a,1\nb,0\n', "expected rows of csv with quotes in pairs, found "),
    "latin-1": ("d.csv", b"text\ncaf\xe9\n", "expected text in UTF-8, found byte 0xe9 at position 8; save"),
    "utf-16": ("d.txt", "a".encode("utf-16"), "expected text in UTF-8, found byte 0xff at position 0"),
    "half a row": ("d.jsonl", b'{"text": "a"}\n{"text": ', "line 2: expected JSON, found Expecting value"),
    "number": ("d.jsonl", b'{"text": "a"}\n5\n', "line 2: expected an object of JSON per row, found '5'"),
    "name twice": ("d.jsonl", b'{"text": "a", "text": "b"}', "expected each name once, found 'text' twice"),
    "nested": ("d.json", b"[" * 100_000, "expected JSON, found "),
    "a quoted tsv": (
        "d.tsv",
        b'"text"\t"label"\n"a"\t"1"\n',
        "found what may be quoting in line 1; save the",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_table_is_refused_with_the_place(case: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_table(tmp_path / name)
    assert str(raised.value).startswith(str(tmp_path / name)) and message in str(raised.value)


def test_the_limit_of_a_fields_length_is_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    write_csv(tmp_path / "d.csv", ["x" * 2 * before])
    assert len(read_table(tmp_path / "d.csv")["text"][0]) == 2 * before == 2 * csv.field_size_limit()
