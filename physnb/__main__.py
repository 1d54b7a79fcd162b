"""The command line: `python -m physnb --help`.

Every command takes --json for one JSON object on standard output, and ends with status 1 and one line on failure.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from physnb.commands import (
    command_bench,
    command_codec,
    command_eval_frechet,
    command_eval_physics_iq,
    command_eval_plausibility,
    command_eval_trajectory,
    command_export,
    command_generate,
    command_heads,
    command_hunt,
    command_report,
    command_run,
    command_scaling,
    command_study,
    command_train,
)
from physnb.config import (
    AXES,
    CAPTION_LEVELS,
    EXECUTORS,
    PERTURBATION_KINDS,
    PRESETS,
    PROMISES,
    SCENARIOS,
    SEARCHES,
    SIMULATED,
    SOLVERS,
    SPLITS,
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


def add_executor(sub: argparse.ArgumentParser) -> None:
    """Where the trials of a hunt or a study run."""
    sub.add_argument("--executor", choices=EXECUTORS, default="local", help="where trials run")
    sub.add_argument("--address", help="of a running Ray cluster; without it one is started here")
    sub.add_argument("--workers", type=count, help="Ray workers (default: one a GPU, or one a processor core)")


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
    sub.add_argument(
        "--start",
        metavar="DIR",
        help="model folder whose weights training begins with; it may be coarser, shallower, or know fewer words",
    )
    sub.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for name, kind in (("--steps", count), ("--batch", count), ("--seed", natural), ("--learning-rate", float)):
        sub.add_argument(name, type=kind, help="instead of the preset's")
    sub.add_argument("--clips", type=natural, help="distinct clips of each scenario (0, the default: none comes twice)")
    sub.add_argument("--codec", metavar="DIR", help="train in the latents of this autoencoder: folder or hub id")
    sub.add_argument("--frames", type=count, help="of a clip, where the codec does not take the preset's")
    sub.add_argument("--source", action="append", default=[], metavar="NAME[@WEIGHT]",
                     help="instead of the preset's: a scenario, templates, smoke, flame, phyworld:FILE, videos:DIR; "
                     "may be repeated")  # fmt: skip
    sub.add_argument("--level", choices=CAPTION_LEVELS, help="what captions say (default: description)")
    sub.add_argument("--layers", type=natural, help="transformer layers that read captions (default: 0, their mean)")
    sub.add_argument("--text-encoder", metavar="DIR", help="folder or hub id of a pretrained reader of captions")
    sub.add_argument("--workers", type=natural, default=0, help="processes that make batches ahead (default: none)")
    sub.add_argument("--save-every", type=count, default=250, help="steps between saved states")
    sub.add_argument("--keep", type=count, action="append", default=[], metavar="STEP",
                     help="keep the model after this step as OUT/model-STEP; may be repeated")  # fmt: skip
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
    add_executor(sub)

    sub = command(
        "study", command_study, "the pre-registered study of a model: every part, and what became of each claim"
    )
    sub.add_argument("--model", default=str(REFERENCE_MODEL))
    sub.add_argument("--weaker", action="append", default=[], metavar="DIR", help="worse model, for AutoGuidance")
    sub.add_argument("--twin", metavar="DIR", help="another training of the same shape, for transfer")
    sub.add_argument("--plan", choices=("full", "smoke"), default="full", help="sizes (default: %(default)s)")
    sub.add_argument("--part", action="append", default=[], metavar="NAME", help="only this part; may be repeated")
    sub.add_argument("--against", metavar="DIR", help="compare with the tables of this study, within their intervals")
    sub.add_argument("--out", required=True, help="folder of the study")
    sub.add_argument("--resume", action="store_true", help="go on with the study in --out")
    add_executor(sub)

    sub = command("scaling", command_scaling, "what training at phyworld's scale takes, on paper")
    sub.add_argument("--utilisation", type=float, default=0.4, help="share of the H100's peak (default: %(default)s)")

    sub = command("codec", command_codec, "reconstruction floor of an autoencoder; or train a small one")
    sub.add_argument("codec", nargs="?", help="folder or hub id of an autoencoder of diffusers")
    sub.add_argument("--out", help="folder of a small codec to train here")
    sub.add_argument("--scenario", choices=SIMULATED, default="uniform")
    sub.add_argument("--split", choices=SPLITS, default="id")
    for name, default in (("--cases", 64), ("--frames", 16), ("--size", 32)):
        sub.add_argument(name, type=count, default=default, help="(default: %(default)s)")

    sub = command("export", command_export, "write simulated clips as a file in phyworld's HDF5 layout")
    sub.add_argument("--scenario", choices=SCENARIOS, required=True)
    sub.add_argument("--split", choices=SPLITS, default="train")
    sub.add_argument("--cases", type=count, default=1000, help="clips (default: %(default)s)")
    sub.add_argument("--seed", type=natural, default=0)
    sub.add_argument("--out", required=True, help="an .hdf5 file")

    sub = command("bench", command_bench, "time a part of the suite against the usual way")
    sub.add_argument("which", choices=("sim", "data", "train", "heads", "metrics", "hunt"))
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
