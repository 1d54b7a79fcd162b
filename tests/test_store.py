import math
import os
import re
import shutil
import sqlite3

import pytest
import torch

from physnb.checkpoint import CONFIG, RESULT, WEIGHTS, load_model, model_hash, save_model
from physnb.choices import ChoiceStore
from physnb.store import (
    TrialStore,
    prepare_folder,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    written_whole,
)


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# --- files that appear whole or not at all


def test_file_appears_when_the_block_ends_and_replaces_the_old(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with written_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_folder_appears_when_the_block_ends(tmp_path):
    with written_whole(tmp_path / "run") as temporary:
        temporary.mkdir()
        (temporary / "a.txt").write_text("a")
        assert not (tmp_path / "run").exists()
    assert names(tmp_path) == ["a.txt", "run"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_exception_leaves_nothing(tmp_path, kind):
    with pytest.raises(RuntimeError, match="stop"), written_whole(tmp_path / "a") as temporary:
        if kind == "folder":
            temporary.mkdir()
        (temporary / "b" if kind == "folder" else temporary).write_text("half")
        raise RuntimeError("stop")
    assert names(tmp_path) == []


def test_an_interrupt_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert read_json(tmp_path / "a.json") == {"old": 1} and names(tmp_path) == ["a.json"]


def test_json_without_a_name_for_nan_is_refused_and_the_old_kept(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", [math.nan])
    assert read_json(tmp_path / "a.json") == [1]


@pytest.mark.parametrize("write", ["json", "tensors"])
def test_a_write_that_fails_half_way_keeps_the_old_file(tmp_path, full_disk, write):
    path = tmp_path / "state"
    writers = dict(
        json=lambda size: write_json(path, list(range(size))),
        tensors=lambda size: write_tensors(path, {"a": torch.arange(float(size))}, {"size": str(size)}),
    )
    writers[write](10)
    before = path.read_bytes()
    # OSError is what the command line turns into its one line
    with full_disk(2000), pytest.raises(OSError, match=r"(?i)too large"):
        writers[write](100_000)
    assert path.read_bytes() == before and names(tmp_path) == ["state"]


def test_tensors_survive_a_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 2).T, "b": torch.arange(4)}  # the transpose is not contiguous
    write_tensors(tmp_path / "t", tensors, {"step": "3"})
    found, metadata = read_tensors(tmp_path / "t")
    assert metadata == {"step": "3"} and all(torch.equal(found[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("content", [None, b"", b"not tensors", b"\x10" + bytes(40)])
def test_damaged_tensor_file_is_named(tmp_path, content):
    path = tmp_path / "state.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        read_tensors(path)
    one_line(error)


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe\x00"])
def test_damaged_json_file_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        read_json(path)
    one_line(error)


# --- run folders


def test_new_folder_is_made_with_its_parents(tmp_path):
    assert prepare_folder(tmp_path / "a" / "b").is_dir() and names(tmp_path / "a" / "b") == []


def test_folder_that_holds_a_run_is_refused_unless_resuming(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state").write_text("precious")
    with pytest.raises(ValueError, match=r"run already holds a run; choose another name, or pass --resume"):
        prepare_folder(tmp_path / "run")
    assert prepare_folder(tmp_path / "run", resume=True) == tmp_path / "run"
    assert (tmp_path / "run" / "state").read_text() == "precious"


def test_folder_name_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match="run is a file; name a folder"):
        prepare_folder(tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["", "run"])
def test_read_only_place_is_refused_before_work_starts(read_only_folder, name):
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\); choose another place") as error:
        prepare_folder(read_only_folder / name)
    assert str(read_only_folder) in one_line(error) and names(read_only_folder) == []


def test_full_disk_is_refused_before_work_starts(tmp_path, full_disk):
    with full_disk(), pytest.raises(ValueError, match=r"run cannot be written \(File too large\)"):
        prepare_folder(tmp_path / "run")
    assert names(tmp_path) == []  # nothing that a second try would take for a run


# --- trial store


def test_trials_survive_a_round_trip_in_any_order_with_nan(tmp_path):
    with TrialStore(tmp_path / "new" / "trials.sqlite") as store:
        store.write("a", ["x/0", "x/1", "x/2"], [0.1, math.nan, 1e-300])
        store.write("b", ["x/0"], [5.0])
    with TrialStore(tmp_path / "new" / "trials.sqlite") as store:
        values = store.read("a", ["x/2", "x/0", "x/1"])
        assert values[:2] == [1e-300, 0.1] and math.isnan(values[2])
        assert store.read("b", ["x/0"]) == [5.0]


def test_a_trial_with_a_case_missing_is_not_done(tmp_path):
    with TrialStore(tmp_path / "t.sqlite") as store:
        store.write("a", ["x/0"], [1.0])
        assert store.read("a", ["x/0", "x/1"]) is None and store.read("c", ["x/0"]) is None


def test_writing_a_trial_again_replaces_it(tmp_path):
    with TrialStore(tmp_path / "t.sqlite") as store:
        store.write("a", ["x/0"], [1.0])
        store.write("a", ["x/0"], [2.0])
        assert store.read("a", ["x/0"]) == [2.0]


def test_a_trial_is_written_whole_or_not_at_all(tmp_path):
    with TrialStore(tmp_path / "t.sqlite") as store:
        with pytest.raises(ValueError, match="shorter"):
            store.write("a", ["x/0", "x/1"], [1.0])
        assert store.read("a", ["x/0"]) is None


def test_killed_writer_loses_the_trial_in_flight_at_most(tmp_path, start_python):
    path = tmp_path / "trials.sqlite"
    # a trial has the same value in all of its cases, so half a trial would show
    program = f"""
from physnb.store import TrialStore
store, cases, number = TrialStore({str(path)!r}), [str(i) for i in range(200)], 0
while True:
    store.write(f"trial {{number}}", cases, [float(number)] * 200)
    print(number, flush=True)
    number += 1
"""
    process = start_python("-c", program)
    done = [int(process.stdout.readline()) for _ in range(20)]
    process.kill()
    done += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    assert process.wait() == -9
    cases = [str(i) for i in range(200)]
    with TrialStore(path) as store:
        for number in done:
            assert store.read(f"trial {number}", cases) == [float(number)] * 200
        ((left,),) = store.connection.execute("SELECT COUNT(*) % 200 FROM trials")
        assert left == 0


STORES = [(TrialStore, "trial store"), (ChoiceStore, "choice store")]


@pytest.mark.parametrize("store, kind", STORES)
def test_store_of_another_schema_is_refused_and_kept(tmp_path, store, kind):
    path = tmp_path / "t.sqlite"
    with store(path) as opened:
        opened.connection.execute("PRAGMA user_version=7")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"t.sqlite has schema version 7, not \d"):
        store(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("store, kind", STORES)
def test_file_that_is_no_database_is_refused_and_kept(tmp_path, store, kind):
    path = tmp_path / "notes.txt"
    path.write_text("my notes " * 200)
    with pytest.raises(ValueError, match=rf"notes.txt is not a {kind} .*; choose another file"):
        store(path)
    assert path.read_text() == "my notes " * 200


@pytest.mark.parametrize("store, kind", STORES)
def test_database_of_another_program_is_refused_and_kept(tmp_path, store, kind):
    path = tmp_path / "photos.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE photos (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"photos.sqlite is the database of another program"):
        store(path)
    assert path.read_bytes() == before


# --- model folders


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_model_survives_a_round_trip(make_model, inputs, tmp_path):
    model = make_model(3)
    folder = save_model(model, tmp_path / "model", {"position_error": 0.5})
    assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, RESULT, WEIGHTS])
    assert read_json(folder / RESULT) == {"position_error": 0.5}
    loaded = load_model(folder)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)
    assert not loaded.training and loaded.config.noise_shift == model.config.noise_shift


