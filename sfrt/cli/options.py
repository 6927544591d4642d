"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import click

from sfrt.config import Placement, Positions, Refresh, RingDType


def _numbers(text: str) -> tuple[float, ...]:
    """A list such as 1000,750,500,250."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 1000,750,500,250") from None


def stream_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The settings of a stream that the command line can change; each is None where the model decides."""
    for option in (
        click.option("--height", type=int, help="Pixels, a multiple of 16."),
        click.option("--width", type=int, help="Pixels, a multiple of 16."),
        click.option("--sink", type=int, help="Latent frames at the start that stay in view."),
        click.option(
            "--positions",
            type=click.Choice(get_args(Positions)),
            help="Where the model sees a frame: at its number in the video, or at its place in the window.",
        ),
        click.option(
            "--refresh",
            type=click.Choice(get_args(Refresh)),
            help="How clean frames come into the cache: chunk by chunk, or all in view anew before every chunk.",
        ),
        click.option("--window", type=int, help="Latent frames in view, with the sink and the chunk itself."),
        click.option(
            "--ring-dtype",
            type=click.Choice(get_args(RingDType)),
            help="What keys and values are kept in: as the model runs, or float8, half of 16 bits; slower on a CPU.",
        ),
        click.option("--shift", type=float, help="Shift of the noise schedule."),
        click.option(
            "--first-steps",
            type=_numbers,
            metavar="LIST",
            help="Timesteps of the first chunk.  [default: --steps, where given]",
        ),
        click.option(
            "--steps", type=_numbers, metavar="LIST", help="Timesteps from noise to picture, such as 1000,750,500,250."
        ),
    ):
        command = option(command)
    return command


def given_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The stream settings that were asked for; steps hold for the first chunk as well, unless it was given its own."""
    given = {name: value for name, value in settings.items() if value is not None}
    return {"first_steps": None, **given} if "steps" in given else given


def text_encoder_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--text-encoder."""
    return click.option(
        "--text-encoder",
        type=click.Choice(get_args(Placement)),
        default="auto",
        show_default=True,
        help="Where it stays: resident on the device, loaded there on demand, or in main memory (cpu).",
    )(command)


def json_option(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--json, and what it prints."""
    return click.option("--json", "as_json", is_flag=True, help=help)


device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")


def backend_option(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--backend."""
    return click.option(
        "--backend",
        default=default,
        show_default=True,
        help="What runs it: torch, onnx (or onnx:PROVIDER: cpu, cuda, tensorrt), tensorrt.",
    )
