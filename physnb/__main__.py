"""The command line: `python -m physnb --help`.

Every command takes --json for one JSON object on standard output, and ends with status 1 and one line on failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from physnb.config import (
    AXES,
    CAPTION_LEVELS,
    EXECUTORS,
    PERTURBATION_KINDS,
    PRESETS,
    PROMISES,
    SEARCHES,
    SIMULATED,
    SOLVERS,
    SPLITS,
    Guidance,
    Perturbation,
    head_set,
    preset,
    require,
    to_json,
)
from physnb.tables import format_cell, text_table

REFERENCE_MODEL = Path("outputs/reference/model")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that names the argument and the fix."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def count(text: str) -> int:
    """A positive whole number."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def command_train(args: argparse.Namespace) -> dict[str, Any] | None:
    from physnb.checkpoint import fingerprint, load_model, save_model
    from physnb.evaluate import result_table, sample_grid
    from physnb.space import latent_config
    from physnb.text import load_text_encoder
    from physnb.train import is_main_process, train

    config = preset(args.preset).train
    given = {name: getattr(args, name) for name in ("steps", "batch", "seed", "learning_rate", "clips")}
    given |= sources_of(args.source) if args.source else {}
    text = {name: getattr(args, name) for name in ("level", "layers") if getattr(args, name) is not None}
    if args.text_encoder:
        text |= dict(encoder=args.text_encoder, width=load_text_encoder(args.text_encoder).width)
    given |= dict(text=dataclasses.replace(config.text, **text))
    require(not args.frames or bool(args.codec), "--frames goes with --codec; presets have their own number of frames")
    if args.codec:
        given |= dict(codec=args.codec, model=latent_config(args.codec, config.model, args.frames))
    start = load_model(args.start) if args.start else None
    given |= dict(start=fingerprint(start) if start else None)
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    if args.dry_run:
        return json.loads(to_json(config))
    folder, model_folder = Path(args.out), Path(args.out) / "model"
    require(not model_folder.exists(), f"{model_folder} is already trained; choose another --out")
    scenarios = [name for name in config.sources if name in SIMULATED]
    model = train(config, folder, start=start, resume=args.resume, save_every=args.save_every,
                  sample_every=args.sample_every, on_sample=partial(sample_grid, scenarios=scenarios),
                  progress=not args.json)  # fmt: skip
    if not is_main_process():
        return None  # the first process speaks for all
    result = result_table(model, cases=args.cases, seed=config.seed, scenarios=scenarios)
    save_model(model, model_folder, result)
    return dict(model=str(model_folder), steps=config.steps, result=result)


def sources_of(names: list[str]) -> dict[str, Any]:
    """The settings of a training on sources written as NAME or NAME=WEIGHT."""
    pairs = [name.partition("=") for name in names]
    try:
        weights = tuple(float(weight) if equals else 1.0 for _, equals, weight in pairs)
    except ValueError:
        raise ValueError(f"--source must be NAME or NAME=WEIGHT, got {', '.join(names)}") from None
    return dict(sources=tuple(name for name, _, _ in pairs), source_weights=weights)


