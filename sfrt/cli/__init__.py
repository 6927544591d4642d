"""The command line: one function per verb. Each imports what it needs when it runs, so that help costs nothing."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from sfrt import __version__
from sfrt.cli.bench import bench
from sfrt.cli.bundles import export, info
from sfrt.cli.checks import doctor, verify
from sfrt.cli.serving import serve
from sfrt.cli.streams import generate
from sfrt.errors import SfrtError

BAD_INPUT = 2
INTERRUPTED = 130


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sfrt")
def cli() -> None:
    """Turn a Self Forcing checkpoint into a live video stream."""


for verb in (generate, serve, export, info, bench, verify, doctor):
    cli.add_command(verb)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a verb and exit: 0 done, 1 a check failed, 2 bad input (one line on stderr), 130 interrupted."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            status = cli.main(arguments, prog_name="sfrt", standalone_mode=False)
    except (SfrtError, click.ClickException, OSError) as error:
        sys.exit(_complain(error))
    except (click.Abort, KeyboardInterrupt):
        click.echo("sfrt: interrupted", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(status)


def _complain(error: SfrtError | click.ClickException | OSError) -> int:
    """One line on stderr that names the thing and the way out."""
    message = str(error)
    if isinstance(error, click.ClickException):
        message = error.format_message().rstrip(".")
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    if isinstance(error, click.UsageError) and error.ctx is not None:
        message += f"; see {error.ctx.command_path} --help"
    click.echo(f"sfrt: error: {' '.join(message.split())}", err=True)
    return BAD_INPUT


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """A warning as a user of the command line wants it: without the place in the source."""
    click.echo(f"sfrt: warning: {message}", err=True)
