import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from pathflip_jax.data.texts import tables
from pathflip_jax.data.texts.identity import is_missing
from pathflip_jax.data.texts.text import (
    SlideText,
    match_rows,
    match_texts,
    read_questions,
    read_slide_table,
    read_texts,
)

DATA = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
A = "TCGA-AA-0001-01Z-00-DX1.0a1b2c3d-0000-4000-8000-00000000000a"
B = "TCGA-AA-0001-01Z-00-DX10.0a1b2c3d-0000-4000-8000-00000000000b"


@pytest.fixture
def table(tmp_path):
    """Writes a table; its name says nothing about what it holds."""

    def write(content, encoding="utf-8", name="table"):
        path = tmp_path / name
        path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode(encoding))
        return path

    return write


def conversation(image, *turns):
    spoken = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(turns)]
    return {"id": "train::0", "image": image, "conversations": spoken}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    "content",
    [
        '{"slide_id": "S1", "caption": "A tumor, 1.8 cm."}\n\n{"slide_id": "S2", "caption": "Größe."}\n',
        '[{"slide_id": "S1", "caption": "A tumor, 1.8 cm."}, {"slide_id": "S2", "caption": "Größe."}]',
        'slide_id,caption\nS1,"A tumor, 1.8 cm."\n\nS2,Größe.\n',
        "Slide;Caption\r\nS1;A tumor, 1.8 cm.\r\nS2;Größe.\r\n",
        "slide_id\treport\nfolder/S1.h5\tA tumor, 1.8 cm.\nC:\\slides\\S2.svs\tGröße.",
        [conversation(["S1.csv"], "What?\n<image>", "A tumor, 1.8 cm."), conversation("x/S2.pt", "<image>", "Größe. ")],
    ],
)
def test_every_shape_of_a_caption_table(table, content, encoding):
    found = read_texts(table(content, encoding))
    assert found == [SlideText(("S1",), "", "A tumor, 1.8 cm."), SlideText(("S2",), "", "Größe.")]


def test_captions_over_several_lines_and_columns_in_any_order(table):
    path = table('Tumor,Caption,Slide\nBLCA,"One.\nTwo, ""three"".",a/b/S1.h5\nX,End.,S2\nX,,S3\n')
    with pytest.raises(ValueError, match=r"table, line 5: the caption of S3 is empty"):
        read_texts(path)
    path.write_text(path.read_text().replace("X,,S3\n", ""))
    assert [text.caption for text in read_texts(path)] == ['One.\nTwo, "three".', "End."]


def test_cases_of_several_slides(table):
    found = read_texts(
        table(
            [
                {"slide_id": ["S1", "S2", "S1"], "case_id": "P", "caption": "A."},
                {"patient_id": 7, "caption": "B."},
                {"slide_id": 12, "caption": "C."},
                {"image": [f"{A}.csv", f"{B}.csv"], "caption": "D."},
            ]
        )
    )
    assert [(text.slide_ids, text.case_id) for text in found] == [
        (("S1", "S2"), "P"),
        ((), "7"),
        (("12",), ""),
        ((A, B), "TCGA-AA-0001"),
    ]
    assert read_texts(table("slide_id,case_id,caption\nS1;S2,P,A.\n"))[0].slide_ids == ("S1", "S2")


def test_conversations_of_several_turns_are_one_caption(table):
    rows = [conversation("S1.csv", "<image>\nWhat?", "A tumor.", "And?", "Necrosis.")]
    assert read_texts(table(rows))[0].caption == "A tumor.\nNecrosis."


def test_given_subcaptions(table):
    rows = [{"slide_id": "S1", "caption": "A. B.", "subcaptions": [" A.", "B."]}, {"slide_id": "S2", "caption": "A."}]
    assert [text.subcaptions for text in read_texts(table(rows))] == [("A.", "B."), None]
    assert read_texts(table('slide_id,caption,subcaptions\nS1,A. B.,"A.\nB."\n'))[0].subcaptions == ("A.", "B.")
    for wrong, message in (([1], "must be a list of texts"), (["A.", " "], "an empty subcaption")):
        with pytest.raises(ValueError, match=f"entry 1: .*{message}"):
            read_texts(table([{"slide_id": "S1", "caption": "A. B.", "subcaptions": wrong}]))


