import shlex
from dataclasses import asdict

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.bench import matmul_flops_per_sample, operations
from physnb.config import DIT_SHAPES, ModelConfig, preset
from physnb.data import VOCABULARY
from physnb.model import Block, VideoDiT, rotary_table
from physnb.scaling import (
    CLIPS,
    H100,
    LAUNCH,
    Device,
    attention_share,
    block_activations,
    fitting,
    hours_at_rate,
    latent_model,
    launch_command,
    parameter_counts,
    scaling_table,
    token_count,
    training_hours,
    training_memory,
    training_operations,
)


@pytest.fixture(scope="module")
def table():
    return scaling_table(utilisation=0.4)


@pytest.mark.parametrize(
    "model", [*(latent_model(shape) for shape in DIT_SHAPES), preset("smoke").train.model, preset("quick").train.model]
)
def test_parameters_are_those_of_the_model(model):
    with torch.device("meta"):
        built = VideoDiT(**asdict(model), vocabulary=VOCABULARY)
    assert parameter_counts(model)[0] == sum(p.numel() for p in built.parameters())
    matrices = [p for block in built.blocks for part in (block.attn, block.mlp) for p in part.parameters()]
    assert parameter_counts(model)[1] == sum(p.numel() for p in matrices if p.ndim == 2)
    by_token = [p for part in (built.embed, built.head) for p in part.parameters()] + matrices
    assert parameter_counts(model)[2] == sum(p.numel() for p in by_token)
    assert token_count(model) == built.grid[0] * built.grid[1] * built.grid[2]


def test_published_counts_are_met_without_the_modulations():
    """Table 1 of phyworld, in millions."""
    published = dict(s=22.5, b=89.5, l=310.0, xl=456.0)
    for shape, millions in published.items():
        assert parameter_counts(latent_model(shape))[2] / 1e6 == pytest.approx(millions, rel=0.06)
    assert token_count(latent_model("s")) == 512 and token_count(latent_model("s", pixels=256)) == 2048


def test_operations_are_those_of_the_benchmark():
    model = latent_model("b")
    assert training_operations(model, steps=7, batch=3) == 21 * matmul_flops_per_sample(model)
    assert matmul_flops_per_sample(model) == 6 * (sum(operations(model)) + (model.depth - 1) * operations(model)[1])
    # 6 N D and attention, but for the biases
    tokens = token_count(model)
    rule = 6 * parameter_counts(model)[2] * tokens + 12 * model.depth * model.width * tokens**2
    assert matmul_flops_per_sample(model) == pytest.approx(rule, rel=2e-3)


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(1, 10**6), devices=st.integers(1, 64), share=st.floats(0.01, 1))
def test_hours_scale_as_they_must(steps, devices, share):
    model = latent_model("s")
    one = training_hours(training_operations(model, steps=steps), devices=devices, utilisation=share)
    assert one > 0
    double = training_operations(model, steps=2 * steps)
    assert training_hours(double, devices=devices, utilisation=share) == pytest.approx(2 * one)
    assert training_hours(double, devices=2 * devices, utilisation=share) == pytest.approx(one)
    assert training_hours(double, devices=devices, utilisation=share / 2) == pytest.approx(4 * one)
    # a device measured at exactly this share of the peak takes as long
    rate = share * H100.peak / matmul_flops_per_sample(model)
    by_rate = hours_at_rate(double, samples_per_second=rate, measured=model, devices=devices)
    assert by_rate == pytest.approx(2 * one)


def test_hours_by_hand():
    assert training_hours(3.6e18, devices=1, utilisation=0.5, device=Device("some", 1e15, 1e9)) == pytest.approx(2)
    quick = preset("quick").train.model
    operations = 100 * 3600 * matmul_flops_per_sample(quick)
    assert hours_at_rate(operations, samples_per_second=50, measured=quick) == pytest.approx(2)


