# SPDX-License-Identifier: Apache-2.0
"""Load on the server over loopback: tokens per second and how long clients wait.

    awq-jax serve OUT --port 8000 --slots 8
    python benchmarks/serve_load.py --port 8000 --clients 1,8,64 --requests 128 --tokens 64

Every client keeps one request under way until all are done. Prompts differ in length; answers are greedy, streamed and
of a fixed length. Percentiles are over requests: first token, and the whole answer.
"""

import argparse
import concurrent.futures
import http.client
import json
import time

import numpy as np

WORDS = "the list of a file is returned when an object has no more items and each function takes its own value".split()


def main() -> int:
    """Print one row of a table for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    print("| clients | tokens/s | first token, ms: p50 / p95 | answer, ms: p50 / p95 / p99 |\n|---|---|---|---|")
    ask = lambda index: one(args.port, prompt(index), args.tokens)
    for clients in map(int, args.clients.split(",")):
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            start = time.perf_counter()
            first, whole, tokens = map(np.array, zip(*pool.map(ask, range(args.requests)), strict=True))
            seconds = time.perf_counter() - start
        of = lambda times, *ps: " / ".join(f"{1e3 * np.percentile(times, p):.0f}" for p in ps)
        print(
            f"| {clients} | {tokens.sum() / seconds:.0f} | {of(first, 50, 95)} | {of(whole, 50, 95, 99)} |", flush=True
        )
    return 0


def prompt(index: int) -> str:
    """A text of 4 to 60 words, the same for the same index."""
    rng = np.random.default_rng(index)
    return " ".join(rng.choice(WORDS, rng.integers(4, 60)))


def one(port: int, text: str, tokens: int) -> tuple[float, float, int]:
    """Seconds to the first piece and to the end, and the tokens that came."""
    body = {"prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read()[:200]!r}")
    first, count = 0.0, 0
    for line in response:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            piece = json.loads(line[6:])
            count = (piece.get("usage") or {}).get("completion_tokens", count)
    connection.close()
    return first, time.perf_counter() - start, count


if __name__ == "__main__":
    raise SystemExit(main())
