"""The import directions of the package: what each module may import, and nothing else.

A new line here is a decision: the arrows keep hooks, metrics and plots usable by themselves.
"""

import ast
from pathlib import Path

import pytest

import physnb

PACKAGE = Path(physnb.__file__).parent

ALLOWED = {  # data and metrics are one module each; `__init__` is what `import physnb` gives
    "__init__": "config",
    "config": "",
    "statistics": "config",
    "store": "config",
    "flow": "config",
    "attention": "config",
    "families": "attention config",
    "hooks": "attention config families",
    "replay": "families",
    "guider": "config families hooks replay",
    "guide": "config families guider hooks replay",
    "probe": "attention config families hooks",
    "tiny": "config model",
    "tiny_pipelines": "config tiny",
    "pretrained": "checkpoint config data families guide guider hooks hub store tiny tiny_pipelines",
    "hub": "config",
    "plots": "config store",
    "data": "config store",
    "linear": "",
    "model": "config linear",
    "metrics": "config data statistics store",
    "choices": "config data store",
    "memory": "",
    "checkpoint": "config memory model store",
    "guidance": "config flow hooks model",
    "generate": "captioning config data flow guidance model space",
    "likelihood": "config data flow generate guidance hooks metrics model",
    "ladder": "config data metrics statistics",
    "evaluate": "config data generate likelihood metrics model space statistics store",
    "text": "checkpoint config hub store tiny_pipelines",
    "captioning": "config data model text",
    "codec": "checkpoint config data hub memory metrics store tiny_pipelines",
    "space": "codec config data model",
    "sharding": "",
    "ahead": "",
    "optimizer": "sharding",
    "grow": "config model",
    "train": "ahead captioning checkpoint codec config data flow grow memory model optimizer sharding space store",
    "objectives": "config data likelihood metrics model",
    "subjects": "checkpoint config data families generate guidance guide memory metrics model objectives pretrained "
    "space",
    "trials": "config objectives store subjects",
    "executors": "config memory subjects trials",
    "ranking": "config objectives statistics trials",
    "race": "config ranking trials",
    "search": "config race ranking statistics store trials",
    "confirm": "config ranking statistics trials",
    "strength": "config confirm metrics ranking statistics subjects trials",
    "profiles": "config flow ranking statistics subjects trials",
    "contributions": "config ranking statistics trials",
    "transfer": "config confirm model profiles ranking search statistics store subjects trials",
    "analysis": "config data families flow generate hooks model statistics",
    "pictures": "config data plots",
    "attention_pictures": "analysis config data",
    "widgets": "analysis attention_pictures choices config confirm data metrics pictures plots profiles ranking "
    "strength trials",
    "results": "plots store",
    "tables": "",
    "runs": "config results store tables",
    "sweeps": "config runs store",
    "knowledge": "config data evaluate generate likelihood metrics model statistics",
    "scaling": "bench config data model",
    "bench": "config data linear memory model train",
    "bench_data": "bench config data memory train",
    "bench_heads": "bench config flow guidance hooks memory model",
    "bench_hunt": "bench config flow generate hooks memory model race ranking subjects trials",
    "standings": "bench config data ladder metrics",
    "study": "analysis captioning checkpoint config confirm contributions data metrics model objectives profiles "
    "ranking search statistics store strength subjects transfer trials",
    "commands": "bench bench_data bench_heads bench_hunt checkpoint codec config confirm data evaluate executors "
    "generate metrics plots pretrained ranking runs scaling search space standings store study subjects sweeps "
    "text train trials",
    "__main__": "commands config tables",
}
ONLY_IN = {"matplotlib": {"plots", "widgets"}, "ipywidgets": {"widgets"}, "papermill": {"runs"}}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Dotted names of everything a file imports, anywhere in it, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            # `from physnb import hooks` names the module in the alias
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Dotted names that each module of the package imports."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        found.setdefault(module_of(path), set()).update(imported_names(path))
    return found


def test_modules_import_exactly_what_the_table_says(imports):
    actual = {}
    for module, names in imports.items():
        inside = {name.split(".")[1] for name in names if name.startswith("physnb.")} - {module}
        actual[module] = " ".join(sorted(inside))
    assert actual == ALLOWED


def test_the_table_has_no_circle():
    remaining = {module: set(row.split()) for module, row in ALLOWED.items()}
    while remaining:
        free = {module for module, needs in remaining.items() if not needs & remaining.keys()}
        assert free, f"these modules import each other in a circle: {sorted(remaining)}"
        remaining = {module: needs for module, needs in remaining.items() if module not in free}


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_stay_where_they_belong(imports, library):
    users = {m for m, names in imports.items() if any(name.split(".")[0] == library for name in names)}
    assert users == ONLY_IN[library]


def test_nothing_imports_tests_or_notebooks(imports):
    for module, names in imports.items():
        assert not {name.split(".")[0] for name in names} & {"tests", "notebooks", "conftest"}, module
