"""The three services as processes of this machine, found by a Consul."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from registry import Instance, ServiceRegistry
from registry.testing.agent import ConsulAgent
from registry.testing.ports import free_ports
from tools.services import SERVICES

START_SECONDS = 60.0
QUIET = {"LOG_LEVEL": "ERROR"}


@contextmanager
def running_services(agent: ConsulAgent, folder: Path) -> Iterator[dict[str, tuple[Instance, psutil.Process]]]:
    """By name, each found by Consul; their cards are in the folder. Killed after, and taken out of Consul."""
    with ExitStack() as stack:
        registry = stack.enter_context(ServiceRegistry("127.0.0.1", agent.http_port))
        processes = {}
        for service, port in zip(SERVICES, free_ports(len(SERVICES)), strict=True):
            command = [sys.executable, "-m", "uvicorn", service.app, "--port", str(port), "--log-level", "error"]
            variables = {"SERVICE_PORT": str(port), "DATABASE_URL": f"sqlite:///{folder}/cards.db"} | QUIET
            process = subprocess.Popen(command, env=os.environ | agent.env() | variables, cwd=folder)
            stack.callback(registry.deregister_service, f"{service.name}-127.0.0.1-{port}")
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes[service.name] = psutil.Process(process.pid)
        found: dict[str, tuple[Instance, psutil.Process]] = {}
        deadline = time.monotonic() + START_SECONDS
        while len(found) < len(processes):
            assert time.monotonic() < deadline, f"found {sorted(found)} only"
            time.sleep(0.05)
            for name, started in processes.items():
                for instance in registry.discover_service(name):
                    found[name] = instance, started
        yield found