def command_eval_trajectory(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.checkpoint import load_model
    from physnb.evaluate import evaluate_trajectory

    model = load_model(args.model)
    return evaluate_trajectory(
        model, args.scenario, args.split, cases=args.cases, frames_given=args.frames_given, seed=args.seed,
        steps=args.steps, solver=args.solver, guidance=guidance_of(args), mode=args.mode,
    )  # fmt: skip


def command_eval_plausibility(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.checkpoint import load_model
    from physnb.evaluate import evaluate_plausibility

    broken = Perturbation(head_set(args.broken)) if args.broken else None
    model = load_model(args.model)
    return evaluate_plausibility(
        model, args.scenario, args.split, cases=args.cases, frames_given=args.frames_given, seed=args.seed,
        guidance=guidance_of(args), perturbation=broken,
    )  # fmt: skip


def command_eval_physics_iq(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.metrics.physics_iq_files import score_folders

    return score_folders(
        Path(args.real), Path(args.generated), fps=args.fps, mode=args.mode, scenarios=args.scenario or None,
        descriptions=args.descriptions and Path(args.descriptions),
    )  # fmt: skip


def command_eval_frechet(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.checkpoint import load_model
    from physnb.evaluate import evaluate_frechet

    model = load_model(args.model)
    return evaluate_frechet(
        model, args.scenario, args.split, cases=args.cases, features=args.features, weights=args.weights,
        frames_given=args.frames_given, seed=args.seed, steps=args.steps, solver=args.solver,
        guidance=guidance_of(args),
    )  # fmt: skip


def guidance_of(args: argparse.Namespace) -> Guidance:
    """The guidance that --text-weight, --heads, --weight and --strength describe."""
    if not args.heads:
        return Guidance(text_weight=args.text_weight)
    heads = Guidance.from_heads(head_set(args.heads), args.weight, args.strength)
    return dataclasses.replace(heads, text_weight=args.text_weight)


def command_generate(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.checkpoint import load_model
    from physnb.data import simulate
    from physnb.evaluate import shape_of
    from physnb.generate import generate
    from physnb.plots import check_video_path, write_video

    check_video_path(Path(args.out))
    require(not Path(args.out).exists(), f"{args.out} exists; choose another name or delete it")
    model = load_model(args.model)
    shape = shape_of(model) | dict(seed=args.seed)
    true = simulate(args.scenario, args.split, range(args.cases), **shape)
    made = generate(model, true, frames_given=args.frames_given, guidance=guidance_of(args), steps=args.steps,
                    solver=args.solver, seed=args.seed)  # fmt: skip
    write_video(Path(args.out), {"true": true, "generated": made})
    return dict(video=args.out, cases=args.cases)


def command_heads(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.pretrained import head_report, load_transformer

    return head_report(load_transformer(args.model))


def command_hunt(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.checkpoint import load_model
    from physnb.confirm import MOTION, confirm, confirm_heads, metric_units
    from physnb.executors import executor_named
    from physnb.plots import plot_differences, plot_head_map, save_figure
    from physnb.search import check_subject_heads, hunt_heads, pilot_power
    from physnb.store import TrialStore, prepare_folder, write_json
    from physnb.subjects import simulated_subject
    from physnb.trials import Trials

    hunt = preset(args.preset).hunt
    names = {field.name for field in dataclasses.fields(hunt)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    hunt = dataclasses.replace(hunt, **given)
    model = load_model(args.model)
    others = {Path(folder).resolve().name: load_model(folder) for folder in args.weaker}
    require(len(others) == len(args.weaker), f"--weaker folders of one name ({', '.join(args.weaker)}); rename one")
    subject = simulated_subject(model, hunt, "selection")
    settings = dict(batch_size=args.batch_size, progress=not args.json)
    with executor_named(args.executor, address=args.address, workers=args.workers) as executor:
        trials = Trials(subject, executor=executor, **settings)
        heads = check_subject_heads(trials, head_set(args.heads) if args.heads else None)
        picks = hunt.top_k * hunt.rounds
        require(picks <= len(heads), f"--top-k must be at most {len(heads)}, the heads to hunt, got {picks} picks")
        folder = prepare_folder(args.out, resume=args.resume)
        with TrialStore(folder / "trials.sqlite") as store:
            trials = Trials(subject, store, executor=executor, **settings)
            power = pilot_power(trials, hunt)
            if not args.json:
                print(f"power: {power}")
            found = hunt_heads(trials, hunt, heads)
            result = dict(hunt=json.loads(to_json(hunt)), hunted=[str(head) for head in found.heads])
            result |= dict(power=power.to_dict(), ranking=found.ranking.to_rows())
            for name, split in dict(table=hunt.split, table_id="id").items():
                part = dict(split=split, others=others)
                judges = (hunt.objective, MOTION)
                subjects = [simulated_subject(model, hunt, "confirmation", objective=o, **part) for o in judges]
                fresh, motion = (Trials(subject, store, executor=executor, **settings) for subject in subjects)
                if name == "table":
                    verdicts = confirm_heads(trials, fresh, found.ranking, hunt, found.picked)
                    result["heads"] = [verdict.to_row() for verdict in verdicts]
                arms = confirm(trials, fresh, hunt, found.heads, others=list(others), beside=motion)
                result[name] = [arm.to_row() for arm in arms]
    for name in ("table", "table_id"):
        save_figure(folder / f"{name}.png", plot_differences(result[name], metric_units(fresh)))
    head_map = plot_head_map(found.ranking.layer_map(), found.heads, found.ranking.label)
    save_figure(folder / "map.png", head_map)
    write_json(folder / "hunt.json", result)
    return result


def command_run(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.runs import parse_value, run_notebooks
    from physnb.sweeps import run_sweep

    parameters = {}
    for text in args.parameter:
        name, equals, value = text.partition("=")
        require(bool(equals), f"-p {text!r} is not of the form name=value")
        parameters[name] = parse_value(value)
    if args.sweep is None:
        require(not args.resume, "--resume goes on with a sweep; a run of notebooks begins anew")
        return run_notebooks(args.notebook, preset=args.preset, folder=args.out, parameters=parameters)
    require(args.out is not None, "a sweep needs a folder; give --out")
    settings = dict(preset=args.preset, parameters=parameters, resume=args.resume)
    return run_sweep(args.notebook, args.sweep, args.out, **settings)


def command_report(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.runs import write_report

    return dict(report=str(write_report(Path(args.folder))))


def command_bench(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.bench import bench_simulator, bench_training
    from physnb.bench_heads import bench_heads
    from physnb.bench_hunt import bench_hunt
    from physnb.checkpoint import load_model
    from physnb.standings import bench_metrics

    if args.which == "hunt":
        return bench_hunt(load_model(args.model), preset("quick").hunt, args.rounds)
    benches = dict(sim=bench_simulator, train=bench_training, heads=bench_heads, metrics=bench_metrics)
    return benches[args.which](rounds=args.rounds)


def add_cases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(REFERENCE_MODEL), help="model folder (default: %(default)s)")
    parser.add_argument("--scenario", choices=SIMULATED, required=True)
    parser.add_argument(
        "--split", choices=SPLITS, default="id", help="in or out of distribution (default: %(default)s)"
    )
    parser.add_argument("--cases", type=count, default=64, help="clips (default: %(default)s)")
    parser.add_argument("--frames-given", type=natural, default=3, help="start frames (default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of cases and noise (default: %(default)s)")
    parser.add_argument("--heads", default="", help="heads to break in the weak pass, for example L0H1,L3H7")
    parser.add_argument("--weight", type=float, default=2.0, help="guidance weight w of --heads, 0 is off")
    parser.add_argument("--strength", type=float, default=1.0, help="perturbation strength u in [0, 1]")
    parser.add_argument("--text-weight", type=float, default=0.0, help="guidance weight of the caption, 0 is off")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    add_cases(parser)
    parser.add_argument("--steps", type=count, default=10, help="sampling steps (default: %(default)s)")
    parser.add_argument("--solver", choices=SOLVERS, default="euler")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m physnb", description="Which attention heads of a video model carry physics?")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser, metavar="COMMAND")

    def command(name: str, function, text: str, under=None) -> argparse.ArgumentParser:
        sub = (under or commands).add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    sub = command("run", command_run, "run notebooks through papermill and write report.html")
    sub.add_argument("notebook", nargs="*", help="notebook files or numbers (default: all)")
    sub.add_argument("--preset", choices=PRESETS, default="quick")
    sub.add_argument("--out", help="run folder (default: a new one in outputs/)")
    sub.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE")
    sub.add_argument("--sweep", metavar="YAML", help="run once a setting of this file, see physnb.sweeps; needs --out")
    sub.add_argument("--resume", action="store_true", help="go on with the sweep in --out")

    sub = command("train", command_train, "train a VideoDiT")
    sub.add_argument("--preset", choices=PRESETS, default="quick")
    sub.add_argument("--out", required=True, help="run folder; the model appears in its folder `model`")
    sub.add_argument("--start", metavar="DIR", help="model folder whose weights training begins with")
    sub.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for name, kind in (("--steps", count), ("--batch", count), ("--seed", natural), ("--learning-rate", float)):
        sub.add_argument(name, type=kind, help="instead of the preset's")
    sub.add_argument("--clips", type=natural, help="distinct clips of each scenario (0, the default: none comes twice)")
    sub.add_argument("--codec", metavar="DIR", help="train in the latents of this autoencoder: folder or hub id")
    sub.add_argument("--frames", type=count, help="of a clip, where the codec does not take the preset's")
    sub.add_argument("--source", action="append", default=[], metavar="NAME[=WEIGHT]",
                     help="instead of the preset's: a scenario, templates, smoke, flame, phyworld:FILE, videos:DIR; "
                     "may be repeated")  # fmt: skip
    sub.add_argument("--level", choices=CAPTION_LEVELS, help="what captions say (default: description)")
    sub.add_argument("--layers", type=natural, help="transformer layers that read captions (default: 0, their mean)")
    sub.add_argument("--text-encoder", metavar="DIR", help="folder or hub id of a pretrained reader of captions")
    sub.add_argument("--save-every", type=count, default=250, help="steps between saved states")
    sub.add_argument("--sample-every", type=count, default=1000, help="steps between sample grids")
    sub.add_argument("--cases", type=count, default=128, help="clips a world in the final table")
    sub.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")

    sub = command("generate", command_generate, "generate clips and write them beside the true ones as a video")
    add_sampling(sub)
    sub.add_argument("--out", required=True, help="an .mp4 file")

    metrics = commands.add_parser("eval", help="measure a model").add_subparsers(
        dest="metric", required=True, parser_class=OneLineParser, metavar="METRIC"
    )
    sub = command("trajectory", command_eval_trajectory, "trajectory errors of a model in one world", metrics)
    add_sampling(sub)
    sub.add_argument("--mode", choices=("clean", "compat"), default="clean", help="ours, or phyworld's definitions")

    sub = command("plausibility", command_eval_plausibility, "whether a model prefers lawful clips to others", metrics)
    add_cases(sub)
    sub.add_argument("--broken", default="", help="judge the model with these heads broken, for example L0H1,L3H7")

    sub = command("frechet", command_eval_frechet, "distances between sets of generated and true clips", metrics)
    add_sampling(sub)
    sub.add_argument("--features", choices=("trajectory", "efficientnet", "i3d"), default="trajectory")
    sub.add_argument("--weights", help="file with the weights of I3D")

    sub = command("physics-iq", command_eval_physics_iq, "Physics-IQ of a folder of generated videos", metrics)
    sub.add_argument("--real", required=True, metavar="DIR", help="real videos, both takes, in the official layout")
    sub.add_argument("--generated", required=True, metavar="DIR", help="generated videos of 5 s, by official name")
    sub.add_argument("--fps", type=count, required=True, help="frames/s of all videos")
    sub.add_argument("--mode", choices=("clean", "compat"), default="clean", help="ours, or the official procedure")
    sub.add_argument("--scenario", action="append", default=[], help="only this scenario; may be repeated")
    sub.add_argument("--descriptions", metavar="CSV", help="the official descriptions.csv, for categories")

    sub = command("heads", command_heads, "list the attention heads of any video transformer")
    sub.add_argument("model", nargs="?", default=str(REFERENCE_MODEL), help="folder, hub id or tiny:FAMILY")

    sub = command("hunt", command_hunt, "rank every head, then confirm the best with controls on other cases")
    sub.add_argument("--model", default=str(REFERENCE_MODEL))
    sub.add_argument("--weaker", action="append", default=[], metavar="DIR", help="worse model, for AutoGuidance")
    sub.add_argument("--preset", choices=PRESETS, default="quick", help="the other options take the place of its own")
    sub.add_argument("--out", required=True, help="run folder")
    sub.add_argument("--resume", action="store_true", help="go on with the hunt in --out")
    sub.add_argument("--heads", default="", help="hunt among these only, for example L0H1,L3H7")
    sub.add_argument("--objective", help="a score of physnb.objectives, or module:function")
    sub.add_argument("--search", choices=SEARCHES, help="all cases for every head, or a race")
    sub.add_argument("--confidence", type=float, help="of a race: chance that it keeps its promise")
    sub.add_argument("--promise", choices=PROMISES, help="of a race: the same top k as a set, or each head of it")
    sub.add_argument("--budget", type=natural, help="clips that choosing may take (0: no limit)")
    sub.add_argument("--split", choices=SPLITS)
    for name in ("--top-k", "--rounds", "--selection-cases", "--confirmation-cases", "--steps", "--random-draws"):
        sub.add_argument(name, type=count)
    sub.add_argument("--seed", type=natural)
    sub.add_argument("--kind", choices=PERTURBATION_KINDS, help="of the perturbation")
    sub.add_argument("--axis", choices=AXES, help="along which attention is broken")
    sub.add_argument("--weight", type=float, help="guidance weight w")
    sub.add_argument("--strength", type=float, help="perturbation strength u in [0, 1]")
    sub.add_argument("--batch-size", type=count, help="clips a batch (default: as many as fit)")
    sub.add_argument("--executor", choices=EXECUTORS, default="local", help="where trials run")
    sub.add_argument("--address", help="of a running Ray cluster; without it one is started here")
    sub.add_argument("--workers", type=count, help="Ray workers (default: one a GPU, or one a processor core)")

    sub = command("bench", command_bench, "time a part of the suite against the usual way")
    sub.add_argument("which", choices=("sim", "train", "heads", "metrics", "hunt"))
    sub.add_argument("--model", default=str(REFERENCE_MODEL), help="of the hunt (default: %(default)s)")
    sub.add_argument("--rounds", type=count, default=7, help="turns of each side (default: %(default)s)")

    sub = command("report", command_report, "write report.html of a run folder anew")
    sub.add_argument("folder")
    return parser


def show(result: dict[str, Any], indent: str = "") -> None:
    """A result as `name: value` lines, and its tables as aligned columns."""
    for name, value in result.items():
        if isinstance(value, dict) and "mean" in value:
            print(f"{indent}{name}: {format_cell(value)}, floor {format_cell(value.get('floor'))}")
        elif isinstance(value, dict):
            print(f"{indent}{name}:")
            show(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"\n{indent}{name}:\n{text_table(value)}\n")
        elif isinstance(value, list):
            print(f"{indent}{name}: {', '.join(map(str, value))}")
        else:
            print(f"{indent}{name}: {value:.4g}" if isinstance(value, float) else f"{indent}{name}: {value}")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        args = build_parser().parse_args(arguments)
        result = args.function(args)
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        print(f"physnb: {reason}", file=sys.stderr)
        if "--json" in arguments:
            print(json.dumps(dict(error=reason)))
        return 1
    except KeyboardInterrupt:
        print("physnb: stopped; what was saved is kept", file=sys.stderr)
        return 130
    if args.json and result is not None:
        print(json.dumps(result, allow_nan=False))
    elif result is not None:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
