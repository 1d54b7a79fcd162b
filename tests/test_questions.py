import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from physnb.metrics.questions import (
    CHANCE,
    LETTERS,
    Question,
    Reply,
    option_lines,
    questions_from_rows,
    read_choice,
    read_options,
    read_physbench,
    read_table,
    score_answers,
)

# Composition of PhysBench's val_answer.json: reference/metrics.md, 5.1.
ANSWERS = {"B": 60, "C": 58, "A": 45, "D": 36, "": 1}
TASKS = {"dynamics": 79, "relationships": 47, "scene": 37, "property": 37}
OPTIONS = ("lead", "a feather", "both", "neither")


def question(name="q", answer="B", task="dynamics", **other) -> Question:
    tags = dict(task=task, sub="motion", ability="perception")
    return Question(
        id=str(name), text=f"Which?\n{option_lines(OPTIONS)}", options=OPTIONS, answer=answer, tags=tags, **other
    )


def official_val() -> list[Question]:
    """200 questions with the answers and task types of the official file; the order does not matter to the scorer."""
    answers = [letter for letter, count in ANSWERS.items() for _ in range(count)]
    tasks = [task for task, count in TASKS.items() for _ in range(count)]
    order = np.random.default_rng(0).permutation(200)
    return [question(i, answers[order[i]], tasks[i]) for i in range(200)]


def reply_all(questions, text) -> list[Reply]:
    reason = "silent" if text is None else None
    return [Reply(q.id, text, reason) for q in questions]


# --- the official scorer ---


@pytest.mark.parametrize(
    ("text", "percent"),
    [
        ("A", 23.0),  # 45 and the empty one
        ("B", 30.5),
        ("C", 29.5),
        ("D", 18.5),
        ("E", 0.5),  # all wrong, but for the empty one
        (" A", 0.5),  # a leading space is wrong
        ("a", 0.5),
        ("A. because it is heavier", 23.0),
        ("Because it is heavier", 30.5),  # any word that starts with the right capital
        ("", 0.5),
    ],
)
def test_compat_scores_one_reply_for_all_as_the_official_scorer_does(text, percent):
    found = score_answers(official_val(), reply_all(official_val(), text), mode="compat")
    assert found.overall.accuracy == pytest.approx(percent)
    assert found.overall.total == 200 and found.overall.correct == round(2 * percent)


def test_compat_none_counts_overall_but_in_no_table():
    questions = official_val()
    replies = [Reply(q.id, None, "silent") if i < 50 else Reply(q.id, q.answer) for i, q in enumerate(questions)]
    found = score_answers(questions, replies, mode="compat")
    assert found.overall.accuracy == pytest.approx(75)
    assert sum(row.total for row in found.tables["task"].values()) == 150
    assert all(row.accuracy == 100 for row in found.tables["task"].values())


def test_compat_unknown_replies_count_overall_and_unanswered_questions_not_at_all():
    found = score_answers([question(1), question(2)], [Reply("1", "B"), Reply("other", "B")], mode="compat")
    assert (found.overall.accuracy, found.overall.total) == (50, 2)
    unknown = score_answers(
        [question(1, None)], [Reply("1", "B")], mode="compat"
    )  # test split: no answer to compare with
    assert (unknown.overall.correct, unknown.overall.total, unknown.tables["task"]) == (0, 1, {})


def test_compat_type_without_a_hit_keeps_minus_one():
    questions = [question(1, "A", "dynamics"), question(2, "A", "dynamics"), question(3, "B", "scene")]
    found = score_answers(questions, reply_all(questions, "A"), mode="compat")
    assert found.tables["task"]["scene"] == type(found.overall)(accuracy=0.0, correct=-1, total=1)
    assert found.tables["task"]["dynamics"].correct == 2
    assert found.weighted_average("task") == pytest.approx(100 / 3)  # (2 - 1) of 3, where 2 of 3 were right


