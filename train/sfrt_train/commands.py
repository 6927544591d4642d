"""`prepare` and `finetune`: Self Forcing for other models than the one the recipe makes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from sfrt.bundle import Bundle, resolve_model
from sfrt_train.finetune import Finetuning, Published, export, finetune, read_settings
from sfrt_train.memory import memory, table
from sfrt_train.prepare import Sources, prepare
from sfrt_train.shards import DataFolder

VERBS = ("prepare", "finetune")


def main(arguments: Sequence[str]) -> None:
    """Parse `VERB …` and run it. Raises the errors of what it runs."""
    parser = argparse.ArgumentParser(prog="sfrt_train", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", required=True, help="bundle to train, or the name of the one that comes with sfrt")
    shared.add_argument("--data", type=Path, help="folder of shards")
    shared.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    shared.add_argument("--threads", type=int, help="CPU threads")
    of_prepare = verbs.add_parser(
        "prepare", parents=[shared], help="prompts and clips to shards of embeddings, latents"
    )
    of_prepare.add_argument("--prompts", type=Path, required=True, help="text file, a prompt in each line")
    of_prepare.add_argument("--clips", type=Path, help="folder of videos, each beside its text (for the loss 'gan')")
    of_prepare.add_argument("--unprompted", default="", help="what a video without a prompt is told, such as Wan's")
    of_prepare.add_argument("--chunks", type=int, default=7, help="length of a clip [7]")
    of_prepare.add_argument("--per-shard", type=int, default=512, help="prompts or clips in a shard [512]")
    of_finetune = verbs.add_parser("finetune", parents=[shared], help="the Self Forcing stage, and a bundle of its end")
    of_finetune.add_argument("--judge", required=True, help="bundle of the bidirectional teacher")
    of_finetune.add_argument("--critic", help="bundle that the critic starts as [the judge]")
    of_finetune.add_argument("--folder", type=Path, required=True, help="checkpoint and log, to go on from")
    of_finetune.add_argument("--config", type=Path, help="TOML file of settings")
    of_finetune.add_argument("--until", type=int, help="step to stop at, to go on from another time")
    of_finetune.add_argument("--output", type=Path, help="bundle to write [FOLDER/bundle]")
    of_finetune.add_argument("--dry-run", action="store_true", help="only say what memory it takes")
    parsed = parser.parse_args(arguments)
    if parsed.data is None and not getattr(parsed, "dry_run", False):
        parser.error("the following arguments are required: --data")
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    (_prepare if parsed.verb == "prepare" else _finetune)(parsed)


def _prepare(parsed: argparse.Namespace) -> None:
    model = Bundle.open(resolve_model(parsed.model), verify=False)
    sources = Sources.read(parsed.prompts, parsed.clips, parsed.unprompted)
    prepare(model, sources, parsed.data, parsed.device, chunks=parsed.chunks, per_shard=parsed.per_shard)
    print(f"{len(sources.prompts)} prompts and {len(sources.clips)} clips are in {parsed.data}")


def _finetune(parsed: argparse.Namespace) -> None:
    model, judge, critic = (
        Bundle.open(resolve_model(path), verify=False)
        for path in (parsed.model, parsed.judge, parsed.critic or parsed.judge)
    )
    settings = read_settings(parsed.config, model.manifest)
    if parsed.dry_run:
        print(table(memory(settings, model.manifest.model, judge.manifest.model, critic.manifest.model)))
        return
    run = Finetuning(settings, model.manifest.model)
    material = Published(run, model, judge, critic, DataFolder(parsed.data, model.manifest), parsed.device)
    finetune(material, parsed.folder, parsed.until)
    print(f"wrote {export(model, settings, parsed.folder, parsed.output or parsed.folder / 'bundle').path}")
