import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest

from physnb.__main__ import main
from physnb.checkpoint import CONFIG, WEIGHTS, save_model
from physnb.families import heads_of
from physnb.store import TrialStore, read_json, write_json
from physnb.subjects import ModelSubject

COMMANDS = (
    "run",
    "train",
    "generate",
    "eval",
    "heads",
    "hunt",
    "study",
    "scaling",
    "codec",
    "export",
    "bench",
    "report",
)
HUNT = "hunt --preset smoke --split id --selection-cases 1 --confirmation-cases 1".split()


@pytest.fixture(scope="module")
def weaker_folder(make_model, tmp_path_factory):
    return save_model(make_model(1), tmp_path_factory.mktemp("other") / "weaker")


@pytest.fixture(scope="module")
def hunt_arguments(model_folder, weaker_folder):
    """A hunt in small batches, all but --out."""
    return [*HUNT, "--model", str(model_folder), "--weaker", str(weaker_folder), "--batch-size", "9"]


@pytest.fixture(scope="module")
def finished_hunt(hunt_arguments, tmp_path_factory):
    """The folder of an undisturbed hunt; shared, so whoever changes it copies it."""
    folder = tmp_path_factory.mktemp("hunts") / "whole"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*hunt_arguments, "--out", str(folder), "--json"]) == 0
    return folder


@pytest.fixture(autouse=True)
def inside_tmp(tmp_path, monkeypatch):
    """Every test works in its own empty folder, so that whatever is written by mistake is seen."""
    monkeypatch.chdir(tmp_path)


def everything(folder):
    """Name, size and time of all that lies below a folder."""
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*"))


def fails(capsys, folder, arguments, *named):
    """Assert that a command ends with status 1 and one line that names the things, and writes nothing into `folder`."""
    before = everything(folder)
    for flags in ([], ["--json"]):
        status = main([*map(str, arguments), *flags])
        out, err = capsys.readouterr()
        assert status == 1, (arguments, out)
        assert err.startswith("physnb: ") and err.count("\n") == 1, err
        for text in named:
            assert text in err, err
        if flags:
            assert json.loads(out) == {"error": err.removeprefix("physnb: ").rstrip("\n")}
        else:
            assert out == ""
    assert everything(folder) == before


def succeeds(capsys, *arguments):
    """The JSON object that a command prints; nothing else is on standard output."""
    status = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def evaluation(model, *more):
    return ["eval", "trajectory", "--model", model, "--scenario", "uniform", "--cases", "2", *more]


def stored_rows(folder):
    with TrialStore(folder / "trials.sqlite") as store:
        return store.table()


# --- help


