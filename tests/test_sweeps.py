import nbformat
import pytest

from physnb.runs import NotebookFailed
from physnb.store import read_json
from physnb.sweeps import read_sweep, run_sweep


@pytest.fixture
def notebook(tmp_path):
    """A notebook that records `speed` times two as its final table, and fails where a file says so."""
    cells = [
        "from pathlib import Path\nfrom physnb.results import Recorder",
        "assert speed != 9.0 or Path(gate).exists(), 'too fast'",
        "Recorder(run_dir, 'small').table('final', [dict(method='unguided', speed_x2=2 * speed, kind=kind)], '')",
    ]
    source = f"run_dir: str = ''\nspeed: float = 1.0\nkind: str = 'a'\ngate: str = {str(tmp_path / 'gate')!r}"
    first = nbformat.v4.new_code_cell(source, metadata=dict(tags=["parameters"]))
    book = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    book.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
    nbformat.write(book, tmp_path / "small.ipynb")
    return str(tmp_path / "small.ipynb")


def sweep_file(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    return tmp_path / "sweep.yaml"


def test_settings_are_all_combinations_and_then_the_points(tmp_path):
    text = "parameters: {kind: [a, b], speed: [1, 2.5]}\npoints: [{kind: c}]"
    assert read_sweep(sweep_file(tmp_path, text)) == [
        dict(kind="a", speed=1),
        dict(kind="a", speed=2.5),
        dict(kind="b", speed=1),
        dict(kind="b", speed=2.5),
        dict(kind="c"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters: [", "is not valid YAML"),
        ("", "must have `parameters`"),
        ("settings: {a: [1]}", "must have `parameters`"),
        ("parameters: {a: 1}", "must be a list with a value"),
        ("parameters: {a: []}", "must be a list with a value"),
        ("points: [3]", "must be a list of settings"),
        ("points: []", "lists no setting"),
        ("points: [{a: 1}, {a: 1}]", "twice"),
    ],
)
def test_bad_sweep_files_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_sweep(sweep_file(tmp_path, text))


def test_sweep_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.yaml does not exist"):
        read_sweep(tmp_path / "nowhere.yaml")


def test_sweep_stops_at_a_failure_and_goes_on_there(tmp_path, notebook):
    sweep = sweep_file(tmp_path, "parameters: {speed: [1.0, 9.0]}")
    out = tmp_path / "out"
    with pytest.raises(NotebookFailed, match="too fast"):
        run_sweep([notebook], sweep, out, parameters=dict(kind="b"))
    first = dict(setting="001", speed=1.0, method="unguided", speed_x2=2.0, kind="b")
    assert read_json(out / "sweep.json") == [first]
    (tmp_path / "gate").touch()
    before = (out / "001" / "small.ipynb").stat().st_mtime_ns
    result = run_sweep([notebook], sweep, out, parameters=dict(kind="b"), resume=True)
    assert result["settings"] == 2 and result["table"] == read_json(out / "sweep.json")
    assert [row["setting"] for row in result["table"]] == ["001", "002-2"]  # what is left of 002 stays
    assert result["table"][1]["speed_x2"] == 18.0
    assert (out / "001" / "small.ipynb").stat().st_mtime_ns == before and (out / "002" / "small.ipynb").exists()
    with pytest.raises(ValueError, match="holds another sweep"):
        run_sweep([notebook], sweep, out, parameters=dict(kind="c"), resume=True)


def test_sweep_over_a_parameter_that_no_notebook_has_writes_nothing(tmp_path, notebook):
    sweep = sweep_file(tmp_path, "parameters: {spede: [1.0]}")
    with pytest.raises(ValueError, match="no notebook of this run has a parameter 'spede'"):
        run_sweep([notebook], sweep, tmp_path / "out")
    assert not (tmp_path / "out").exists()
