"""The `advmoe` command: one thin file per sub-command, wired together here.

Each command imports its libraries when it runs. Help and wrong arguments need none of them, and
torch takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import advmoe
from advmoe.cli import console
from advmoe.cli.analyze import analyze
from advmoe.cli.bench_onnx import bench_onnx
from advmoe.cli.compare import compare
from advmoe.cli.evaluate import evaluate
from advmoe.cli.export import export
from advmoe.cli.info import info
from advmoe.cli.options import flag
from advmoe.cli.predict import predict
from advmoe.cli.push import push
from advmoe.cli.recipes import recipes
from advmoe.cli.report import report
from advmoe.cli.reproduce import reproduce
from advmoe.cli.serve import serve
from advmoe.cli.signals import NAMES, Stopped, Terminated, handling, interrupt, resumable, terminate
from advmoe.cli.train import train
from advmoe.errors import AdvMoEError, ConfigError, LostRankError
from advmoe.world import World, launched


class Commands(TyperGroup):
    """The commands. A command that is interrupted ends with `Interrupted`."""

    def invoke(self, ctx: Any) -> Any:
        """Call the command."""
        with resumable():
            return super().invoke(ctx)


app = typer.Typer(
    name="advmoe",
    cls=Commands,
    help=(
        "Robust, cheap-to-serve CNNs: train a sparse mixture-of-experts CNN adversarially (AdvMoE, ICCV 2023), "
        "measure its robustness, export it to ONNX, serve it.\n\n"
        "A first run, without any download:  advmoe train digits --arch vgg16 --width 0.125 --epochs 3"
    ),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (train, evaluate, compare, analyze, report, export, push, predict, bench_onnx, info, recipes, reproduce):
    app.command()(command)
# The server's package parses its own arguments, so that `advmoe-serve` does not need this package.
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


TOGETHER = {"train", "evaluate", "reproduce"}
"""Commands that the processes of torchrun run together."""


def show_version(asked: bool) -> None:
    """Print the version and exit, if requested."""
    if asked:
        print(f"advmoe {advmoe.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Options before any command. Their help is the help of the program."""


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Shows a warning as one line, without its place in the source."""
    console.warn(str(message))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 an error of the user's, 130 interrupted, 143 terminated).

    A wrong option, like any other bad input, is one line on stderr. With ADVMOE_TRACEBACK=1 the
    traceback is shown too.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(handling(signal.SIGTERM, terminate))
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # jobs in the background ignore it
            stack.enter_context(handling(signal.SIGINT, interrupt))
        warnings.showwarning = show_warning
        return run(arguments)


def run(arguments: Sequence[str] | None) -> int:
    """Run the command line. Every exception becomes an exit code and a line on stderr."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    ranks = World()

    def fail(message: str, *, lost: bool = False, say: Callable[[str], None] = console.fail) -> None:
        if ranks.size > 1:
            from advmoe.distributed import first_to_say

            if lost:  # torchrun, too, has noticed, and may end this process while it waits
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if not first_to_say(message, lost=lost):
                return
        say(message)

    try:
        ranks = launched()
        if not ranks.leads:
            console.be_quiet()
        if ranks.size > 1 and command_of(given) not in TOGETHER:
            raise ConfigError(f"torchrun can start {', '.join(sorted(TOGETHER))} only; start this in one process")
        refuse_empty(given)
        given = [with_home(argument) for argument in given]
        code = command_line()(args=given, standalone_mode=False)
        sys.stdout.flush()  # here, where an error of it has a handler
        return code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt, Stopped) as stop:
        ending = f"; {stop.going_on}" if isinstance(stop, Stopped) and stop.going_on else ""
        signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        fail(NAMES[signum] + ending, say=console.stopped)
        return 128 + signum
    except BrokenPipeError:
        forget_output()
        sys.stderr.close()
        return 1
    except OSError as error:  # a full disk, a folder that is a file or may not be written to
        forget_output()
        reason = error.strerror or str(error)
        fail(
            f"cannot use {error.filename}: {reason}; give another place"
            if error.filename
            else f"{reason}; the output is incomplete"  # stdout's, or that of an open file
        )
        return 1
    except typer.TyperException as error:
        message = error.format_message() or str(error)
        if not message.strip():  # bare `advmoe`: the help has been shown
            return 1
        context = getattr(error, "ctx", None)
        command = "" if context is None or context.parent is None else f" {context.info_name}"
        fail(f"{message.rstrip('.')}; see 'advmoe{command} --help'")
        return 1
    except AdvMoEError as error:
        if os.environ.get("ADVMOE_TRACEBACK"):
            console.err.print_exception()
        fail(with_options(error, given), lost=isinstance(error, LostRankError))
        return 1


def with_home(argument: str) -> str:
    """An argument with a leading ~ as the user's home. Shells leave it in --out=~/runs and in quotes."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{Path(value).expanduser()}" if value == "~" or value.startswith("~/") else argument


def forget_output() -> None:
    """Drop output that stdout could not take. Python would try again at its end, and exit with a code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # stdout may have no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@cache
def command_line() -> Any:
    """The commands with their parameters. Parsing and messages both need them, so they are made once."""
    return typer.main.get_command(app)


def command_of(arguments: Sequence[str]) -> str | None:
    """The name of the command that is called."""
    commands: Mapping[str, Any] = command_line().commands
    return next((argument for argument in arguments if argument in commands), None)


def parameters_of(arguments: Sequence[str]) -> list[Any]:
    """The parameters of the command that is called."""
    name = command_of(arguments)
    return [] if name is None else list(command_line().commands[name].params)


def refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse empty values, which an unset variable of a shell script gives. An empty path would be
    the current folder.

    Raises:
        ConfigError: An argument, or an option that has no empty default, is empty.
    """
    may_be_empty = {
        name for parameter in parameters_of(arguments) if parameter.default == "" for name in parameter.opts
    }
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        name = argument[:-1] if argument.startswith("--") and argument.endswith("=") else previous
        if (argument == "" or name != previous) and name not in may_be_empty:
            raise ConfigError(f"{name if name.startswith('--') else 'an argument'} is empty; expected a value")


def with_options(error: AdvMoEError, arguments: Sequence[str]) -> str:
    """The message of an error, and the options of this command that give the settings it is about.

    The library knows settings but no options. Only this function maps one to the other.
    """
    known = {opts for parameter in parameters_of(arguments) for opts in parameter.opts}
    options = [flag(name) for name in error.options if flag(name) in known]
    missing = [option for option in options if option not in str(error)]
    return f"{error} ({', '.join(missing)})" if missing else str(error)
