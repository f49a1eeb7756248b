"""Writes a run down for readers: tables in Markdown, the samples in JSON, a plot."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.clients import CLIENTS
from benchmarks.many import HELD, LEFT, MEMORY
from benchmarks.mesh import PROMISED_RATIO, SERVED
from benchmarks.overhead import PROMISED
from benchmarks.overload import CALLERS, GOODPUT, IN_FLIGHT, LAG, PATIENCE
from benchmarks.plot import plot
from benchmarks.results import Results

__all__ = ["table", "write"]

FLEET = 3
"""The promises are about so many instances; or about the nearest number that was measured."""

OVERHEADS = {
    "none": "counting a call, which nobody observes",
    "metrics": "metrics of a call",
    "unsampled": "tracing a call, not sampled",
    "sampled": "tracing a call, sampled",
    "middleware": "`RegistryMiddleware`, a GET",
    "middleware that sheds": "the same, with all of its limits set and none reached",
    "middleware, with a body": "`RegistryMiddleware`, a POST with a body",
}
"""What is measured, in words."""

BUSY = (
    "**Others used the machine during this run.** Calls per second and latencies say little then, ratios of them "
    "something, CPU per call the most."
)


def write(results: Results, folder: Path) -> None:
    """README.md, results.json and throughput.svg in the folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(asdict(results), indent=1) + "\n")
    (folder / "throughput.svg").write_text(plot(results, _fleet(results)))
    (folder / "README.md").write_text(_page(results))


