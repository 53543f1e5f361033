"""Options of questions in all their shapes, and the letters that answers mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathflip_jax.data.texts.choices import answer_letter, row_options
from pathflip_jax.data.texts.tables import Row

NAN = float("nan")
YES_NO = {"A": "Yes", "B": "No"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"choices": ["Yes", "No", None, NAN, "nan", ""]}, YES_NO),
        ({"options": {"a": "Yes", "B": "No", "C": None, "D": NAN}}, YES_NO),
        ({"a": "Yes", "b": "No", "c": None, "d": NAN}, YES_NO),
        ({"a": "Yes", "b": "", "c": "No"}, {"A": "Yes", "C": "No"}),  # the columns name the letters
        ({"a": 0, "b": 1.0, "c": 2.5}, {"A": "0", "B": "1", "C": "2.5"}),
        ({"choices": [False, True]}, {"A": "False", "B": "True"}),
        ({"choices": ["None", "Unknown", "N/A"]}, {"A": "None", "B": "Unknown", "C": "N/A"}),
        ({"choices": None, "a": "Yes", "b": "No"}, YES_NO),
        ({"choices": "['Yes', 'No', nan]"}, YES_NO),
        ({"choices": "['Yes' 'No']"}, YES_NO),
        ({"choices": "{'A': 'Yes', 'B': 'No', 'C': None}"}, YES_NO),
        ({"choices": '["Yes", "No"]'}, YES_NO),
        ({"choices": "A. Yes\nB. No"}, YES_NO),
        ({"choices": "(A) Yes; (B) No"}, YES_NO),
        ({"choices": "Yes\nNo\n"}, YES_NO),
        ({"choices": "Yes | No"}, YES_NO),
        ({"choices": ["A. Yes", "B. No"]}, YES_NO),
        ({"choices": [{"label": "A", "text": "Yes"}, {"label": "B", "text": "No"}]}, YES_NO),
        ({"choices": {"text": ["Yes", "No"], "label": ["A", "B"]}}, YES_NO),
        ({"choices": "None"}, {}),
        ({"choices": []}, {}),
        ({}, {}),
    ],
)
def test_every_shape_of_options(values, expected):
    assert row_options(Row("x", values), "Necrosis?") == ("Necrosis?", expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["Yes", None, "No"], "x: option 2 of 3 is empty, .*give the options by letter"),
        (["Yes", None], "x: .*the only option"),
        ("Yes, No", "x: the options 'Yes, No' cannot be separated; write a list, or one per line"),
        ("[A Yes, B", "cannot be separated"),
        (["Yes", ["No"]], "an option must be a text"),
        (3, "options must be a list of texts"),
        ([str(i) for i in range(27)], "27 options"),
    ],
)
def test_options_that_cannot_be_told_apart_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        row_options(Row("x", {"choices": given}), "Necrosis?")


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("b", YES_NO, "B"),
        ("(B) No", YES_NO, "B"),
        ("B. surely", YES_NO, "B"),
        ("no.", YES_NO, "B"),
        ("1", {"A": "0", "B": "1"}, "B"),
        ("1", {"A": "0.0", "B": "1.0"}, "B"),
        ("True", {"A": "true", "B": "false"}, "A"),
        ("A", {"A": "A", "B": "B"}, "A"),
        ("unknown", {"A": "known", "B": "Unknown"}, "B"),
    ],
)
def test_answers_are_letters_or_texts(answer, options, letter):
    assert answer_letter(Row("x", {}), answer, options) == letter


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        ("A", {"A": "B", "B": "A"}, "x: the answer 'A' is the letter of 'B' and the text of option B"),
        ("B. Yes", YES_NO, "has letter B and the text of A"),
        ("same", {"A": "same", "B": "Same."}, "matches each of A, B; write the letter"),
        ("C", YES_NO, "is none of the options"),
        ("1", YES_NO, "is none of the options"),
    ],
)
def test_answers_that_may_be_two_or_none_are_refused(answer, options, message):
    with pytest.raises(ValueError, match=message):
        answer_letter(Row("x", {}), answer, options)


words = st.text("abcxyz ", min_size=1, max_size=5).map(str.strip).filter(lambda text: len(text) > 1)


@given(st.lists(words, min_size=2, max_size=8, unique=True), st.data())
def test_the_text_of_an_option_is_its_letter_in_every_shape(texts, data):
    right = data.draw(st.integers(0, len(texts) - 1))
    by_letter = dict(zip("ABCDEFGH", texts, strict=False))
    shapes = [
        {"choices": texts},
        {"options": by_letter},
        {"choices": str([*texts, None])},
        {"choice": "\n".join(texts)},
    ]
    for values in [*shapes, {name.lower(): text for name, text in by_letter.items()}]:
        _, options = row_options(Row("x", values), "Which?")
        assert options == by_letter
        assert answer_letter(Row("x", {}), texts[right], options) == "ABCDEFGH"[right]
