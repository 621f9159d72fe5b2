"""python -m hypersd {draw, methods, evaluate, bench, emoji}: parse, call, turn a wrong input into one sentence.

A command is one row in COMMANDS: its help line, a function that adds its arguments, a function that runs it. What a
command needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hypersd import __version__
from hypersd.records import InputError, Problem, Request


class Command(NamedTuple):
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def draw_arguments(parser: argparse.ArgumentParser) -> None:
    # Numbers arrive as text and are checked by Request, which explains what is allowed better than argparse.
    parser.add_argument("--prompt", required=True, help="what to draw")
    parser.add_argument("--negative-prompt", default="", help="what to stay away from; needs guidance above 1")
    parser.add_argument("--backbone", default="emoji", help="emoji, sd15, or a model's folder (default: %(default)s)")
    parser.add_argument("--method", default="base", help="see `python -m hypersd methods` (default: %(default)s)")
    parser.add_argument("--steps", default=25, help="network steps (default: %(default)s)")
    parser.add_argument("--guidance", help="guidance scale (default: what the method was made for)")
    parser.add_argument("--eta", help="share of fresh noise a step, 0 to 1 (default: what the method was made for)")
    parser.add_argument("--seed", default=0, help="seed of the initial noise (default: %(default)s)")
    parser.add_argument("--out", default="picture.png", help="PNG to write, provenance inside (default: %(default)s)")


def draw_command(given: argparse.Namespace) -> None:
    from hypersd.pictures import check_png_path, save_png

    request = Request(
        given.prompt, given.seed, given.steps, given.guidance, given.eta, negative_prompt=given.negative_prompt
    )
    out = check_png_path(given.out)
    from hypersd import methods

    method = methods.find(given.method)
    method.check(request)
    from hypersd.backbone import Backbone
    from hypersd.generate import draw

    backbone = Backbone.load(given.backbone)
    for text in (request.prompt, request.negative_prompt):
        if ignored := backbone.truncated(text):
            print(f"note: too long for {backbone.name}, this part is ignored: {ignored}", file=sys.stderr)
    panel = draw(backbone, request, method)
    save_png(panel, out)
    print(
        f"{out}: {panel.method}, {panel.steps} steps, {panel.nfe} NFE, {panel.seconds:.2f} s, seed {panel.seed}, "
        f"noise {panel.noise_sha256[:8]}, {panel.backbone} (licence: {backbone.licence})"
    )


def methods_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="every field, for programs")


def methods_command(given: argparse.Namespace) -> None:
    from hypersd.methods import METHODS

    rows = [method.describe() for method in METHODS.values()]
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'method':<10} {'steps':<8} {'guidance':<9} {'sampler':<8} {'licence':<14} summary")
    for method in METHODS.values():
        print(
            f"{method.name:<10} {method.steps!s:<8} {method.guidance:<9g} {method.sampler:<8} "
            f"{method.licence:<14} {method.summary} {method.paper}"
        )


def emoji_arguments(parser: argparse.ArgumentParser) -> None:
    from hypersd.emoji import PARTS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "parts, in the order they are made:\n" + "".join(f"  {n:<12} {t}\n" for n, t in PARTS.items())
    parser.add_argument("part", choices=PARTS, help="which part")
    parser.add_argument("--runs", default="runs/emoji", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on from there")


def emoji_command(given: argparse.Namespace) -> None:
    from importlib import import_module
    from pathlib import Path

    import_module(f"hypersd.emoji.{given.part}").make(Path(given.runs), minutes=given.minutes)


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="emoji", help="emoji, sd15, or a model's folder (default: %(default)s)")
    parser.add_argument("--sets", help="frozen prompt sets, with commas (default: all four)")
    parser.add_argument("--prompts", help="a text file instead, one prompt a line")
    parser.add_argument("--methods", help="methods, with commas (default: all)")
    parser.add_argument("--steps", default="1,2,4,8", help="step counts (default: %(default)s)")
    parser.add_argument("--teacher-steps", help="of the base model, the last one is compared with (default: 25,50)")
    parser.add_argument("--seeds", help="drawings of each prompt (default: 4)")
    parser.add_argument("--limit", help="at most so many prompts a set, spread evenly (default: all)")
    parser.add_argument("--metrics", help="metrics, with commas (default: all)")
    parser.add_argument("--artwork", default="runs/emoji/artwork", help="the real pictures (default: %(default)s)")
    parser.add_argument("--out", help="folder of pictures and report (default: runs/evaluate, -quick or -ladder)")
    parser.add_argument("--quick", action="store_true", help="6 prompts a set, 2 drawings, teacher of 25 steps")
    parser.add_argument("--ladder", action="store_true", help="ask which metrics can be believed, of the base model")


def evaluate_command(given: argparse.Namespace) -> None:
    from pathlib import Path

    if given.backbone != "emoji" and not (given.sets or given.prompts or given.ladder):
        raise InputError(f"{given.backbone[:80]} has no prompts of its own; give --prompts FILE or --sets")
    from hypersd import evaluate
    from hypersd.evaluate import ladder, plan

    kind = "-ladder" if given.ladder else "-quick" if given.quick else ""
    out, artwork = Path(given.out or f"runs/evaluate{kind}"), Path(given.artwork)
    if given.ladder:
        limit, seeds = given.limit or (12 if given.quick else 60), given.seeds or 2
        page = ladder.run(given.backbone, out, artwork, limit=limit, seeds=seeds)
    else:
        wanted = plan.make(
            sets=given.sets,
            file=given.prompts,
            methods=given.methods,
            steps=given.steps,
            teacher_steps=given.teacher_steps or ("25" if given.quick else plan.TEACHER_STEPS),
            seeds=given.seeds or (2 if given.quick else 4),
            limit=given.limit or (plan.QUICK if given.quick else None),
        )
        metrics = evaluate.chosen(given.metrics, quick=given.quick)
        page = evaluate.run(wanted, given.backbone, out, metrics, artwork)
    if page:
        print(page)


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="emoji", help="emoji, sd15, or a model's folder (default: %(default)s)")
    parser.add_argument("--rounds", default=15, help="timings of each kind of work (default: %(default)s)")
    parser.add_argument("--out", default="runs/bench", help="folder of bench.json and its plot (default: %(default)s)")


def bench_command(given: argparse.Namespace) -> None:
    from pathlib import Path

    from hypersd import bench

    content = bench.run(given.backbone, given.rounds)
    bench.write(Path(given.out), content)
    print(bench.table(content))


COMMANDS = {
    "draw": Command("draw one picture", draw_arguments, draw_command),
    "methods": Command("list the methods", methods_arguments, methods_command),
    "evaluate": Command("measure methods against the teacher, with intervals", evaluate_arguments, evaluate_command),
    "bench": Command("how fast it is here", bench_arguments, bench_command),
    "emoji": Command("make the embedded model, part by part", emoji_arguments, emoji_command),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did what was asked, 2 if the input was wrong, 1 if something else a person can mend
    stopped it, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m hypersd", description="Distil, compare, vote, feed back.")
    parser.add_argument("--version", action="version", version=__version__)
    choices = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(choices.add_parser(name, help=command.help, description=f"{command.help}."))
    given = parser.parse_args(arguments)
    try:
        COMMANDS[given.command].run(given)
    except Problem as problem:
        print(f"hypersd: {problem}", file=sys.stderr)
        return 2 if isinstance(problem, InputError) else 1
    except KeyboardInterrupt:
        print("hypersd: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
