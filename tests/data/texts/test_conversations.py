import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathflip_jax.data.texts.conversations import (
    DESCRIBE,
    IMAGE,
    Conversation,
    Turn,
    ask,
    match_conversations,
    read_conversations,
    read_mixture,
)
from pathflip_jax.data.texts.text import Question, read_questions

DATA = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[3].parent / "shared" / "data")) / "text"
SLIDE = "TCGA-AA-0001-01Z-00-DX1"


@pytest.fixture
def table(tmp_path):
    """Writes a table; its name says nothing about what it holds."""

    def write(content):
        path = tmp_path / "table"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def conversation(*said, **columns):
    spoken = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(said)]
    return {"id": "train::0", "image": [f"{SLIDE}.csv"], "conversations": spoken} | columns


def only_turns(path):
    (talk,) = read_conversations(path)
    return [tuple(turn) for turn in talk.turns]


def test_conversations_are_taken_as_they_are(table):
    row = conversation("How is\n<image>\ngraded?", "It is G2. ", "And\nwhy?", "Mitoses.")
    expected = (Turn("How is\n<image>\ngraded?", "It is G2."), Turn("And\nwhy?", "Mitoses."))
    assert read_conversations(table([row])) == [Conversation("train::0", (SLIDE,), "TCGA-AA-0001", expected)]
    row["image"] = f"folder/{SLIDE}.pt"
    assert read_conversations(table(json.dumps(row)))[0].slide_ids == (SLIDE,)


@pytest.mark.parametrize("asked", ["Why?\n<image>", "<image>\nWhy?", "<image> Why?", "Is <image> malignant?"])
def test_the_slide_stands_where_it_is_written(table, asked):
    assert only_turns(table([conversation(asked, "Yes.")])) == [(asked, "Yes.")]


def test_the_slide_comes_first_where_it_is_not_written(table):
    assert only_turns(table([conversation("Why?", "A.", "And?", "B.")])) == [("<image>\nWhy?", "A."), ("And?", "B.")]


def test_captions_answer_their_question_or_the_usual_one(table):
    path = table('ID,Slide,Tumor,Question,Caption\n7,a/S1.h5,BLCA,Report?,"One.\nTwo. "\n8,S2,BLCA,,Three.\n')
    assert read_conversations(path) == [
        Conversation("7", ("S1",), "", (Turn("<image>\nReport?", "One.\nTwo."),)),
        Conversation("8", ("S2",), "", (Turn(f"<image>\n{DESCRIBE}", "Three."),)),
    ]
    canonical = '{"slide_id": ["a", "b"], "case_id": "p", "caption": "One.", "subcaptions": ["One."]}\n'
    assert read_conversations(table(canonical)) == [
        Conversation("1", ("a", "b"), "p", (Turn(f"<image>\n{DESCRIBE}", "One."),))
    ]


def test_questions_are_asked_with_their_options_and_answered_by_the_letter(table):
    path = table("ID,Slide,Question,A,B,C,D,Answer\n4,S1,Grade?,G1,G2,,,B\n5,S1,Why?,,,,,Mitoses.\n")
    assert read_conversations(path) == [
        Conversation("4", ("S1",), "", (Turn("<image>\nGrade?\nA. G1\nB. G2", "B"),)),
        Conversation("5", ("S1",), "", (Turn("<image>\nWhy?", "Mitoses."),)),
    ]
    path = table([{"Id": "TCGA-LD-A74U", "Question": "grade?", "Choice": ["low", "high"], "Answer": "high"}])
    assert only_turns(path) == [("<image>\ngrade?\nA. low\nB. high", "B")]
    assert read_conversations(path)[0].slide_ids == ("TCGA-LD-A74U",)
    for question, talk in zip(read_questions(path), read_conversations(path), strict=True):
        assert talk.turns[0].asked == f"<image>\n{ask(question)}"


def test_a_question_is_asked_as_it_is_learnt():
    question = Question("1", ("S1",), "", "Grade?", "B", {"A": "G1", "B": "G2"})
    assert ask(question) == "Grade?\nA. G1\nB. G2"
    assert ask(Question("1", ("S1",), "", "Why?", "Mitoses.")) == "Why?"


