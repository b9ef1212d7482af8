"""Labels are classes by name or number; what may mean two things, or none, is refused."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miracle_hub.errors import DataError
from miracle_hub.evaluate.labels import class_names, class_numbers


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([0, 1, 1], ("0", "1"), [0, 1, 1]),
        (["0", "1", "1"], ("0", "1"), [0, 1, 1]),
        (["good", "bad", "good"], ("bad", "good"), [1, 0, 1]),
        ([True, False], ("false", "true"), [1, 0]),
        (["true", "false"], ("false", "true"), [1, 0]),
        ([" a", "b "], ("a", "b"), [0, 1]),
        (["NA", "UK"], ("NA", "UK"), [0, 1]),
        (["1", "2", "3+"], ("1", "2", "3+"), [0, 1, 2]),
        ([2, 0], ("0", "1", "2"), [2, 0]),
        (["-1", "a"], ("-1", "a"), [0, 1]),
    ],
    ids=str,
)
def test_classes_have_names_and_numbers(
    labels: list[Any], names: tuple[str, ...], numbers: list[int]
) -> None:
    assert class_names(labels, "d") == names and class_numbers(labels, names, "d") == numbers


REFUSED: list[tuple[list[Any], str]] = [
    ([], "of two classes or more, found []"),
    ([1, 1], "of two classes or more, found ['1']"),
    ([1, None, 0], "found ['0', '1'] and none in row 1; complete the labels"),
    (["a", "", "b"], "found ['a', 'b'] and none in row 1"),
    (["a", "  ", "b"], "and none in row 1"),
    ([0.0, math.nan], "and none in row 1"),
    ([1, "1", 0], "expected labels of one kind, found 1 (int) and '1' (str) in row 1"),
    ([0, 1.0], "expected labels of one kind, found 0 (int) and 1.0 (float) in row 1"),
    ([True, 0], "expected labels of one kind, found True (bool) and 0 (int) in row 1"),
    ([0.0, 1.0], "or names, found 0.0 in row 0; number or name the classes (a score is none"),
    (["0.5", "1.25"], "or names, found '0.5' in row 0"),
    (["0.0", "1.0"], "found '0.0' in row 0"),
    (["1", "01", "0"], "found '01' in row 1"),
    (["0", "1", "nan"], "found whole numbers and 'nan' in row 2; complete the labels, or name all classes"),
    (["0", "NA", "1"], "found whole numbers and 'NA' in row 1"),
    (["True", "true", "false"], "expected one spelling of each class, found ['True', 'true', 'false']"),
    ([-1, 0, 1], "expected whole numbers from 0 on, found -1 to 1"),
    ([0, 2**16], "expected whole numbers from 0 on, found 0 to 65536"),
    ([{"a": 1}, {"a": 2}], "or names, found {'a': 1} in row 0"),
]


@pytest.mark.parametrize(("labels", "message"), REFUSED, ids=str)
def test_labels_that_are_no_classes_are_refused_with_their_row(labels: list[Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        class_names(labels, "d: column 'label'")
    assert str(raised.value).startswith("d: column 'label': expected ") and message in str(raised.value)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.booleans(), st.integers(-2, 4), st.floats(), st.text(max_size=3))))
def test_any_labels_are_classes_of_their_own_or_refused(labels: list[Any]) -> None:
    try:
        names = class_names(labels, "d")
    except DataError:
        return
    numbers = class_numbers(labels, names, "d")
    assert len({type(label) for label in labels}) == 1 and len(set(names)) == len(names) > 1
    for label, number in zip(labels, numbers, strict=True):
        assert names[number] == (str(label).lower() if isinstance(label, bool) else str(label).strip())


def test_classes_without_rows_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class_names([0, 3], "d")
    assert "no row has the classes [1, 2], which the model gets all the same" in caplog.text


@pytest.mark.parametrize(
    ("label", "names", "message"),
    [
        ("postive", ("negative", "positive"), "d: expected one of ('negative', 'positive'), found 'postive' "
         "in row 0; near it: 'positive'"),
        (2, ("a", "b"), "d: expected one of ('a', 'b'), found 2 in row 0"),
        (-1, ("a", "b"), "found -1"),
        (None, ("None", "b"), "found None"),
        ("1", ("1", "2"), "expected a label that means one class, found 1 in row 0, the name of class 0 and "
         "the number of class '2'"),
        (1, ("1", "2"), "expected a label that means one class, found 1"),
        (1.0, ("0", "1"), "found 1.0"),
    ],
    ids=str,
)  # fmt: skip
def test_a_label_that_is_none_of_the_models_classes_is_refused(
    label: Any, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError) as raised:
        class_numbers([label], names, "d")
    assert message in str(raised.value)


def test_a_number_is_a_class_where_no_name_says_otherwise() -> None:
    assert class_numbers(["1", 0, "b"], ("a", "b"), "d") == [1, 0, 1]
    assert class_numbers(["2", 2], ("0", "1", "2"), "d") == [2, 2]


def test_numbers_beside_names_are_names_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert class_names(["0", "pos", "1"], "d: column 'label'") == ("0", "1", "pos")
    assert caplog.messages == [
        "d: column 'label': whole numbers stand beside 'pos': they are taken for names too"
    ]
