"""A real JupyterLab in a real browser: starting and ending both, and what a person does in a notebook."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psutil
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

INDEX = "notebooks/00_start_here.ipynb"
CHROMIUM_FLAGS = [
    "--no-sandbox",  # containers, and root, have none
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PICTURES = "img, video"
# Contents, not addresses: a widget gets a new blob address even where its bytes stay the same.
# An address may be revoked between reading and fetching it; then there is nothing to compare yet.
READ_PICTURES = """async pictures => {
  const digests = [];
  try {
    for (const picture of pictures) {
      const bytes = await (await fetch(picture.currentSrc || picture.src)).arrayBuffer();
      digests.push([...new Uint8Array(await crypto.subtle.digest("SHA-256", bytes))].join());
    }
  } catch { return null; }
  return digests.join(";");
}"""


@contextmanager
def start_lab(project: Path, scratch: Path) -> Iterator[str]:
    """The address at which `make lab` opens a browser, served from `project` until the block ends, kernels included.

    scratch: an empty folder for settings, logs and the kernels' temporary files. The port is a free one, nobody needs
    a token, and nothing asks for news. Raises RuntimeError with the end of the server's log if it does not come up.
    """
    folders = {
        name: scratch / name.lower()
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "TMPDIR")
    }
    for folder in folders.values():
        folder.mkdir(parents=True)
    page_config = folders["JUPYTER_CONFIG_DIR"] / "labconfig" / "page_config.json"
    page_config.parent.mkdir()
    page_config.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    # A researcher's kernel uses all cores; the tests' own thread count is not theirs.
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [str(Path(sys.executable).parent / "jupyter"), "lab", "--ServerApp.root_dir=.", INDEX]
    options = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.port=0",
        "--ServerApp.ip=127.0.0.1",
        "--IdentityProvider.token=",
        "--LabApp.news_url=None",
    ]
    log = scratch / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, *options],
            cwd=project,
            env=inherited | {name: str(folder) for name, folder in folders.items()},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _wait_for_page(server, folders["JUPYTER_RUNTIME_DIR"], log)
    finally:
        _end(server)


def _wait_for_page(server: subprocess.Popen, runtime: Path, log: Path, *, seconds: float = 60.0) -> str:
    """The address of the file that JupyterLab writes for a browser when it is up, and that leads to INDEX."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        for page in runtime.glob("jpserver-file-to-run-*-open.html"):
            if "</html>" in page.read_text():
                return page.as_uri()
        time.sleep(0.05)
    raise RuntimeError(f"JupyterLab did not come up:\n{log.read_text()[-2000:]}")


def _end(server: subprocess.Popen) -> None:
    """End the server and its kernels, which are sessions of their own: asked first, killed after 10 seconds."""
    if server.poll() is not None:
        return
    family = psutil.Process(server.pid).children(recursive=True)
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    for process in psutil.wait_procs(family, timeout=1)[1]:
        process.kill()


@contextmanager
def start_browser() -> Iterator[Browser]:
    """Headless Chromium of the system until the block ends; RuntimeError if there is none."""
    program = shutil.which("chromium")
    if program is None:
        raise RuntimeError("no chromium on PATH; tests/chromium.sh installs Debian's")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def unpack_message(frame: bytes) -> tuple[dict, dict, dict]:
    """Header, parent header and content of a message from a kernel.

    https://jupyter-server.readthedocs.io/en/latest/developers/websocket-protocols.html, v1
    """
    (count,) = struct.unpack_from("<Q", frame)
    starts = struct.unpack_from(f"<{count}Q", frame, 8)
    header, parent, _, content = (json.loads(frame[starts[i] : starts[i + 1]]) for i in range(1, 5))
    return header, parent, content


class KernelMessages:
    """What the kernels tell a page: faults, and the seconds that each message from a widget kept a kernel busy."""

    def __init__(self, page: Page):
        self.faults: list[str] = []
        self.widget_seconds: list[float] = []
        self._busy_since: dict[str, datetime] = {}
        page.on("websocket", lambda socket: socket.on("framereceived", self._hear))

    def _hear(self, frame: str | bytes) -> None:
        try:
            if isinstance(frame, bytes):  # text is of the lab itself
                self._read(*unpack_message(frame))
        except Exception as error:  # whoever calls a listener keeps its exceptions to itself
            self.faults.append(f"{error!r} in {frame[:300]!r}")

    def _read(self, header: dict, parent: dict, content: dict) -> None:
        kind = header["msg_type"]
        if kind == "error" or content.get("status") == "error":
            self.faults.append(f"{content.get('ename')}: {content.get('evalue')}")
        elif kind == "stream" and (content["name"] == "stderr" or "Traceback" in content["text"]):
            # A lab greets each kernel's widgets before any cell has imported ipywidgets, and the kernel grumbles.
            if not content["text"].startswith("No such comm"):
                self.faults.append(content["text"])
        elif kind == "status" and parent.get("msg_type") == "comm_msg":
            at = datetime.fromisoformat(header["date"])
            if content["execution_state"] == "busy":
                self._busy_since[parent["msg_id"]] = at
            elif parent["msg_id"] in self._busy_since:
                self.widget_seconds.append((at - self._busy_since.pop(parent["msg_id"])).total_seconds())