@pytest.mark.parametrize(
    ("asked", "answer", "expected"),
    [
        ("<image>\nGrade?\nA) G1\nB) G2", "B", ("<image>\nGrade?\nA. G1\nB. G2", "B")),
        ("Grade? (A) G1 (B) G2.\n<image>", "(b) g2", ("Grade?\nA. G1\nB. G2.\n<image>", "B")),
        ("Grade of <image>? A: G1 B: G2", "G2.", ("Grade of <image>?\nA. G1\nB. G2", "B")),
        ("Grade? A) G1 B) G2", "B) G2. Mitoses abound.", ("<image>\nGrade? A) G1 B) G2", "B) G2. Mitoses abound.")),
        ("Grade? A) G1 B) G2", "A tumor.", ("<image>\nGrade? A) G1 B) G2", "A tumor.")),
        ("Grade? A) G1 B) G2", "B) G1", ("<image>\nGrade? A) G1 B) G2", "B) G1")),
        ("Is it grade A) or not?", "A", ("<image>\nIs it grade A) or not?", "A")),
    ],
)
def test_options_within_conversations(table, asked, answer, expected):
    """An answer that says more than an option is kept whole, and so is its question."""
    assert only_turns(table([conversation(asked, answer)])) == [expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (conversation("<image> <image> Why?", "A."), "2 times <image> in .*write it once"),
        (conversation("Grade? A) <image> B) <image>", "A"), "2 times <image>"),
        (conversation("<image> Why?", "A.", "<image> And?", "B."), "turn 2: <image> in .*move it there"),
        (conversation("Why?", "A.", "And?<image>", "B."), "turn 2: <image> in .*move it there"),
        (conversation("<image>", "A."), "the question holds only <image>; write it"),
        (conversation("<image>\n<image>", "A."), "the question holds only <image>"),
        (conversation("Why?", "A.", " ", "B."), "turn 2: the question is empty; write it"),
        (conversation("Why?", " \n"), "the answer to 'Why\\?' is empty; write it or remove the row"),
        (conversation("Why?", "A.", "And?", ""), "turn 2: the answer to 'And\\?' is empty"),
        (conversation("Why?", "An <image>."), "<image> in the answer .*first question"),
        (conversation("Why?", "A.", "And?"), "must alternate, found \\['human', 'gpt', 'human'\\]; merge"),
        (conversation(), "must alternate"),
        (
            conversation(conversations=[{"from": "gpt", "value": "A."}, {"from": "human", "value": "B"}]),
            "must alternate",
        ),
        (conversation(conversations=[{"from": "human", "value": 1}]), "conversations must be a list"),
        (conversation(conversations={"from": "human"}), "conversations must be a list"),
        (conversation(conversations=3), "conversations must be a list"),
        ({"slide_id": "S1", "question": "Why?", "answer": ""}, "no answer; write it or remove the row"),
        ({"slide_id": "S1", "question": "", "answer": "A."}, "no question; write it or remove the row"),
        ({"slide_id": "S1", "question": "<image>", "answer": "A."}, "the question holds only <image>"),
        ({"slide_id": "S1", "question": "Why?"}, "no answer; columns question and answer .*found slide_id, question"),
        ({"slide_id": "S1", "caption": " . "}, "the caption of S1 is empty"),
        ({"slide_id": "S1", "caption": "An <image>."}, "<image> in the answer"),
        ({"slide_id": "S1", "caption": "A.", "question": ["Why?"]}, "a question must be a text, not \\['Why\\?'\\]"),
        ({"caption": "A."}, "no slide"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(table, row, message):
    fine = {"slide_id": "S1", "caption": "A."}
    with pytest.raises(ValueError, match=f"table, line 2.*{message}"):
        read_conversations(table(json.dumps(fine) + "\n" + json.dumps(row)))


def test_a_mixture_of_tables():
    assert read_mixture("a/reports.jsonl*2, vqa.csv") == [(Path("a/reports.jsonl"), 2), (Path("vqa.csv"), 1)]
    assert read_mixture("vqa.csv * 12") == [(Path("vqa.csv"), 12)]
    (table,) = read_mixture("memory://tables/vqa.csv*3")
    assert (str(table[0]), table[1]) == ("memory://tables/vqa.csv", 3)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ("", "part 1 of '' names no table"),
        ("a.csv,,b.csv", "part 2 of 'a.csv,,b.csv' names no table"),
        ("a.csv,*2", "part 2 of 'a.csv,\\*2' names no table"),
        ("a.csv*0", "part 1 .* a.csv has the repetition count '0'; .* at least 1"),
        ("a.csv,b.csv*-1", "part 2 .* b.csv has the repetition count '-1'"),
        ("a.csv*1.5", "repetition count '1.5'"),
        ("a.csv*²", "repetition count '²'"),
        ("data/*.csv", "data/ has the repetition count '.csv'; .* no other \\*"),
        ("a.csv*", "a.csv has the repetition count ''"),
        ("a.csv,b.csv,a.csv", "part 3 .* names a.csv again; name it once, followed by \\*2"),
    ],
)
def test_a_mixture_that_is_none(tables, message):
    with pytest.raises(ValueError, match=message):
        read_mixture(tables)