def test_compat_of_no_reply_is_zero_of_zero():
    found = score_answers([question(1)], [], mode="compat")
    assert (found.overall.accuracy, found.overall.total, found.weighted_average("task")) == (0, 0, -1)


def test_compat_needs_the_official_tags():
    plain = Question("1", "Which?", OPTIONS, "A")
    with pytest.raises(ValueError, match="question 1 lacks the tag 'task'"):
        score_answers([plain], [Reply("1", "A")], mode="compat")


# --- our own scorer ---


def test_clean_drops_the_empty_answer_and_forgives_form():
    questions = official_val()
    for text in ("A", " a.", "(A)", "**A**", "The answer is A."):
        found = score_answers(questions, reply_all(questions, text))
        assert found.overall.mean == pytest.approx(45 / 199) and found.overall.cases == 199 and found.dropped == 1
    assert score_answers(questions, reply_all(questions, "Because")).overall.mean == 0


def test_clean_counts_silence_as_wrong_and_says_so():
    questions = [question(i) for i in range(5)]
    replies = [Reply("0", "B"), Reply("1", "C"), Reply("2", "I cannot see it"), Reply("3", None, "timeout")]
    found = score_answers(questions, replies)
    assert found.scores.values.tolist() == [1, 0, 0, 0, 0] and found.overall.mean == pytest.approx(0.2)
    assert found.unread == {"2": "no letter A to D in 'I cannot see it'", "3": "timeout", "4": "no reply"}
    assert not found.scores.lower_is_better and found.ids == tuple("01234")


def test_clean_tables_have_every_value_with_its_count():
    questions = official_val()
    found = score_answers(questions, [Reply(q.id, q.answer or "A") for q in questions])
    assert sum(row.cases for row in found.tables["task"].values()) == 199
    assert found.tables["task"].keys() == TASKS.keys() and all(row.mean == 1 for row in found.tables["task"].values())
    half = [Reply(q.id, q.answer if q.tags["task"] == "scene" else "E") for q in questions if q.answer]
    tables = score_answers(questions, half).tables["task"]
    assert tables["scene"].mean == 1 and tables["dynamics"].mean == 0 and tables["scene"].low <= 1


def test_random_replies_score_chance_and_a_perfect_judge_one():
    rng = np.random.default_rng(0)
    questions = [question(i, LETTERS[rng.integers(4)]) for i in range(500)]
    found = score_answers(questions, [Reply(q.id, LETTERS[rng.integers(4)]) for q in questions])
    assert found.overall.mean == pytest.approx(CHANCE, abs=0.06)  # three standard errors
    assert found.overall.low < CHANCE < found.overall.high
    assert score_answers(questions, [Reply(q.id, q.answer) for q in questions]).overall.mean == 1


@given(st.permutations(range(8)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_questions_and_replies_does_not_matter(order):
    questions = [question(i, LETTERS[i % 4]) for i in range(8)]
    replies = [Reply(str(i), "ABCA"[i % 4]) for i in order]
    found = score_answers([questions[i] for i in order], replies)
    values = dict(zip(found.ids, found.scores.values.tolist(), strict=True))
    assert values == {str(i): float(i % 4 != 3) for i in range(8)}


@pytest.mark.parametrize(
    ("questions", "replies", "message"),
    [
        ([question(1), question(1)], [], "duplicated id: 1"),
        ([question(1)], [Reply("1", "A"), Reply("1", "B")], "duplicated id: 1"),
        ([question(1)], [Reply("2", "A")], "replies to questions that are not there: 2"),
        ([question(1, "")], [Reply("1", "A")], "no question has a known answer"),
        ([], [], "no question has a known answer"),
    ],
)
def test_what_cannot_be_scored_is_refused(questions, replies, message):
    with pytest.raises(ValueError, match=message):
        score_answers(questions, replies)
    with pytest.raises(ValueError, match="unknown mode 'exact'"):
        score_answers([question(1)], [], mode="exact")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(
            (f"{before}{x}{after}", x)
            for x in LETTERS
            for before, after in (("", ""), ("(", ")"), ("\n ", "."), ("", "\nas"))
        ),
        ("b", "B"),
        ("c) the ball", "C"),
        ("d because", None),
        ("A ball is red", None),
        ("A red ball hits B", "B"),
        ("A: the ball", "A"),
        ("A is right", "A"),
        ("Option A shows it", "A"),
        ("the answer is B because of A", "B"),
        ("Answer:D", "D"),
        ("<answer>C</answer>", "C"),
        ("'A'", "A"),
        ("A's", None),
        ("I'D SAY", None),
        ("2D or 3-D", None),
        ("Because", None),
        ("a ball", None),
        ("U.S.A.", None),
        ("E", None),
        ("", None),
        ("АВС", None),  # cyrillic
    ],
)
def test_the_letter_that_stands_alone_is_the_choice(text, letter):
    assert read_choice(text) == letter


