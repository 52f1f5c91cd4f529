"""The command line: what is installed, what would run and why, in words or as JSON.

Starting up is cheap: a subcommand's module is imported when that subcommand is invoked or its own
help is shown, so ``polyattn --help`` imports click and nothing else of weight.

Every :class:`~polyattn.errors.PolyattnError` ends as one message on stderr and exit code 1, as JSON
on stdout where ``--json`` was given, and as a traceback only with ``--debug`` or
``POLYATTN_DEBUG=1``. Usage errors exit with 2, Ctrl-C with 130; a closed pipe is silent.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import IO, Any

import click
from click.shell_completion import CompletionItem

from polyattn.errors import PolyattnError, nearest

__all__ = ["JSON_WANTED", "main"]

# Subcommand to the line `polyattn --help` shows. The command `new-plugin` would be the object
# `new_plugin` in the module `polyattn.cli.new_plugin`.
SUMMARIES = {
    "generate": "Make a video, and say which backend ran where.",
    "backends": "List the installed backends, and why each can or cannot run.",
    "matrix": "Show which backend supports which platform.",
    "explain": "Show which backend would serve a request, and why.",
    "config": "Show a backend's parameters, or check a configuration.",
    "doctor": "Check this machine and this installation.",
}

# Keys of click's per-invocation `meta`, shared by the group and its subcommand.
JSON_WANTED = "polyattn.cli.json"
DEBUG_WANTED = "polyattn.cli.debug"

EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C


class _ShownError(click.ClickException):
    """An error as the reader sees it: one message on stderr, or one JSON object on stdout."""

    exit_code = 1

    def __init__(self, error: Exception, *, as_json: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.as_json = as_json

    def show(self, file: IO[Any] | None = None) -> None:
        if self.as_json:
            click.echo(json.dumps({"error": self._as_data()}, indent=2))
            return
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(self.message, err=True)

    def _as_data(self) -> dict[str, Any]:
        error = self.error
        message, hint = str(error), None
        if isinstance(error, PolyattnError):
            message, hint = error.message, error.hint
        return {"type": type(error).__name__, "message": message, "hint": hint}


class _LazyGroup(click.Group):
    """A group that knows its subcommands by name and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUMMARIES:
            return None
        attribute = cmd_name.replace("-", "_")
        command = getattr(importlib.import_module(f"polyattn.cli.{attribute}"), attribute)
        assert isinstance(command, click.Command)
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(_debug_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in SUMMARIES and not name.startswith("-") and not ctx.resilient_parsing:
            close = nearest(name, SUMMARIES)
            meant = f" Did you mean {' or '.join(close)}?" if close else ""
            ctx.fail(f"No such command {name!r}.{meant}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        commands = [
            CompletionItem(name, help=summary)
            for name, summary in SUMMARIES.items()
            if name.startswith(incomplete)
        ]
        # click's own version imports every subcommand for its help; Command's completes options.
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
        except (PolyattnError, ModuleNotFoundError) as error:
            if _debugging(ctx) or not _is_for_the_reader(error):
                raise
            raise _ShownError(error, as_json=ctx.meta.get(JSON_WANTED, False)) from error


def _debugging(ctx: click.Context) -> bool:
    from_environment = os.environ.get("POLYATTN_DEBUG", "").strip().lower()
    return bool(ctx.meta.get(DEBUG_WANTED)) or from_environment not in ("", "0", "false", "no")


def _is_for_the_reader(error: Exception) -> bool:
    """Whether the message alone is enough; a missing module is, where polyattn explains it."""
    return isinstance(error, PolyattnError) or "Try:" in str(error)


def _remember_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG_WANTED] = True


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_remember_debug,
        help="Show tracebacks (also POLYATTN_DEBUG=1).",
    )


def _show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib import metadata

    try:
        version = metadata.version("polyattn")
    except metadata.PackageNotFoundError:
        version = "(not installed as a distribution)"
    click.echo(f"polyattn {version}")
    ctx.exit()


def _write_any_text() -> None:
    """Let stdout take every character: what its encoding lacks is escaped, not an exception."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Every attention kernel a diffusion model can use, behind one contract."""
    _write_any_text()


main.params.append(_debug_option())
