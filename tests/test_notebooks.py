"""The form of the notebooks, without running them: nbval runs them."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

PROJECT = Path(__file__).parent.parent
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
FORBIDDEN = ("pip install", "!pip", "sys.path", "os.environ", "cuda:", "/home/", "/root/", "/tmp/")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_numbers_are_those_of_the_design():
    assert [path.stem for path in NOTEBOOKS] == [
        "00_start_here",
        "01_train",
        "02_head_hunt",
        "03_guidance_strength",
        "04_head_analysis",
        "05_benchmarks",
        "06_knowledge",
        "07_pretrained",
        "08_findings",
    ]


def test_title_says_what_why_how_and_how_long(path, notebook):
    title = notebook.cells[0]
    assert title.cell_type == "markdown"
    assert title.source.startswith(f"# {path.stem[:2]} ")
    for part in ("**What:**", "**Why:**", "**How:**", "**Run time:**"):
        assert part in title.source
    assert re.search(r"smoke: \d+ s", title.source), "the run time is a measured number"


def test_one_parameters_cell_of_annotated_literals(notebook):
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code_cells(notebook)[:1]
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, ast.AnnAssign)
        ast.literal_eval(statement.value)
    assert all("#" in line for line in tagged[0].source.splitlines()), "every parameter says what it is"


def test_cells_are_small(notebook):
    sizes = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    assert max(sizes) <= 25 and sum(sizes) <= 200 and len(sizes) <= 40


def test_no_classes_and_no_long_functions(notebook):
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source.replace("%matplotlib inline", ""))):
            assert not isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 10


def test_no_machine_facts(notebook):
    for cell in notebook.cells:
        for text in FORBIDDEN:
            assert text not in cell.source


def test_every_figure_has_a_caption_below(notebook):
    for cell, below in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code" and "record.figure(" in cell.source:
            assert below.source.startswith("**Figure "), cell.source


def test_links_resolve(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
                assert (PROJECT / "notebooks" / target).resolve().exists(), target


def test_committed_as_executed_top_to_bottom_without_errors(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(out.output_type == "error" for cell in code_cells(notebook) for out in cell.outputs)
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
