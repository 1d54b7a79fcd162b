import contextlib
import itertools
import math
import multiprocessing
import os
import re
import shutil
import sqlite3
from datetime import datetime

import pytest
import torch

from physnb.checkpoint import CONFIG, RESULT, WEIGHTS, fingerprint, load_model, save_model
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


IDENTITY = '{"guidance": {"stop": 1.0, "weak": {"1": {"heads": "L0H1"}}}, "subject": {"judge": "speed@1"}}'
OTHER = '{"guidance": {"stop": 1.0, "weak": {}}, "subject": {"judge": "speed@1"}}'


def rows_of(store, identity=IDENTITY, **scores_by_case):
    store.write((identity, "a trial", case, scores) for case, scores in scores_by_case.items())


def test_scores_survive_a_round_trip_to_the_bit_of_float32_with_nan(tmp_path):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 20).repeat(25)
    with TrialStore(tmp_path / "many.sqlite") as store:
        rows_of(store, x={str(number): value for number, value in enumerate(values.tolist())})
        assert torch.equal(torch.tensor(list(store.read(IDENTITY)["x"].values())), values)
    third = 0.333333343  # the float32 next to a third, in the digits that tell it from its neighbours
    with TrialStore(tmp_path / "new" / "trials.sqlite") as store:
        rows_of(store, x=dict(a=0.1, b=math.nan), y=dict(a=1e-300, b=third))
        rows_of(store, OTHER, x=dict(a=5.0, b=0.0))
    with TrialStore(tmp_path / "new" / "trials.sqlite") as store:
        found = store.read(IDENTITY)
        assert list(found) == ["x", "y"] and found["y"] == dict(a=1e-300, b=third)
        assert found["x"]["a"] == 0.1 and math.isnan(found["x"]["b"])
        assert store.read(OTHER) == dict(x=dict(a=5.0, b=0.0))
        assert store.read("{}") == {}


def test_row_that_is_there_stays_and_new_cases_join_it(tmp_path):
    with TrialStore(tmp_path / "t.sqlite") as store:
        rows_of(store, x=dict(a=1.0))
        rows_of(store, x=dict(a=2.0), y=dict(a=2.0))
        assert store.read(IDENTITY) == dict(x=dict(a=1.0), y=dict(a=2.0))
        assert len(store.table()) == 2


def test_table_has_one_row_a_trial_and_case_and_readable_columns(tmp_path):
    with TrialStore(tmp_path / "t.sqlite") as store:
        rows_of(store, y=dict(speed=2.0, missing=math.nan), x=dict(speed=1.0, missing=math.nan))
        store.write([(OTHER, "unguided", "x", dict(speed=0.5, missing=math.nan))])
        table = store.table()
    assert list(table.columns) == [
        *("trial", "name", "case_name", "written", "guidance.stop", "guidance.weak.1.heads", "subject.judge"),
        *("speed", "missing"),
    ]
    assert table["name"].tolist() == ["a trial", "a trial", "unguided"] and table["case_name"].tolist() == list("xyx")
    assert table["trial"].nunique() == 2 and table["speed"].tolist() == [1.0, 2.0, 0.5]
    assert table["guidance.weak.1.heads"].tolist()[:2] == ["L0H1", "L0H1"] and table.isna().loc[2].any()
    assert table["missing"].isna().all() and table["missing"].dtype == float  # not an object of None
    datetime.strptime(table["written"][0], "%Y-%m-%d %H:%M:%S")


def test_table_of_an_empty_store_is_empty(tmp_path):
    with TrialStore(tmp_path / "t.sqlite") as store:
        table = store.table()
    assert len(table) == 0 and list(table.columns) == ["trial", "name", "case_name", "written"]


def test_table_of_several_judges_has_all_their_scores(tmp_path):
    with TrialStore(tmp_path / "t.sqlite") as store:
        rows_of(store, x=dict(speed=1.0))
        rows_of(store, OTHER, x=dict(name=3.0))  # a user's score may be called like a column
        table = store.table().set_index("trial")
    assert table.loc[TrialStore.key(IDENTITY), "speed"] == 1 and math.isnan(table.loc[TrialStore.key(OTHER), "speed"])
    assert table["name"].tolist() == ["a trial"] * 2 and table.loc[TrialStore.key(OTHER), "name_score"] == 3


@pytest.mark.parametrize("full", ["no file can grow", "SQLite finds no room"])
def test_full_disk_is_named_and_what_was_written_is_kept(tmp_path, full_disk, full):
    def fill(first):
        for number in range(first, 2000):
            rows_of(store, f'{{"number": {number}}}', **{f"case {case}": dict(a=float(number)) for case in range(20)})

    with TrialStore(tmp_path / "t.sqlite") as store:
        rows_of(store, x=dict(a=1.0))
        ((pages,),) = store.connection.execute("PRAGMA page_count")
        if full == "SQLite finds no room":
            store.connection.execute(f"PRAGMA max_page_count={pages + 20}")
        limited = full_disk(100_000) if full == "no file can grow" else contextlib.nullcontext()
        with limited, pytest.raises(OSError, match=r"t\.sqlite cannot be used .* what was written before is kept"):
            fill(0)
        assert store.read(IDENTITY) == dict(x=dict(a=1.0))
        ((rows, trials),) = store.connection.execute("SELECT COUNT(*), COUNT(DISTINCT trial) FROM scores")
        assert rows == (trials - 1) * 20 + 1 > 1  # of a batch all rows or none
        store.connection.execute("PRAGMA max_page_count=100000")
        rows_of(store, y=dict(a=2.0))  # and with room again the same connection goes on
    with TrialStore(tmp_path / "t.sqlite") as store:
        assert store.read(IDENTITY) == dict(x=dict(a=1.0), y=dict(a=2.0)) and len(store.table()) == rows + 1
        assert store.connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