def _page(results: Results) -> str:
    fleet = _fleet(results)
    sections = [
        "# Benchmarks",
        "Written by `python3 -m nox -s bench`, which measures everything below anew. All samples are in "
        "[results.json](results.json).",
        table(["", ""], results.environment.items()),
        f"One client process and {min(3, max(results.sizes()))} server processes on loopback share these cores. Every "
        "call reads the status and the body of one small answer, and checks both. The clients take turns: "
        f"{results.rounds} rounds, in each of them {results.seconds:g} s per client, number of callers and number of "
        "instances, after a warm-up. Figures are medians over the rounds, ratios are taken within each round first. "
        "CPU is that of the client process per call: the steadier figure where others use the machine too. The usual "
        "sample is measured in one round only. Instances are registrations in a real Consul, each with a loopback "
        "address of its own; clients that know no registry are given the addresses and take turns.",
        *([BUSY] if float(results.environment["load before"]) >= 1 else []),
        "## Promises",
        table(["", "seen", "promised", ""], _promises(results)),
        f"## {fleet} instances",
        "![Calls per second](throughput.svg)",
        *(_clients(results, callers, fleet) for callers in results.callers()),
        "## Other numbers of instances",
        "Calls per second, and µs of client CPU per call.",
        *(_fleets(results, callers) for callers in results.callers()),
        "## What discovery costs",
        "A pick, from the service's name to an instance while 32 calls are under way, takes at the median "
        + " and ".join(f"{micros:.1f} µs among {size:,} instances" for size, micros in results.pick.items())
        + f". During 10,000 calls in steady state Consul got {results.consul_requests} requests.",
        "## What it costs to be seen",
        "µs of CPU that a call over the facade takes beyond one that nobody observes, and that a request to a FastAPI "
        "app takes beyond one without `RegistryMiddleware`. Nothing goes over a network here, or so little would not "
        "show. What is compared takes turns of 50 calls; what counts is the tenth of them that others disturbed least. "
        "Without an observer, only the counting itself is measured. Spans are handed to a thread that exports them, "
        "whose work is not part of it.",
        table(["", "µs"], ((OVERHEADS[name], f"{micros:.1f}") for name, micros in results.overhead.items())),
        "## Blocking callers",
        "µs of CPU per call of `httpx.Client`, one caller, over real connections. An event loop in another thread does "
        "the work of `SyncDiscoveryTransport`; handing each call over and back is what it costs.",
        table(["", "µs"], ((name, f"{micros:,.0f}") for name, micros in results.blocking.items())),
        "## Mutual TLS",
        "µs of CPU per call on kept connections: a FastAPI service under uvicorn, served plainly and with "
        "`CONSUL_CONNECT=true`, called by turns. The ratio is that of both sides together.",
        table(
            ["", "caller, plain", "caller, mutual TLS", "service, plain", "service, mutual TLS", "ratio"],
            (
                (
                    _several(each.callers, "caller"),
                    *(f"{side[way]:,.0f}" for side in (each.caller, each.service) for way in SERVED),
                    f"{each.ratio:.2f}",
                )
                for each in results.mesh
            ),
        ),
        "## Failover",
        "Real processes, a real Consul, four callers without a pause, at least 4,000 calls each; where it says so, "
        "a steady load instead. While all instances are gone, calls fail by design. `tests/failover` asserts the same. "
        "Received twice: calls of which instances got a first attempt and another; only those that may be repeated.",
        table(
            ["scene", "calls", "failed", "received twice", "p50 ms", "p99 ms", "promised", "seen", ""],
            (
                (
                    each.scene,
                    *(f"{count:,}" for count in (each.calls, each.failed, each.duplicated)),
                    *(f"{each.p50:.2f}", f"{each.p99:.1f}"),
                    *(each.promise, each.seen, _mark(each.kept)),
                )
                for each in results.failover
            ),
        ),
        "## Overload",
        f"Two processes of backend-api on one core, a real Consul, and a caller on the other cores: searches, and one "
        f"new card in ten. Capacity is what {CALLERS} callers without a pause get done. Then three times as many calls "
        f"are begun each second, whether or not others have ended, each with a deadline of {PATIENCE:g} s. Goodput is "
        "what was answered by then, as a share of the capacity. Medians over the rounds. Declined: attempts that got "
        f"503 at once and were not executed. Lag: `SERVICE_SHED_LAG={LAG['SERVICE_SHED_LAG']}`. In flight: "
        f"`SERVICE_MAX_IN_FLIGHT={IN_FLIGHT['SERVICE_MAX_IN_FLIGHT']}`, since the requests queue for the database.",
        table(
            ["", "capacity, calls/s", "offered", "goodput", "p50 ms", "p99 ms", "declined", "ejections", "other calls"],
            (
                (
                    each.shedding or "no shedding",
                    *(f"{median(rates):,.0f}" for rates in (each.capacity, each.offered)),
                    f"{median(each.goodput):.2f} ({min(each.goodput):.2f} to {max(each.goodput):.2f})",
                    *(f"{median(milliseconds):,.0f}" for milliseconds in (each.p50, each.p99)),
                    *(f"{count:,}" for count in (each.declined, each.ejections)),
                    ", ".join(f"{name} {count:,}" for name, count in sorted(each.errors.items())) or "none",
                )
                for each in results.overload
            ),
        ),
        "## Many instances",
        "A real Consul, and a caller in a process of its own, which picks every 5 ms and watches one service; one of "
        "its instances changes its state, again and again. Late: by how much a task that sleeps for 2 ms wakes too "
        "late. Busy: the most CPU that the loop's thread uses between two such looks, which is what it would be late "
        "if nobody else used the machine. Without a change: as long, beforehand. Medians. First list: from the "
        "question to the first pick. Memory is that of the whole process.",
        table(
            ["", "late ms", "busy ms", "without a change", "first list, busy ms", "memory MB"],
            (
                (
                    _several(each.instances, "instance"),
                    *(f"{milliseconds:.1f}" for milliseconds in (each.late, each.busy, each.undisturbed)),
                    *(f"{each.first.busy:.1f}", f"{each.memory:.0f}"),
                )
                for each in results.held
            ),
        ),
        f"Then instances of one service came and went, {results.churn.changes:,} changes in "
        f"{results.churn.seconds / 60:.1f} minutes, while a caller picked, and explained itself once a second. After "
        f"the first minutes it had {results.churn.objects[0]:,} objects and {results.churn.memory[0]:.0f} MB, at the "
        f"end {results.churn.objects[1]:,} and {results.churn.memory[1]:.0f} MB.",
    ]
    return "\n\n".join(sections) + "\n"