def test_attention_grows_with_the_square_of_the_tokens():
    small, large = latent_model("xl"), latent_model("xl", pixels=256)
    assert 0 < attention_share(small) < attention_share(large) < 0.4
    part = [attention_share(model) * matmul_flops_per_sample(model) for model in (small, large)]
    assert part[1] == pytest.approx(16 * part[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ratio", [4.0, 2.0])
def test_activations_are_those_that_autograd_keeps(precision, ratio):
    width, heads, tokens, batch = 96, 4, 100, 3  # no two sizes the same
    block, rotary = Block(width, heads, ratio), rotary_table((1, 1, tokens), width // heads)
    x = torch.randn(batch, tokens, width, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor):
        if tensor.shape.numel() >= batch * tokens * width and tensor.shape[0] in (batch, batch * tokens):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = block(x, torch.randn(batch, width), rotary)
        counted = sum(kept.values())
    assert output.requires_grad
    model = ModelConfig(frames=tokens, size=8, patch=(1, 8, 8), width=width, heads=heads, depth=1, mlp_ratio=ratio)
    assert block_activations(model, batch, precision) == counted


def test_memory_adds_up():
    model = latent_model("b")
    total, matrices, _ = parameter_counts(model)
    parts = training_memory(model, 4)
    assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
    assert parts["weights"] == parts["gradients"] == parts["average"] == 4 * total
    assert parts["moments"] == 4 * matrices + 8 * (total - matrices)
    assert parts["activations"] == 12 * block_activations(model, 4, "bf16")
    assert training_memory(model, 8)["activations"] == 2 * parts["activations"]
    assert training_memory(model, 4, precision="fp32")["casts"] == 0
    sharded = training_memory(model, 4, shards=8)
    assert sharded["gradients"] == parts["gradients"] / 8 and sharded["activations"] == parts["activations"]
    assert training_memory(model, 4, checkpointing=True)["activations"] < parts["activations"] / 4


def test_what_fits():
    xl = latent_model("xl")
    assert fitting(latent_model("s"), 32, 1) == "yes"
    assert fitting(xl, 256, 1) == "checkpointed"
    assert fitting(xl, 32, 8, Device("small", 1e12, 35e9)) == "sharded"
    assert fitting(xl, 256, 1, Device("tiny", 1e12, 8e9)) == "no"


def test_table_has_a_row_a_shape_count_and_devices(table):
    assert len(table) == len(DIT_SHAPES) * len(CLIPS) * 2
    first = table[0]
    assert (first["model"], first["clips"], first["devices"], first["tokens"]) == ("DiT-S", 30_000, 1, 512)
    assert first["epochs"] == pytest.approx(100_000 * 256 / 30_000)
    assert first["disk_gib"] == pytest.approx(30_000 * 4 * 8 * 16 * 16 * 4 / 2**30)
    assert first["utilisation"] == 0.4 and first["device"] == "H100 SXM"
    by_key = {(row["model"], row["clips"], row["devices"]): row for row in table}
    for shape in DIT_SHAPES:
        rows = [by_key[f"DiT-{shape.upper()}", clips, 1] for clips in CLIPS]
        assert len({row["hours"] for row in rows}) == 1  # the published number of steps does not depend on the clips
        assert rows[0]["hours"] == pytest.approx(8 * by_key[f"DiT-{shape.upper()}", CLIPS[0], 8]["hours"])
    hours = [by_key[f"DiT-{shape.upper()}", CLIPS[0], 1]["hours"] for shape in DIT_SHAPES]
    assert hours == sorted(hours)


def test_combinations_take_longer():
    """Section 4 of phyworld: ten times the steps at twice the size."""
    row = scaling_table(utilisation=0.4, shapes=("xl",), clips=(6_000_000,), pixels=256, steps=1_000_000)[0]
    usual = scaling_table(utilisation=0.4, shapes=("xl",), clips=(3_000_000,))[0]
    assert row["hours"] > 40 * usual["hours"] and row["tokens"] == 4 * usual["tokens"]


@pytest.mark.parametrize("row", range(0, 24, 5))
def test_commands_are_understood_by_their_launcher(table, row, monkeypatch):
    command = shlex.split(table[row]["command"])
    if table[row]["devices"] == 1:
        assert command == [] or command[:4] == ["python", "-m", "physnb", "train"]
        return
    assert command[:2] == ["accelerate", "launch"]
    monkeypatch.chdir(LAUNCH.parents[1])
    args = launch_command_parser().parse_args(command[2:])
    assert args.num_processes == table[row]["devices"] and args.module and args.training_script == "physnb"
    assert args.training_script_args[:2] == ["train", "--preset"]


@pytest.mark.parametrize(("name", "kind"), [("data_parallel.yaml", "MULTI_GPU"), ("sharded.yaml", "FSDP")])
def test_launch_files_are_in_the_form_of_accelerate(name, kind):
    config = load_config_from_file(str(LAUNCH / name))  # refuses unknown keys
    assert config.distributed_type == kind and config.num_processes == 8 and config.mixed_precision == "bf16"


def test_sharding_wraps_our_blocks():
    entries = load_config_from_file(str(LAUNCH / "sharded.yaml")).fsdp_config
    assert entries.keys() <= vars(launch_command_parser().parse_args(["x.py"])).keys()
    settings = {name.removeprefix("fsdp_"): value for name, value in entries.items()}
    settings["transformer_cls_names_to_wrap"] = [settings.pop("transformer_layer_cls_to_wrap")]
    settings["cpu_offload"] = settings.pop("offload_params")
    settings["fsdp_version"] = settings.pop("version")
    plugin = FullyShardedDataParallelPlugin(**settings)
    with torch.device("meta"):
        model = VideoDiT(**asdict(latent_model("s")), vocabulary=VOCABULARY)
    plugin.set_auto_wrap_policy(model)
    wrapped = [
        name
        for name, module in model.named_modules()
        if plugin.auto_wrap_policy(module=module, recurse=False, nonwrapped_numel=0)
    ]
    assert wrapped == [f"blocks.{layer}" for layer in range(12)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: latent_model("xxl"), "unknown shape 'xxl'; choose one of s, b, l, xl"),
        (lambda: latent_model("s", frames=33), "33 frames of 128 pixels do not divide"),
        (lambda: latent_model("s", pixels=130), "do not divide"),
        (lambda: training_operations(latent_model("s"), steps=0), "steps and batch must be positive"),
        (lambda: training_hours(1e18, devices=0, utilisation=0.4), "devices must be positive"),
        (lambda: training_hours(1e18, devices=1, utilisation=0), r"utilisation must be in \(0, 1\]"),
        (lambda: training_hours(1e18, devices=1, utilisation=40), r"utilisation must be in \(0, 1\]"),
        (
            lambda: hours_at_rate(1e18, samples_per_second=0, measured=latent_model("s")),
            "samples per second and devices must be positive",
        ),
        (lambda: training_memory(latent_model("s"), 0), "batch and shards must be positive"),
        (lambda: block_activations(latent_model("s"), 1, "fp8"), "unknown precision 'fp8'"),
        (lambda: scaling_table(utilisation=0.4, devices=(7,)), "batch 256 does not split over 7 devices"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_command_takes_what_it_takes_to_fit():
    assert "data_parallel.yaml --num_processes 8 -m physnb train --preset paper-xl" in launch_command("xl", 30_000, 8)
    assert "sharded.yaml --num_processes" in launch_command("xl", 30_000, 8, fits="sharded")
    assert "sharded.yaml --fsdp_activation" in launch_command("xl", 30_000, 8, fits="checkpointed")
    assert launch_command("xl", 30_000, 8, fits="no") == launch_command("xl", 30_000, 1, fits="checkpointed") == ""
