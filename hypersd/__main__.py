"""python -m hypersd COMMAND: parse, call, turn a wrong input into one sentence.

A command is one row in COMMANDS: its help line, a function that adds its arguments, a function that runs it. What a
command needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hypersd import __version__
from hypersd.records import InputError, Problem, Request, real_number, whole_number

if TYPE_CHECKING:
    from hypersd.releases import Release


class Command(NamedTuple):
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def holding_arguments(parser: argparse.ArgumentParser, engine: bool = True) -> None:
    """How the model is held in memory and drawn with: what the app asks HYPERSD_ENGINE, _DECODER and _OFFLOAD for."""
    if engine:
        parser.add_argument("--engine", default="torch", help="torch or openvino (default: %(default)s)")
    parser.add_argument("--decoder", default="", help="a quicker, smaller one: quick, or its folder (default: its own)")
    parser.add_argument("--offload", action="store_true", help="text encoders and decoder wait in main memory, which "
                        "leaves room on a GPU")  # fmt: skip


def holding(given: argparse.Namespace) -> dict[str, Any]:
    """The same as arguments of `Backbone.load`."""
    from hypersd.backbone import best_device

    if given.offload and (best_device() == "cpu" or vars(given).get("engine", "torch") != "torch"):
        print("note: --offload changes nothing here: there is no GPU to make room on", file=sys.stderr)
    return {key: vars(given)[key] for key in ("engine", "decoder", "offload") if key in given}


def draw_arguments(parser: argparse.ArgumentParser) -> None:
    # Numbers arrive as text and are checked by Request, which explains what is allowed better than argparse.
    parser.add_argument("--prompt", required=True, help="what to draw")
    parser.add_argument("--negative-prompt", default="", help="what to stay away from, by guidance above 1 or --nag")
    parser.add_argument("--nag", help="how far from it, 1 to 20, where guidance is not above 1 (default: not at all)")
    parser.add_argument("--backbone", default="emoji", help="emoji, sd15, sdxl or a folder (default: %(default)s)")
    parser.add_argument("--method", default="base", help="see `python -m hypersd methods` (default: %(default)s)")
    parser.add_argument("--steps", default=25, help="network steps (default: %(default)s)")
    parser.add_argument("--guidance", help="guidance scale (default: what the method was made for)")
    parser.add_argument("--eta", help="share of fresh noise a step, 0 to 1 (default: what the method was made for)")
    parser.add_argument("--seed", default=0, help="seed of the initial noise (default: %(default)s)")
    holding_arguments(parser)
    parser.add_argument("--out", default="picture.png", help="PNG to write, provenance inside (default: %(default)s)")


def draw_command(given: argparse.Namespace) -> None:
    from hypersd.pictures import check_png_path, save_png

    request = Request(
        given.prompt, given.seed, given.steps, given.guidance, given.eta, given.negative_prompt, given.nag
    )
    out = check_png_path(given.out)
    from hypersd import methods

    method = methods.find(given.method, methods.installed(given.backbone))
    method.check(request)
    from hypersd.backbone import load_best
    from hypersd.generate import draw

    backbone = load_best(given.backbone, **holding(given))
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
    parser.add_argument("--backbone", default="emoji", help="emoji, sd15, sdxl or a folder (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="every field, for programs")


def methods_command(given: argparse.Namespace) -> None:
    from hypersd.methods import installed

    table = installed(given.backbone)
    rows = [method.describe() for method in table.values()]
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'method':<10} {'steps':<8} {'guidance':<9} {'sampler':<8} {'licence':<14} summary")
    for method in table.values():
        print(
            f"{method.name:<10} {method.steps!s:<8} {method.guidance:<9g} {method.sampler:<8} "
            f"{method.licence:<14} {method.summary} {method.paper}"
        )


def fetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backbone", nargs="?", help="sd15, sdxl, sd3, flux, or a folder or file of their kinds "
                        "(default: list the base models)")  # fmt: skip
    parser.add_argument("methods", nargs="*", help="methods, or names of the list (default: list them)")
    parser.add_argument("--file", help="a copy of the one file that is asked for, instead of the hub's")
    parser.add_argument("--accept-licence", action="store_true", help="of what is not for commerce, the base model too")
    parser.add_argument("--out", help="folder of the files (default: where the app looks)")


def fetch_command(given: argparse.Namespace) -> None:
    from hypersd import releases
    from hypersd.adapters import beside
    from hypersd.folders import BACKBONES, accept, check_accepted, denoiser_shapes, find_folder, network_sha256
    from hypersd.single import laid_out

    if given.backbone is None:
        for name, preset in BACKBONES.items():
            print(f"{name:<6} {preset.licence:<64} {preset.summary}")
        return
    backbone = str(laid_out(given.backbone))
    out = Path(given.out) if given.out else beside(backbone)[1]
    wanted = releases.chosen(backbone, given.methods)
    if given.accept_licence:
        accept(backbone)
    if not wanted:
        _list_releases(given.backbone, releases.of(backbone), out)
        return
    check_accepted(backbone)
    if (closed := [release for release in wanted if not release.commercial]) and not given.accept_licence:
        raise InputError(
            f"{closed[0].method} by {closed[0].repository} is {closed[0].licence}; "
            "if that suits you, say --accept-licence"
        )
    if given.file and len(wanted) > 1:
        names = ", ".join(release.name for release in wanted)
        raise InputError(f"--file is one file, but {', '.join(given.methods)} are {len(wanted)}: {names}")
    base = BACKBONES[given.backbone].summary if given.backbone in BACKBONES else given.backbone
    print(
        f"{base}, and {sum(release.megabytes for release in wanted)} MB beside it; what is cached is not fetched again"
    )
    name, folder, licence = find_folder(backbone)
    print(f"{folder}: {licence}", flush=True)
    made_for, shapes = network_sha256(folder), denoiser_shapes(folder, name)
    for release in wanted:
        get = (lambda _repository, _file: Path(given.file)) if given.file else releases.hub
        print(f"{releases.fetch(release, made_for, out, get, shapes).path}: {release.licence}", flush=True)


def _list_releases(backbone: str, there: Sequence[Release], out: Path) -> None:
    from hypersd.folders import BACKBONES
    from hypersd.releases import describe

    for release in there:
        print(describe(release, (out / f"{release.name}.safetensors").is_file()))
    if preset := BACKBONES.get(backbone):
        print(f"with the base model: {preset.summary}; licence: {preset.licence}")
    print(f"fetch some with: python -m hypersd fetch {backbone} {there[0].method}")


def space_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="a folder that is empty or not there")
    parser.add_argument("--backbone", default="emoji", help="emoji or sd15 (default: %(default)s)")
    parser.add_argument("--with", dest="methods", help="published adapters, with commas (default: all there are)")


def space_command(given: argparse.Namespace) -> None:
    from hypersd.space import lay_out

    space = lay_out(Path(given.out), given.backbone, given.methods)
    print(f"{given.out}: {space.files} files, {space.size / 1e6:.0f} MB\n\n{space.next_steps}", end="")


def emoji_arguments(parser: argparse.ArgumentParser) -> None:
    from hypersd.emoji import PARTS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "parts, in the order they are made:\n" + "".join(f"  {n:<12} {t}\n" for n, t in PARTS.items())
    parser.add_argument("part", choices=PARTS, help="which part")
    parser.add_argument("--runs", default="runs/emoji", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on from there")


def emoji_command(given: argparse.Namespace) -> None:
    from importlib import import_module

    import_module(f"hypersd.emoji.{given.part}").make(Path(given.runs), minutes=given.minutes)


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="emoji", help="emoji, sd15, sdxl or a folder (default: %(default)s)")
    parser.add_argument("--sets", help="frozen prompt sets, with commas (default: all four)")
    parser.add_argument("--prompts", help="a text file instead, one prompt a line")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--methods", help="methods, with commas (default: all)")
    chosen.add_argument("--ablation", action="store_true", help="those parts of Hyper-SD that are there, one by one")
    parser.add_argument("--steps", default="1,2,4,8", help="step counts (default: %(default)s)")
    parser.add_argument("--teacher-steps", help="of the base model, the last one is compared with (default: 25,50)")
    parser.add_argument("--guidance", help="the teacher's, for students taught at another (default: the base model's)")
    parser.add_argument("--rivals", help="arms to compare with each other, such as hyper@1:lcm@4,hyper@1:tcd@4")
    parser.add_argument("--seeds", help="drawings of each prompt (default: 4)")
    parser.add_argument("--limit", help="at most so many prompts a set, spread evenly (default: all)")
    parser.add_argument("--metrics", help="metrics, with commas (default: all)")
    parser.add_argument("--artwork", default="runs/emoji/artwork", help="the real pictures (default: %(default)s)")
    parser.add_argument("--out", help="folder of pictures and report (default: runs/evaluate, -quick, -ablation or "
                        "-ladder)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="3 prompts a set, 2 drawings, teacher of 25 steps")
    holding_arguments(parser)
    parser.add_argument("--publish", action="store_true", help="into assets too: what the app and the reports go by")
    parser.add_argument("--ladder", action="store_true", help="ask which metrics can be believed, of the base model")


def evaluate_command(given: argparse.Namespace) -> None:
    from pathlib import Path

    if given.backbone != "emoji" and not (given.sets or given.prompts or given.ladder):
        raise InputError(f"{given.backbone[:80]} has no prompts of its own; give --prompts FILE or --sets")
    from hypersd import evaluate
    from hypersd.evaluate import ladder, plan

    if given.publish and (given.decoder or given.offload):
        raise InputError("what is published is drawn as the app does by itself; leave --decoder and --offload out")
    if given.guidance is not None and (given.ladder or given.publish):
        raise InputError("what is published, and the ladder, are of the teacher as it is drawn; leave --guidance out")
    kind = "-ladder" if given.ladder else "-ablation" if given.ablation else "-quick" if given.quick else ""
    out, artwork = Path(given.out or f"runs/evaluate{kind}"), Path(given.artwork)
    if given.ladder:
        limit, seeds = given.limit or (12 if given.quick else 60), given.seeds or 2
        page = ladder.run(given.backbone, out, artwork, limit=limit, seeds=seeds, **holding(given))
    else:
        wanted = plan.make(
            backbone=given.backbone,
            sets=given.sets,
            file=given.prompts,
            methods=_parts(given.backbone) if given.ablation else given.methods,
            steps=given.steps,
            teacher_steps=given.teacher_steps or ("25" if given.quick else plan.TEACHER_STEPS),
            seeds=given.seeds or (2 if given.quick else 4),
            limit=given.limit or (plan.QUICK if given.quick else None),
            guidance=given.guidance,
            rivals=given.rivals,
        )
        metrics = evaluate.chosen(given.metrics, quick=given.quick, published=given.backbone != "emoji")
        page = evaluate.run(wanted, given.backbone, out, metrics, artwork, **holding(given))
    if page:
        print(page)
        if given.publish and given.ladder:
            ladder.publish(out)
        elif given.publish:
            from hypersd.bench import publish

            if given.ablation:
                publish(out, given.backbone, "report.json", prefix="ablation-")
            elif given.rivals:
                publish(out, given.backbone, "report.json", prefix="rivals-")
            else:
                publish(out, given.backbone, "report.json", "quality.png")


def _parts(backbone: str) -> list[str]:
    """The parts of the ablation that can draw on a backbone; InputError if there is nothing to hold side by side."""
    from hypersd.evaluate import paper
    from hypersd.methods import installed

    rows = installed(backbone)
    there = paper.at_hand(rows)
    if paper.REFINED in there:
        name = paper.learned(file.card.recipe for file in rows[paper.REFINED].adapters)
        if name != paper.REFINED:
            there.remove(paper.REFINED)
            told = f"convert {paper.REFINED} --name {name} --out FILE, in the LoRA folder"
            print(f"{paper.REFINED} was not refined for likeness and is left out; to have it: {told}", file=sys.stderr)
    if len(there) < 2:
        wanted = ", ".join(part.method for part in paper.ABLATION)
        raise InputError(f"an ablation needs two of {wanted}, found {there or 'none'}; see python -m hypersd distill")
    return there


def sheet_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arms", required=True, help="columns with commas, such as base@25,hyper@1")
    parser.add_argument("--backbone", default="emoji", help="emoji, sd15, sdxl or a folder (default: %(default)s)")
    parser.add_argument("--sets", help="frozen prompt sets, with commas (default: all four)")
    parser.add_argument("--prompts", help="a text file instead, one prompt a line")
    parser.add_argument("--limit", default=4, help="prompts a set, spread evenly (default: %(default)s)")
    holding_arguments(parser)
    parser.add_argument("--out", default="sheet.png", help="PNG to write, provenance inside (default: %(default)s)")


def sheet_command(given: argparse.Namespace) -> None:
    from hypersd.evaluate import plan, sheet

    columns = sheet.arms(given.arms)
    wanted = plan.make(backbone=given.backbone, sets=given.sets, file=given.prompts, limit=given.limit, seeds=1)
    sheet.make(wanted, columns, Path(given.out), given.backbone, **holding(given))
    print(f"{given.out}: {len(wanted.prompts)} prompts by {len(columns)} columns")


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="emoji", help="emoji, sd15, sdxl or a folder (default: %(default)s)")
    parser.add_argument("--rounds", default=15, help="timings of each kind of work (default: %(default)s)")
    holding_arguments(parser, engine=False)
    parser.add_argument("--out", default="runs/bench", help="folder of bench.json and its plot (default: %(default)s)")
    parser.add_argument("--publish", action="store_true", help="into assets/measured too, which the app shows")
    parser.add_argument("--training", action="store_true", help="updates of training beside the usual LCM-LoRA update")


def bench_command(given: argparse.Namespace) -> None:
    from pathlib import Path

    from hypersd import bench

    if given.training:
        if given.decoder or given.offload:
            raise InputError("--training draws nothing; leave --decoder and --offload out")
        from hypersd import throughput

        print(throughput.table(throughput.run(given.backbone, given.rounds)))
        return
    if given.publish and (given.decoder or given.offload):
        raise InputError("what is published is drawn as the app does by itself; leave --decoder and --offload out")
    content = bench.run(given.backbone, given.rounds, votes=_votes_per_second, **holding(given))
    bench.write(Path(given.out), content)
    if given.publish:
        bench.publish(Path(given.out), given.backbone, "bench.json", "bench.png")
    print(bench.table(content))


def _votes_per_second() -> float:
    import tempfile

    from hypersd.study import simulate
    from hypersd.study.definition import load

    with tempfile.TemporaryDirectory(dir=".") as folder:  # a real disk, where /tmp may be memory
        return simulate.pace(Path(folder), load())


def distill_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", help="lcm, tcd, tscd, tscd-cfg, dmd or hyper: see `python -m hypersd methods`")
    parser.add_argument("--backbone", default="emoji", help="emoji, sd15, sdxl or a folder (default: %(default)s)")
    parser.add_argument(
        "--data",
        help="captioned pictures: a folder, parquet or tar files; for dmd prompts are enough, one a line in a "
        ".txt (default: the emoji artwork)",
    )
    parser.add_argument("--runs", default="runs/distill", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--out", help="folder of the LoRA files (default: beside the backbone, where the app looks)")
    parser.add_argument("--name", help="of its row in the app (default: the method's)")
    parser.add_argument("--begin", help="the LoRA to start from: a file's name there, such as tscd-1, or the path "
                        "of one, of another base too (default: the method's, if it goes on from another)")  # fmt: skip
    parser.add_argument("--guidance", help="the teacher's scale, or a range such as 3-8 (default: the preset's)")
    for option, what in (("updates", "of each stage"), ("batch", "latents an update"), ("rank", "of the LoRA"),
                         ("accumulate", "micro-batches an update"), ("seed", "of all randomness")):  # fmt: skip
        parser.add_argument(f"--{option}", type=int, help=f"{what} (default: the preset's)")
    parser.add_argument("--start", type=int, help="timestep of score distillation and of one step (default: the last)")
    parser.add_argument("--lr", type=float, help="learning rate (default: the preset's)")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on from there")
    parser.add_argument("--checkpointing", action="store_true", help="take less memory and more time: activations are "
                        "computed again instead of kept")  # fmt: skip
    parser.add_argument("--tensorboard", action="store_true", help="losses and measures for TensorBoard too, in --runs")
    parser.add_argument("--dry-run", action="store_true", help="say what it will take, train nothing")


def distill_command(given: argparse.Namespace) -> None:
    from dataclasses import replace

    from hypersd import distill
    from hypersd.adapters import asked_for, beside
    from hypersd.emoji import training

    method = distill.find(given.method)
    settings, recipe, _ = distill.preset(given.backbone)
    changed = {k: v for k in ("updates", "batch", "accumulate", "seed", "lr") if (v := getattr(given, k)) is not None}
    recipe = replace(recipe, **changed)
    settings = replace(settings, rank=settings.rank if given.rank is None else given.rank, start=given.start,
                       guidance=_span(given.guidance, settings.guidance))  # fmt: skip
    load = distill.loader(given.backbone)
    if given.dry_run:
        from hypersd.plan import dry_run

        for line in dry_run(method, load(), settings, recipe, checkpointing=given.checkpointing):
            print(line, flush=True)
        return
    runs, out = (
        Path(given.runs) / Path(given.backbone).name,
        Path(given.out) if given.out else beside(given.backbone)[1],
    )
    begin = asked_for(out, given.begin) if given.begin else None
    files = distill.run(
        method,
        load,
        training.opener(given.data, runs),
        settings,
        recipe,
        runs,
        out,
        name=given.name,
        begin=begin,
        minutes=given.minutes,
        checkpointing=given.checkpointing,
        tensorboard=given.tensorboard,
    )
    for file in files:
        print(f"{file.path}: {file.card.segments} segment(s), {file.card.updates} updates, sha256 {file.sha256[:12]}")


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lora", help="a file's name in the LoRA folder, such as tscd-4, or the path of one")
    parser.add_argument("--out", required=True, help="the .safetensors to write")
    parser.add_argument("--backbone", default="emoji", help="whose LoRA folder (default: %(default)s)")
    parser.add_argument(
        "--kohya", action="store_true", help="kohya's names, for ComfyUI and A1111 (default: diffusers')"
    )
    parser.add_argument("--scale", default=1.0, help="times so much, -10 to 10 (default: %(default)s)")
    parser.add_argument("--onto", help="another one, on top of which it is put; its card and row are kept")
    parser.add_argument("--name", help="of its row in the app, where it lies in the LoRA folder (default: as it was)")


def convert_command(given: argparse.Namespace) -> None:
    from hypersd.adapters import asked_for, beside
    from hypersd.convert import convert
    from hypersd.distill import check_name
    from hypersd.methods import find

    folder, out = beside(given.backbone)[1], Path(given.out)
    onto = asked_for(folder, given.onto) if given.onto else None
    lora = asked_for(folder, given.lora)
    name = given.name and check_name(given.name, find((onto or lora).card.method))
    made = convert(lora, out, scale=given.scale, onto=onto, kohya=given.kohya, name=name)
    print(f"{made.path}: rank {made.card.rank}, {'kohya' if given.kohya else 'diffusers'}, sha256 {made.sha256[:12]}")


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="emoji", help="emoji, sd15, sdxl, or a model's folder, whose weights are "
                        "not read (default: %(default)s)")  # fmt: skip
    parser.add_argument("--method", default="tscd", help="what is trained (default: %(default)s)")
    parser.add_argument("--gpus", default=1, help="how many (default: %(default)s)")
    parser.add_argument("--gpu", default="h100", help="a100, h100, h200, l40s or rtx4090 (default: %(default)s)")
    parser.add_argument("--utilisation", help="share of its peak that is used (default: a guess, which is printed)")
    parser.add_argument("--price-per-hour", help="of one GPU (default: no costs are told)")
    for option, what in (("updates", "of each stage"), ("batch", "latents an update"), ("rank", "of the LoRA"),
                         ("accumulate", "micro-batches an update on each GPU")):  # fmt: skip
        parser.add_argument(f"--{option}", type=int, help=f"{what} (default: the preset's)")


def plan_command(given: argparse.Namespace) -> None:
    from dataclasses import replace

    from hypersd import distill, plan

    machines = plan.Machines.of(given.gpu, given.gpus, given.utilisation, given.price_per_hour)
    method = distill.find(given.method)
    settings, recipe, _ = distill.preset(given.backbone)
    changed = {k: v for k in ("updates", "batch", "accumulate") if (v := getattr(given, k)) is not None}
    settings = settings if given.rank is None else replace(settings, rank=given.rank)
    for line in plan.on_paper(given.backbone, method, settings, replace(recipe, **changed), machines):
        print(line)


def _span(text: str | None, otherwise: tuple[float, float]) -> tuple[float, float]:
    """ "3-8" -> (3.0, 8.0), "4" -> (4.0, 4.0)"""
    if text is None:
        return otherwise
    low, _, high = text.partition("-")
    return (real_number(low, "guidance", 1.0, 30.0), real_number(high or low, "guidance", 1.0, 30.0))


def gather_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", nargs="+", help="parquet files, or folders of them, as LAION and COYO publish them; "
                        "or addresses: https://.., or hf://datasets/OWNER/NAME/.. with a pattern or not")  # fmt: skip
    parser.add_argument(
        "--out", required=True, help="folder of the tars; the same command goes on where it was stopped"
    )
    parser.add_argument("--side", default=512, help="of the squares, in pixels; 1024 for SDXL (default: %(default)s)")
    parser.add_argument(
        "--smallest", default=1024, help="shorter side before cutting, in pixels (default: %(default)s)"
    )
    parser.add_argument("--aesthetic", default=5.5, help="keep what is above, 0 to 10, or off (default: %(default)s)")
    parser.add_argument("--watermark", default=0.5, help="keep what is below, 0 to 1, or off (default: %(default)s)")
    parser.add_argument("--unsafe", default=0.1, help="keep what is below, 0 to 1, or off (default: %(default)s)")
    parser.add_argument(
        "--sharpness", default=2.0, help="least log10 of the Laplacian's variance (default: %(default)s)"
    )
    parser.add_argument(
        "--near", default=4, help="bits of 64 in which pictures count as the same (default: %(default)s)"
    )
    parser.add_argument("--shortest", default=5, help="characters of a caption (default: %(default)s)")
    parser.add_argument("--score", action="store_true", help="find out the aesthetic score where the index has none")
    parser.add_argument("--rows", default=10_000, help="of the index that make one tar (default: %(default)s)")
    parser.add_argument("--threads", default=32, help="downloads at a time (default: %(default)s)")
    parser.add_argument("--megabytes", default=20, help="largest download (default: %(default)s)")
    parser.add_argument("--seconds", default=20, help="longest download, tried twice (default: %(default)s)")
    parser.add_argument("--allow-private", action="store_true", help="let the index name addresses of your own network")


def gather_command(given: argparse.Namespace) -> None:
    import warnings
    from dataclasses import fields

    from hypersd import scores
    from hypersd.data import gather, index
    from hypersd.data.download import Downloads

    warnings.filterwarnings("ignore", module=r"PIL\.")  # odd pictures are counted
    wanted = gather.Wanted(**{field.name: getattr(given, field.name) for field in fields(gather.Wanted)})
    downloads = Downloads(
        largest=1_000_000 * whole_number(given.megabytes, "megabytes", 1, 1000),
        seconds=real_number(given.seconds, "seconds", 0.1, 600.0),
        private=given.allow_private,
    )
    rows, threads = whole_number(given.rows, "rows", 1, 1_000_000), whole_number(given.threads, "threads", 1, 256)
    found = index.open_index(given.index, rows)
    scorer = scores.load("aesthetic") if given.score else None
    print(gather.table(gather.gather(found, Path(given.out), wanted, downloads, scorer, threads)))


def study_arguments(parser: argparse.ArgumentParser) -> None:
    from hypersd.study import command

    command.add_arguments(parser)


def study_command(given: argparse.Namespace) -> None:
    from hypersd.study import command

    for line in command.run(given):
        print(line)


FEEDBACK = {
    "reward": "learn what is preferred, from votes, files or known order",
    "segmenter": "train the network that sees where the object is",
    "refine": "teach a distilled LoRA what a reward likes",
    "loop": "votes to reward to a better LoRA, in one go",
}


def _feedback(name: str, help: str) -> Command:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        from hypersd.feedback import command

        command.ACTIONS[name].add_arguments(parser)

    def run(given: argparse.Namespace) -> None:
        from hypersd.feedback import command

        for line in command.ACTIONS[name].run(given):
            print(line, flush=True)

    return Command(help, add_arguments, run)


COMMANDS = {
    "draw": Command("draw one picture", draw_arguments, draw_command),
    "methods": Command("list the methods", methods_arguments, methods_command),
    "fetch": Command("get published few-step LoRAs, and their base model", fetch_arguments, fetch_command),
    "gather": Command(
        "pictures and captions from an index of LAION's or COYO's kind", gather_arguments, gather_command
    ),
    "distill": Command("train a few-step method on a base model", distill_arguments, distill_command),
    "convert": Command("a LoRA file for other programs, or at another scale", convert_arguments, convert_command),
    "plan": Command("what a training would take on GPUs that need not be here", plan_arguments, plan_command),
    **{name: _feedback(name, help) for name, help in FEEDBACK.items()},
    "evaluate": Command("measure methods against the teacher, with intervals", evaluate_arguments, evaluate_command),
    "sheet": Command("prompts in rows, methods in columns, as one picture", sheet_arguments, sheet_command),
    "bench": Command("how fast it is here", bench_arguments, bench_command),
    "emoji": Command("make the embedded model, part by part", emoji_arguments, emoji_command),
    "space": Command("lay out the folder of a Hugging Face Space", space_arguments, space_command),
    "study": Command("look after the blind study", study_arguments, study_command),
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
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        print(f"hypersd: {error.strerror or error}{place}; what was saved before stands", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:  # with a sentence, where a training says how far it came
        print(f"hypersd: {str(stopped) or 'stopped'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