def _promises(results: Results) -> list[tuple[str, str, str, str]]:
    crowd, fleet = _crowd(results), _fleet(results)
    few = results.callers()[0]
    by_httpx = results.ratio("facade", "httpx", crowd, fleet, lambda sample: sample.calls_per_second)
    by_httpx2 = results.ratio("facade", "httpx2", crowd, fleet, lambda sample: sample.calls_per_second)
    by_aiohttp = results.ratio("facade", "aiohttp", crowd, fleet, lambda sample: sample.calls_per_second)
    cpu = results.ratio("facade", "aiohttp", crowd, fleet, lambda sample: 1 / sample.cpu)
    latency = results.ratio("facade", "httpx", few, fleet, lambda sample: sample.p50)
    return [
        (f"calls/s at {crowd} callers, by bare httpx", f"{by_httpx:.1f}", "≥ 8", _mark(by_httpx >= 8)),
        (f"calls/s at {crowd} callers, by bare httpx2", f"{by_httpx2:.1f}", "≥ 2", _mark(by_httpx2 >= 2)),
        (f"calls/s at {crowd} callers, by bare aiohttp", f"{by_aiohttp:.2f}", "≥ 0.45", _mark(by_aiohttp >= 0.45)),
        ("the same by CPU per call", f"{cpu:.2f}", "", ""),
        (f"p50 at {_several(few, 'caller')}, by bare httpx", f"{latency:.2f}", "≤ 0.5", _mark(latency <= 0.5)),
        *(
            (f"pick among {size:,} instances, p50", f"{micros:.1f} µs", "≤ 5 µs", _mark(micros <= 5))
            for size, micros in results.pick.items()
        ),
        *(
            (
                OVERHEADS[name],
                f"{results.overhead[name]:.1f} µs",
                f"≤ {most:g} µs",
                _mark(results.overhead[name] <= most),
            )
            for name, most in PROMISED.items()
            if name in results.overhead
        ),
        *(
            (
                f"CPU of a call over mutual TLS, by a plain one, {_several(each.callers, 'caller')}",
                f"{each.ratio:.2f}",
                f"≤ {PROMISED_RATIO}",
                _mark(each.ratio <= PROMISED_RATIO),
            )
            for each in results.mesh
        ),
        ("Consul requests per 10,000 calls", str(results.consul_requests), "0", _mark(not results.consul_requests)),
        (
            "failover scenes as promised",
            f"{sum(each.kept for each in results.failover)} of {len(results.failover)}",
            "all",
            _mark(all(each.kept for each in results.failover)),
        ),
        *(
            (
                "goodput at three times the capacity, shedding",
                f"{median(each.goodput):.2f}",
                f"≥ {GOODPUT:g} of it",
                _mark(median(each.goodput) >= GOODPUT),
            )
            for each in results.overload[-1:]
        ),
        *(
            (
                f"one change among {each.instances:,} holds the loop, p50",
                f"{each.late:.1f} ms",
                f"≤ {HELD[each.instances]:g} ms",
                _mark(each.late <= HELD[each.instances]),
            )
            for each in results.held
            if each.instances in HELD
        ),
        *(
            (
                f"memory of a caller of {each.instances:,}",
                f"{each.memory:.0f} MB",
                f"≤ {MEMORY:g} MB",
                _mark(each.memory <= MEMORY),
            )
            for each in results.held[-1:]
        ),
        (
            f"objects after {results.churn.changes:,} changes, by those before",
            f"{results.churn.left:.3f}",
            f"≤ {LEFT:g}",
            _mark(results.churn.left <= LEFT),
        ),
    ]


def _clients(results: Results, callers: int, instances: int) -> str:
    rows = []
    for client in CLIENTS:
        cell = (client.name, callers, instances)
        rates = [
            results.ratio(client.name, base, callers, instances, lambda sample: sample.calls_per_second)
            for base in ("httpx", "aiohttp")
        ]
        rows.append(
            (
                client.title,
                f"{results.median(*cell, lambda sample: sample.calls_per_second):,.0f}",
                *(f"{rate:.2f}" for rate in rates),
                f"{results.median(*cell, lambda sample: sample.cpu):,.0f}",
                f"{results.median(*cell, lambda sample: sample.p50):,.2f}",
                f"{results.median(*cell, lambda sample: sample.p99):,.2f}",
            )
        )
    head = [_several(callers, "caller"), "calls/s", "by httpx", "by aiohttp", "CPU µs", "p50 ms", "p99 ms"]
    return table(head, rows)


def _fleets(results: Results, callers: int) -> str:
    rows = []
    for client in CLIENTS:
        cells = [(client.name, callers, size) for size in results.sizes()]
        rows.append(
            (
                client.title,
                *(
                    f"{results.median(*cell, lambda sample: sample.calls_per_second):,.0f} "
                    f"({results.median(*cell, lambda sample: sample.cpu):,.0f})"
                    for cell in cells
                ),
            )
        )
    return table([_several(callers, "caller"), *(_several(size, "instance") for size in results.sizes())], rows)


def _several(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' if count > 1 else ''}"


def _crowd(results: Results) -> int:
    return min(results.callers(), key=lambda callers: abs(callers - 32))


def _fleet(results: Results) -> int:
    return min(results.sizes(), key=lambda size: abs(size - FLEET))


def _mark(kept: bool) -> str:
    return "✓" if kept else "✗"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
