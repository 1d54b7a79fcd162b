"""Human choices between clips: which pairs to show, and a SQLite record of what was answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime

import numpy as np
import pandas as pd

from physnb.config import choose, require
from physnb.data import hash_draws
from physnb.store import Database

ANSWERS = ("left", "right", "tie", "skip")


@dataclass(frozen=True)
class Pair:
    """Two methods on one case, and which of them is shown on which side. A clip's id is `method/case`."""

    case_name: str
    left_method: str
    right_method: str

    @property
    def name(self) -> str:
        """The same whichever side is which."""
        return " | ".join([self.case_name, *sorted((self.left_method, self.right_method))])

    @property
    def left_clip(self) -> str:
        return f"{self.left_method}/{self.case_name}"

    @property
    def right_clip(self) -> str:
        return f"{self.right_method}/{self.case_name}"


def design_pairs(
    methods: Sequence[str], cases: Sequence[str], *, pairs: int | None = None, seed: int = 0
) -> tuple[Pair, ...]:
    """The first `pairs` (None: all) of every two methods on every case, in an order that is balanced wherever it stops.

    In every prefix two methods meet as often as any other two, and a case comes as often as any other, give or take 1;
    so does a method, give or take 2. The order of methods and cases is drawn from `seed`, the side by (seed, pair).
    Raises ValueError for fewer than 2 methods, no case, a name given twice, or a number of pairs that there is not.
    """
    for name, values, least in (("methods", methods, 2), ("cases", cases, 1)):
        require(len(values) >= least, f"a comparison needs at least {least} {name}, got {len(values)}")
        require(len(set(values)) == len(values), f"{name} must differ, got {', '.join(values)}")
    methods, cases = (_shuffled(values, seed, name) for name, values in (("methods", methods), ("cases", cases)))
    count = len(methods)
    # Pairs of neighbours around a circle, then of second neighbours, and so on: every method twice a round.
    meetings = [(i, (i + d) % count) for d in range(1, count // 2 + 1) for i in range(count if 2 * d < count else d)]
    total = len(meetings) * len(cases)
    pairs = total if pairs is None else pairs
    require(1 <= pairs <= total, f"there are {total} pairs to show, so the number of them must be in [1, {total}]")
    design, period = [], int(np.lcm(len(meetings), len(cases)))
    for number in range(pairs):
        one, other = (methods[i] for i in meetings[number % len(meetings)])
        # The diagonal of the table of meetings and cases, moved by one case whenever it closes on itself.
        pair = Pair(cases[(number + number // period) % len(cases)], *sorted((one, other)))
        swap = hash_draws(seed, f"side/{pair.name}", np.array([0]))[0] >> np.uint64(63)
        design.append(Pair(pair.case_name, pair.right_method, pair.left_method) if swap else pair)
    return tuple(design)


def _shuffled(values: Sequence[str], seed: int, name: str) -> list[str]:
    return [values[i] for i in np.argsort(hash_draws(seed, f"order/{name}", np.arange(len(values))))]


_COLUMNS = ", ".join(f"pairs.{field.name}" for field in fields(Pair))


class ChoiceStore(Database):
    """A SQLite file with the pairs to show and one row a choice, written as it is made; kill -9 loses none but that.

    Several processes may write at once. Raises ValueError for another program's file, or another schema version.
    """

    kind = "choice store"
    tables = frozenset({"pairs", "choices"})
    schema = """
CREATE TABLE IF NOT EXISTS pairs (
    position INTEGER PRIMARY KEY,  -- in the design
    pair TEXT NOT NULL UNIQUE,
    case_name TEXT NOT NULL,
    left_method TEXT NOT NULL,
    right_method TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS choices (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    pair TEXT NOT NULL REFERENCES pairs (pair),
    left_clip TEXT NOT NULL,       -- ids as shown
    right_clip TEXT NOT NULL,
    answer TEXT NOT NULL CHECK (answer IN ('left', 'right', 'tie', 'skip')),
    rater TEXT NOT NULL,
    time_utc TEXT NOT NULL,        -- ISO 8601
    seconds REAL NOT NULL CHECK (seconds >= 0),
    UNIQUE (pair, rater)
);
"""

    def plan(self, pairs: Sequence[Pair]) -> None:
        """Write down the pairs to show. The same plan again changes nothing, and a longer one goes on from the old.

        Raises ValueError for a plan that differs from the one on record: answers to two designs must not mix.
        """
        rows = [(i, p.name, p.case_name, p.left_method, p.right_method) for i, p in enumerate(pairs)]
        require(len({row[1] for row in rows}) == len(rows), "a pair is planned twice")
        with self._named(), self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            found = self.connection.execute("SELECT * FROM pairs ORDER BY position").fetchall()
            shared = min(len(found), len(rows))
            require(found[:shared] == rows[:shared], f"{self.path} holds another plan of pairs; choose another file")
            self.connection.executemany("INSERT INTO pairs VALUES (?, ?, ?, ?, ?)", rows[shared:])

    def pairs(self) -> tuple[Pair, ...]:
        """All planned pairs in the order of the design."""
        with self._named():
            return tuple(
                Pair(*row) for row in self.connection.execute(f"SELECT {_COLUMNS} FROM pairs ORDER BY position")
            )

    def next_pair(self, rater: str) -> Pair | None:
        """The pair to show to `rater`: of those new to this rater the one with the fewest judgements; None at the end.

        Among equals the design decides, so that raters first share the pairs out and then see each other's.
        """
        query = f"""
            SELECT {_COLUMNS} FROM pairs LEFT JOIN choices ON choices.pair = pairs.pair AND choices.answer != 'skip'
            WHERE pairs.pair NOT IN (SELECT pair FROM choices WHERE rater = ?)
            GROUP BY pairs.position ORDER BY COUNT(choices.number), pairs.position LIMIT 1
        """
        with self._named():
            row = self.connection.execute(query, (rater,)).fetchone()
        return None if row is None else Pair(*row)

    def write(self, pair: Pair, answer: str, rater: str, seconds: float) -> None:
        """One choice, now. Raises ValueError for an unknown answer or pair, no rater, or a pair this rater judged."""
        choose("answer", answer, ANSWERS)
        require(bool(rater.strip()), "a choice needs the rater's name")
        require(0 <= seconds < float("inf"), f"seconds taken must be finite and not negative, got {seconds}")
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = (pair.name, pair.left_clip, pair.right_clip, answer, rater, now, seconds)
        with self._named(), self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            planned = "SELECT 1 FROM pairs WHERE (case_name, left_method, right_method) = (?, ?, ?)"
            known = self.connection.execute(planned, (pair.case_name, pair.left_method, pair.right_method)).fetchone()
            require(known is not None, f"pair {pair.name!r} is not planned in {self.path}, or its sides are swapped")
            judged = "SELECT 1 FROM choices WHERE (pair, rater) = (?, ?)"
            again = self.connection.execute(judged, (pair.name, rater)).fetchone()
            require(again is None, f"{rater} has already judged {pair.name!r}; undo that choice first")
            columns = "pair, left_clip, right_clip, answer, rater, time_utc, seconds"
            self.connection.execute(f"INSERT INTO choices ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def undo(self, rater: str) -> Pair | None:
        """Take back the rater's last choice and return its pair, to be shown again; None if there is no choice left."""
        query = f"""
            SELECT choices.number, {_COLUMNS} FROM choices JOIN pairs ON pairs.pair = choices.pair
            WHERE rater = ? ORDER BY choices.number DESC LIMIT 1
        """
        with self._named(), self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            row = self.connection.execute(query, (rater,)).fetchone()
            if row is None:
                return None
            self.connection.execute("DELETE FROM choices WHERE number = ?", row[:1])
        return Pair(*row[1:])

    def counts(self, rater: str) -> dict[str, int]:
        """How often `rater` gave each answer."""
        query = "SELECT answer, COUNT(*) FROM choices WHERE rater = ? GROUP BY answer"
        with self._named():
            return dict.fromkeys(ANSWERS, 0) | dict(self.connection.execute(query, (rater,)))

    def read(self) -> pd.DataFrame:
        """Every choice in the order made: pair, case, methods and clips by side, answer, rater, time, seconds."""
        query = f"""
            SELECT choices.pair, {_COLUMNS}, left_clip, right_clip, answer, rater, time_utc, seconds
            FROM choices JOIN pairs ON pairs.pair = choices.pair ORDER BY choices.number
        """
        with self._named():
            return pd.read_sql_query(query, self.connection)
