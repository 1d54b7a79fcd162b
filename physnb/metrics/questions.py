"""Four-choice questions about videos: their schema, the official files, and the scoring of a judge's replies.

PhysBench (Chow et al. 2025, arXiv 2501.16411; USC-GVL/PhysBench) and WM-ABench (Gao et al. 2025, arXiv 2506.21876).
They score answers, not videos: `physnb.metrics.judges` asks, `physnb.metrics.question_making` makes such questions.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from physnb.config import choose, require
from physnb.metrics.scores import Scores
from physnb.statistics import Estimate, bootstrap_mean

LETTERS = ("A", "B", "C", "D")
CHANCE = 0.25  # accuracy of a random letter
QUESTION_MODES = ("image-only", "image&video", "general")  # PhysBench's: one picture, one video, interleaved
VIDEO_SUFFIXES, IMAGE_SUFFIXES = (".mp4",), (".jpg", ".jpeg", ".png")
MODES = ("clean", "compat")
OFFICIAL_TAGS = ("task", "sub", "ability")
ROW_FIELDS = ("id", "stage", "dimension", "environment", "context_images", "prompt", "options", "answer")

Media = Path | UInt8[Tensor, "time height width 3"]


@dataclass(frozen=True, eq=False)
class Question:
    """A question with four options, of which one is right.

    text: all that is asked, the options as lines "A. ..." to "D. ..."; `<image>` and `<video>` stand for the media.
    answer: "A" to "D"; None where it is not known; "" where the official file leaves it empty, which PhysBench's scorer
    treats in its own way. option_media: four pictures when the options are pictures. tags: what tables are made of.
    Raises ValueError unless there are four options and the answer is one of them.
    """

    id: str
    text: str
    options: tuple[str, str, str, str]
    answer: str | None
    media: tuple[Media, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    mode: str = "image&video"
    option_media: tuple[Media, ...] = ()

    def __post_init__(self) -> None:
        about, pictures = f"question {self.id}", len(self.option_media)
        require(len(self.options) == 4, f"{about}: needs four options A to D, has {len(self.options)}")
        require(self.answer in (None, "", *LETTERS), f"{about}: unknown answer {self.answer!r}; use A, B, C or D")
        require(pictures in (0, 4), f"{about}: needs four option pictures or none, has {pictures}")
        choose("question mode", self.mode, QUESTION_MODES)


@dataclass(frozen=True)
class Reply:
    """What a judge said to question `id`; text None, with the reason, where it said nothing."""

    id: str
    text: str | None
    reason: str | None = None

    def __post_init__(self) -> None:
        one = (self.text is None) == (self.reason is not None)
        require(one, f"reply {self.id}: needs either a text or a reason")


def option_lines(options: Iterable[str]) -> str:
    """The options as the lines "A. ..." to "D. ..."."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))


def read_options(text: str) -> tuple[str, ...]:
    """The options written in `text` as lines that start with "A." to "D.", in this order; () unless all four are there.

    >>> read_options("Which falls faster?\\nA. lead\\nB. a feather\\nC. both\\nD. neither")
    ('lead', 'a feather', 'both', 'neither')
    """
    lines = re.findall(r"^[ \t]*([A-D])\.[ \t]*(.*?)[ \t]*$", text, flags=re.MULTILINE)
    return tuple(option for _, option in lines) if tuple(letter for letter, _ in lines) == LETTERS else ()


