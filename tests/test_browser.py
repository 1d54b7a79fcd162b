"""What a researcher does after `make lab`: the real JupyterLab in headless Chromium, on the reference outputs.

Screenshots land in tests/screenshots, or in the folder that PHYSNB_SCREENSHOTS names.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from lab import PICTURES, Instrument, KernelMessages, Notebook, start_browser, start_lab
from playwright.sync_api import expect

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parent.parent
SCREENSHOTS = Path(os.environ.get("PHYSNB_SCREENSHOTS") or Path(__file__).parent / "screenshots")
# Loose, because a machine of a CI service is shared; what was measured is printed.
FIRST_PICTURE_SECONDS, REDRAW_SECONDS = 120.0, 6.0


class Desk:
    """The page with the index in front; what its kernels said; and the seconds from the start of the server to it."""

    def __init__(self, address: str, browser, began: float):
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(30_000)
        self.kernels = KernelMessages(self.page)
        self.index = Notebook(self.page, "00", lambda: self.page.goto(address))
        self.seconds_to_index = time.perf_counter() - began

    def check_kernels(self) -> None:
        """Nothing has failed since the last check, neither in a kernel nor while showing what it sent."""
        expect(self.page.locator("body")).not_to_contain_text("Error displaying widget")
        faults, self.kernels.faults = self.kernels.faults, []
        assert faults == []


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Iterator[Desk]:
    """JupyterLab on a copy of the project, so that nothing that it saves lands in the work tree."""
    project = tmp_path_factory.mktemp("project")
    for folder in ("notebooks", "outputs/reference"):
        shutil.copytree(PROJECT / folder, project / folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=30_000)
    began = time.perf_counter()
    with start_lab(project, tmp_path_factory.mktemp("lab")) as address, start_browser() as browser:
        desk = Desk(address, browser, began)
        yield desk
        desk.page.screenshot(path=SCREENSHOTS / "last.png")


def open_and_run(desk: Desk, number: str, control: str) -> tuple[Notebook, Instrument]:
    """Follow the index to a notebook, run all of it, and wait for the pictures of the cell with the button `control`.

    Prints the seconds to the first picture, and asserts that they are not out of all proportion.
    """
    clicked = time.perf_counter()
    notebook = desk.index.follow_link(number)
    stored = notebook.panel.locator(".jp-OutputArea").locator(PICTURES).first
    notebook.panel.locator(".jp-WindowedPanel-outer").hover()
    while not stored.is_visible():  # cells are drawn as they come into the window
        assert time.perf_counter() - clicked < FIRST_PICTURE_SECONDS, f"{number}: no stored picture"
        desk.page.mouse.wheel(0, 600)
        desk.page.wait_for_timeout(50)
    opened = time.perf_counter()
    print(f"{number}: stored picture {desk.seconds_to_index + opened - clicked:.1f} s after the start of the server")
    notebook.run_all()
    instrument = notebook.instrument(control)
    while not instrument.pictures.first.is_visible():
        desk.check_kernels()
        assert time.perf_counter() - opened < FIRST_PICTURE_SECONDS, f"{number}: no picture yet"
        desk.page.wait_for_timeout(20)
    seen = time.perf_counter()
    print(f"{number}: first picture {seen - opened:.1f} s after Run All", end=", ")
    print(f"{desk.seconds_to_index + seen - clicked:.1f} s after the start of the server")
    notebook.wait_until_idle()
    return notebook, instrument


def check_slider(desk: Desk, instrument: Instrument, label: str) -> None:
    """One step by keyboard changes the sentence and the picture; prints how long that takes."""
    desk.kernels.widget_seconds.clear()
    slider = instrument.slider(label)
    seconds = instrument.seconds_to_change(lambda: instrument.step(slider))
    in_kernel = max(desk.kernels.widget_seconds)
    print(f"{label}: redrawn in {seconds:.2f} s, {in_kernel:.2f} s of them in the kernel")
    assert seconds < REDRAW_SECONDS
    assert "Error" not in instrument.words()


def test_index_opens(desk):
    print(f"index after {desk.seconds_to_index:.1f} s")
    for number in ("03", "04", "05"):
        expect(desk.index.panel.get_by_role("link", name=number, exact=True).first).to_be_attached()
    desk.page.screenshot(path=SCREENSHOTS / "00_index.png")
    desk.check_kernels()


def test_guidance_strength_plays_and_computes_points(desk):
    _, instrument = open_and_run(desk, "03", "Compute this point")
    instrument.screenshot(SCREENSHOTS / "03_first.png")
    for label in ("guidance weight w", "perturbation strength u"):
        check_slider(desk, instrument, label)
    instrument.screenshot(SCREENSHOTS / "03_moved.png")

    compute, cancel = instrument.button("Compute this point"), instrument.button("Cancel")
    bar = instrument.area.locator(".progress-bar").first
    before = bar.get_attribute("style")
    compute.click()
    expect(bar).not_to_have_attribute("style", before)
    cancel.click()
    expect(instrument.area).to_contain_text("cancelled", ignore_case=True)
    instrument.screenshot(SCREENSHOTS / "03_cancelled.png")

    began = time.perf_counter()
    compute.click()
    expect(instrument.area).not_to_contain_text("cancelled", ignore_case=True)
    expect(instrument.area).to_contain_text(
        re.compile("(?<!not )(?<!not yet )computed"), ignore_case=True, timeout=60_000
    )
    print(f"03: a point computed in {time.perf_counter() - began:.1f} s")
    instrument.screenshot(SCREENSHOTS / "03_computed.png")
    desk.check_kernels()


def test_head_analysis_follows_the_map(desk):
    _, instrument = open_and_run(desk, "04", "L3H7")
    instrument.screenshot(SCREENSHOTS / "04_first.png")
    head = instrument.area.locator(".physnb-map").get_by_role("button", name="L3H7", exact=True)
    print(f"04: head shown in {instrument.seconds_to_change(head.click):.2f} s")
    assert "L3H7" in instrument.words()
    instrument.screenshot(SCREENSHOTS / "04_L3H7.png")
    check_slider(desk, instrument, "query")
    desk.check_kernels()


def test_a_pair_is_labelled(desk):
    cells = nbformat.read(PROJECT / "notebooks/05_benchmarks.ipynb", as_version=4).cells
    # Scoring every judge takes minutes, and the pairs need none of it.
    needed = (
        "preset: str",
        "import choice_widget",
        "model = load_model(",
        "made = generate(",
        "plan =",
        "choice_widget(human",
    )
    notebook = desk.index.follow_link("05")
    notebook.run_cells(*(number for number, cell in enumerate(cells) if any(part in cell.source for part in needed)))
    instrument = notebook.instrument("Left")
    expect(instrument.area).to_contain_text("1 of 6. So far: left 0")
    before = instrument.pictures.evaluate_all("videos => videos[0].src")
    instrument.button("Left").click()
    expect(instrument.area).to_contain_text("2 of 6. So far: left 1")
    expect(instrument.pictures).not_to_have_attribute("src", before)
    instrument.screenshot(SCREENSHOTS / "05_pair.png")
    desk.check_kernels()
