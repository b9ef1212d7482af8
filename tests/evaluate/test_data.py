"""Columns, splits and files of data: right, or refused in one line with a status that says so."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig

from miracle_hub.errors import DataError
from miracle_hub.evaluate.data import read_examples, read_split, read_texts

datasets = pytest.importorskip("datasets", reason="data are read with datasets: pip install '.[fit]'")


def written(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def texts_of(path: Path, *columns: str, task: str = "text-classification") -> list[list[str]]:
    return read_texts(path, None, list(columns) or None, task)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("text,label\nNA,0\nnull,1\n", [["NA", "null"]]),
        ("text,label\n12,0\n007,1\n", [["12", "007"]]),  # one column that is no label
        ("id,sentence,label\n1,a b,0\n2,c,1\n", [["a b", "c"]]),  # numbers are no texts
        (",sentence,label\n0,a b,0\n1,c,1\n", [["a b", "c"]]),  # as pandas writes an index
        ("sentence,flag,label\na,True,0\nb,False,1\n", [["a", "b"]]),
        ("q,a,label\na b,c d,0\ne f,g h,1\n", [["a b", "e f"], ["c d", "g h"]]),
    ],
    ids=repr,
)
def test_texts_are_those_of_the_columns_that_can_be_no_others(
    content: str, texts: list[list[str]], tmp_path: Path
) -> None:
    assert texts_of(written(tmp_path / "d.csv", content)) == texts


@pytest.mark.parametrize(
    ("content", "candidates"),
    [
        ("id,text,label\nx1,a b,0\nx2,c d,1\n", "2 that may be ('id', 'text')"),
        ("title,text,genre\na b,c d,x\ne f,g h,y\n", "3 that may be ('title', 'text', 'genre')"),
        ("id,text,label\n1,12,0\n2,13,1\n", "none that is one for sure"),
    ],
    ids=repr,
)
def test_where_several_columns_may_be_texts_they_are_to_be_named(
    content: str, candidates: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "d.csv", content)
    with pytest.raises(DataError) as raised:
        texts_of(path)
    assert f"found {candidates} in [" in str(raised.value)
    assert str(raised.value).endswith("name them with --text-columns, once for each")
    assert texts_of(path, "text")[0] == [line.split(",")[1] for line in content.splitlines()[1:]]


def test_a_guess_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts_of(written(tmp_path / "d.csv", "q,a\na b,c d\ne f,g h\n"))
    assert "texts are pairs of columns 'q' and 'a' (--text-columns names others)" in caplog.text
    texts_of(written(tmp_path / "d.csv", "title,text\na b,c d\ne f,g h\n"), task="causal-lm")
    assert "texts are those of column 'text', of ['title', 'text']" in caplog.text
    texts_of(written(tmp_path / "d.txt", "a\n\n \nb\n"))
    assert "2 rows without any text are left out" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ["txet"],
            "found ['txet'] in ['text', 'label', 'n']; name them with --text-columns (near it: 'text')",
        ),
        (["text", "text"], "none twice and none the labels ('label'), found ['text', 'text']"),
        (["text", "label"], "none the labels ('label'), found ['text', 'label']"),
        (["text", "n", "label"], "expected one or two columns of text, none twice"),
        (["n"], "column 'n': row 0: expected a text, found '5' (int); complete it, or name another column"),
    ],
    ids=str,
)
def test_columns_that_are_no_texts_are_refused(columns: list[str], message: str, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0, "n": 5}, {"text": "b", "label": 1, "n": 6}]
    path = written(tmp_path / "d.json", json.dumps(rows))
    with pytest.raises(DataError) as raised:
        read_split(path, "text-classification", columns, "label", 0)
    assert message in str(raised.value)


def test_a_row_without_a_text_is_refused_by_every_reader(tmp_path: Path) -> None:
    lines = ['{"text": "a", "label": 0}', '{"text": null, "label": 1}', '{"label": 1}']
    path = written(tmp_path / "d.jsonl", "\n".join(lines))
    message = "column 'text': row 1: expected a text, found none; complete it, or name another column"
    for read in (
        lambda: read_texts(path, None, None, "causal-lm"),
        lambda: read_examples(path, None, None, "label", ("0", "1")),
        lambda: read_split(path, "text-classification", None, "label", 0),
    ):
        with pytest.raises(DataError, match=message):
            read()


def test_a_folder_of_files_is_read_like_the_files(tmp_path: Path) -> None:
    for name, content in (("train", "NA,0\nb,1\n"), ("test", "null,1\n")):
        written(tmp_path / f"{name}.csv", f"text,label\n{content}")
    found = read_split(tmp_path, "text-classification", None, "label", 0)
    assert found.train["text"][:] == ["NA", "b"] and found.evaluation[:] == {"text": ["null"], "labels": [1]}
    with pytest.raises(DataError, match=r"found 'trian'; name it with --split \(near it: 'train'\)"):
        read_texts(tmp_path, "trian", None, "causal-lm")


def test_a_label_that_training_has_not_is_refused_in_the_evaluation(tmp_path: Path) -> None:
    written(tmp_path / "train.csv", "text,label\na,good\nb,bad\n")
    written(tmp_path / "test.csv", "text,label\na,goood\n")
    with pytest.raises(DataError, match="test: column 'label': expected one of .* in row 0; near it: 'good'"):
        read_split(tmp_path, "text-classification", None, "label", 0)


def test_classes_are_those_of_all_rows_though_some_are_held_back(tmp_path: Path) -> None:
    rows = "".join(f"a,{'rare' if i == 7 else 'b' if i % 2 else 'c'}\n" for i in range(20))
    path = written(tmp_path / "d.csv", f"text,label\n{rows}")
    for seed in range(6):
        found = read_split(path, "text-classification", None, "label", seed)
        assert found.class_names == ("b", "c", "rare") and len(found.train) + len(found.evaluation) == 20


ODD = {
    "d.csv": ["", "text,label\n", "text,label\na,1\n", "text,label\na,1\nb\n", "text,label\na,1\nb,1\n",
              "text,label\na,0.5\nb,0.7\n", "text,label\na,\nb,1\n", "text,lable\na,0\nb,1\n", '"a\n'],
    "d.json": ["{", "[1]", '{"text": ["a", "b"], "label": [1, "1"]}',
               '{"text": ["a", null], "label": [0, 1]}', '{"text": ["a", "b"]}'],
    "d.parquet": ["no parquet"],
    "d.tsv": ["text\tlabel\n" + '"a""b"\t0\nb\t1\n', "id\ttext\tlabel\nx1\ta b\t0\nx2\tc d\t1\n"],
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something dense to fit, as far as is looked at before the data are."""
    folder = tmp_path_factory.mktemp("source")
    BertConfig().save_pretrained(folder)
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("name", "content"), [(n, c) for n, contents in ODD.items() for c in contents])
def test_the_command_line_says_one_line_of_odd_data(
    name: str,
    content: str,
    source: Path,
    tmp_path: Path,
    run: Callable[..., tuple[int, str, str]],
) -> None:
    path = written(tmp_path / name, content)
    status, out, err = run("fit", source, tmp_path / "out", "--data", path, "--rate", 1)
    assert status == 1 and out == "" and list(tmp_path.iterdir()) == [path]
    assert err.startswith(f"miracle: {path}: ") and err.count("\n") == 1 and ", found " in err


def test_a_misspelled_path_is_refused_with_what_is_there(tmp_path: Path) -> None:
    written(tmp_path / "train.csv", "text\na\n")
    with pytest.raises(DataError, match=r"check the name \(near it: 'train.csv'\) and the contents"):
        texts_of(tmp_path / "trian.csv")