class Notebook:
    """The notebook in front, and what a person does in it."""

    def __init__(self, page: Page, name: str, opens: Callable[[], None]):
        """The notebook whose name begins with `name` and which `opens()` opens, once its kernel is there.

        Cells that are run before the kernel is there are not run at all, without a word; and the notebook calls
        itself idle before it has asked for a kernel.
        """
        self.page, self.name = page, name
        with page.expect_websocket(lambda socket: "/api/kernels/" in socket.url):
            opens()
        self.panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        expect(page.get_by_role("tab", name=re.compile(f"^{name}"), selected=True)).to_be_visible()
        expect(self.panel.get_by_role("heading", level=1)).to_contain_text(name)
        expect(self.panel.locator(".jp-Notebook-ExecutionIndicator")).to_have_attribute("data-status", "idle")

    def follow_link(self, number: str) -> Notebook:
        """The notebook that the link `number` opens in a new tab."""
        self.page.get_by_role("tab", name=re.compile(f"^{self.name}")).click()
        link = self.panel.get_by_role("link", name=number, exact=True).first
        return Notebook(self.page, number, link.click)

    def run_all(self) -> None:
        """Choose Run All Cells of the menu Run; returns at once."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()

    def run_cells(self, *numbers: int, seconds: float = 120.0) -> None:
        """Run some cells by keyboard and wait for each; numbers count all cells of the notebook from 0.

        Stored outputs are cleared before, and with them the prompts: a quick cell's new prompt may equal the old one.
        """
        self.page.get_by_role("menuitem", name="Edit", exact=True).click()
        self.page.get_by_role("menuitem", name="Clear Outputs of All Cells", exact=True).click()
        for number in numbers:
            cell = self.panel.locator(".jp-Cell").nth(number)
            expect(cell.locator(".jp-InputPrompt")).to_have_text("[ ]:")
            cell.locator(".cm-content").click()
            self.page.keyboard.press("Control+Enter")
            expect(cell.locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]:"), timeout=1000 * seconds)

    def wait_until_idle(self, *, seconds: float = 180.0) -> None:
        """Return when no cell runs or waits any more."""
        expect(self.panel.locator(".jp-InputPrompt", has_text="[*]")).to_have_count(0, timeout=1000 * seconds)

    def instrument(self, button: str) -> Instrument:
        """The output of the cell that shows the button named `button`."""
        within = self.page.get_by_role("button", name=button, exact=True)
        return Instrument(self.page, self.panel.locator(".jp-Cell-outputArea").filter(has=within))


class Instrument:
    """Controls, with the sentences and the pictures that follow them."""

    def __init__(self, page: Page, area: Locator):
        self.page, self.area = page, area
        self.sentences = area.locator(".physnb-sentence")
        self.pictures = area.locator(PICTURES)

    def button(self, name: str) -> Locator:
        return self.area.get_by_role("button", name=name, exact=True)

    def slider(self, label: str) -> Locator:
        """The handle of the slider whose description begins with `label`."""
        row = self.area.locator(".widget-inline-hbox").filter(has=self.page.get_by_text(re.compile(f"^{label}")))
        return row.get_by_role("slider")

    def step(self, slider: Locator) -> None:
        """Move a slider by one, by keyboard: to the right, or to the left where it is at its end."""
        now, end = (float(slider.get_attribute(f"aria-value{which}")) for which in ("now", "max"))
        slider.press("ArrowLeft" if now == end else "ArrowRight")

    def words(self) -> str:
        """The sentences, one a line."""
        return "\n".join(self.sentences.all_inner_texts())

    def seconds_to_change(self, act: Callable[[], None], *, limit: float = 10.0) -> float:
        """Act, and return the seconds until both the sentences and the pictures are others than before."""
        words, contents = self.words(), self.pictures.evaluate_all(READ_PICTURES)
        began = time.perf_counter()
        act()
        while self.words() == words or self.pictures.evaluate_all(READ_PICTURES) in (contents, None):
            assert time.perf_counter() - began < limit, f"sentences or pictures stay the same at: {self.words()}"
            self.page.wait_for_timeout(10)
        return time.perf_counter() - began

    def screenshot(self, path: Path) -> None:
        """What the window shows with the instrument at its top."""
        self.area.evaluate("area => area.scrollIntoView({block: 'start'})")
        self.page.screenshot(path=path)
