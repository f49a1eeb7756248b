"""Measures clients side by side and plays the failover scenes: ``python -m benchmarks [--quick] [--output FOLDER]``."""

import argparse
import asyncio
import os
import tempfile
from pathlib import Path

import httpx

from benchmarks.costs import consul_requests, pick_microseconds
from benchmarks.failover import play
from benchmarks.many import many
from benchmarks.mesh import mesh_costs
from benchmarks.overhead import overheads, sync_microseconds
from benchmarks.overload import overload
from benchmarks.report import write
from benchmarks.results import Results, environment
from benchmarks.throughput import measure, targets
from registry.testing.agent import running_agent

DOCS = Path(__file__).parents[1] / "docs/benchmarks"


def run(quick: bool, rounds: int, seconds: float) -> Results:
    """Everything, in some minutes; ``quick``: a little of everything, to see that it runs."""
    callers, sizes = ((1, 4), (1, 3)) if quick else ((1, 32, 256), (1, 3, 100, 1_000))
    with running_agent() as agent, targets(agent, sizes) as found:
        settings = httpx.get(f"{agent.url}/v1/agent/self", trust_env=False).json()["Config"]
        where = environment(settings["Version"])
        samples = asyncio.run(measure(found, callers, rounds, seconds))
        requests = asyncio.run(consul_requests(found[1], 10_000 if not quick else 1_000))
        blocking = sync_microseconds(found[1], 10_000 if not quick else 100)
        mesh = mesh_costs(agent, rounds, 2_000 if not quick else 50)
    overhead = overheads(400 if not quick else 5)
    picks = {size: asyncio.run(pick_microseconds(size, 2_000 if quick else 50_000)) for size in (3, 10_000)}
    failover, overloaded = play(quick), overload(quick)
    held, churned = many(quick)
    where["load after"] = f"{os.getloadavg()[0]:.1f}"
    return Results(
        where,
        rounds,
        seconds,
        samples,
        picks,
        requests,
        overhead,
        blocking,
        mesh,
        failover,
        overloaded,
        held,
        churned,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a short run, written to a temporary folder")
    parser.add_argument("--rounds", type=int, help="how often each client has its turn, 5 unless given")
    parser.add_argument("--seconds", type=float, help="how long one turn takes, 1 unless given")
    parser.add_argument("--output", type=Path, help="the folder to write to, docs/benchmarks unless given")
    options = parser.parse_args()
    output = options.output or (Path(tempfile.mkdtemp(prefix="bench-")) if options.quick else DOCS)
    rounds = options.rounds or (1 if options.quick else 5)
    write(run(options.quick, rounds, options.seconds or (0.05 if options.quick else 1.0)), output)
    print(f"written to {output}")


if __name__ == "__main__":
    main()