@given(st.text(alphabet="ABCDEabcd is.,:(*'\n-", max_size=40))
@settings(max_examples=20, deadline=None)
def test_any_text_is_a_letter_or_nothing(text):
    assert read_choice(text) in (None, *LETTERS)


def test_questions_and_replies_are_checked():
    with pytest.raises(ValueError, match="question q: needs four options A to D, has 2"):
        Question("q", "Which?", ("yes", "no"), "A")
    with pytest.raises(ValueError, match="question q: unknown answer 'E'"):
        question(answer="E")
    with pytest.raises(ValueError, match="unknown question mode 'audio'"):
        question(mode="audio")
    with pytest.raises(ValueError, match="needs four option pictures or none, has 1"):
        question(option_media=(Path("a.png"),))
    for text, reason in ((None, None), ("A", "why")):
        with pytest.raises(ValueError, match="reply 1: needs either a text or a reason"):
            Reply("1", text, reason)


def test_options_are_read_from_their_lines():
    assert read_options(f"<video>\nWhich falls?\n{option_lines(OPTIONS)}\n") == OPTIONS
    for text in ("Which?", "A. x\nB. y\nC. z", "B. x\nA. y\nC. z\nD. w", "A. x B. y C. z D. w"):
        assert read_options(text) == ()


# --- PhysBench's files ---


def write_physbench(folder: Path, items=None, answers=None) -> Path:
    """A download in miniature: two val questions, one test question, one picture and one video."""
    text = f"<video>\nWhich falls faster?\n{option_lines(OPTIONS)}"
    made = [
        dict(idx=0, question=text, file_name=["a.mp4"], mode="image&video", split="val"),
        dict(idx=7, question=text.replace("video", "image"), file_name=["b.JPG"], mode="image-only", split="val"),
        dict(idx=9, question=text, file_name=["a.mp4"], mode="image&video", split="test"),
    ]
    types = dict(task_type="dynamics", sub_type="throwing", ability_type="prediction")
    given = [dict(idx=0, answer="B", **types, mode="image&video"), dict(idx=7, answer="", **types, mode="image-only")]
    for name in ("image", "video"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "video" / "a.mp4").write_bytes(b"video")
    (folder / "image" / "b.JPG").write_bytes(b"image")
    (folder / "test.json").write_text(json.dumps((items or (lambda x: x))(made)))
    (folder / "val_answer.json").write_text(json.dumps((answers or (lambda x: x))(given)))
    return folder


def test_physbench_files_are_joined_by_idx(tmp_path):
    first, second = read_physbench(write_physbench(tmp_path))
    assert (first.id, first.answer, first.options) == ("0", "B", OPTIONS)
    assert first.media == (tmp_path / "video" / "a.mp4",) and second.media == (tmp_path / "image" / "b.JPG",)
    assert first.tags == dict(task="dynamics", sub="throwing", ability="prediction")
    assert (second.answer, second.mode) == ("", "image-only")
    (test,) = read_physbench(tmp_path, split="test")
    assert (test.id, test.answer, test.tags) == ("9", None, {})
    assert [q.id for q in read_physbench(tmp_path, exclude=(0,))] == ["7"]