def read_physbench(folder: Path, *, split: str = "val", exclude: Collection[int] = ()) -> list[Question]:
    """The questions of a PhysBench download: `test.json`, with `val_answer.json` joined by idx, and image/ and video/.

    split: "val" are the 200 questions with public answers; "test" the others, whose answers are not public (None).
    exclude: idx to leave out, for example of media that were not unpacked; an error lists what it would have to hold.
    Raises ValueError for a missing or damaged file, a missing field, an idx that occurs twice, a question without four
    options, an answer without a question or other than A to D or empty, and media that are missing or of another kind.
    """
    folder = Path(folder)
    choose("PhysBench split", split, ("val", "test"))
    items = _by_idx(folder / "test.json", ("idx", "question", "file_name", "mode", "split"), exclude)
    answers = {}
    if split == "val":
        names = ("idx", "answer", "task_type", "sub_type", "ability_type")
        answers = _by_idx(folder / "val_answer.json", names, exclude)
        odd = [idx for idx, item in answers.items() if item["answer"] not in ("", *LETTERS)]
        _refuse(odd, "answers in val_answer.json that are neither A to D nor empty")
    chosen = {idx: item for idx, item in items.items() if (item["split"] == "val") == (split == "val")}
    _refuse([idx for idx in answers if idx not in chosen], "answers in val_answer.json without a question of split val")
    options = {idx: read_options(item["question"]) for idx, item in chosen.items()}
    _refuse([idx for idx, found in options.items() if not found], "questions without options A to D")
    media = {idx: tuple(_media_path(folder, name, idx) for name in item["file_name"]) for idx, item in chosen.items()}
    _refuse([idx for idx, paths in media.items() if not all(map(Path.is_file, paths))], "questions with missing media")
    return [
        Question(
            id=str(idx),
            text=item["question"],
            options=options[idx],
            answer=answers[idx]["answer"] if idx in answers else None,
            media=media[idx],
            tags={tag: answers[idx][f"{tag}_type"] for tag in OFFICIAL_TAGS} if idx in answers else {},
            mode=item["mode"],
        )
        for idx, item in chosen.items()
    ]


def _by_idx(path: Path, names: tuple[str, ...], exclude: Collection[int]) -> dict[int, dict[str, Any]]:
    """Items of a JSON list by idx, without `exclude`; every item has the fields `names`."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None
    require(isinstance(items, list) and len(items) > 0, f"{path} must hold a list of items")
    for number, item in enumerate(items):
        missing = [name for name in names if not isinstance(item, dict) or name not in item]
        require(not missing, f"{path}: item number {number} lacks {', '.join(missing)}")
        require(isinstance(item["idx"], int), f"{path}: item number {number} has idx {item['idx']!r}, not a number")
    counts = Counter(item["idx"] for item in items)
    _refuse([idx for idx, count in counts.items() if count > 1], f"duplicated idx in {path}")
    return {item["idx"]: item for item in items if item["idx"] not in exclude}


def _refuse(ids: list, what: str) -> None:
    require(not ids, f"{what}: {len(ids)}, the first are {ids[:5]}; mend them or leave them out with `exclude`")


def _media_path(folder: Path, name: str, idx: int) -> Path:
    suffix = Path(name).suffix.lower()
    require(suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES, f"question {idx}: {name} is neither .mp4 nor .jpg nor .png")
    return folder / ("video" if suffix in VIDEO_SUFFIXES else "image") / name


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .csv or .parquet file; parquet needs pandas' engine `pyarrow`, which physnb does not require.

    Raises ValueError naming a missing or empty file, a damaged line, or another kind of file.
    """
    path = Path(path)
    suffix = choose("kind of table", path.suffix, (".jsonl", ".csv", ".parquet"))
    require(path.is_file(), f"{path} does not exist")
    if suffix == ".parquet":
        try:
            rows = pandas.read_parquet(path).to_dict("records")
        except (ImportError, OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{path} cannot be read ({first}); pip install pyarrow, or convert it to .jsonl") from None
    elif suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    else:
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").strip().split("\n"), start=1):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} line {number} is not a JSON object ({error})") from None
    require(len(rows) > 0, f"{path} holds no rows")
    return rows


def questions_from_rows(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], *, folder: Path = Path(), options_are: str = "images"
) -> list[Question]:
    """Questions of a table whose column names are not ours: `columns` says which column is which of ROW_FIELDS.

    WM-ABench's own column names were not seen when this was written: look into its parquet files, then write the map.
    context_images and options are lists (in a CSV as JSON); a picture is a path below `folder` or the
    {"bytes": ...} of an encoded file, as parquet stores it. options_are "text" takes the options as words.
    answer is a letter or a number from 0 to 3; an empty one is None, and a table may have no answer column at all.
    Raises ValueError for a column that is not there, an id that occurs twice, pictures that are missing, not four
    options, and an answer that is neither a letter nor 0 to 3.
    """
    for name in columns:
        choose("field", name, ROW_FIELDS)
    for name in ("id", "prompt", "options"):
        require(name in columns, f"the column map lacks {name!r}")
    choose("options_are", options_are, ("images", "text"))
    questions = []
    for number, row in enumerate(rows):
        gone = [column for column in columns.values() if column not in row]
        require(not gone, f"row {number} has no column {', '.join(gone)}; it has {', '.join(map(str, row))}")
        value = {name: row[column] for name, column in columns.items()}
        about = f"question {value['id']}"
        options = _listed(value["options"], about)
        require(len(options) == 4, f"{about}: needs four options A to D, has {len(options)}")
        pictures = options_are == "images"
        words = tuple(f"the picture marked {x}" for x in LETTERS) if pictures else tuple(map(str, options))
        questions.append(
            Question(
                id=str(value["id"]),
                text=f"{value['prompt']}\n{option_lines(words)}",
                options=words,
                answer=_letter_of(value.get("answer"), about),
                media=tuple(_picture(x, folder, about) for x in _listed(value.get("context_images"), about)),
                tags={tag: str(value[tag]) for tag in ("stage", "dimension", "environment") if tag in value},
                mode="general",
                option_media=tuple(_picture(x, folder, about) for x in options) if pictures else (),
            )
        )
    _refuse_repeats(question.id for question in questions)
    return questions


