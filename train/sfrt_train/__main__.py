"""`python -m sfrt_train VERB`: one verb per stage of the recipe, and `all` for the whole of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sfrt_train import autoencoder, evaluate, export, flow, reading
from sfrt_train.settings import Settings


def main() -> None:
    """Parse the command line and run the verb."""
    parser = argparse.ArgumentParser(prog="sfrt_train", description=__doc__)
    parser.add_argument("verb", choices=["autoencoder", "reading", "flow", "export", "evaluate", "all"])
    parser.add_argument("--folder", type=Path, default=Path("runs/shapes"), help="checkpoints, logs, the pool of clips")
    parser.add_argument("--output", type=Path, help="bundle to write (export, all) [FOLDER/shapes]")
    parser.add_argument("--model", type=Path, help="bundle to evaluate [the one that comes with sfrt]")
    parser.add_argument("--prompts", type=int, default=200, help="how many to evaluate")
    parser.add_argument("--skip", type=int, default=0, help="chunks to roll out before those that are read")
    parser.add_argument("--report", type=Path, help="JSON file for the evaluation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    run(arguments, Settings())


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Run one stage, or all of them in order."""
    folder, device, verb = arguments.folder, arguments.device, arguments.verb
    output, model = arguments.output or folder / export.NAME, arguments.model
    if verb in ("autoencoder", "all"):
        autoencoder.train(settings, folder, device)
    if verb in ("reading", "all"):
        reading.train(settings, folder, device)
    if verb in ("flow", "all"):
        flow.train(settings, folder, device)
    if verb in ("autoencoder", "all"):
        right = autoencoder.check(settings, folder, device)
        print("reconstructions read right:", ", ".join(f"{part} {100 * share:.0f} %" for part, share in right.items()))
    if verb in ("export", "all"):
        model = export.export(settings, folder, output).path
        print(f"wrote {model}")
    if verb in ("evaluate", "all"):
        print(evaluate.evaluate(settings, model, device, arguments.prompts, arguments.skip, arguments.report))


if __name__ == "__main__":
    main()