def changed(number, **fields):
    return lambda items: [item | fields if i == number else item for i, item in enumerate(items)]


@pytest.mark.parametrize(
    ("items", "answers", "message"),
    [
        (lambda x: [*x, x[0]], None, r"duplicated idx in .*test\.json: 1, the first are \[0\]"),
        (None, lambda x: [*x, x[0]], r"duplicated idx in .*val_answer\.json"),
        (changed(0, question="Which?"), None, r"questions without options A to D: 1, the first are \[0\]"),
        (None, lambda x: [*x, x[0] | dict(idx=99)], r"without a question of split val: 1, the first are \[99\]"),
        (None, lambda x: [*x, x[0] | dict(idx=9)], r"without a question of split val: 1, the first are \[9\]"),
        (None, changed(0, answer="E"), r"neither A to D nor empty: 1, the first are \[0\]"),
        (changed(0, file_name=["gone.mp4"]), None, r"questions with missing media: 1, the first are \[0\]"),
        (changed(0, file_name=["a.avi"]), None, "question 0: a.avi is neither .mp4 nor .jpg nor .png"),
        (changed(0, mode="audio"), None, "unknown question mode 'audio'"),
        (changed(0, idx="0"), None, "item number 0 has idx '0', not a number"),
        (lambda x: [{"idx": 0}], None, "item number 0 lacks question, file_name, mode, split"),
        (lambda x: ["text"], None, "item number 0 lacks idx"),
        (lambda x: [], None, "must hold a list of items"),
        (None, lambda x: {"idx": 0}, "must hold a list of items"),
    ],
)
def test_bad_physbench_files_are_named(tmp_path, items, answers, message):
    with pytest.raises(ValueError, match=message):
        read_physbench(write_physbench(tmp_path, items, answers))


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"test\.json does not exist"):
        read_physbench(tmp_path)
    write_physbench(tmp_path)
    (tmp_path / "val_answer.json").write_text('[{"idx": 0')
    with pytest.raises(ValueError, match=r"val_answer\.json is not valid JSON"):
        read_physbench(tmp_path)
    with pytest.raises(ValueError, match="unknown PhysBench split 'dev'"):
        read_physbench(tmp_path, split="dev")


# --- tables such as WM-ABench's ---

COLUMNS = dict(
    id="uid", stage="level", dimension="dim", environment="sim", context_images="past", prompt="ask", options="futures",
    answer="label",
)  # fmt: skip


def table_row(**fields) -> dict:
    row = dict(uid=3, level="prediction", dim="collide", sim="ThreeDWorld", past=["0.png", "1.png"], ask="What next?")
    return row | dict(futures=["0.png", "1.png", "2.png", "3.png"], label=2) | fields


@pytest.fixture
def pictures(tmp_path) -> Path:
    for i in range(4):
        Image.new("RGB", (8, 6), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_rows_become_questions_through_the_column_map(pictures):
    (found,) = questions_from_rows([table_row()], COLUMNS, folder=pictures)
    assert (found.id, found.answer) == ("3", "C")
    assert found.tags == dict(stage="prediction", dimension="collide", environment="ThreeDWorld")
    assert found.media == (pictures / "0.png", pictures / "1.png") and found.option_media[3] == pictures / "3.png"
    assert read_options(found.text) == found.options and len(set(found.options)) == 4
    for label, answer in (("D", "D"), (0, "A"), ("1", "B"), (3.0, "D"), (None, None), (float("nan"), None), ("", None)):
        assert questions_from_rows([table_row(label=label)], COLUMNS, folder=pictures)[0].answer == answer


def test_encoded_pictures_and_words_as_options_are_read(pictures):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (10, 20, 30)).save(buffer, format="PNG")
    cell = {"bytes": buffer.getvalue(), "path": None}  # how parquet stores a picture
    row = table_row(past=np.array([cell], dtype=object), futures=np.array(OPTIONS, dtype=object))
    (found,) = questions_from_rows([row], COLUMNS, options_are="text")
    assert torch.equal(found.media[0], torch.tensor([10, 20, 30], dtype=torch.uint8).expand(1, 6, 8, 3))
    assert found.options == OPTIONS and found.option_media == ()