def test_process_helps_and_fails_with_one_line():
    help_text = subprocess.run([sys.executable, "-m", "physnb", "--help"], capture_output=True, text=True)
    assert help_text.returncode == 0 and help_text.stderr == ""
    assert all(name in help_text.stdout for name in COMMANDS)
    bad = subprocess.run([sys.executable, "-m", "physnb", "train", "--out"], capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stdout == "" and bad.stderr.count("\n") == 1


EVALS = [f"eval {metric}" for metric in ("trajectory", "plausibility", "frechet", "physics-iq")]


@pytest.mark.parametrize("command", [*COMMANDS, *EVALS])
def test_every_command_has_help_and_json(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert command == "eval" or "--json" in capsys.readouterr().out


# --- bad input, before any work


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", ["COMMAND", "--help"]),
        ("fly", ["'fly'", "train"]),
        ("train", ["--out"]),
        ("train --out new --colour red", ["--colour"]),
        ("train --preset tiny --out new", ["--preset", "'tiny'", "smoke"]),
        ("hunt --preset tiny --out new", ["--preset", "'tiny'", "smoke"]),
        ("run --preset tiny", ["--preset", "'tiny'", "smoke"]),
        ("eval trajectory --scenario pendulums", ["--scenario", "'pendulums'", "uniform", "collision"]),
        ("generate --scenario pendulums --out a.mp4", ["--scenario", "'pendulums'", "parabola"]),
        ("eval trajectory --scenario uniform --split test", ["--split", "'test'", "ood"]),
        ("eval trajectory --scenario uniform --solver ddim", ["--solver", "'ddim'", "euler"]),
        ("eval trajectory --scenario uniform --cases -3", ["--cases", "'-3'", "positive"]),
        ("eval trajectory --scenario uniform --cases 2.5", ["--cases", "'2.5'", "positive"]),
        ("eval trajectory --scenario uniform --steps 0", ["--steps", "'0'", "positive"]),
        ("eval trajectory --scenario uniform --frames-given -1", ["--frames-given", "'-1'", "from 0 on"]),
        ("eval trajectory --scenario uniform --seed -1", ["--seed", "'-1'", "from 0 on"]),
        ("train --out new --steps -5", ["--steps", "'-5'", "positive"]),
        ("train --out new --batch 0", ["--batch", "'0'", "positive"]),
        ("train --out new --save-every 0", ["--save-every", "'0'", "positive"]),
        ("train --out new --learning-rate -1", ["learning_rate", "positive", "-1"]),
        ("train --out new --learning-rate nan", ["learning_rate", "positive", "nan"]),
        ("hunt --out new --top-k -1", ["--top-k", "'-1'", "positive"]),
        ("hunt --out new --selection-cases -1", ["--selection-cases", "'-1'", "positive"]),
        ("hunt --out new --rounds 0", ["--rounds", "'0'", "positive"]),
        ("hunt --out new --search guess", ["--search", "'guess'", "exhaustive", "race"]),
        ("hunt --out new --confidence 1.5", ["confidence", "(0, 1)", "1.5"]),
        ("hunt --out new --kind magic", ["--kind", "'magic'", "identity"]),
        ("hunt --out new --axis depth", ["--axis", "'depth'", "space"]),
        ("hunt --out new --executor fly", ["--executor", "'fly'", "local", "ray"]),
        ("bench sim --rounds 0", ["--rounds", "'0'", "positive"]),
        ("bench fly", ["'fly'", "sim", "train"]),
        ("eval trajectory --scenario uniform --model nowhere", ["nowhere", "does not exist", "physnb train"]),
        ("heads nowhere", ["nowhere", "does not exist"]),
        ("hunt --out new --model nowhere", ["nowhere", "does not exist"]),
        ("generate --scenario uniform --out clip.gif", ["clip.gif", ".mp4"]),
        ("run 77", ["'77'", "01_train"]),
        ("run 00 -p preset", ["'preset'", "name=value"]),
        ("run 00 --out new -p no_such_parameter=1", ["'no_such_parameter'", "run_dir"]),
        ("report nowhere", ["nowhere", "does not exist"]),
    ],
)
def test_bad_argument_is_named_in_one_line(capsys, tmp_path, arguments, named):
    fails(capsys, tmp_path, arguments.split(), *named)


@pytest.mark.parametrize(
    ("heads", "named"),
    [("L99H0", ["L99H0", "layers 0 to 1", "heads 0 to 3"]), ("3.7", ["'3.7'", "L3H7"]), ("L0H0,L1H4", ["L1H4"])],
)
def test_unknown_head_is_named_and_nothing_written(capsys, tmp_path, model_folder, heads, named):
    fails(capsys, tmp_path, evaluation(model_folder, "--heads", heads), *named)
    clip = ["generate", "--model", model_folder, "--scenario", "uniform", "--out", "a.mp4", "--heads", heads]
    fails(capsys, tmp_path, clip, *named)
    fails(capsys, tmp_path, [*HUNT, "--model", model_folder, "--out", "new", "--heads", heads], *named)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--strength", "2"], ["strength", "[0, 1]", "2"]),
        (["--strength", "nan"], ["strength", "nan"]),
        (["--weight", "nan"], ["weight", "nan"]),
    ],
)
def test_bad_guidance_is_named_and_nothing_written(capsys, tmp_path, model_folder, more, named):
    fails(capsys, tmp_path, evaluation(model_folder, "--heads", "L0H0", *more), *named)
    fails(capsys, tmp_path, [*HUNT, "--model", model_folder, "--out", "new", *more], *named)


def test_weaker_models_of_one_name_are_refused(capsys, tmp_path, hunt_arguments, weaker_folder):
    fails(capsys, tmp_path, [*hunt_arguments, "--weaker", f"{weaker_folder}/", "--out", "new"], "one name", "rename")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--objective", "beauty"], ["objective", "'beauty'", "tracking_error", "reward"]),
        (["--objective", "no_such_module:score"], ["no_such_module:score", "cannot be imported", "module:function"]),
        (["--objective", "math:no_such_score"], ["math:no_such_score", "cannot be imported"]),
        (["--objective", "math:pi"], ["math:pi", "no function"]),
        (["--top-k", "3", "--rounds", "3"], ["top", "9", "8"]),
        (["--kind", "zero", "--axis", "time"], ["'zero'", "no axis"]),
        (["--frames-given", "6"], ["--frames-given"]),
        (["--weaker", "nowhere"], ["nowhere", "does not exist"]),
    ],
)
def test_bad_hunt_is_named_and_nothing_written(capsys, tmp_path, model_folder, more, named):
    fails(capsys, tmp_path, [*HUNT, "--model", model_folder, "--out", "new", *more], *named)


