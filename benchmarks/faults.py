# SPDX-License-Identifier: Apache-2.0
"""Faults at random moments of a quantization, and whether the next run ends with the bits of one that met none.

    python -m benchmarks.faults --kills 200

Each run is a process of its own, forked from one that has imported everything and started nothing. "Lost" counts
layers that a run had reported finished and the next one did again; "corrupted" counts outputs that differ in a bit.
"""

import argparse
import dataclasses
import errno
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from awq_jax.resume import store_of
from tests.reliability.job import contents, make_source, run

LAYERS = 3
FORK = multiprocessing.get_context("forkserver")


@dataclasses.dataclass
class Row:
    """One line of the table."""

    fault: str
    runs: int = 0
    struck: int = 0
    lost: int = 0
    corrupted: int = 0


def _inject(fault: tuple[str, Any] | None) -> None:
    """Arrange for a fault in this process."""
    kind, at = fault or ("", 0)
    if kind == "clock":
        real = time.time
        time.time = lambda: real() + (at if random.random() < 0.5 else -at)
    if kind == "room":  # the check before the run does not see how full the disk is
        shutil.disk_usage = lambda path: type("Usage", (), {"free": at})
    if kind == "file size":
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
    if kind in ("preadv", "fsync", "rename"):
        real_call, left = getattr(os, kind), [at]

        def failing(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO, "injected", str(args[0]))
            return real_call(*args, **options)

        setattr(os, kind, failing)


def _child(source: pathlib.Path, out: pathlib.Path, log: pathlib.Path, cache: str, fault: Any) -> None:
    """One run; its log gets a line for each finished layer, and how it ended."""
    import jax

    from awq_jax.cli.stopping import stoppable

    sys.stderr = open(log.with_suffix(".err"), "a")  # noqa: SIM115 - ends with the process
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    _inject(fault)
    with open(log, "a", buffering=1) as lines, stoppable() as stop:

        def progress(layer: Any, layers: int) -> None:
            lines.write(f"finished {layer.index}\n")
            if layer.index + 1 < layers:
                stop.between()

        try:
            report = run(source, out, progress=progress)
            lines.write(f"done {report.resumed_layers}\n")
        except KeyboardInterrupt:
            lines.write("interrupted\n")
            os._exit(130)
        except Exception as error:
            lines.write(f"failed {type(error).__name__} {error}\n")
            traceback.print_exc()
            os._exit(1)
    os._exit(0)


class Bench:
    """A source, the output that every run must end with, and runs with faults.

    Args:
      home: directory for everything.
    """

    def __init__(self, home: pathlib.Path) -> None:
        self.home, self.cache = home, str(home / "cache")
        self.source = make_source(home / "source", LAYERS)
        self._count = 0
        self.start(self.fresh()).join()  # fills the compilation cache
        out, begun = self.fresh(), time.perf_counter()
        self.start(out).join()
        self.seconds = time.perf_counter() - begun
        self.wanted = contents(out)

    def fresh(self, under: pathlib.Path | None = None) -> pathlib.Path:
        """The name of an output that nobody wrote yet."""
        self._count += 1
        home = (under or self.home) / f"run-{self._count:04d}"
        home.mkdir()
        return home / "out"

    def log(self, out: pathlib.Path) -> pathlib.Path:
        """Where the runs of an output write their lines."""
        return self.home / f"{out.parent.name}.log"

    def start(self, out: pathlib.Path, fault: tuple[str, Any] | None = None) -> Any:
        """Begin a run."""
        child = FORK.Process(target=_child, args=(self.source, out, self.log(out), self.cache, fault))
        child.start()
        return child

    def finish(self, out: pathlib.Path, row: Row) -> None:
        """Run without a fault and judge what came of it."""
        log = self.log(out)
        before = (
            {line for line in log.read_text().splitlines() if line.startswith("finished")} if log.exists() else set()
        )
        begun = time.perf_counter()
        self.start(out).join()
        row.runs += 1
        self._took(time.perf_counter() - begun)
        ended = log.read_text().splitlines()[-1]
        if not ended.startswith("done"):
            row.corrupted += 1
            print(row.fault, ended, file=sys.stderr)
            return
        row.lost += max(0, len(before) - int(ended.split()[1]))
        left = [path.name for path in out.parent.iterdir()]
        row.corrupted += contents(out) != self.wanted or left != ["out"]
        shutil.rmtree(out.parent)

    def _took(self, seconds: float) -> None:
        """Moments are drawn from what a run takes now: the machine becomes busier, and idle again."""
        self.seconds = max(0.8 * self.seconds, seconds)

    def killed(self, row: Row, times: int, number: int) -> None:
        """Signals at random moments: one to three runs of an output are struck, the next gets through."""
        while row.struck < times:
            out = self.fresh()
            for _ in range(random.randint(1, 3)):
                begun = time.perf_counter()
                child = self.start(out)
                child.join(random.uniform(0, 1.1 * self.seconds))
                row.runs += 1
                if child.exitcode is None:
                    os.kill(child.pid, number)
                    row.struck += 1
                else:
                    self._took(time.perf_counter() - begun)
                child.join()
                if (out / "awq_jax_manifest.json").exists():  # it was faster, or past its last step
                    break
            if (out / "awq_jax_manifest.json").exists():
                self.judge(out, row)
            else:
                self.finish(out, row)

    def judge(self, out: pathlib.Path, row: Row) -> None:
        """Look at an output that is there."""
        row.corrupted += contents(out) != self.wanted
        shutil.rmtree(out.parent)


