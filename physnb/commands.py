"""What every command of `python -m physnb` does: arguments in, a result that can be printed as JSON out.

Modules are imported where they are used, so that `--help` and mistyped arguments answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from physnb.config import SIMULATED, Guidance, Perturbation, head_set, preset, require, to_json


def command_train(args: argparse.Namespace) -> dict[str, Any] | None:
    from physnb.checkpoint import fingerprint, load_model, save_model
    from physnb.data.videos import VideoSource
    from physnb.evaluate import result_table, sample_grid
    from physnb.space import latent_config
    from physnb.text import load_text_encoder
    from physnb.train import is_main_process, train, training_stream

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
    reports = [source.prepare() for source in training_stream(config).sources if isinstance(source, VideoSource)]
    for report in reports if not args.json and is_main_process() else ():
        print(report)
    scenarios = [name for name in config.sources if name in SIMULATED]
    model = train(config, folder, start=start, resume=args.resume, save_every=args.save_every, keep=args.keep,
                  sample_every=args.sample_every, on_sample=partial(sample_grid, scenarios=scenarios),
                  workers=args.workers,
                  progress=not args.json)  # fmt: skip
    if not is_main_process():
        return None  # the first process speaks for all
    result = result_table(model, cases=args.cases, seed=config.seed, scenarios=scenarios)
    save_model(model, model_folder, result)
    videos = [dict(files=r.files, clips=r.clips, skipped=r.reasons) for r in reports]
    return dict(model=str(model_folder), steps=config.steps, result=result) | (dict(videos=videos) if videos else {})


def sources_of(names: list[str]) -> dict[str, Any]:
    """The settings of a training on sources written as NAME or NAME@WEIGHT."""
    pairs = [name.rpartition("@") if "@" in name else (name, "", "1") for name in names]
    try:
        weights = tuple(float(weight) for _, _, weight in pairs)
    except ValueError:
        raise ValueError(f"--source must be NAME or NAME@WEIGHT, got {', '.join(names)}") from None
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
    from physnb.ranking import check_subject_heads
    from physnb.search import hunt_heads, pilot_power
    from physnb.store import TrialStore, prepare_folder, write_json
    from physnb.subjects import simulated_subject
    from physnb.trials import Trials

    hunt = preset(args.preset).hunt
    names = {field.name for field in dataclasses.fields(hunt)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    hunt = dataclasses.replace(hunt, **given)
    model = load_model(args.model)
    others = load_others(args.weaker)
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


def load_others(folders: list[str]) -> dict[str, Any]:
    """Models to steer away from, by the names of their folders."""
    from physnb.checkpoint import load_model

    others = {Path(folder).resolve().name: load_model(folder) for folder in folders}
    require(len(others) == len(folders), f"--weaker folders of one name ({', '.join(folders)}); rename one")
    return others


def command_study(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.checkpoint import load_model
    from physnb.executors import executor_named
    from physnb.study import PLANS, compare, judge, read_tables, run_study

    committed = read_tables(args.against) if args.against else {}
    require(not args.against or bool(committed), f"there are no tables of a study in {args.against}")
    models = dict(others=load_others(args.weaker), twin=load_model(args.twin) if args.twin else None)
    with executor_named(args.executor, address=args.address, workers=args.workers) as executor:
        settings = dict(only=args.part, executor=executor, resume=args.resume, progress=not args.json)
        tables = run_study(PLANS[args.plan], load_model(args.model), args.out, **models, **settings)
    result: dict[str, Any] = dict(folder=args.out, verdicts=[verdict.to_row() for verdict in judge(tables)])
    if committed:
        result["agreement"] = compare(committed, tables)
        others = [row["table"] for row in result["agreement"] if not row["agrees"]]
        require(
            not others, f"{', '.join(others)}: too many estimates outside of the committed intervals; see {args.out}"
        )
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
    from physnb.bench_data import bench_data
    from physnb.bench_heads import bench_heads
    from physnb.bench_hunt import bench_hunt
    from physnb.checkpoint import load_model
    from physnb.standings import bench_metrics

    if args.which == "hunt":
        return bench_hunt(load_model(args.model), preset("quick").hunt, args.rounds)
    benches = dict(sim=bench_simulator, train=bench_training, heads=bench_heads, metrics=bench_metrics, data=bench_data)
    return benches[args.which](rounds=args.rounds)


def command_scaling(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.scaling import scaling_table

    return dict(utilisation=args.utilisation, table=scaling_table(utilisation=args.utilisation))


def command_codec(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.codec import load_codec, reconstruction_floor, train_small_codec
    from physnb.data import simulate

    require(bool(args.codec) != bool(args.out), "give a codec to measure, or --out to train a small one")
    codec = load_codec(args.codec) if args.codec else train_small_codec(args.out, progress=not args.json)
    clips = simulate(args.scenario, args.split, range(args.cases), frames=args.frames, size=args.size)
    return dict(codec=args.codec or args.out, kind=codec.name, floor=reconstruction_floor(codec, clips))


def command_export(args: argparse.Namespace) -> dict[str, Any]:
    from physnb.data.phyworld import simulate_phyworld

    require(not Path(args.out).exists(), f"{args.out} exists; choose another name or delete it")
    count = simulate_phyworld(args.out, args.scenario, args.cases, split=args.split, seed=args.seed)
    return dict(file=args.out, clips=count)
