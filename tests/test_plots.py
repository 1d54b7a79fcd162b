"""What figures of the laboratory show, read from the figures themselves."""

import numpy as np
import pytest
import torch

from physnb.config import head_set
from physnb.plots import (
    cell_boxes,
    figure_pixels,
    interval_text,
    plot_arms,
    plot_contributions,
    plot_head_maps,
    plot_picture,
    plot_profile,
    plot_surface,
    plot_surfaces,
    plot_transfer,
    text_colour,
)


def effect(mean, width=0.1):
    return dict(mean=mean, low=mean - width, high=mean + width, judged=4, cases=4)


SURFACE = {(w, u): effect(0.0 - w * u) for w in (0.0, 1.0, 2.0) for u in (0.5, 1.0)}


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_surface_has_a_cell_a_point_and_a_line_a_strength():
    heat, lines, *_ = plot_surface(SURFACE, "tracking error").axes
    assert texts(heat) == ["0.00", "-0.50", "-1.00", "0.00", "-1.00", "-2.00"]  # w across, u upwards
    assert not heat.yaxis_inverted() and [t.get_text() for t in heat.get_yticklabels()] == ["0.5", "1"]
    assert [t.get_text() for t in lines.get_legend().get_texts()] == ["u = 0.5", "u = 1"]


def test_point_that_is_not_there_stays_blank_and_the_line_goes_on():
    surface = {point: value for point, value in SURFACE.items() if point != (1.0, 1.0)}
    heat, lines, *_ = plot_surface(surface, "tracking error").axes
    assert texts(heat) == ["0.00", "-0.50", "-1.00", "0.00", "-2.00"]
    assert [len(container[0].get_xdata()) for container in lines.containers] == [3, 2]


def test_cells_are_found_in_the_pixels():
    figure = plot_surface(SURFACE, "tracking error")
    pixels, boxes = figure_pixels(figure), cell_boxes(figure)
    assert len(boxes) == 2 and len(boxes[0]) == 3
    left, top, right, bottom = boxes[1][2]  # w = 2, u = 1: the most helpful, so the most orange
    orange = pixels[int(top) + 3, int(left) + 3].astype(int)
    assert orange[0] > orange[2] + 50 and 0 <= left < right <= pixels.shape[1] and 0 <= top < bottom <= pixels.shape[0]
    blank = pixels[int(boxes[0][0][1]) + 3, int(boxes[0][0][0]) + 3].astype(int)
    assert np.ptp(blank) < 10  # w = 0: no effect, no colour


def test_surfaces_show_mean_and_interval_of_every_metric():
    figure = plot_surfaces(
        {"missing_rate": SURFACE, "velocity_error": SURFACE}, dict(missing_rate="share", velocity_error="m/s")
    )
    first, second = (axis for axis in figure.axes if axis.get_title())
    assert first.get_title() == "missing rate minus unguided (share)" and "m/s" in second.get_title()
    assert texts(first)[1] == "-0.50\n[-0.60, -0.40]"
    assert interval_text(None) == interval_text(dict(mean=None, low=None, high=None)) == ""
    with pytest.raises(ValueError, match="no surface"):
        plot_surfaces({}, {})


def test_profile_has_a_panel_a_question_and_an_interval_a_value():
    rows = [
        dict(head=head, by=by, at=at) | effect(-0.3)
        for head in ("L0H0", "L0H1")
        for by, at in (("noise level", "1.000"), ("noise level", "0.9"), ("split", "id"))
    ]
    levels, split = plot_profile(rows, "effect").axes
    assert (levels.get_xlabel(), split.get_xlabel()) == ("noise level", "split")
    assert [t.get_text() for t in levels.get_xticklabels()] == ["1.000", "0.9"]
    assert sum(len(collection.get_segments()) for collection in levels.collections) == 4
    with pytest.raises(ValueError, match="no effect"):
        plot_profile([], "effect")