def _listed(value: Any, about: str) -> list[Any]:
    """A cell that holds a list: of Python, of numpy, or written as JSON; an empty cell is an empty list."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except json.JSONDecodeError:
            raise ValueError(f"{about}: {value[:40]!r} is not a list in JSON") from None
    require(value is None or isinstance(value, list | tuple | np.ndarray), f"{about}: {value!r} is not a list")
    return [] if value is None else list(value)


def _letter_of(value: Any, about: str) -> str | None:
    """The letter of an answer given as a letter or as 0 to 3."""
    if value is None or value == "" or value != value:  # parquet has NaN in an empty cell
        return None
    numbers = {str(number): letter for number, letter in enumerate(LETTERS)}
    text = str(value).strip().removesuffix(".0")  # a column of numbers with an empty cell is one of floats
    require(text in LETTERS or text in numbers, f"{about}: unknown answer {value!r}; use A, B, C, D or 0 to 3")
    return numbers.get(text, text)


def _picture(value: Any, folder: Path, about: str) -> Media:
    if isinstance(value, str):
        path = Path(folder) / value
        require(path.is_file(), f"{about}: media {path} is missing")
        return path
    data = value.get("bytes") if isinstance(value, Mapping) else None
    require(isinstance(data, bytes), f"{about}: a picture must be a path or hold encoded bytes")
    try:
        return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))[None]
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{about}: a picture cannot be decoded ({error})") from None


def _refuse_repeats(ids: Iterable[str]) -> None:
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    require(not repeated, f"duplicated id: {', '.join(repeated[:5])}")


_APART = r"(?<![\w'’.\-])"  # nothing touches the letter from the left
_ENDS = r"(?=\s*$|\s*\n|[.,:;!?)\]}*\"<]|'(?!\w))"
_CHOICE = re.compile(
    rf"^[\s(\[{{*\"']*([A-Da-d]){_ENDS}"
    rf"|{_APART}([B-D])(?![\w'’\-])"
    rf"|{_APART}(A)(?:{_ENDS}|(?=\s+(?:is|or|and|but|because|since|as)\b))"
    r"|(?<=[Oo]ption )(A)\b"
)


def read_choice(text: str) -> str | None:
    """The letter A to D that a reply chooses: the first one that stands alone; None where there is none.

    A capital stands alone when no letter, digit, hyphen or apostrophe touches it and no full stop comes just before.
    Because "A" is also an article, it counts only after "option" or where the end of a line, punctuation or one of is,
    or, and, but, because, since, as follows. A small letter counts only where the reply begins with it and the end of a
    line or punctuation follows. Brackets, quotes and asterisks around a letter do not matter.

    >>> [read_choice(text) for text in ("B", " (c) because", "The answer is A.", "A ball is red", "A. ball", "bad")]
    ['B', 'C', 'A', None, 'A', None]
    """
    match = _CHOICE.search(text)
    return None if match is None else match[match.lastindex].upper()


@dataclass(frozen=True)
class Accuracy:
    """Right answers among the questions that have one: per question, in all, and by tag.

    scores: 1 right, 0 wrong, one a question, higher is better, 0.25 by chance. overall, tables: share of right answers,
    with interval and count. unread: ids of replies that chose no letter, with the reason; they count as wrong.
    dropped: questions left out because no answer to them is known.
    """

    ids: tuple[str, ...]
    scores: Scores
    overall: Estimate
    tables: dict[str, dict[str, Estimate]]
    unread: dict[str, str]
    dropped: int


@dataclass(frozen=True)
class OfficialRow:
    """PhysBench's counts for one type of question; accuracy in %. Without a hit, `correct` stays at -1."""

    accuracy: float
    correct: int
    total: int


