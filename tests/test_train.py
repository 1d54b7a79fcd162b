import dataclasses
import itertools
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import physnb
from physnb.checkpoint import fingerprint, load_model, save_model
from physnb.config import ModelConfig, TextConfig, preset
from physnb.data import encode_captions
from physnb.flow import add_noise, velocity_loss
from physnb.store import read_tensors, write_tensors
from physnb.train import STATE_FILE, TrainState, make_batch, make_batches, read_history, schedule, train

SMOKE = preset("smoke").train


def settings(**changes):
    return dataclasses.replace(SMOKE, **changes)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# --- examples


def test_example_does_not_depend_on_its_batch():
    config = settings(seed=3)
    batch = make_batch(config, np.arange(100, 140))
    for indices in ([100], [139], [120, 105, 131]):
        part = make_batch(config, np.array(indices))
        for name, value in vars(part).items():
            assert torch.equal(value, getattr(batch, name)[np.array(indices) - 100]), name


def test_examples_of_another_seed_are_others():
    one, other = (make_batch(settings(seed=seed), np.arange(8)) for seed in (0, 1))
    for name in ("clean", "noise", "sigma"):
        assert (getattr(one, name) != getattr(other, name)).reshape(8, -1).any(1).all(), name


def test_conditions_are_dropped_as_often_as_asked():
    # a tiny model's frames, but 8 of them: counts of 1 to 6 start frames fit
    batch = make_batch(settings(start_drop=0.2, caption_drop=0.3, vary_frames_given=0.5), np.arange(2000))
    counts = batch.given.sum(1)
    assert float((counts == 0).float().mean()) == pytest.approx(0.2, abs=0.04)
    assert float((batch.caption == 0).all(1).float().mean()) == pytest.approx(0.3, abs=0.05)
    assert float((counts == 3).float().mean()) == pytest.approx(0.3 + 0.5 / 6, abs=0.05)
    assert set(counts.tolist()) == {0, 1, 2, 3, 4, 5, 6}
    # start frames are the first ones, without a gap
    assert torch.equal(batch.given, (torch.arange(8)[None] < counts[:, None]).float())


def test_noise_levels_are_in_range_and_shifted_up():
    sigma = make_batch(settings(noise_shift=6.0), np.arange(1000)).sigma
    assert 0 < sigma.min() and sigma.max() <= 1
    # the median of uniform levels, shifted: 6 * 0.5 / (1 + 5 * 0.5)
    assert float(sigma.median()) == pytest.approx(6 * 0.5 / 3.5, abs=0.02)


def test_a_start_frame_count_beyond_the_clip_is_impossible():
    short = settings(
        model=ModelConfig(frames=4, size=16, width=32, depth=1, heads=4), vary_frames_given=1.0, start_drop=0.0
    )
    counts = make_batch(short, np.arange(300)).given.sum(1)
    assert counts.min() == 1 and counts.max() == 3  # a frame is left to predict


# --- schedules


def test_learning_rate_warms_up_holds_and_falls():
    config = settings(steps=100, warmup_steps=10, decay_fraction=0.4)
    rates = [schedule(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10:60] == pytest.approx([1.0] * 50)
    assert rates[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 100)])
    assert 0 < rates[-1] < 0.05


def test_average_follows_its_formula():
    state = TrainState(settings(ema_decay=0.9))
    name, parameter = next(iter(state.model.named_parameters()))
    expected = parameter.detach().clone()
    for step in (0, 4, 1000):
        with torch.no_grad():
            parameter.normal_()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
        state.step = step
        state.update_average()
        torch.testing.assert_close(state.average[name], expected)
    assert (state.averaged_model().state_dict()[name] == state.average[name]).all()


# --- training


def test_training_learns(tmp_path):
    config = settings(steps=150, batch=8, warmup_steps=20)
    batch = make_batch(dataclasses.replace(config, seed=99), np.arange(64))  # clips that training does not see

    def loss(model):
        with torch.no_grad():
            noised = add_noise(batch.clean, batch.noise, batch.sigma)
            predicted = model(noised, batch.sigma, batch.clean, batch.given, batch.caption).sample
            return float(velocity_loss(predicted, batch.clean, batch.sigma, 1 - batch.given, config.sigma_floor).mean())

    before = loss(TrainState(config).averaged_model())
    assert loss(train(config, tmp_path / "run", progress=False)) < 0.75 * before