def test_contributions_show_three_estimates_a_head():
    rows = [
        dict(head=head, alone=effect(-3), shapley=effect(-2), leave_one_out=effect(-1)) for head in ("L0H0", "L1H2")
    ]
    axis = plot_contributions(rows, "effect").axes[0]
    points = {line.get_label(): list(line.get_ydata()) for line in axis.lines[1:]}
    assert points == {"alone": [-3, -3], "shapley": [-2, -2], "leave one out": [-1, -1]}
    assert [t.get_text() for t in axis.get_xticklabels()] == ["L0H0", "L1H2"]


def test_transfer_has_sources_down_targets_across_and_frames_at_home():
    rows = [
        dict(hunted_on=source, tested_on=target, effect=effect(value))
        for source, values in (("a", (-3, -1)), ("b", (-1, -4)), ("random heads", (0, 0)))
        for target, value in zip("ab", values, strict=True)
    ]
    axis = plot_transfer(rows, "effect").axes[0]
    assert texts(axis)[1] == "-1.00\n[-1.10, -0.90]" and texts(axis)[3].startswith("-4.00")
    assert [t.get_text() for t in axis.get_yticklabels()] == ["a", "b", "random heads"]
    assert [patch.get_xy() for patch in axis.patches] == [(0, 0), (1, 1)]


def test_maps_are_around_zero_only_where_there_are_both_signs():
    table = torch.tensor([[-1.0, 0.5], [0.0, torch.nan]])
    figure = plot_head_maps({"effect": table, "share": table.abs()}, head_set("L0H1"))
    signed, share = (axis for axis in figure.axes if axis.get_title())
    assert signed.collections[0].get_clim() == (-1, 1) and share.collections[0].get_clim() == (0, 1)
    assert [patch.get_xy() for patch in signed.patches] == [(1, 0)]


def test_picture_keeps_its_pixels():
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    figure = plot_picture(picture)
    assert np.abs(figure_pixels(figure).astype(int) - picture).max() <= 1


def test_text_reads_on_its_ground():
    assert text_colour("#ffffff") == text_colour("#ffee00") == "black"
    assert text_colour("#000000") == text_colour("#2d004b") == "white"


def arm_rows(physics: float, difference: dict | None, splits=("id", "ood")) -> list[dict]:
    common = dict(level="law", physics=physics, variety="many", quantity="velocity error")
    return [common | dict(split=split, value=effect(1.0), difference=difference) for split in splits]


def test_arms_have_a_point_a_split_and_an_interval_of_several_trainings():
    alone = dict(mean=0.4, low=None, high=None, judged=1, cases=1)
    rows = arm_rows(1.0, None) + arm_rows(0.5, effect(-0.3)) + arm_rows(0.2, alone, splits=("ood",))
    rows += [row | dict(quantity="missing rate") for row in arm_rows(0.5, effect(0.1))]
    figure = plot_arms(rows, {"velocity error": "units/s", "missing rate": "share"})
    velocity, missing = figure.axes
    zero, *drawn = velocity.lines
    assert list(zero.get_xdata()) == [0, 0]
    points = [(*line.get_xdata(), *line.get_ydata()) for line in drawn if line.get_marker() == "o"]
    assert points == [(-0.3, 1.15), (-0.3, 0.85), (0.4, -0.15)]  # in distribution above, the first arm on top
    intervals = [list(line.get_xdata()) for line in drawn if line.get_marker() != "o"]
    assert intervals == [pytest.approx([-0.4, -0.2])] * 2
    assert [t.get_text() for t in velocity.get_yticklabels()] == ["law, 20% many", "law, 50% many"]
    assert velocity.get_xlabel() == "velocity error\nminus baseline (units/s)" and "(share)" in missing.get_xlabel()
    assert sum(line.get_marker() == "o" for line in missing.lines) == 2
    assert drawn[1].get_color() != drawn[3].get_color()  # the splits
    assert figure_pixels(figure).std() > 0
    with pytest.raises(ValueError, match="no arm besides the baseline"):
        plot_arms(arm_rows(1.0, None), {"velocity error": "units/s"})
