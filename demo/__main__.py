"""`nox -s demo`: Consul, every service and two more backend replicas as local processes, and a tour through them."""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

from rich.console import Console
from rich.live import Live

from demo.collector import running_collector
from demo.locked import Lock, locked
from demo.processes import DemoError, Processes
from demo.system import Ports, System
from demo.tour import show_tour, stay
from deploy.keeper.api import ConsulError
from registry.testing.agent import ConsulNotFoundError, ConsulStartError, find_consul, running_agent
from tools.services import SERVICES

_START_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit code."""
    options = _options(arguments)
    # A closed terminal or a polite kill ends it as Ctrl-C does, which a shell makes background jobs ignore.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        _run(_ports(*options.ports), options, Console())
    except (DemoError, ConsulNotFoundError, ConsulStartError, ConsulError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s demo --", description=__doc__)
    parser.add_argument("--once", action="store_true", help="show the tour and leave")
    parser.add_argument("--locked", action="store_true", help="with a token for each service, and TLS to Consul")
    # For tests, which run beside a running demo: Consul, then every service in the order of its own port.
    count = 1 + len(SERVICES)
    parser.add_argument(
        "--ports",
        type=int,
        nargs=count,
        default=[8500, *(service.port for service in SERVICES)],
        help=argparse.SUPPRESS,
    )
    return parser.parse_args(arguments)


def _ports(consul: int, *services: int) -> Ports:
    return Ports(consul, {service.name: port for service, port in zip(SERVICES, services, strict=True)})


def _run(ports: Ports, options: argparse.Namespace, console: Console) -> None:
    ports.check()
    consul = find_consul()
    with (
        locked(ports.consul, consul) if options.locked else nullcontext() as lock,
        running_collector() as collector,
        Processes() as processes,
        Live(console=console, refresh_per_second=8) as live,
    ):
        system = System(ports, processes, collector, lock)
        system.start()
        live.update(system.table(system.rows(), "starting Consul"))
        with lock.open() if lock else running_agent(http_port=ports.consul, binary=consul, in_memory=True):
            try:
                _wait_until_passing(system, live)
                path = asyncio.run(show_tour(system, console))
                live.update(system.table(system.rows()))
                _print_urls(ports, lock, console)
                if not options.once:
                    _stay_until_interrupted(system, path, live, console)
            finally:
                # Before Consul, from which they withdraw.
                processes.stop()
    if not console.is_terminal:
        console.line()  # which Live leaves out there


def _wait_until_passing(system: System, live: Live) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        rows = system.rows()
        live.update(system.table(rows, "waiting until every instance is passing"))
        if all(row.health == "passing" for row in rows):
            return
        if dead := system.dead():
            raise DemoError(
                f"{dead.service} on port {dead.port} ended with exit code {dead.exit_code}. "
                f"The end of its log {dead.log}:\n{dead.log_tail()}"
            )
        if time.monotonic() > deadline:
            waiting = ", ".join(row.instance for row in rows if row.health != "passing")
            raise DemoError(
                f"Not passing after {_START_SECONDS:.0f} s: {waiting}. The logs are in {system.processes.directory}."
            )
        time.sleep(0.1)


def _print_urls(ports: Ports, lock: Lock | None, console: Console) -> None:
    for name, port in ports.services.items():
        console.print(f"{name:<17} http://localhost:{port}/docs", soft_wrap=True)
    console.print(f"{'Consul':<17} {'https' if lock else 'http'}://localhost:{ports.consul}/ui", soft_wrap=True)
    if lock:
        console.print(f"  Its UI asks for a token: see {lock.folder}/readers/agent/token", soft_wrap=True)
    console.print(f"{'Who calls whom':<17} http://localhost:{ports.services['orchestrator-api']}/", soft_wrap=True)


def _stay_until_interrupted(system: System, path: str, live: Live, console: Console) -> None:
    console.print(f"\nThe logs are in {system.processes.directory}.", soft_wrap=True)
    console.print("Kill a backend-api (kill -9 and its pid) and see what callers notice. Ctrl-C stops everything.")
    try:
        asyncio.run(stay(system, path, live))
    except KeyboardInterrupt:
        console.print("Stopping: the services withdraw from Consul, drain and end.")


if __name__ == "__main__":
    sys.exit(main())