def faulty(bench: Bench, name: str, faults: list[tuple[str, Any]]) -> Row:
    """One injected fault a run, and a run without."""
    row = Row(name)
    for fault in faults:
        out = bench.fresh()
        child = bench.start(out, fault)
        child.join()
        row.runs += 1
        row.struck += child.exitcode != 0
        if (out / "awq_jax_manifest.json").exists():
            bench.judge(out, row)
        else:
            bench.finish(out, row)
    return row


def clock_jumps(bench: Bench, times: int) -> Row:
    """A clock that jumps by years under a run that is killed, and files dated anywhere."""
    row = Row("clock jumps ±10 years, files dated 1970 or 2100")
    for i in range(times):
        out = bench.fresh()
        child = bench.start(out, ("clock", 3.15e8))
        child.join(random.uniform(0, bench.seconds))
        child.kill()
        child.join()
        row.runs, row.struck = row.runs + 1, row.struck + 1
        if (out / "awq_jax_manifest.json").exists():
            bench.judge(out, row)
            continue
        for path in out.parent.rglob("*"):
            os.utime(path, (0, 0) if i % 2 else (4.1e9, 4.1e9))
        bench.finish(out, row)
    return row


def second_writers(bench: Bench, times: int) -> Row:
    """Two runs of one output at once: one is refused, the other ends as if it were alone."""
    row = Row("second writer of the same output")
    for _ in range(times):
        out = bench.fresh()
        both = [bench.start(out), bench.start(out)]
        for child in both:
            child.join()
        row.runs += 2
        codes = sorted(child.exitcode for child in both)
        row.struck += codes == [0, 1]
        row.corrupted += codes != [0, 1]
        bench.judge(out, row)
    return row


def bit_flips(bench: Bench, times: int) -> Row:
    """A bit of what a killed run kept turns over: the next run says so, or does without it."""
    row = Row("bit flipped in what was kept (refused, or the state before is used)")
    while row.runs < times:
        out = bench.fresh()
        child = bench.start(out)
        child.join(random.uniform(0.4, 0.9) * bench.seconds)
        child.kill()
        child.join()
        kept = [path for path in store_of(out).rglob("*") if path.is_file() and path.name != "LEASE"]
        if not (store_of(out) / "CURRENT").is_file() or out.exists():
            shutil.rmtree(out.parent)
            continue
        victim = random.choice(kept)
        content = bytearray(victim.read_bytes())
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        victim.write_bytes(content)
        again = bench.start(out)
        again.join()
        row.runs, row.struck = row.runs + 1, row.struck + 1
        said = bench.log(out).read_text().splitlines()[-1]
        row.corrupted += contents(out) != bench.wanted if out.exists() else "damaged" not in said
        shutil.rmtree(out.parent)
    return row


def full_disks(bench: Bench, times: int) -> Row:
    """A file system that is too small by some, and then is not."""
    if not times:
        return Row("disk full")
    place = bench.home / "small"
    place.mkdir()
    largest = 3 * sum(len(content) for content in bench.wanted.values() if isinstance(content, bytes))
    sizes = [largest * (i + 1) // times for i in range(times)]
    mount = ["mount", "-t", "tmpfs", "-o", f"size={largest}", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        return faulty(bench, "disk full (file size limit)", [("file size", size // 8) for size in sizes])
    row = Row("disk full (tmpfs)")
    try:
        for size in sizes:
            resize = lambda n: subprocess.run(["mount", "-o", f"remount,size={n}", str(place)], check=True)
            resize(size)
            out = bench.fresh(place)
            child = bench.start(out, ("room", 10 * largest))
            child.join()
            row.runs, row.struck = row.runs + 1, row.struck + (child.exitcode != 0)
            resize(10 * largest)
            if out.exists():
                bench.judge(out, row)
            else:
                bench.finish(out, row)
    finally:
        subprocess.run(["umount", str(place)], check=True)
    return row


def table(bench: Bench, kills: int, others: int) -> Iterator[Row]:
    """Every fault."""

    def signals(name: str, number: int, times: int) -> Row:
        row = Row(name)
        bench.killed(row, times, number)
        return row

    rest: tuple[Callable[[], Row], ...] = (
        lambda: signals("SIGKILL at random moments", signal.SIGKILL, kills),
        lambda: signals("SIGTERM at random moments", signal.SIGTERM, others),
        lambda: signals("SIGINT at random moments", signal.SIGINT, others),
        lambda: full_disks(bench, others),
        lambda: faulty(bench, "read error (EIO)", [("preadv", 1 + 3 * i) for i in range(others)]),
        lambda: faulty(bench, "flush error (EIO)", [("fsync", 1 + 2 * i) for i in range(others)]),
        lambda: faulty(bench, "rename error (EIO)", [("rename", 1 + i) for i in range(others)]),
        lambda: second_writers(bench, (others + 1) // 2),
        lambda: clock_jumps(bench, others),
        lambda: bit_flips(bench, others),
    )
    for made in rest:
        row = made()
        if row.runs:
            yield row


def main() -> int:
    """Print the table; 1 if anything was lost or corrupted."""
    p = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--others", type=int, default=20, help="runs of each other fault; 0 leaves them out (%(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=pathlib.Path, help="also write the table there")
    args = p.parse_args()
    random.seed(args.seed)
    FORK.set_forkserver_preload(["awq_jax.pipeline", "awq_jax.cli", "tests.reliability.job"])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(pathlib.Path(home))
        print(f"one run: {bench.seconds:.1f} s, {LAYERS} layers\n", file=sys.stderr)
        print("| fault | runs | struck | layers lost | outputs corrupted |\n|---|---|---|---|---|", flush=True)
        for row in table(bench, args.kills, args.others):
            rows.append(row)
            print(f"| {row.fault} | {row.runs} | {row.struck} | {row.lost} | {row.corrupted} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return int(any(row.lost or row.corrupted for row in rows))


if __name__ == "__main__":
    sys.exit(main())