@dataclass(frozen=True)
class OfficialAccuracy:
    """The tables of PhysBench's scorer, in %: parity only."""

    overall: OfficialRow
    tables: dict[str, dict[str, OfficialRow]]

    def weighted_average(self, tag: str) -> float:
        """The "avg" column of a table, in %: correct over total of its rows, so a row without a hit takes one away."""
        rows = [row for row in self.tables[tag].values() if row.total > 0]
        return sum(row.correct for row in rows) / sum(row.total for row in rows) * 100 if rows else -1.0


def score_answers(
    questions: Iterable[Question], replies: Iterable[Reply], mode: str = "clean", seed: int = 0
) -> Accuracy | OfficialAccuracy:
    """How many replies are right.

    clean: `read_choice` against the answer. A question without a known answer is dropped and counted. One without a
    reply, or whose reply chooses no letter, is wrong and listed in `unread`: saying nothing never pays.
    compat: PhysBench's calculate_accuracy (caculate_core.py, commit a50c667): a reply is right when it starts with the
    answer, as it stands, so a leading space is wrong, "Because" is right for B, and an empty answer is always right.
    Overall is over all replies, also None and unknown ones; the tables are over what was compared.
    seed: of the bootstrap intervals. Raises ValueError for an id that occurs twice, and in clean for no question with
    an answer or a reply to a question that is not there.
    Leaves out that questions about the same video are not independent: their interval is too narrow.
    """
    choose("mode", mode, MODES)
    questions, replies = list(questions), list(replies)
    _refuse_repeats(question.id for question in questions)
    _refuse_repeats(reply.id for reply in replies)
    return _score_compat(questions, replies) if mode == "compat" else _score_clean(questions, replies, seed)


def _score_clean(questions: list[Question], replies: list[Reply], seed: int) -> Accuracy:
    said = {reply.id: reply for reply in replies}
    unknown = sorted(said.keys() - {question.id for question in questions})
    require(not unknown, f"replies to questions that are not there: {', '.join(unknown[:5])}")
    known = [question for question in questions if question.answer in LETTERS]
    require(len(known) > 0, "no question has a known answer, so nothing can be scored")
    right, unread = [], {}
    for question in known:
        reply = said.get(question.id, Reply(question.id, None, "no reply"))
        choice = None if reply.text is None else read_choice(reply.text)
        if choice is None:
            unread[question.id] = reply.reason or f"no letter A to D in {reply.text[:60]!r}"
        right.append(float(choice == question.answer))
    values = torch.tensor(right)
    tables: dict[str, dict[str, Estimate]] = {}
    for tag in sorted({tag for question in known for tag in question.tags}):
        rows = [question.tags.get(tag) for question in known]
        tables[tag] = {
            value: bootstrap_mean(values[[row == value for row in rows]], seed) for value in sorted({*rows} - {None})
        }
    scores = Scores("accuracy", "share", values, (None,) * len(known), lower_is_better=False)
    ids = tuple(question.id for question in known)
    return Accuracy(ids, scores, scores.estimate(seed), tables, unread, len(questions) - len(known))


def _score_compat(questions: list[Question], replies: list[Reply]) -> OfficialAccuracy:
    answered = {question.id: question for question in questions if question.answer is not None}
    correct, counts = 0, {tag: {} for tag in OFFICIAL_TAGS}
    for reply in replies:
        question = answered.get(reply.id)
        if reply.text is None or question is None:
            continue
        right = reply.text.startswith(question.answer)
        correct += right
        for tag in OFFICIAL_TAGS:
            require(tag in question.tags, f"question {question.id} lacks the tag {tag!r} that PhysBench's tables need")
            row = counts[tag].setdefault(question.tags[tag], [-1, 0])
            row[0] = max(row[0], 0) + 1 if right else row[0]
            row[1] += 1
    overall = OfficialRow(correct / len(replies) * 100 if replies else 0.0, correct, len(replies))
    tables = {
        tag: {value: OfficialRow(max(hits / total * 100, 0.0), hits, total) for value, (hits, total) in rows.items()}
        for tag, rows in counts.items()
    }
    return OfficialAccuracy(overall, tables)