def test_existing_model_folder_is_refused_and_kept(model, model_folder):
    before = (model_folder / WEIGHTS).stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"model exists; choose another name or delete it"):
        save_model(model, model_folder)
    assert (model_folder / WEIGHTS).stat().st_mtime_ns == before


def test_model_folder_is_written_whole_or_not_at_all(model, tmp_path):
    with pytest.raises(ValueError):
        save_model(model, tmp_path / "model", {"error": math.nan})
    assert names(tmp_path) == []


def test_model_that_does_not_fit_on_the_disk_leaves_nothing(model, tmp_path, full_disk):
    with full_disk(20_000), pytest.raises(OSError, match=r"(?i)too large"):
        save_model(model, tmp_path / "model")
    assert names(tmp_path) == []


def test_missing_model_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model folder .*nowhere does not exist; train one with"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_missing_file_is_named(model_folder, tmp_path, missing):
    folder = copy_of(model_folder, tmp_path)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"copy/{missing} does not exist"):
        load_model(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_named(model_folder, tmp_path, share):
    folder = copy_of(model_folder, tmp_path)
    os.truncate(folder / WEIGHTS, int(share * (folder / WEIGHTS).stat().st_size))
    with pytest.raises(ValueError, match=rf"copy/{WEIGHTS} is damaged or not a safetensors file") as error:
        load_model(folder)
    one_line(error)


def change_config(folder, **changes):
    write_json(folder / CONFIG, read_json(folder / CONFIG) | changes)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(_class_name="UNet2DModel"), "describes a UNet2DModel, not a VideoDiT"),
        (dict(_class_name=None), "describes a None, not a VideoDiT"),
        (dict(width=48), rf"{WEIGHTS} does not fit its config, for example at "),
        (dict(depth=3), rf"{WEIGHTS} does not fit its config"),
        (dict(depth=1), rf"{WEIGHTS} does not fit its config"),
        (dict(vocabulary=["disc"]), rf"{WEIGHTS} does not fit its config, for example at words.weight"),
        (dict(heads=5), rf"{CONFIG} is not a usable VideoDiT config: width 32 must split into 5 heads"),
        (dict(frames="eight"), rf"{CONFIG} is not a usable VideoDiT config"),
        (dict(patch=[2, 8]), rf"{CONFIG} is not a usable VideoDiT config"),
        (dict(patch=[0, 8, 8]), rf"{CONFIG} is not a usable VideoDiT config"),
    ],
)
def test_config_that_does_not_fit_is_named(model_folder, tmp_path, changes, message):
    folder = change_config(copy_of(model_folder, tmp_path), **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert "copy" in one_line(error)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_foreign_config_file_is_named(model_folder, tmp_path, content):
    folder = copy_of(model_folder, tmp_path)
    (folder / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=f"copy/{CONFIG}") as error:
        load_model(folder)
    one_line(error)


def test_hash_tells_models_apart(make_model, model_folder, tmp_path):
    other = save_model(make_model(1), tmp_path / "other")
    same = copy_of(model_folder, tmp_path)
    assert model_hash(same) == model_hash(model_folder) != model_hash(other)
    assert model_hash(change_config(same, noise_shift=1.0)) != model_hash(model_folder)
    assert re.fullmatch("[0-9a-f]{12}", model_hash(other))
