# SPDX-License-Identifier: Apache-2.0
"""How one process of several comes to know the others."""

import argparse
import contextlib
import ipaddress
import os
import re
import sys
from collections.abc import Iterator

__all__ = ["add_arguments", "join", "stdout_kept"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument_group("several processes, each started with the same command").add_argument
    add("--distributed", action="store_true", help="find the others as the cluster says: TPU pods, SLURM, Open MPI")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens; on a network that you trust")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which of them this is, from 0")
    add(
        "--host-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds that one may keep the others waiting between two layers (%(default)g)",
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _refuse_incomplete(args: argparse.Namespace) -> None:
    named = {"--coordinator": args.coordinator, "--processes": args.processes, "--process": args.process}
    missing = [name for name, value in named.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: a process needs {', '.join(named)}, or --distributed alone.")
    if not re.fullmatch(r".+:[1-9][0-9]{0,4}", args.coordinator):
        raise ValueError(f"--coordinator {args.coordinator!r}: expected HOST:PORT, such as 10.0.0.1:8476.")
    if not 0 <= args.process < args.processes:
        raise ValueError(f"--process {args.process} of --processes {args.processes}: they are counted from 0.")


def join(args: argparse.Namespace) -> tuple[bool, bool]:
    """Meet the other processes that the options speak of.

    Returns:
      Whether there are others, and whether this is the one that speaks for all.

    Raises:
      ValueError: options are missing or contradict each other.
      RuntimeError: the others did not come in time.
    """
    if args.host_timeout <= 0:
        raise ValueError(f"--host-timeout is {args.host_timeout:g}; it must be more than 0.")
    explicit = any(value is not None for value in (args.coordinator, args.processes, args.process))
    if not (explicit or args.distributed):
        return False, True
    where: dict[str, object] = {}
    if explicit:
        _refuse_incomplete(args)
        where = {
            "coordinator_address": args.coordinator,
            "num_processes": args.processes,
            "process_id": args.process,
        }
        if _is_loopback(args.coordinator.rpartition(":")[0]):
            where["coordinator_bind_address"] = args.coordinator  # jax would listen on every interface
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**where, initialization_timeout=max(1, round(args.host_timeout)))  # pyright: ignore[reportArgumentType]
    return True, jax.process_index() == 0


@contextlib.contextmanager
def stdout_kept(several: bool) -> Iterator[None]:
    """Send what C++ prints to standard error: gloo tells standard output of its connections, and that is a report's."""
    if not several:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
