"""`python -m sfrt_train VERB`: one verb per stage of the recipe, and `all` for the whole of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from sfrt.errors import SfrtError
from sfrt_train import autoencoder, commands, evaluate, export, gap
from sfrt_train.settings import Loss, Settings
from sfrt_train.stages import COMPARED, STAGES

VERBS = ("all", "baselines", *STAGES, "export", "evaluate", "gap")


def main() -> None:
    """Run what the command line says; an error that its writer can cure is one line, and status 2."""
    arguments = sys.argv[1:]
    try:
        (commands.main if arguments[:1] and arguments[0] in commands.VERBS else recipe)(arguments)
    except SfrtError as error:
        print(f"sfrt_train: {error}", file=sys.stderr)
        sys.exit(2)


def recipe(given: Sequence[str]) -> None:
    """Parse and run a verb of the recipe."""
    parser = argparse.ArgumentParser(
        prog="sfrt_train",
        description=f"{__doc__} `baselines` trains what the model is compared with: {', '.join(COMPARED)}. "
        f"Other models: `{'`, `'.join(commands.VERBS)}`, each with a --help of its own.",
    )
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--folder", type=Path, default=Path("runs/shapes"), help="checkpoints, logs, pools of clips")
    parser.add_argument("--stage", choices=tuple(STAGES), default="self_forcing", help="whose model to export")
    parser.add_argument("--until", type=int, help="step to stop a stage at, to go on from another time")
    parser.add_argument("--loss", choices=get_args(Loss), help="what Self Forcing judges videos by [dmd]")
    parser.add_argument("--output", type=Path, help="bundle to write (export, all) [FOLDER/shapes]")
    parser.add_argument("--model", type=Path, help="bundle to evaluate [the one that comes with sfrt]")
    parser.add_argument("--prompts", type=int, help="how many to evaluate [200], or per seed for gap [40]")
    parser.add_argument("--seeds", type=int, default=3, help="of gap")
    parser.add_argument("--times", type=int, default=10, help="how many times the trained length gap goes")
    parser.add_argument("--steps", type=float, nargs="+", help="of gap, such as 1000 500 [those trained for]")
    parser.add_argument("--skip", type=int, default=0, help="chunks to roll out before those that are read (evaluate)")
    parser.add_argument("--report", type=Path, help="JSON file for the evaluation, or for gap [FOLDER/gap.json]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    arguments = parser.parse_args(given)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = Settings()
    if arguments.loss:
        settings = replace(settings, self_forcing=replace(settings.self_forcing, loss=arguments.loss))
    run(arguments, settings)


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Run one stage, or all of them in order."""
    folder, device, verb = arguments.folder, arguments.device, arguments.verb
    output, model = arguments.output or folder / export.NAME, arguments.model
    chosen = {"all": [stage for stage in STAGES if stage not in COMPARED], "baselines": COMPARED}.get(verb, [verb])
    for stage in chosen:
        if stage in STAGES:
            STAGES[stage](settings, folder, device, arguments.until)
    for stage in autoencoder.STAGES:
        if verb not in (stage, "all"):
            continue
        right = autoencoder.check(settings, folder, device, stage)
        print("reconstructions read right:", ", ".join(f"{part} {100 * share:.0f} %" for part, share in right.items()))
    if verb in ("export", "all"):
        model = export.export(settings, folder, output, arguments.stage).path
        print(f"wrote {model}")
    if verb in ("evaluate", "all"):
        count = arguments.prompts or 200
        print(evaluate.evaluate(settings, model, device, count, arguments.skip, arguments.report))
    if verb == "gap":
        report, count = arguments.report or folder / "gap.json", arguments.prompts or 40
        how = {"prompts": count, "seeds": arguments.seeds, "times": arguments.times}
        print(gap.measure(settings, folder, device, report, **how, steps=arguments.steps or ()))


if __name__ == "__main__":
    main()
