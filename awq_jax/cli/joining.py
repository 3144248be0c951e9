# SPDX-License-Identifier: Apache-2.0
"""How one process of several comes to know the others."""

import argparse
import contextlib
import ipaddress
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["add_arguments", "asked", "join", "stdout_kept"]

# What jax looks for: (cluster, its variables, what is often forgotten).
_CLUSTERS = (
    ("SLURM", ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"), "; a step of srun has all"),
    ("Open MPI", ("OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri"), "; Open MPI 5 no longer sets the latter"),
    ("GKE", ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"), ""),
    ("Kubernetes", ("KUBERNETES_SERVICE_HOST",), "; it needs the package kubernetes"),
)

_FIRST_S = 30.0  # that jax waits longer than we do
_MOST_S = 1e6  # of patience; threads can't wait for ever


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


def _is_explicit(args: argparse.Namespace) -> bool:
    return any(value is not None for value in (args.coordinator, args.processes, args.process))


def asked(args: argparse.Namespace) -> bool:
    """Whether the options speak of other processes."""
    return args.distributed or _is_explicit(args)


def _refuse_incomplete(args: argparse.Namespace) -> None:
    named = {"--coordinator": args.coordinator, "--processes": args.processes, "--process": args.process}
    missing = [name for name, value in named.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: a process needs {', '.join(named)}, or --distributed alone.")
    if not re.fullmatch(r".+:[1-9][0-9]{0,4}", args.coordinator) or int(args.coordinator.rpartition(":")[2]) > 65535:
        raise ValueError(f"--coordinator {args.coordinator!r}: expected HOST:PORT, such as 10.0.0.1:8476.")
    if not 0 <= args.process < args.processes:
        raise ValueError(f"--process {args.process} of --processes {args.processes}: they are counted from 0.")


def _unset(names: tuple[str, ...]) -> str:
    """Which of a cluster's variables are missing."""
    missing = [name for name in names if name not in os.environ]
    if len(missing) in (0, len(names)):
        return f"{names[0]} is {'not ' if missing else ''}set"
    return f"{names[0]} is set, {' and '.join(missing)} not" if names[0] not in missing else f"{missing[0]} is not set"


def _no_cluster(error: Exception) -> str:
    """What `--distributed` looked for in vain, and what to give instead."""
    looked = [f"{name} ({_unset(variables)}{hint})" for name, variables, hint in _CLUSTERS]
    return (
        f"--distributed: no cluster says who the other processes are ({error}). Looked for {', '.join(looked)} and the "
        "metadata of a TPU machine. Say it yourself: --coordinator HOST:PORT --processes N --process I, without "
        "--distributed."
    )


def _refuse_taken(address: str, loopback: bool) -> None:
    """Of a port that is taken jax 0.10 dies without a word."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_server((host.strip("[]") if loopback else "", int(port))).close()
    except OSError as error:
        said = f"process 0 can't listen there ({os.strerror(error.errno or 0)}); choose another port (--coordinator)"
        raise OSError(error.errno, said, address) from error


@contextlib.contextmanager
def _ended_after(limit_s: float, said: str) -> Iterator[None]:
    """End the process in words where the block takes longer: jax ends it with a signal and a stack of C++."""

    def end() -> None:
        print(f"awq-jax quantize: {said}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _initialize(where: dict[str, Any], limit_s: float) -> None:
    """`jax.distributed.initialize`, which fails in many ways, in words."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    place = where.get("coordinator_address", "the address that the cluster says")
    late = (
        f"the processes did not meet at {place} within {limit_s:g} s (--host-timeout). Is the address reached from all?"
    )
    try:
        with _ended_after(limit_s, late):
            jax.distributed.initialize(**where, initialization_timeout=round(limit_s + _FIRST_S))
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(f"the processes can't meet at {place}: {error}") from error
    except Exception as error:  # no address at all, no answer of a metadata server, a package that is missing
        if where:
            raise
        raise ValueError(_no_cluster(error)) from error


def join(args: argparse.Namespace) -> tuple[bool, bool]:
    """Meet the other processes that the options speak of.

    Returns:
      Whether there are others, and whether this is the one that speaks for all.

    Raises:
      ValueError: options are missing or contradict each other, or no cluster is found.
      RuntimeError: the others did not come in time.
    """
    if not 0 < args.host_timeout <= _MOST_S:
        raise ValueError(f"--host-timeout is {args.host_timeout:g}; it must be more than 0, and at most {_MOST_S:g}.")
    if not asked(args):
        return False, True
    where: dict[str, Any] = {}
    if _is_explicit(args):
        _refuse_incomplete(args)
        where = {
            "coordinator_address": args.coordinator,
            "num_processes": args.processes,
            "process_id": args.process,
        }
        loopback = _is_loopback(args.coordinator.rpartition(":")[0])
        if loopback:
            where["coordinator_bind_address"] = args.coordinator  # jax would listen on every interface
        if args.process == 0:
            _refuse_taken(args.coordinator, loopback)
    _initialize(where, args.host_timeout)
    import jax

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