def test_the_concepts_of_the_follow_ups_files_are_subcaptions(table):
    concepts = [{"concept": "glands", "visual_description": "Many glands."}, {"visual_description": "Pale fat."}]
    row = {"image": "features/S1.h5", "caption": "A tumor of glands. Much fat.", "fine_grained_concepts": concepts}
    (text,) = read_texts(table([row]))
    assert text.slide_ids == ("S1",) and text.subcaptions == ("Many glands.", "Pale fat.")
    row["fine_grained_concepts"] = [{"concept": "glands"}]
    with pytest.raises(ValueError, match="objects with a visual_description"):
        read_texts(table([row]))
    row["fine_grained_concepts"] = []
    (text,) = read_texts(table([row]))
    assert text.subcaptions is None


def test_rows_that_repeat_are_left_out_and_counted(table, caplog):
    rows = "slide_id,caption\nS1,A.\nS1,A.\nS1,B.\n"
    assert [text.caption for text in read_texts(table(rows))] == ["A.", "B."]  # two texts of one slide are two
    assert "1 of 3 rows repeat" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("slide_id,caption\n", "no rows"),
        ("[]", "no rows"),
        ("slide_id,caption\nS1,\n", "line 2: the caption of S1 is empty"),
        ('{"slide_id": "S1", "caption": "A."}\n{"slide_id": "S2", "caption": " . "}', "line 2: the caption of S2"),
        ('{"slide_id": "S1", "caption": null}', "line 1: the caption of S1 is empty"),
        ('{"slide_id": "S1", "caption": 3}', "the caption of S1 is empty"),
        ('{"slide_id": "S1", "caption": "A."}\n{"slide_id": "S2", "cap', "line 2: broken JSON"),
        ('[{"slide_id": "S1", "capt', "broken JSON"),
        ('["S1"]', "entry 1: found a str, expected an object"),
        ("slide_id,caption\nS1,A tumor, large.\n", "line 2: 3 fields, the header has 2"),
        ('slide_id,caption\nS1,"A tumor\n', "line 2: broken CSV"),
        ("slide_id,caption,caption\nS1,A,B\n", "line 1: the column 'caption' occurs twice"),
        ("slide_id,diagnosis\nS1,A.\n", "line 2: no column caption, found slide_id, diagnosis"),
        ("name,caption\nS1,A.\n", "line 2: no slide; a column slide_id or case_id is needed, found name, caption"),
        ('[{"slide_id": {"a": 1}, "caption": "A."}]', "entry 1: slide ids must be texts"),
        ([conversation("S1", "<image>", "")], "entry 1: the caption of S1 is empty"),
        ([conversation("S1", "<image>")], "entry 1: human and gpt must alternate"),
        ([{"image": "S1", "conversations": [{"from": "human"}]}], "entry 1: conversations must be a list"),
        ([conversation("S1", "Grade? A) 1 B) 2", "A")], "read_questions reads"),
        ("Slide,Question,A,B,Answer\nS1,Grade?,1,2,A\n", "no column caption.*read_questions reads"),
    ],
)
def test_bad_tables_name_file_and_line(table, content, message):
    with pytest.raises(ValueError, match=f"table.*{message}"):
        read_texts(table(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"slide_id": ' * 100_000, "line 1: broken JSON .nested too deeply"),
        ('{"slide_id": "S1", "caption": "\\ud800 A."}', "line 1: broken JSON .*not a character"),
        ("slide_id,caption\nS1," + "A" * 140_000, "line 2: broken CSV .field larger than"),
        (",".join(map(str, range(200_000))) + ",7\n", "line 1: the column '7' occurs twice"),
        ("slide_id,caption\n" + '"\n",' * 500_000, "line .* a row of more than 2 million characters"),
        ("slide_id,caption\nS1" + "," * 2_000_000, "line 2: a row of more than 2 million characters"),
        (" " * 2_000_000 + "slide_id", "the file is empty"),
    ],
)
def test_tables_beyond_all_measure(table, content, message, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST_RECORD", 1_500_000)
    with pytest.raises(ValueError, match=message):
        read_texts(table(content))


def test_a_list_that_is_too_large_to_be_read_at_once(table, monkeypatch):
    rows = json.dumps([{"slide_id": f"S{i}", "caption": "A."} for i in range(9)])
    assert len(read_texts(table(rows))) == 9
    monkeypatch.setattr(tables, "LARGEST_JSON", 100)
    with pytest.raises(ValueError, match="table: .*at most 0 MB; write it as JSON Lines"):
        read_texts(table(rows))


def test_files_that_are_no_tables(table, tmp_path):
    with pytest.raises(ValueError, match="table: not UTF-8 near line 1; save the table as UTF-8"):
        read_texts(table("slide_id,caption\nS1,Gr\xf6\xdfe\n", "latin-1"))
    with pytest.raises(FileNotFoundError):
        read_texts(tmp_path / "absent.csv")


ids = st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True).filter(lambda name: not is_missing(name))
words = st.text(st.characters(codec="utf-8"), min_size=1).filter(
    lambda text: any(c.isalnum() for c in text) and not is_missing(text)
)