def test_json_lines_and_csv_give_the_same_questions(pictures):
    (pictures / "t.jsonl").write_text(
        json.dumps(table_row(ask="What\u2028next?"), ensure_ascii=False) + "\n" + json.dumps(table_row(uid=4)) + "\n"
    )
    cells = '3,prediction,collide,ThreeDWorld,"[""0.png""]",What next?,"[""a"",""b"",""c"",""d""]",2'
    (pictures / "t.csv").write_text(f"uid,level,dim,sim,past,ask,futures,label\n{cells}\n")
    lines = questions_from_rows(read_table(pictures / "t.jsonl"), COLUMNS, folder=pictures)
    assert [q.id for q in lines] == ["3", "4"] and "\u2028" in lines[0].text
    (found,) = questions_from_rows(read_table(pictures / "t.csv"), COLUMNS, folder=pictures, options_are="text")
    assert (found.answer, found.options, found.media) == ("C", ("a", "b", "c", "d"), (pictures / "0.png",))


def test_parquet_needs_an_engine_and_says_which(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"t\.parquet cannot be read .* pip install pyarrow, or convert it to \.jsonl"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", '{"a": 1}\n{"a"', "line 2 is not a JSON object"),
        ("t.jsonl", "[1]", "line 1 is not a JSON object"),
        ("t.jsonl", "", "line 1 is not a JSON object"),
        ("t.csv", "", "holds no rows"),
        ("t.txt", "", "unknown kind of table '.txt'"),
        ("gone.csv", None, "gone.csv does not exist"),
    ],
)
def test_bad_tables_are_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (dict(label=4), {}, "question 3: unknown answer 4"),
        (dict(label="E"), {}, "question 3: unknown answer 'E'"),
        (dict(futures=["0.png"]), {}, "question 3: needs four options A to D, has 1"),
        (dict(futures=None), {}, "question 3: needs four options A to D, has 0"),
        (dict(futures="0.png"), {}, "question 3: '0.png' is not a list in JSON"),
        (dict(past=5), {}, "question 3: 5 is not a list"),
        (dict(past=["gone.png"]), {}, "question 3: media .*gone.png is missing"),
        (dict(past=[{"bytes": b"no picture"}]), {}, "question 3: a picture cannot be decoded"),
        (dict(past=[7]), {}, "question 3: a picture must be a path or hold encoded bytes"),
        ({}, dict(prompt="question"), "row 0 has no column question; it has uid, level"),
        ({}, dict(colour="dim"), "unknown field 'colour'"),
    ],
)
def test_bad_rows_are_named(pictures, row, columns, message):
    with pytest.raises(ValueError, match=message):
        questions_from_rows([table_row(**row)], COLUMNS | columns, folder=pictures)


def test_a_map_without_a_prompt_and_repeated_rows_are_refused(pictures):
    with pytest.raises(ValueError, match="the column map lacks 'prompt'"):
        questions_from_rows([table_row()], dict(id="uid", options="futures"), folder=pictures)
    with pytest.raises(ValueError, match="duplicated id: 3"):
        questions_from_rows([table_row()] * 2, COLUMNS, folder=pictures)


def test_the_synthetic_val_file_has_the_official_composition():
    assert Counter(q.answer for q in official_val()) == ANSWERS