def test_same_seed_same_weights_another_seed_others(tmp_path):
    one, same, other = (
        weights(train(settings(steps=4, seed=seed), tmp_path / name, progress=False))
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert_same_weights(one, same)
    assert any((one[name] != other[name]).any() for name in one)


@pytest.mark.parametrize("stop_after", [1, 7, 11])
def test_stopped_run_goes_on_bit_for_bit(tmp_path, stop_after):
    whole = train(SMOKE, tmp_path / "whole", progress=False)
    train(SMOKE, tmp_path / "parts", stop_after=stop_after, progress=False)
    resumed = train(SMOKE, tmp_path / "parts", resume=True, progress=False)
    assert_same_weights(weights(whole), weights(resumed))


def test_training_goes_on_from_the_weights_of_another_model(tmp_path):
    first = train(settings(steps=3), tmp_path / "a", progress=False)
    config = settings(steps=3, noise_shift=6.0, start=fingerprint(first))
    assert_same_weights(weights(TrainState(config, first).model), weights(first))
    whole = train(config, tmp_path / "b", start=first, progress=False)
    assert whole.config.noise_shift == 6.0
    train(config, tmp_path / "c", start=first, stop_after=2, progress=False)
    resumed = train(config, tmp_path / "c", start=first, resume=True, progress=False)
    assert_same_weights(weights(resumed), weights(whole))
    with pytest.raises(ValueError, match="starts from model none, the config says"):
        train(config, tmp_path / "d", progress=False)
    with pytest.raises(ValueError, match="alone, not in width"):
        wide = dataclasses.replace(config, model=dataclasses.replace(config.model, width=48))
        train(wide, tmp_path / "d", start=first, progress=False)
    assert not (tmp_path / "d").exists()


def test_log_has_every_loss_once_after_a_resume(tmp_path):
    train(SMOKE, tmp_path / "run", save_every=5, stop_after=15, progress=False)
    train(SMOKE, tmp_path / "run", save_every=5, resume=True, progress=False)
    train(SMOKE, tmp_path / "whole", progress=False)
    resumed, whole = read_history(tmp_path / "run"), read_history(tmp_path / "whole")
    assert resumed["loss"] == whole["loss"] and whole["loss"][0][-1] == 20


def test_samples_are_asked_for_and_logged(tmp_path):
    seen = []

    def on_sample(model, step, folder):
        seen.append((step, folder, model.training))
        return {"position_error": 0.1 * step}

    train(SMOKE, tmp_path / "run", sample_every=8, on_sample=on_sample, progress=False)
    assert seen == [(8, tmp_path / "run", False), (16, tmp_path / "run", False)]
    steps, values = read_history(tmp_path / "run")["position_error"]
    assert steps == [8, 16] and values == pytest.approx([0.8, 1.6])


def test_models_are_kept_where_asked(tmp_path):
    final = train(SMOKE, tmp_path / "run", keep=(8, 20), progress=False)
    stopped = train(SMOKE, tmp_path / "other", stop_after=8, progress=False)
    assert_same_weights(weights(load_model(tmp_path / "run" / "model-8")), weights(stopped))
    assert_same_weights(weights(load_model(tmp_path / "run" / "model-20")), weights(final))
    with pytest.raises(ValueError, match=r"a model can be kept after step 1 to 20, not after \[21\]"):
        train(SMOKE, tmp_path / "third", keep=(8, 21), progress=False)
    assert not (tmp_path / "third").exists()


def test_used_folder_other_settings_and_damaged_state_are_refused(tmp_path):
    folder = tmp_path / "run"
    train(SMOKE, folder, stop_after=2, progress=False)
    state = (folder / STATE_FILE).read_bytes()
    with pytest.raises(ValueError, match="run already holds a run; choose another name, or pass --resume"):
        train(SMOKE, folder, progress=False)
    with pytest.raises(ValueError, match="run holds a run with another configuration; choose another folder"):
        train(settings(learning_rate=1e-3), folder, resume=True, progress=False)
    assert (folder / STATE_FILE).read_bytes() == state
    (folder / STATE_FILE).write_bytes(state[: len(state) // 2])
    with pytest.raises(ValueError, match=f"{STATE_FILE} is damaged"):
        train(SMOKE, folder, resume=True, progress=False)


def test_killed_training_resumes_to_the_same_weights(tmp_path, start_python):
    from physnb.__main__ import main

    def command(folder):
        small = ["--preset", "smoke", "--steps", "300", "--cases", "1"]
        return ["train", *small, "--save-every", "7", "--out", str(folder), "--json"]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start_python("-m", "physnb", *command(killed))
    deadline = time.monotonic() + 180
    while not (killed / STATE_FILE).exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "training wrote no state in three minutes"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    step = int(read_tensors(killed / STATE_FILE)[1]["step"])
    assert 0 < step < 300 and step % 7 == 0 and not (killed / "model").exists()

    assert main([*command(killed), "--resume"]) == 0
    assert main(command(whole)) == 0
    model = "model/diffusion_pytorch_model.safetensors"
    assert_same_weights(*(read_tensors(folder / model)[0] for folder in (killed, whole)))


def test_two_processes_have_the_losses_of_one(tmp_path, start_python):
    steps = 30
    program = f"""
import dataclasses, sys
from physnb.config import preset
from physnb.train import train
config = dataclasses.replace(preset("smoke").train, steps={steps})
train(config, sys.argv[1], progress=False)
try:
    train(dataclasses.replace(config, batch=3), sys.argv[1] + "-odd", progress=False)
except ValueError as error:
    sys.stdout.write(f"refused: {{error}}\\n")  # in one piece: the processes share the pipe
"""
    (tmp_path / "both.py").write_text(program)
    settings_file = Path(physnb.__file__).parent / "launch" / "data_parallel.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(settings_file)]
    launch += ["--num_processes=2", "--mixed_precision=no", "--main_process_port=0"]
    process = start_python(*launch, str(tmp_path / "both.py"), str(tmp_path / "two"))
    one = train(settings(steps=steps), tmp_path / "one", progress=False)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    # each process knows of the other: two that train side by side, each alone, would also have these losses
    assert output.count("refused: batch 3 does not split over 2 processes; change --batch") == 2, output
    (steps_one, losses_one), (steps_two, losses_two) = (read_history(tmp_path / n)["loss"] for n in ("one", "two"))
    assert steps_one == steps_two and steps_one[-1] == 30
    assert losses_two == pytest.approx(losses_one, abs=1e-4, rel=0)
    # and so have the weights, as far as another order of adding gradients goes
    average = {k[8:]: v for k, v in read_tensors(tmp_path / "two" / STATE_FILE)[0].items() if k.startswith("average.")}
    for name, value in weights(one).items():
        torch.testing.assert_close(average[name], value, atol=1e-4, rtol=0)


def test_the_command_under_torchrun_trains_one_model(tmp_path, start_python):
    start, out = tmp_path / "start", tmp_path / "out"
    save_model(train(settings(steps=1), tmp_path / "first", progress=False), start)
    command = ["physnb", "train", "--preset", "smoke", "--steps", "2", "--cases", "1"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "--"]
    process = start_python(*launch, *command, "--start", str(start), "--out", str(out))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("steps: 2") == 1, output  # one of them speaks
    assert (out / "model" / "result.json").exists()


# --- what goes wrong


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run stopped after 12 of 20 steps; copied before it is changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(SMOKE, folder, stop_after=12, progress=False)
    return folder


def poisoned(folder, tmp_path, scale):
    """A copy of a stopped run whose output weights are multiplied by `scale`, as a broken update would."""
    copy = shutil.copytree(folder, tmp_path / "run")
    tensors, progress = read_tensors(copy / STATE_FILE)
    tensors["model.head.weight"] = tensors["model.head.weight"] * scale
    write_tensors(copy / STATE_FILE, tensors, progress)
    return copy


@pytest.mark.parametrize(
    ("scale", "reason"),
    [(torch.nan, r"loss nan"), (1e30, r"loss (inf|nan)"), (1e4, r"loss \d.*e\+\d+")],
    ids=["nan", "overflow", "explosion"],
)
def test_broken_weights_stop_with_a_reason_and_save_nothing(stopped_run, tmp_path, scale, reason):
    folder = poisoned(stopped_run, tmp_path, scale)
    before = (folder / STATE_FILE).read_bytes()
    with pytest.raises(
        FloatingPointError, match=f"training stopped at step 12: {reason}.*running loss.*try a lower"
    ) as error:
        train(SMOKE, folder, resume=True, save_every=1, progress=False)
    assert str(folder / STATE_FILE) in str(error.value) and "\n" not in str(error.value)
    assert (folder / STATE_FILE).read_bytes() == before


def test_huge_learning_rate_stops_and_keeps_a_state_that_loads(tmp_path):
    config = settings(learning_rate=1e4, warmup_steps=10, steps=60)
    with pytest.raises(FloatingPointError, match=r"training stopped at step \d+: loss .*try a lower learning rate"):
        train(config, tmp_path / "run", save_every=1, progress=False)
    state = TrainState(config)
    state.load(tmp_path / "run" / STATE_FILE)
    assert state.step > 0 and all(value.isfinite().all() for value in state.average.values())


def test_encode_captions_of_dropped_rows_are_zero():
    batch = make_batch(settings(caption_drop=1.0), np.arange(4))
    assert torch.equal(batch.caption, encode_captions([""] * 4))


@pytest.mark.slow
def test_batches_do_not_depend_on_workers_or_where_one_begins():
    config = settings(sources=("uniform", "orbit", "templates"), source_weights=(1.0, 1.0, 1.0), steps=40, batch=4)
    config = dataclasses.replace(config, text=TextConfig(level="augmented", layers=1))
    alone, made = make_batches(config), list(itertools.islice(make_batches(config, 17, workers=2), 6))
    for one, other in zip(itertools.islice(alone, 17, 23), made, strict=True):
        assert all(torch.equal(value, getattr(other, name)) for name, value in vars(one).items())