def test_text_weight_that_is_no_number_is_named(capsys, tmp_path, model_folder):
    fails(capsys, tmp_path, evaluation(model_folder, "--text-weight", "nan"), "weight", "nan")


def test_more_top_heads_than_there_are_is_named_before_the_hunt(capsys, tmp_path, model_folder):
    fails(capsys, tmp_path, [*HUNT, "--model", model_folder, "--out", "new", "--top-k", "99"], "top", "99", "8")


@pytest.mark.parametrize("frames_given", ["0", "6", "99"])
def test_start_frames_that_leave_nothing_to_judge_are_named(capsys, tmp_path, model_folder, frames_given):
    fails(capsys, tmp_path, evaluation(model_folder, "--frames-given", frames_given), "frames given", frames_given)


# --- bad files and folders


def test_truncated_checkpoint_is_named(capsys, tmp_path, model_folder):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    os.truncate(copy / WEIGHTS, 5000)
    fails(capsys, tmp_path, evaluation(copy), f"copy/{WEIGHTS}", "damaged", "another checkpoint")
    fails(capsys, tmp_path, [*HUNT, "--model", copy, "--out", "new"], f"copy/{WEIGHTS}")


def test_foreign_checkpoint_is_named(capsys, tmp_path, model_folder):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    write_json(copy / CONFIG, {"_class_name": "AutoencoderKL", "in_channels": 3})
    fails(capsys, tmp_path, ["heads", copy], f"copy/{CONFIG}", "AutoencoderKL", "another checkpoint")
    (tmp_path / "empty").mkdir()
    fails(capsys, tmp_path, ["heads", tmp_path / "empty"], f"empty/{CONFIG}", "does not exist")


def training(out, *more):
    return ["train", "--preset", "smoke", "--steps", "2", "--cases", "1", "--out", out, *more]


def test_existing_run_folder_is_refused_and_kept(capsys, tmp_path, model_folder):
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.txt").write_text("a year of work")
    for command in (training(run), [*HUNT, "--model", model_folder, "--out", run], ["run", "00", "--out", run]):
        fails(capsys, tmp_path, command, str(run), "already holds a run", "choose another name")


def test_finished_training_is_not_trained_over(capsys, tmp_path):
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    fails(capsys, tmp_path, training(tmp_path / "run", "--resume"), str(model), "already trained", "--out")


def test_output_that_is_a_file_is_refused(capsys, tmp_path, model_folder):
    (tmp_path / "file").write_text("a file")
    for command in (training("file"), [*HUNT, "--model", model_folder, "--out", "file"]):
        fails(capsys, tmp_path, command, "file is a file", "name a folder")


def test_read_only_output_folder_is_named(capsys, read_only_folder, monkeypatch):
    monkeypatch.chdir("/")
    for out in (read_only_folder, read_only_folder / "run"):
        fails(capsys, read_only_folder, training(out), str(out), "Permission denied", "choose another place")
        fails(capsys, read_only_folder, ["run", "00", "--out", out], str(out), "Permission denied")


def test_video_in_a_place_that_cannot_hold_it_is_named(capsys, tmp_path, full_disk, model_folder):
    clip = ["generate", "--model", model_folder, "--scenario", "uniform", "--cases", "1", "--out"]
    fails(capsys, tmp_path, [*clip, "no/folder/a.mp4"], "no/folder", "does not exist")
    with full_disk(1000):
        fails(capsys, tmp_path, [*clip, "a.mp4"], "a.mp4")


def test_video_that_fails_leaves_the_old_one(capsys, tmp_path, full_disk, model_folder):
    (tmp_path / "a.mp4").write_bytes(b"the old video")
    clip = ["generate", "--model", model_folder, "--scenario", "uniform", "--cases", "1", "--out", "a.mp4"]
    with full_disk(1000):
        fails(capsys, tmp_path, clip, "a.mp4")


