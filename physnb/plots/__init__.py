"""Figures and videos from results: data in, Figure out. One style, one colour a method, intervals always drawn."""

from physnb.plots.clips import check_video_path, plot_clips, plot_trajectories, side_by_side, write_video
from physnb.plots.heads import (
    plot_contributions,
    plot_head_maps,
    plot_picture,
    plot_profile,
    plot_transfer,
)
from physnb.plots.hunting import plot_differences, plot_head_map, plot_promises, plot_ranking
from physnb.plots.judging import plot_correlations, plot_ladder, plot_sensitivity
from physnb.plots.knowledge import plot_arms
from physnb.plots.strength import plot_surface, plot_surfaces
from physnb.plots.style import (
    cell_boxes,
    effect_colours,
    figure_pixels,
    figure_png,
    interval_text,
    method_colour,
    new_figure,
    save_figure,
    text_colour,
)
from physnb.plots.training import plot_training

__all__ = [
    "cell_boxes",
    "check_video_path",
    "effect_colours",
    "figure_pixels",
    "figure_png",
    "interval_text",
    "method_colour",
    "new_figure",
    "plot_arms",
    "plot_clips",
    "plot_contributions",
    "plot_correlations",
    "plot_differences",
    "plot_head_map",
    "plot_head_maps",
    "plot_ladder",
    "plot_picture",
    "plot_profile",
    "plot_promises",
    "plot_ranking",
    "plot_sensitivity",
    "plot_surface",
    "plot_surfaces",
    "plot_training",
    "plot_trajectories",
    "plot_transfer",
    "save_figure",
    "side_by_side",
    "text_colour",
    "write_video",
]
