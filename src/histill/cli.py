"""The command line: a table of commands; only the chosen command's module is imported."""

from __future__ import annotations

import importlib
import os
import sys

from histill import __version__
from histill.errors import ConfigError, HistillError, nearest

__all__ = ["COMMANDS", "main"]

# command -> (module with run(argv) -> exit status, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("histill.demo.command", "a small distillation on drawn tissue, offline, with a report"),
    "distill": ("histill.distill.command", "teach a small student from a large frozen teacher"),
    "extract": ("histill.extract.command", "turn slides into feature files that MIL tools read"),
    "evaluate": ("histill.evaluate.command", "score encoders: PLISM, HEST, EVA, PathoROB, your own tiles"),
    "tile": ("histill.tiles.command", "cut slides into a tile set for training"),
    "calibrate": ("histill.distill.calibrate_command", "fold a standardisation into a finished student"),
    "report": ("histill.evaluate.report.command", "the results of all benchmarks on one page that opens offline"),
    "export": ("histill.export.command", "a verified model for onnxruntime or OpenVINO, int8, or the hub"),
    "bench": ("histill.export.bench_command", "speed, latency, memory of models and engines, in turns"),
    "models": ("histill.models.command", "the known teachers and students, their licences and sizes"),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: histill COMMAND [OPTIONS]\n\n"
        "Make pathology foundation models small, robust and usable.\n\n"
        f"commands:\n{rows}\n\n"
        "histill COMMAND --help   the options of one command\n"
        "histill --version        the version\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status (0 done, 1 a user's error, 2 a wrong command line).

    A command's own options are read by tyro, which leaves with :class:`SystemExit` (2, or 0 after ``--help``).
    """
    args = sys.argv[1:] if argv is None else argv
    if not args:
        print(_help(), end="", file=sys.stderr)
        return 2
    if args[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if args[0] == "--version":
        print(f"histill {__version__}")
        return 0
    try:
        if args[0] not in COMMANDS:
            raise ConfigError(
                f"there is no command '{args[0]}'",
                allowed=", ".join(COMMANDS),
                remedy=nearest(args[0], COMMANDS) or "see histill --help",
            )
        module, _ = COMMANDS[args[0]]
        status: int = importlib.import_module(module).run(args[1:])
        sys.stdout.flush()
        return status
    except HistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if args[0] not in COMMANDS else 1
    except BrokenPipeError:  # the reader went away, as in "histill models | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
