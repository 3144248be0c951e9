# SPDX-License-Identifier: Apache-2.0
"""The command line, `awq-jax`: thin, and on top of everything. Each command imports what it needs when it runs."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from awq_jax._version import __version__
from awq_jax.cli.parser import Parser

__all__ = ["main"]

COMMANDS = (
    "quantize",
    "convert",
    "compare",
    "eval",
    "generate",
    "inspect",
    "families",
    "serve",
    "chat",
    "export",
    "demo",
)

DESCRIPTION = """\
Quantize language models to INT4 in JAX, and run them.

  awq-jax demo                                see it work, in two minutes
  awq-jax quantize SRC OUT --calib text.txt   Hugging Face in, INT4 out
  awq-jax convert SRC OUT --to native         another format, same codes
  awq-jax compare SRC OUT --bits 4,3          several methods, one table
  awq-jax eval OUT --text t.txt --base SRC    perplexity, KL to the original
  awq-jax generate OUT --prompt "Once"        continue a text
  awq-jax chat OUT                            talk to it
  awq-jax serve OUT                           the same over HTTP
  awq-jax export OUT ARTEFACTS --platform tpu artefacts for another machine
  awq-jax inspect OUT                         what is in it, layer by layer
  awq-jax families                            models, and what scales fold into
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="awq-jax", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"awq-jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"awq_jax.cli.{name}_command")
        summary = (module.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def _message(error: BaseException) -> str:
    """What went wrong, for people, and what an error says beside it in notes."""
    notes = getattr(error, "__notes__", ())
    notes = [note for note in notes if "JAX_TRACEBACK_FILTERING" not in note]  # of a traceback, which is not shown
    return "\n".join([_reason(error), *notes])


def _reason(error: BaseException) -> str:
    """``PATH: reason`` for what the system refused."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # its str() is the repr of that
    if isinstance(error, OSError) and error.strerror:  # its str() begins with a number
        return ": ".join(str(part) for part in (error.filename, error.filename2, error.strerror) if part is not None)
    return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 success, 1 it failed while working, 2 the arguments or the input are wrong, 130 interrupted."""
    code = _run(argv)
    if code == 130 and argv is None:  # this is the program: what XLA still computes crashes at the interpreter's end
        sys.stderr.flush()
        os._exit(code)
    hosts = sys.modules.get("awq_jax.hosts")  # imports jax, which `awq-jax --help` does without
    return hosts.leave(code) if hosts else code


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    try:
        done = args.run(args) or 0
        if sys.stdout:  # None where it is closed
            sys.stdout.flush()  # here, where what goes wrong is still answered
        return done
    except (ValueError, KeyError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        print(f"awq-jax {args.command}: {_message(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of `awq-jax inspect DIR | head`: nobody reads on, and nobody need be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except (OSError, MemoryError, RuntimeError) as error:  # RuntimeError: jax found no device, or no memory on it
        print(f"awq-jax {args.command}: {_message(error) or 'out of memory'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"awq-jax {args.command}: {str(error) or 'interrupted; nothing was left behind.'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