def test_video_in_a_read_only_folder_is_named(capsys, model, monkeypatch, read_only_folder):
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to the user that we are now
        folder = save_model(model, Path(place) / "model")
        clip = ["generate", "--model", folder, "--scenario", "uniform", "--cases", "1"]
        fails(capsys, read_only_folder, [*clip, "--out", read_only_folder / "a.mp4"], str(read_only_folder))


def test_full_disk_is_named_before_work_starts(capsys, tmp_path, full_disk, model_folder):
    for command in (training("run"), [*HUNT, "--model", model_folder, "--out", "run"]):
        with full_disk():
            fails(capsys, tmp_path, command, "run cannot be written", "choose another place")


def test_disk_that_fills_up_during_training_ends_with_one_line(capsys, tmp_path, full_disk):
    with full_disk(100_000):  # room for settings and log, but not for weights
        status = main([*training("run"), "--json"])
    out, err = capsys.readouterr()
    assert status == 1 and err.count("\n") == 1 and "too large" in err.lower() and "error" in json.loads(out)
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".part" or p.name == "model"]


def test_disk_that_fills_up_during_a_hunt_ends_with_one_line(
    capsys, tmp_path, full_disk, hunt_arguments, finished_hunt
):
    with full_disk(80_000):
        status = main([*hunt_arguments, "--out", "run", "--json"])
    out, err = capsys.readouterr()
    assert status == 1 and err.count("\n") == 1 and "trials.sqlite" in err and "error" in json.loads(out)
    # what was written is still good: with room again, the hunt goes on to the same numbers
    assert 0 < len(stored_rows(tmp_path / "run")) < len(stored_rows(finished_hunt))
    result = succeeds(capsys, *hunt_arguments, "--out", "run", "--resume")
    assert result == read_json(finished_hunt / "hunt.json")


# --- good input


@pytest.mark.parametrize("split", ["id", "ood"])
def test_eval_trajectory_prints_the_agreed_object(capsys, model_folder, split):
    asked = dict(scenario="collision", split=split, cases=5, frames_given=3, seed=7)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    result = succeeds(capsys, "eval", "trajectory", "--model", model_folder, *options, "--steps", "2")
    assert {name: result[name] for name in asked} == asked
    for metric in ("velocity_error", "position_error", "missing_rate"):
        found = result[metric]
        assert {"mean", "low", "high", "floor"} <= set(found)
        assert found["low"] <= found["mean"] <= found["high"] and 0 <= found["floor"] <= found["mean"]
        assert 0 < found["judged"] <= 5
    assert result["position_error"]["floor"] < 0.1 < result["position_error"]["mean"]  # a random model is far off
    assert result["judged"] == min(result[m]["judged"] for m in ("velocity_error", "position_error", "missing_rate"))
    assert ("buckets" in result) == (split == "ood")
    assert result == succeeds(capsys, "eval", "trajectory", "--model", model_folder, *options, "--steps", "2")


def test_eval_in_phyworlds_mode(capsys, model_folder):
    result = succeeds(capsys, *evaluation(model_folder, "--mode", "compat"))
    assert result["mode"] == "compat" and result["velocity_error"]["mean"] > 0


def test_eval_plausibility_judges_the_model_whole_or_broken(capsys, model_folder):
    asked = ["eval", "plausibility", "--model", model_folder, "--scenario", "uniform", "--cases", "3"]
    whole = {row["score"]: row for row in succeeds(capsys, *asked)["scores"]}
    assert whole["preference_error"]["judged"] == whole["futures"]["cases"] == 3
    assert {"preference_margin/matched", "preference_error/teleport"} <= set(whole)
    broken = {row["score"]: row for row in succeeds(capsys, *asked, "--broken", "L0H1")["scores"]}
    assert broken["preference_margin"]["mean"] != whole["preference_margin"]["mean"]


def test_eval_frechet_gives_value_floor_and_count(capsys, model_folder, tmp_path):
    asked = ["eval", "frechet", "--model", model_folder, "--scenario", "uniform", "--steps", "2"]
    few, enough = (succeeds(capsys, *asked, "--cases", cases)["scores"] for cases in ("32", "33"))
    assert [row["name"] for row in few] == ["kernel_trajectory"]  # full rank needs more clips than features
    assert [row["name"] for row in enough] == ["frechet_trajectory", "kernel_trajectory"]
    assert all(row["clips"] == 33 and row["floor"] < row["value"] for row in enough)  # a random model is far off
    fails(capsys, tmp_path, [*asked, "--cases", "8"], "at least 32 clips, got 8")
    fails(capsys, tmp_path, [*asked, "--features", "i3d"], "I3D needs its weights")