@given(
    st.lists(
        st.builds(
            SlideText,
            st.lists(ids, min_size=1, max_size=3, unique=True).map(tuple),
            st.just("P") | st.just(""),
            words.map(str.strip).filter(bool),
            st.none() | st.lists(words.map(str.strip).filter(bool), min_size=1, max_size=3).map(tuple),
        ),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
def test_what_is_written_is_read(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [
        {"slide_id": list(text.slide_ids) if text.slide_ids[1:] else text.slide_ids[0], "case_id": text.case_id}
        | {"caption": text.caption}
        | ({} if text.subcaptions is None else {"subcaptions": text.subcaptions})
        for text in texts
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_texts(path) == texts


def test_questions_of_a_benchmark_table(table):
    path = table(
        "ID,Slide,Tumor,Broad Category,Narrow Category,Question,A,B,C,D,Answer\n"
        f"7,x/{A}.h5,LUAD,Diagnosis,Grading,Which grade?,G1,G2,,,B\n"
        "8,S2,LUAD,Diagnosis,Staging,Which?,I,II,III,IV,C\n",
        "utf-8-sig",
    )
    first, second = read_questions(path)
    assert (first.question_id, first.slide_ids, first.case_id) == ("7", (A,), "TCGA-AA-0001")
    assert (first.question, first.options, first.answer) == ("Which grade?", {"A": "G1", "B": "G2"}, "B")
    assert (first.category, second.answer, list(second.options)) == ("Grading", "C", ["A", "B", "C", "D"])
    assert (first.broad_category, second.category, second.broad_category) == ("Diagnosis", "Staging", "Diagnosis")


def test_questions_in_conversations(table):
    asked = "<image>\nWhich grade? A) Grade 1 B) Grade 2, of 3 C) Not known"
    rows = [conversation("x/S1.pt", asked, "B"), conversation("S2", "What?\n<image>", "A tumor.", "Where?", "Here.")]
    choice, first, second = read_questions(table(rows))
    assert choice.question == "Which grade?" and choice.answer == "B"
    assert choice.options == {"A": "Grade 1", "B": "Grade 2, of 3", "C": "Not known"}
    assert (first.question, first.answer, first.options) == ("What?", "A tumor.", {})
    assert (second.question, second.question_id, second.slide_ids) == ("Where?", "train::0/1", ("S2",))


def test_questions_with_a_list_of_choices(table):
    rows = [
        {"Id": "TCGA-LD-A74U", "Question": "Grade?", "Choice": ["low", "High."], "Answer": "high"},
        {"Id": "TCGA-LD-A74U", "Question": "Survival?", "Answer": 1881},
    ]
    choice, free = read_questions(table(rows))
    assert (choice.answer, choice.options, choice.case_id) == ("B", {"A": "low", "B": "High."}, "TCGA-LD-A74U")
    assert (free.answer, free.options, free.question_id) == ("1881", {}, "2")
    rows[0]["Answer"] = "middling"
    with pytest.raises(ValueError, match="entry 1: the answer 'middling' is none of the options"):
        read_questions(table(rows))
    with pytest.raises(ValueError, match="line 2: no answer; write it .* found slide, question, answer"):
        read_questions(table("slide,question,answer\nS1,Which?,\n"))
    with pytest.raises(ValueError, match="line 2: no question"):
        read_questions(table("slide_id,caption\nS1,A.\n"))


def test_slide_tables(table):
    path = table("slide_id,patient_id,Label,split,mpp\nx/S1.svs,P1,a,Train,0.5\nS2,,b,validation,\n", "utf-8-sig")
    assert read_slide_table(path) == [
        {"slide_id": "S1", "patient_id": "P1", "case_id": "P1", "label": "a", "split": "train", "mpp": "0.5"},
        {"slide_id": "S2", "patient_id": "", "case_id": "", "label": "b", "split": "val", "mpp": ""},
    ]
    row = read_slide_table(table(json.dumps({"slide_id": A, "split": None})))[0]
    assert (row["case_id"], row["patient_id"], row["split"], row["label"]) == ("TCGA-AA-0001", "TCGA-AA-0001", "", "")


MISSING = [None, float("nan"), "", "nan", "NaN", "NA", "None", "null", "Unknown", " N/A "]


@pytest.mark.parametrize("value", MISSING)
@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_missing_patients_cases_and_labels_are_none_at_all(tmp_path, kind, value):
    rows = [{"slide_id": f"S{i}", "patient_id": value, "label": value, "split": "test", "mpp": value} for i in (1, 2)]
    path = tmp_path / "table"
    if kind == "csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in [list(rows[0]), *(row.values() for row in rows)]))
    else:
        path.write_text("\n".join(map(json.dumps, rows))) if kind == "json" else write_parquet(path, rows)
    assert [[row[name] for name in ("patient_id", "case_id", "label", "mpp")] for row in read_slide_table(path)] == [
        [""] * 4
    ] * 2


@pytest.mark.parametrize("value", MISSING)
def test_a_missing_caption_is_refused_and_a_missing_case_is_none(table, value):
    with pytest.raises(ValueError, match="the caption of S1 is empty"):
        read_texts(table([{"slide_id": "S1", "caption": value}]))
    rows = [{"slide_id": "S1", "case_id": value, "caption": value, "report": "A.", "subcaptions": value}]
    assert read_texts(table(rows)) == [SlideText(("S1",), "", "A.")]
    with pytest.raises(ValueError, match="no slide"):
        read_texts(table([{"slide_id": [value], "case_id": value, "caption": "A."}]))


def test_lists_are_padded_with_null_and_written_as_text(table):
    rows = [{"slide_id": ["S1", None], "caption": "A. B.", "subcaptions": ["A.", None, float("nan")]}]
    assert read_texts(table(rows)) == [SlideText(("S1",), "", "A. B.", ("A.",))]
    as_text = "slide_id,caption,subcaptions\n\"['S1', 'S2']\",A. B.,\"['A.', 'B.']\"\n"
    assert read_texts(table(as_text)) == [SlideText(("S1", "S2"), "", "A. B.", ("A.", "B."))]


def test_ids_that_became_floats_are_whole(table, tmp_path):
    rows = [{"slide_id": 123.0, "patient_id": 7.0, "label": 1.0, "mpp": 0.25}, {"slide_id": 124.0, "patient_id": None}]
    for path in (table(rows), tmp_path / "parquet"):
        if path.name == "parquet":
            write_parquet(path, rows)
        first = read_slide_table(path)[0]
        assert [first[name] for name in ("slide_id", "patient_id", "label", "mpp")] == ["123", "7", "1", "0.25"]
    assert read_texts(table([{"slide_id": [123.0], "case_id": 7.0, "caption": "A."}])) == [
        SlideText(("123",), "7", "A.")
    ]


@pytest.mark.parametrize("answer", ["None", "Unknown", "no", "N/A", 0, False])
def test_an_open_answer_may_be_a_word_that_elsewhere_is_missing(table, answer):
    (found,) = read_questions(table([{"slide_id": "S1", "question": "Positive nodes?", "answer": answer}]))
    assert (found.answer, found.options) == (str(answer), {})
    for empty in (None, float("nan"), "nan", ""):
        with pytest.raises(ValueError, match="no answer"):
            read_questions(table([{"slide_id": "S1", "question": "Positive nodes?", "answer": empty}]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("slide_id,split\nS1.svs,train\ns1.SVS,val\n", "line 3: slide s1 is listed more than once .*line 2 as S1.;"),
        ("slide_id,split\n123,train\n123.0,val\n", "line 3: slide 123.0 is listed more than once"),
        ("slide_id,split\nS1,train\nS1,val\n", "line 3: slide S1 is listed more than once .first in .*line 2"),
        ("slide_id,split\nS1,fold1\n", "line 2: split 'fold1' of slide S1; expected train, val, test"),
        ("slide_id,split\n,train\n", "line 2: no slide id; a column slide_id is needed, found slide_id, split"),
        ("name,label\nS1,a\n", "no slide id.*found name, label"),
    ],
)
def test_bad_slide_tables(table, content, message):
    with pytest.raises(ValueError, match=message):
        read_slide_table(table(content))


def texts_of(*names):
    return [SlideText((name,), "", f"Text of {name}.") for name in names]


@pytest.mark.parametrize(
    ("name", "slides", "expected"),
    [
        ("S1", ["S1", "S10"], "S1"),
        ("a/S1.h5", ["S10", "S1"], "S1"),
        ("s1", ["S1", "S10"], "S1"),
        ("S1", ["S1.svs"], "S1.svs"),
        ("TCGA-AA-0001-01Z-00-DX1", [B, A], A),  # DX1 is not DX10
        (A, ["TCGA-AA-0001-01Z-00-DX10", "TCGA-AA-0001-01Z-00-DX1"], "TCGA-AA-0001-01Z-00-DX1"),
        (A.replace("0a1b2c3d", "0A1B2C3D"), [A, B], A),
        ("TCGA-AA-0001-01Z-00-DX1", [A, A[:-1] + "c"], None),  # two slides come into question
        (A, [A[:-1] + "c"], None),  # another file of that name
        ("S21", ["S21.5"], None),
        ("S21.5", ["S21.7", "S21"], None),
        ("S", ["S1"], None),
    ],
)
def test_ids_match_the_slide_they_mean(name, slides, expected):
    texts = texts_of(name, "Other")
    slides = [*slides, "Other"]
    found = [text.slide_ids for text in match_texts(texts, slides)]
    assert found == ([(expected,)] if expected else []) + [("Other",)]


def test_texts_of_a_case_get_all_its_slides():
    slides, cases = ["S1", "S2", "S3"], ["P1", "P1", "P2"]
    texts = [SlideText((), "P1", "A."), SlideText(("P2",), "", "B."), SlideText(("S1", "S2"), "P1", "C.")]
    found = match_texts(texts, slides, cases)
    assert [text.slide_ids for text in found] == [("S1", "S2"), ("S3",), ("S1", "S2")]
    assert match_texts([SlideText((), "TCGA-AA-0001", "A.")], [A, B])[0].slide_ids == (A, B)


def test_what_matches_partly_is_counted(caplog):
    texts = [*texts_of("S1", "S9"), SlideText(("S2", "S8"), "", "Both."), SlideText((), "P9", "A case.")]
    assert [text.slide_ids for text in match_texts(texts, ["S1", "S2", "S3"])] == [("S1",), ("S2",)]
    assert "3 ids of the text table match no slide (S9, S8, P9)" in caplog.text
    assert "1 of 3 slides have no text (S3)" in caplog.text


def test_what_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"none of the 5 texts .* 2 slides: .* a, b, c and 2 more, .* x, y"):
        match_texts(texts_of(*"abcde"), ["x", "y"])


def test_rows_of_a_slide_table_are_those_of_the_slides_they_mean():
    rows = [{"slide_id": name, "case_id": case} for name, case in (("123.0", "10"), ("45", "11"), ("S9", "12"))]
    found, notes = match_rows(rows, ["0045", "123", "S3"], "slides.csv")
    assert found == {"123": {"slide_id": "123", "case_id": "10"}, "0045": {"slide_id": "0045", "case_id": "11"}}
    assert notes == [
        "2 ids of slides.csv are spelt differently from the slides (123.0 is slide 123, 45 is slide 0045)",
        "1 of 3 rows of slides.csv match no slide (S9)",
    ]
    assert match_rows([{"slide_id": "S1"}], ["S1", "S2"], "slides.csv") == ({"S1": {"slide_id": "S1"}}, [])
    found, notes = match_rows([{"slide_id": "01"}, {"slide_id": "1"}], ["1", "2"], "slides.csv")
    assert list(found) == ["1"] and notes == ["1 of 2 rows of slides.csv match no slide (01)"]
    with pytest.raises(ValueError, match="slides.csv: 01 and 1.0 are both slide 1"):
        match_rows([{"slide_id": "01"}, {"slide_id": "1.0"}], ["1", "2"], "slides.csv")


def test_slides_whose_zeros_differ_may_be_two(table):
    assert len(read_slide_table(table("slide_id\n1\n01\n"))) == 2


def write_parquet(path, rows):
    parquet.write_table(pa.Table.from_pylist(rows), path)


def real(name):
    path = DATA / "text" / name
    if not path.exists():
        pytest.skip(f"no real tables: {path} is absent, set PATHFLIP_TEST_DATA")
    return path


def test_real_caption_tables():
    captions = read_texts(real("SlideBench-Caption-TCGA.csv"))
    assert len(captions) == 732 and len({text.slide_ids for text in captions}) == 732
    assert all(text.case_id and text.slide_ids[0].startswith(text.case_id) for text in captions)
    assert captions[0].slide_ids == ("TCGA-DK-A3IS-01Z-00-DX1.31CABE32-36D7-4920-BF5A-9C9D8B54320F",)
    bare = [text.slide_ids[0].split(".")[0] for text in captions]  # as SlideChat names them
    assert len(match_texts(captions, bare)) == 732
    slidechat = read_texts(real("slidechat_train_data_example.json"))
    assert [text.slide_ids[0] for text in slidechat][0] == "TCGA-A7-A0CJ-01Z-00-DX2"
    regional = read_texts(real("WSIBench_Regional_Structure_Description_test.json"))
    assert len(regional) == 593 and len({text.slide_ids for text in regional}) == 208


def test_real_question_tables():
    questions = read_questions(real("SlideBench-VQA-TCGA.csv"))
    answers = Counter(question.answer for question in questions)
    assert len(questions) == 1489 and round(answers["B"] / 1489, 3) == 0.414  # as counted in STACK
    assert all(question.answer in question.options for question in questions)
    questions = read_questions(real("WsiVQA_test.json"))
    assert len(questions) == 735 and sum(not question.options for question in questions) == 345
    assert len({question.question_id for question in questions}) == 735
    assert len(read_questions(real("WSIBench_Regional_Structure_Description_test.json"))) == 593
    for name in ("SlideBench-VQA-TCGA.csv", "WsiVQA_test.json"):
        with pytest.raises(ValueError, match="read_questions"):
            read_texts(real(name))


def test_real_slide_tables():
    rows = {split: read_slide_table(real(f"../labels/TCGA_RCC_{split}.csv")) for split in ("train", "test")}
    patients = {split: {row["patient_id"] for row in table} for split, table in rows.items()}
    assert len(patients["train"] & patients["test"]) == 14  # as counted in STACK
    assert all(row["label"] for row in rows["train"])
    assert len(read_slide_table(real("../labels/Camelyon16_test.csv"))) > 100
