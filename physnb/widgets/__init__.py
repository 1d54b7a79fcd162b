"""Instruments for notebooks: they show what was measured, and run what one asks them to.

    actions     a button that runs something long, with progress and cancel
    browsing    controls over a picture and a sentence
    watching    a hunt's map while it fills in
    strength    any weight and strength: clips at once, effects with intervals, points computed on demand
    heads       a layer x head map to click, and everything known of the head that was clicked
    choosing    two clips side by side: which moves more lawfully?
    phenomena   every scenario, lawful or not, with what is said of it

Every control takes the keyboard, and errors show where one pressed. Each instrument stands below a plain figure of the
same content, for papermill, the report and readers without a kernel.
"""

from physnb.widgets.actions import Cancelled, long_action
from physnb.widgets.browsing import browse
from physnb.widgets.choosing import choice_widget, draw_pair
from physnb.widgets.heads import HeadMap, browse_heads
from physnb.widgets.phenomena import browse_phenomena
from physnb.widgets.strength import browse_strength
from physnb.widgets.watching import watch_hunt

__all__ = [
    "Cancelled",
    "HeadMap",
    "browse",
    "browse_heads",
    "browse_phenomena",
    "browse_strength",
    "choice_widget",
    "draw_pair",
    "long_action",
    "watch_hunt",
]