def test_eval_physics_iq_names_what_is_missing(capsys, tmp_path):
    asked = ["eval", "physics-iq", "--real", "real", "--generated", "made", "--fps", "8"]
    fails(capsys, tmp_path, asked, "real is not a folder")
    (tmp_path / "real").mkdir()
    (tmp_path / "made").mkdir()
    fails(capsys, tmp_path, asked, "real has no real videos of 8FPS")


def test_guidance_options_reach_the_model(capsys, model_folder):
    plain = succeeds(capsys, *evaluation(model_folder))
    off = succeeds(capsys, *evaluation(model_folder, "--heads", "L0H1", "--weight", "0"))
    on = succeeds(capsys, *evaluation(model_folder, "--heads", "L0H1", "--weight", "2"))
    assert plain == off and plain["position_error"] != on["position_error"]


def test_heads_are_listed(capsys, model_folder, model):
    assert succeeds(capsys, "heads", model_folder)["heads"] == [str(head) for head in heads_of(model)]


def test_train_writes_model_log_and_table(capsys, tmp_path):
    result = succeeds(capsys, *training("run", "--sample-every", "1"))
    model = tmp_path / "run" / "model"
    assert result["model"] == "run/model" and result["steps"] == 2
    worlds = [(row["split"], row["scenario"]) for row in read_json(model / "result.json")]
    assert worlds == [(split, name) for split in ("id", "ood") for name in ("uniform", "parabola", "collision")]
    assert read_json(tmp_path / "run" / "train.json")["steps"] == 2
    assert [p.name for p in sorted((tmp_path / "run" / "samples").iterdir())] == ["step-000001.png", "step-000002.png"]
    assert succeeds(capsys, *evaluation(model))["cases"] == 2


def test_dry_run_prints_the_settings_and_writes_nothing(capsys, tmp_path):
    assert succeeds(capsys, *training("run", "--batch", "6", "--dry-run"))["batch"] == 6
    assert everything(tmp_path) == []


def test_generate_writes_a_video(capsys, tmp_path, model_folder):
    result = succeeds(
        capsys, "generate", "--model", model_folder, "--scenario", "collision", "--cases", 2, "--out", "a.mp4"
    )
    assert result == dict(video="a.mp4", cases=2)
    assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"


def test_hunt_ranks_confirms_and_resumes(capsys, tmp_path, hunt_arguments, finished_hunt):
    run = shutil.copytree(finished_hunt, tmp_path / "run")
    files = {"hunt.json", "trials.sqlite", "map.png", "table.png", "table_id.png"}
    assert {path.name for path in run.iterdir()} == files
    result, rows = read_json(run / "hunt.json"), stored_rows(run)
    assert list(result) == ["hunt", "hunted", "power", "ranking", "heads", "table", "table_id"]
    assert result["hunt"]["objective"] == "tracking_error" and result["hunt"]["search"] == "exhaustive"
    best = [row["head"] for row in result["ranking"]]
    assert len(best) == 8 and result["hunted"] == sorted(best[:2])
    assert [row["head"] for row in result["heads"]] == best[:2]  # each alone, in the order of the ranking
    assert (result["power"]["heads"], result["power"]["cases"]) == (8, 3)
    assert [row["method"] for row in result["table"]][:3] == ["unguided", "CFG", "AutoGuidance weaker"]
    assert result["table"][-1]["method"] == "2 hunted heads" and result["table"][-1]["tracking_error"]["cases"] == 3
    assert result["table"] == result["table_id"]  # of the same split here
    assert succeeds(capsys, *hunt_arguments, "--out", run, "--resume") == result
    assert stored_rows(run).equals(rows) and not rows.duplicated(["trial", "case_name"]).any()


@pytest.mark.parametrize(
    ("objective", "judge"), [("reward", "reward"), ("preference_margin/matched", "plausibility@1")]
)
def test_hunt_improves_the_objective_that_is_asked_for(capsys, tmp_path, model_folder, objective, judge):
    result = succeeds(capsys, *HUNT, "--model", model_folder, "--objective", objective, "--out", "run")
    assert result["hunt"]["objective"] == objective
    last, first = result["table"][-1][objective], result["table"][0][objective]
    assert last["mean"] - first["mean"] == pytest.approx(last["difference"]["mean"], abs=1e-4)
    assert "missing_rate" in result["table"][-1]  # what the discs do stands beside it
    rows = stored_rows(tmp_path / "run")
    chosen_by = rows["subject.judge"].str.startswith(judge)
    assert not rows[chosen_by][objective].isna().any() and rows[~chosen_by][objective].isna().all()
    assert set(rows[~chosen_by]["subject.judge"]) == {"trajectory@2"}