def test_conversations_find_their_slides(caplog):
    said = (Turn(f"{IMAGE}\nWhy?", "A."),)
    talks = [
        Conversation("1", (f"{SLIDE}.h5",), "", said),
        Conversation("2", (), "P", said),
        Conversation("3", ("X",), "", said),
    ]
    found = match_conversations(talks, [SLIDE, "S2"], ["Q", "P"])
    assert [(talk.conversation_id, talk.slide_ids) for talk in found] == [("1", (SLIDE,)), ("2", ("S2",))]
    assert "1 ids of the text table match no slide (X)" in caplog.text
    with pytest.raises(ValueError, match="none of the 1 texts belongs to any of the 1 slides"):
        match_conversations(talks[2:], [SLIDE])


@pytest.mark.parametrize(
    ("name", "count", "options"),
    [
        ("SlideBench-Caption-TCGA.csv", 732, 0),
        ("SlideBench-VQA-TCGA.csv", 1489, 1489),
        ("WSIBench_Regional_Structure_Description_test.json", 593, 0),
        ("WsiVQA_test.json", 735, 390),
        ("slidechat_train_data_example.json", 3, 0),
    ],
)
def test_real_tables(name, count, options):
    if not (DATA / name).exists():
        pytest.skip(f"no real tables: {DATA / name} is absent, set PATHFLIP_TEST_DATA")
    talks = read_conversations(DATA / name)
    assert len({talk.conversation_id for talk in talks}) == len(talks) == count
    assert all(talk.slide_ids and talk.turns[0].asked.count(IMAGE) == 1 for talk in talks)
    assert sum("\nA. " in talk.turns[0].asked and len(talk.turns[0].answer) == 1 for talk in talks) == options
    if name.startswith("slidechat"):
        assert all(talk.turns[0].asked.endswith(f"?\n{IMAGE}") for talk in talks)


pieces = st.sampled_from([IMAGE, "Why? ", "\n", "A) G1 ", "B) G2 ", "A", "B", " "])
spoken = st.lists(pieces, max_size=4).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | spoken,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
speech = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | values, "value": spoken | values})
names = st.sampled_from(["slide_id", "Id", "image", "question", "answer", "caption", "choice", "A", "B", "case_id"])
rows = st.dictionaries(names, values | spoken, max_size=5) | st.builds(
    dict, image=st.just("S1"), conversations=st.lists(speech, max_size=4) | values, options=values
)


@given(st.lists(rows, min_size=1, max_size=2))
def test_hostile_tables_raise_nothing_but_value_errors(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "hostile_conversations.json"
    path.write_text(json.dumps(rows))
    try:
        talks = read_conversations(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    for talk in talks:
        first, *later = talk.turns
        assert first.asked.count(IMAGE) == 1 and first.asked.replace(IMAGE, "").strip()
        assert not any(IMAGE in turn.asked for turn in later)
        assert all(turn.answer.strip() and IMAGE not in turn.answer for turn in talk.turns)


@given(st.lists(st.tuples(spoken, spoken), min_size=1, max_size=2))
def test_no_word_of_a_conversation_is_lost(tmp_path_factory, said):
    path = tmp_path_factory.getbasetemp() / "conversations_as_said.json"
    path.write_text(json.dumps([conversation(*(text for pair in said for text in pair))]))
    try:
        (talk,) = read_conversations(path)
    except ValueError:
        return
    for (asked, answer), turn in zip(said, talk.turns, strict=True):
        bare = asked.replace(IMAGE, "").replace("A)", "A.").replace("B)", "B.").split()
        assert turn.asked.replace(IMAGE, "").replace("A)", "A.").replace("B)", "B.").split() == bare
        assert turn.answer == answer.strip() or answer.strip().startswith(turn.answer) or len(turn.answer) == 1
