"""`sfrt serve`: a page and a protocol to watch and steer streams with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from sfrt.cli.options import backend_option, device_option
from sfrt.errors import ConfigError


@click.command()
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 is the whole network.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--token", envvar="SFRT_TOKEN", default="", help="What a client must know.  [env: SFRT_TOKEN]")
@click.option("--origin", "origins", multiple=True, metavar="URL", help="Another server whose pages may connect.")
@click.option("--sessions", type=click.IntRange(1), default=4, show_default=True, help="Viewers at once.")
@click.option("--fps", type=click.IntRange(1), help="Frames per second that are shown.  [default: the model's own]")
@click.option("--idle", "idle_s", type=float, default=600.0, show_default=True, help="Seconds a viewer may be silent.")
@click.option("--longest", "longest_s", type=float, default=0.0, show_default=True, help="Seconds of a visit; 0: any.")
@click.option("--record-seconds", "record_s", type=float, default=120.0, show_default=True, help="Longest recording.")
@click.option("--recordings", type=click.IntRange(0), default=20, show_default=True, help="How many are kept.")
@click.option(
    "--record-to",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    help="Where to keep them.  [default: a temporary folder, gone with the server]",
)
@click.option("--ray", "on_ray", is_flag=True, help="Replicas on a Ray cluster; else one server, here.")
@click.option("--replicas", type=click.IntRange(1), help="With --ray.  [default: one per GPU; on CPUs 1]")
@device_option
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@backend_option("auto")
def serve(
    model: str | None,
    host: str,
    port: int,
    token: str,
    origins: tuple[str, ...],
    fps: int | None,
    record_to: Path | None,
    on_ray: bool,
    replicas: int | None,
    device: str,
    dtype: str,
    backend: str,
    **limits: Any,
) -> None:
    """Serve MODEL, a bundle (default: the built-in model), as a page to watch and steer.

    With --ray there are several servers of it behind one address, each with a GPU and --sessions viewers of its own.
    """
    if replicas is not None and not on_ray:
        raise ConfigError("--replicas is for --ray; without it there is one server")
    with _needing("serve"):
        from sfrt.server.serving import Address, ModelChoice, serve
    from sfrt.server.limits import Limits

    address = Address(host, port, token, origins, record_to, replace(Limits(), **limits))
    if address.open_to_all:
        click.echo(
            f"sfrt: warning: anyone who can reach {host} may use this server; give it a token with --token", err=True
        )
    choice = ModelChoice(model, device, dtype, backend, fps)
    name = choice.name

    def announce(url: str) -> None:
        click.echo(f"{name} is at {url}", err=True)

    if on_ray:
        with _needing("ray"):
            from sfrt.server.replicas import Fleet, serve_replicas
        serve_replicas(Fleet(choice, address, replicas), announce)
    else:
        serve(choice.open(), address, announce)


@contextmanager
def _needing(extra: str) -> Iterator[None]:
    """Imports from libraries that come with an extra. Raises ConfigError where it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("sfrt"):
            raise
        raise ConfigError(f"serving needs {error.name}; install it with: pip install 'sfrt[{extra}]'") from None