def test_hunt_races_in_rounds_with_another_perturbation(capsys, tmp_path, model_folder):
    hunt = [*HUNT, "--model", model_folder, "--heads", "L0H1,L0H3,L1H0,L1H2", "--objective", "velocity_error"]
    more = "--search race --confidence 0.8 --rounds 2 --top-k 1 --kind uniform --axis time --weight 3 --strength 0.5"
    result = succeeds(capsys, *hunt, *more.split(), "--out", "run")
    assert len(result["hunted"]) == len(result["heads"]) == 2
    assert {row["head"] for row in result["ranking"]} == {"L0H1", "L0H3", "L1H0", "L1H2"} > set(result["hunted"])
    names = set(stored_rows(tmp_path / "run")["name"])
    assert f"uniform/time u=0.5 w=3 {','.join(result['hunted'])}" in names


def test_users_function_is_an_objective_and_its_fault_is_named(capsys, tmp_path, model_folder, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = "def my_score(generated, true):\n    return generated.frames.float().mean((1, 2, 3, 4))"
    mine, hunt = tmp_path / "my_scores.py", [*HUNT, "--model", model_folder, "--objective", "my_scores:my_score"]
    mine.write_text(source.replace("return", "assert 'collision' not in true.scenarios; return"))
    assert main([*map(str, hunt), "--out", "run"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("physnb: objective my_score: case collision/id/0/")
    assert "AssertionError" in error and "(my_scores.py, line 2)" in error
    rows = stored_rows(tmp_path / "run")
    assert set(rows["case_name"].str.split("/").str[0]) == {"uniform", "parabola"}  # those that it could score
    mine.write_text(f"{source}  # mended\n")
    sys.modules.pop("my_scores")
    result = succeeds(capsys, *hunt, "--out", "run", "--resume")
    assert result["table"][0]["my_score"]["judged"] == 3


def test_stopped_hunt_says_so_and_resumes(capsys, tmp_path, hunt_arguments, finished_hunt, monkeypatch):
    score, calls = ModelSubject.score, []

    def stop(subject, rows):
        calls.append(rows)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(subject, rows)

    with monkeypatch.context() as patched:
        patched.setattr(ModelSubject, "score", stop)
        assert main([*hunt_arguments, "--out", "run", "--json"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "physnb: stopped; what was saved is kept"
    assert 0 < len(stored_rows(tmp_path / "run")) == sum(map(len, calls[:3]))
    result = succeeds(capsys, *hunt_arguments, "--out", "run", "--resume")
    assert result == read_json(finished_hunt / "hunt.json")
    assert len(stored_rows(tmp_path / "run")) == len(stored_rows(finished_hunt))


def test_plain_output_has_a_line_a_value(capsys, model_folder):
    assert main(["heads", str(model_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model: VideoDiT" and any(line.startswith("heads: L0H0, L0H1") for line in lines)


# --- notebooks


def notebook(path, *cells):
    """A notebook with a parameters cell and these code cells."""
    first = nbformat.v4.new_code_cell("run_dir: str = ''\nspeed: float = 1.0", metadata=dict(tags=["parameters"]))
    book = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    book.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
    nbformat.write(book, path)
    return path


def test_run_executes_reports_and_prints_the_final_table(capsys, tmp_path):
    good = notebook(
        tmp_path / "good.ipynb",
        "from physnb.results import Recorder",
        "Recorder(run_dir, 'good').table('final', [dict(method='unguided <b>', speed=2 * speed)], 'A table.')",
    )
    bad = notebook(tmp_path / "bad.ipynb", "raise KeyError('no such thing')")
    result = succeeds(capsys, "run", good, "--out", "run", "-p", "speed=1.5")
    assert result["table"] == [dict(method="unguided <b>", speed=3.0)]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "unguided &lt;b&gt;" in report and "A table." in report
    assert "http" not in report  # it opens without a network
    assert read_json(tmp_path / "run" / "params.json")["parameters"] == {"speed": 1.5}

    assert main(["run", str(bad), "--out", "failed"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("physnb: bad.ipynb failed in cell 2: KeyError")
    assert (tmp_path / "failed" / "bad.ipynb").exists() and not (tmp_path / "failed" / "good.ipynb").exists()
