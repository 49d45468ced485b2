"""The `lungssl` command. A verb is one file here and one line in VERBS.

This module and the verbs' modules import only typer at their top; what is heavy is imported inside the functions, so
that `--help`, a misspelt option and a wrong recipe name answer at once. A verb's function takes annotated options, has
a docstring with an example line, raises ConfigError or DataError (`errors.py`), and leaves exit codes to `main`.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lungssl.errors import INTERRUPTED, OK, USAGE, explain
from lungssl.recipe_files import recipe_text

VERBS: dict[str, str] = {
    "demo": "lungssl.cli.demo:demo",
    "doctor": "lungssl.cli.doctor:doctor",
    "phantom": "lungssl.cli.phantom:phantom",
    "cache": "lungssl.cli.cache:app",
    "pretrain": "lungssl.cli.pretrain:pretrain",
    "finetune": "lungssl.cli.finetune:finetune",
    "segment": "lungssl.cli.segment:segment",
    "register": "lungssl.cli.register:register",
    "warp": "lungssl.cli.warp:warp",
    "analyze": "lungssl.cli.analyze:analyze",
    "cosegment": "lungssl.cli.cosegment:cosegment",
    "watch": "lungssl.cli.watch:watch",
    "evaluate": "lungssl.cli.evaluate:evaluate",
    "compare": "lungssl.cli.compare:compare",
    "bench": "lungssl.cli.bench:app",
    "list": "lungssl.cli.names:list_names",
    "config": "lungssl.cli.config:app",
}
"""Verb -> "module:function", or "module:app" for a `new_app()` with verbs of its own; in the order of `--help`."""

BANNER = "Self-supervised pretraining on exhale/inhale lung CT pairs. Research use only, not for clinical decisions."


def new_app(**options: Any) -> typer.Typer:
    """A Typer without rich: its help takes 0.3 s of CPU, plain help 0.1 s (`ecosystem.md` 2.1)."""
    return typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, **options)


class _QuickHelp:
    """Gives `--help` a default: Typer imports pydantic (0.2 s) to read an option that has no value."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # pyright: ignore[reportAttributeAccessIssue] (a mix-in)
        if option is not None:
            option.default = False
        return option


class Verb(_QuickHelp, TyperCommand):
    """A command that names an unknown recipe before Typer reads the options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        raw, _, _ = self.make_parser(ctx).parse_args(list(args))
        if isinstance(raw.get("recipe"), str) and not raw.get("help"):
            recipe_text(raw["recipe"])
        return super().parse_args(ctx, args)


class _Verbs(_QuickHelp, TyperGroup):
    """Finds commands in VERBS, importing a verb's module only when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            self.commands = dict.fromkeys(VERBS)  # what Typer draws its "did you mean" from
            return None
        module, _, attribute = VERBS[cmd_name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        app = found
        if not isinstance(found, typer.Typer):
            app = new_app()
            app.command(cmd_name, cls=Verb)(found)
        command = typer.main.get_command(app)
        command.name = cmd_name
        return command


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"lungssl {version('lungssl')}")
        raise typer.Exit


def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; works after a verb, too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _command(words: Sequence[str]) -> Any:
    """The command line's root. It has Typer's completion options only where they are asked for: they cost 0.2 s."""
    completion = "_LUNGSSL_COMPLETE" in os.environ or any(w == "--help" or "completion" in w for w in words[:1])
    app = typer.Typer(
        cls=_Verbs,
        help=BANNER,
        epilog="Example: lungssl pretrain dino_vit_nano --out runs/a train.steps=200",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        add_completion=completion,
    )
    app.callback()(_root)
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (`errors.py`): 0 ok, 2 usage, 3 data, 4 memory, 130 interrupted."""
    # Threads of torch that spin while they wait made a step 2 to 4 times slower beside any other busy process
    # (docs/log.md, 2026-11-23); read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        result = _command(words).main(words, prog_name="lungssl", standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:  # Typer's word for KeyboardInterrupt
            print("error: interrupted", file=sys.stderr)
        return result if isinstance(result, int) else OK
    except typer.TyperException as error:
        return _usage(error)
    except BrokenPipeError:  # the reader of a pipe has gone, as in `lungssl list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            import traceback

            traceback.print_exc()
        code, text = explain(error)
        print(f"error: {text}", file=sys.stderr)
        return code


def program() -> int:
    """What the command `lungssl` runs: `main`; one of several ranks then ends at once.

    torch's teardown at the end of a process has aborted ranks whose work was done ("terminate called without an active
    exception", seen after a restart), for which torchrun starts all of them again.
    """
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _usage(error: Any) -> int:
    """A command line that Typer cannot make sense of."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)
        return USAGE
    text = " ".join(error.format_message().split()).rstrip(".")
    hint = f"; see `{context.command_path} --help`" if context is not None else ""
    print(f"error: {text}{hint}", file=sys.stderr)
    return USAGE