CASES = [f"case {case}" for case in range(100)]


def write_trials(path, writer, done):
    """Open a store and write trials without end: its own, and others that every writer writes with its own number."""
    with TrialStore(path) as store:
        for number in itertools.count():
            for identity in (f"mine {writer} {number}", f"ours {number}"):
                store.write((identity, "a trial", case, dict(a=float(writer))) for case in CASES)
            done.send(number)


def test_writers_at_once_of_which_one_is_killed_lose_nothing_and_write_nothing_twice(tmp_path):
    path, spawn = tmp_path / "trials.sqlite", multiprocessing.get_context("spawn")  # a fork inherits locks of threads
    pipes = [spawn.Pipe(duplex=False) for _ in range(2)]
    processes = [
        spawn.Process(target=write_trials, args=(path, writer, pipe[1]), daemon=True)
        for writer, pipe in enumerate(pipes)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):  # both make the file
            process.start()
            sender.close()  # so that a writer that dies ends the wait
        done = [[reader.recv() for _ in range(10)][-1] for reader, _ in pipes]
        processes[0].kill()
        processes[0].join()
        with contextlib.suppress(EOFError):
            while True:
                done[0] = pipes[0][0].recv()
        done[1] = [pipes[1][0].recv() for _ in range(10)][-1]  # the other goes on
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [-9, -9]
    with TrialStore(path) as store:
        assert store.connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for writer, last in enumerate(done):
            for number in range(last + 1):
                assert store.read(f"mine {writer} {number}") == {case: dict(a=float(writer)) for case in CASES}
                ours = store.read(f"ours {number}")
                assert sorted(ours) == sorted(CASES) and len({scores["a"] for scores in ours.values()}) == 1
        counts = store.connection.execute("SELECT COUNT(*) FROM scores GROUP BY trial").fetchall()
        assert set(counts) == {(len(CASES),)}  # no trial half written, no row twice
        assert store.connection.execute("SELECT COUNT(*) FROM trials").fetchone()[0] == len(counts)


def open_at_once(paths, barrier, said):
    """Open each of some new stores when all others do."""
    try:
        for path in paths:
            barrier.wait(60)
            TrialStore(path).close()
        said.put("opened")
    except Exception as error:
        barrier.abort()
        said.put(repr(error))


def test_a_new_store_may_be_opened_by_several_processes_at_once(tmp_path):
    spawn, count = multiprocessing.get_context("spawn"), 3
    barrier, said = spawn.Barrier(count), spawn.SimpleQueue()
    arguments = ([tmp_path / f"{turn}.sqlite" for turn in range(100)], barrier, said)
    processes = [spawn.Process(target=open_at_once, args=arguments, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    assert [said.get() for _ in processes] == ["opened"] * count
    for process in processes:
        process.join()


def test_trial_store_of_the_first_version_is_refused_and_kept(tmp_path):
    path = tmp_path / "trials.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TABLE trials (trial TEXT NOT NULL, case_name TEXT NOT NULL, value REAL, "
            "PRIMARY KEY (trial, case_name)) WITHOUT ROWID"
        )
        connection.execute("INSERT INTO trials VALUES ('{}', 'uniform/id/0', 0.5)")
        connection.execute("PRAGMA user_version=1")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"trials\.sqlite has schema version 1, not 3; choose another file"):
        TrialStore(path)
    assert path.read_bytes() == before and names(tmp_path) == ["trials.sqlite"]


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
@pytest.mark.parametrize("table", ["photos", "trials", "pairs"])  # also one that has a name of ours
def test_database_of_another_program_is_refused_and_kept(tmp_path, store, kind, table):
    path = tmp_path / "photos.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE {table} (name TEXT)")
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


def test_fingerprint_survives_a_round_trip_and_tells_models_apart(make_model, model, model_folder, tmp_path):
    same = copy_of(model_folder, tmp_path)
    assert fingerprint(load_model(same)) == fingerprint(model) != fingerprint(make_model(1))
    assert fingerprint(load_model(change_config(same, noise_shift=1.0))) != fingerprint(model)
    assert re.fullmatch("[0-9a-f]{12}", fingerprint(model))


# --- clips


FRAMES = torch.randint(0, 255, (3, 4, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_clips_come_back_to_the_pixel_and_are_written_once(tmp_path):
    with TrialStore(tmp_path / "trials.sqlite") as store:
        store.write_clips([("{}", "unguided", "uniform/0", FRAMES), ("{}", "unguided", "uniform/1", FRAMES[:1])])
        store.write_clips([("{}", "unguided", "uniform/0", 255 - FRAMES)])
        found = store.read_clips("{}", ["uniform/0", "uniform/1", "uniform/2"])
        assert set(found) == {"uniform/0", "uniform/1"} and torch.equal(found["uniform/0"], FRAMES)
        assert torch.equal(found["uniform/1"], FRAMES[:1])
        assert store.read_clips("{}", []) == {} == store.read_clips("another", ["uniform/0"])
        assert len(store.table()) == 0  # a clip that was looked at has no score


def test_damaged_clip_is_named(tmp_path):
    with TrialStore(tmp_path / "trials.sqlite") as store:
        store.write_clips([("{}", "unguided", "uniform/0", FRAMES)])
        for column, value in (("frames", b"not zlib"), ("shape", "[3, 4]")):
            with store.connection:
                store.connection.execute(f"UPDATE clips SET {column} = ?", (value,))
            with pytest.raises(ValueError, match=r"clip uniform/0 in .*trials\.sqlite is damaged"):
                store.read_clips("{}", ["uniform/0"])
