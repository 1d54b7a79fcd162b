"""Result rows as text."""

from physnb.tables import flatten_row, format_cell, text_table


def estimate(mean, low, high, **more):
    return dict(mean=mean, low=low, high=high) | more


def test_cells_are_rounded_and_absence_is_a_dash():
    assert format_cell(0.12345) == "0.123"
    assert format_cell(estimate(1.0, 0.5, 1.5)) == "1.000 [0.500, 1.500]"
    assert format_cell(estimate(None, None, None)) == format_cell(None) == "–"
    assert format_cell(3) == "3"


def test_a_difference_gets_its_own_column_beside_its_metric():
    row = flatten_row(dict(method="CFG", missing_rate=estimate(0.2, 0.1, 0.3, difference=estimate(-0.1, -0.2, 0.0))))
    assert list(row) == ["method", "missing rate", "Δ missing rate"]
    assert row["Δ missing rate"] == "-0.100 [-0.200, 0.000]"


def test_table_lines_are_aligned():
    lines = text_table([dict(head="L0H1", mean=0.5), dict(head="L10H11", mean=-0.25)]).splitlines()
    assert [line.index("mean") if "mean" in line else line.rindex(" ") + 1 for line in lines] == [8, 8, 8]
    assert text_table([]) == ""
