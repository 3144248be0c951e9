# SPDX-License-Identifier: Apache-2.0
"""The command line, `awq-jax`: thin, and on top of everything. Each command imports what it needs when it runs."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from awq_jax._version import __version__

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

  awq-jax demo                                      see it work on the shipped model, two minutes
  awq-jax quantize SRC OUT --calib text.txt         a Hugging Face directory in, an INT4 one out
  awq-jax convert SRC OUT --to compressed-tensors   another format, same codes
  awq-jax compare SRC OUT --bits 4,3                several methods on one model: one page, one table
  awq-jax eval OUT --text held_out.txt --base SRC   perplexity, and KL divergence from the original
  awq-jax generate OUT --prompt "Once upon a time"
  awq-jax chat OUT                                  talk to it; `awq-jax serve OUT` does so over HTTP
  awq-jax export OUT DIR --platform tpu             prefill and decode as artefacts for elsewhere
  awq-jax inspect OUT                               what is in a checkpoint, layer by layer
  awq-jax families                                  which models, and what each scale folds into
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="awq-jax", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"awq-jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"awq_jax.cli.{name}_command")
        summary = (module.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 success, 1 it failed while working, 2 the arguments or the input are wrong, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        done = args.run(args) or 0
        if sys.stdout:  # None where it is closed
            sys.stdout.flush()  # here, where what goes wrong is still answered
        return done
    except (ValueError, KeyError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        # KeyError's str() is the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"awq-jax {args.command}: {message}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of `awq-jax inspect DIR | head`: nobody reads on, and nobody need be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except (OSError, MemoryError, RuntimeError) as error:  # RuntimeError: jax found no device, or no memory on it
        print(f"awq-jax {args.command}: {str(error) or 'out of memory'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"awq-jax {args.command}: {str(error) or 'interrupted; nothing was left behind.'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
