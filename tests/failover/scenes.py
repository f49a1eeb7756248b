"""Faults on real processes while a client calls: what its callers saw, and what the instances received.

Shared by the tests, which assert it, and the benchmarks, which show it for other clients too. Figures are seconds
unless their names say otherwise.
"""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import httpx
from prometheus_client import CollectorRegistry

from registry import ConnectionOptions, ConsulResolver, ConsulSettings, EjectionPolicy, ServiceDiscoveryClient
from registry.mesh.agent import AgentSource
from registry.mesh.identity import MeshIdentity
from registry.metrics import Metrics as ClientMetrics
from registry.testing.agent import ConsulAgent
from registry.testing.instances import RunningInstance, received, running_instances
from tests.failover.counts import Metrics, miscounted_by, read_metrics
from tests.support.load import Load, Report

CALLS = 4_000
"""At least so many in every scene."""
WARM = 1_000
"""So many before the fault."""

Method = Literal["GET", "POST"]
Sickness = Literal["500 always", "500 on half", "300 ms slow"]
Absence = Literal["killed", "deregistered"]
ConsulFault = Literal["killed", "emptied", "paused", "restarted while instances change"]
Outage = Literal["killed", "paused", "500 always"]


class Client(Protocol):
    """What is being tried: it calls one service, whose name it was made for."""

    async def call(self, method: Method, request_id: str) -> httpx.Response:
        """One call to ``/work`` that carries the id as ``X-Request-Id``."""
        ...

    def listed(self) -> set[str] | None:
        """The ids that it holds for alive; None: it can't say."""
        ...

    def metrics(self) -> Metrics:
        """What it has counted itself."""
        ...


Connect = Callable[[ConsulAgent, str, float], AbstractAsyncContextManager[Client]]
"""``connect(agent, service, timeout)``: a client that is ready to call; ``timeout``: seconds for one attempt."""


@dataclass
class Ours:
    """The client of this repository."""

    client: ServiceDiscoveryClient
    service: str
    registry: CollectorRegistry

    async def call(self, method: Method, request_id: str) -> httpx.Response:
        """Through the facade, as a service calls."""
        return await self.client.call_service(self.service, "/work", method, headers={"X-Request-Id": request_id})

    def listed(self) -> set[str]:
        """What Consul listed as passing when it was last heard."""
        return {endpoint.id for endpoint in self.client.explain(self.service).endpoints if endpoint.listed}

    def metrics(self) -> Metrics:
        """As Prometheus would read them now."""
        return read_metrics(self.registry)


@asynccontextmanager
async def connect_ours(
    agent: ConsulAgent,
    service: str,
    timeout: float,
    ejection: EjectionPolicy | None = None,
    peers: MeshIdentity | None = None,
) -> AsyncIterator[Client]:
    """Ours, warm, with every other setting as it comes; ``peers``: by which it calls instances of the mesh alone."""
    resolver = ConsulResolver(_settings(agent), upstreams=[service], mesh="true" if peers else "false")
    await resolver.start()
    connections = ConnectionOptions(peers=peers)
    async with ServiceDiscoveryClient(resolver, timeout=timeout, ejection=ejection, connections=connections) as client:
        observer, registry = ClientMetrics(client.explain_all), CollectorRegistry()
        client.observe(observer)
        registry.register(observer)
        yield Ours(client, service, registry)


@asynccontextmanager
async def connect_in_mesh(agent: ConsulAgent, service: str, timeout: float) -> AsyncIterator[Client]:
    """Ours, with a certificate of its own, for instances of the mesh."""
    source = AgentSource(_settings(agent), allow_unsafe_agent=True)
    async with MeshIdentity("caller", source) as peers, connect_ours(agent, service, timeout, peers=peers) as client:
        yield client


def _settings(agent: ConsulAgent) -> ConsulSettings:
    return ConsulSettings.model_validate({"host": "127.0.0.1", "port": agent.http_port, "token": agent.token})


@dataclass
class Scene:
    """What came of it."""

    report: Report
    requests: int
    """What the instances received: first attempts and others."""
    duplicated: int
    """Ids of calls that they received more than once."""
    miscounted: list[str]
    """Where the client's own count is not that of its callers, or of the instances; in words."""
    figures: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        return (
            f"{self.report.calls} calls, {len(self.report.failures)} failed {dict(self.report.errors)}, "
            f"{self.requests} requests, {self.duplicated} ids more than once; {figures}"
            f"{'; '.join(['', *self.miscounted])}"
        )


@asynccontextmanager
async def calling(
    connect: Connect,
    agent: ConsulAgent,
    instances: list[RunningInstance],
    timeout: float = 5.0,
    method: Method = "GET",
    rate: float | None = None,
) -> AsyncIterator[tuple[Client, "Watched"]]:
    """Four callers, or calls at this rate per second, while the context is open."""
    async with connect(agent, instances[0].instance.service, timeout) as client:

        async def call(request_id: str) -> httpx.Response:
            return await client.call(method, request_id)

        async with Watched(call, callers=4, rate=rate) as load:
            yield client, load
        load.metrics = client.metrics()


class Watched(Load):
    """A load, and what the client has counted when it is over."""

    metrics: Metrics


def scene(load: Watched, instances: Collection[RunningInstance], **figures: float) -> Scene:
    """The scene that this load, now at its end, has been."""
    stats = received(instances)
    counts = {each.instance.id: each.stats().requests for each in instances}
    miscounted = list(miscounted_by(load.metrics, load.report, counts))
    return Scene(load.report, stats.requests, len(stats.duplicated), miscounted, figures)


async def kill_one_of_three(
    agent: ConsulAgent, method: Method = "GET", connect: Connect = connect_ours, *, mesh: bool = False
) -> Scene:
    """kill -9, unknown to Consul.

    Figures: warm_p99 and p99 after the kill; failed_later: calls that began after it; unseen: those that failed and
    that no instance had begun to work on.
    """
    with running_instances(_name(), 3, consul=agent, check_interval=None, connect=mesh) as instances:
        if method == "POST":
            for each in instances:
                # Work takes a moment, so that some is under way at the kill and would be done twice if sent again.
                await asyncio.to_thread(each.set, delay=0.003)
        async with calling(connect, agent, instances, method=method) as (_, load):
            await load.reached(WARM)
            at = load.now
            await asyncio.to_thread(instances[1].kill)
            killed_at = load.now
            await load.reached(load.calls + CALLS - WARM)
        begun = received(instances).ids
        return scene(
            load,
            instances,
            warm_p99=load.report.between(0, at).latency(0.99),
            p99=load.report.between(at).latency(0.99),
            failed_later=len(load.report.between(killed_at).failures),
            unseen=sum(outcome.id not in begun for outcome in load.report.failures),
        )


async def stop_one_of_two(
    agent: ConsulAgent, connect: Connect = connect_ours, seconds: float = 4.5, *, mesh: bool = False
) -> Scene:
    """SIGSTOP, unknown to Consul, seen for so many ``seconds``; one attempt may take 2 s.

    Figures: slow: calls that took longer than 1 s; slow_later: those that began 0.5 s after the stop or later;
    tried_again: how many of the latter had been sent to the stopped one too.
    """
    with running_instances(_name(), 2, consul=agent, check_interval=None, connect=mesh) as instances:
        async with calling(connect, agent, instances, timeout=2.0) as (_, load):
            await load.reached(WARM)
            instances[1].pause()
            at = load.now
            await load.until(lambda: load.now > at + seconds)
            await load.reached(CALLS)
        later = load.report.between(at + 0.5)
        instances[1].resume()
        async with httpx.AsyncClient(trust_env=False, verify=False) as direct:
            await direct.get(f"{instances[1].url}/health")  # what it found in its queues comes before this
        found = instances[1].stats().ids
        return scene(
            load,
            instances,
            slow=load.report.slower_than(1.0),
            slow_later=later.slower_than(1.0),
            tried_again=sum(outcome.id in found for outcome in later.outcomes),
        )


async def sicken_one_of_three(
    agent: ConsulAgent, sickness: Sickness, connect: Connect = connect_ours, heals_within: float = 60.0
) -> Scene:
    """One misbehaves, unknown to Consul, and then heals.

    Figures: share: its part of all requests from 2 s after it fell ill on; back: from its healing until it had a
    fifth of the answers.
    """
    with running_instances(_name(), 3, consul=agent, check_interval=None) as instances:
        sick = instances[1]
        async with calling(connect, agent, instances) as (_, load):
            await load.reached(WARM)
            if sickness == "300 ms slow":
                await asyncio.to_thread(sick.set, delay=0.3)
            else:
                await asyncio.to_thread(sick.set, "error", rate=1.0 if sickness == "500 always" else 0.5)
            at = load.now
            await load.until(lambda: load.now > at + 2.0)
            sick_before, all_before = sick.stats().requests, received(instances).requests
            await load.until(lambda: load.now > at + 4.0)
            await load.reached(CALLS)
            sick_after, all_after = sick.stats().requests, received(instances).requests
            await asyncio.to_thread(sick.set)
            back = await load.until(
                lambda: load.last(200).shares.get(sick.instance.id, 0.0) > 0.2, heals_within, what="back after healing"
            )
        return scene(load, instances, share=(sick_after - sick_before) / (all_after - all_before), back=back)


async def lose_all_then_one_back(
    agent: ConsulAgent, absence: Absence, connect: Connect = connect_ours, seconds: float = 1.5
) -> Scene:
    """All killed, and taken out of Consul or not; then one starts again.

    Figures: of the calls that began meanwhile: gone_calls, gone_ok, gone_p99, and gone_slow: how many took longer than
    50 ms; blocked_p99: how late a timer fired. back: from when one answers until a call succeeded; failed_later: of the
    calls that began after that.
    """
    with running_instances(_name(), 3, consul=agent, check_interval=None) as instances:
        async with calling(connect, agent, instances) as (_, load):
            await load.reached(CALLS // 2)
            for each in instances:
                await asyncio.to_thread(each.kill)
                if absence == "deregistered":
                    await asyncio.to_thread(each.deregister)
            gone_at, late = load.now, []
            while load.now < gone_at + seconds:
                before = time.monotonic()
                await asyncio.sleep(0.005)
                late.append(time.monotonic() - before - 0.005)
            until = load.now
            await asyncio.to_thread(instances[0].start)
            if absence == "deregistered":
                await asyncio.to_thread(instances[0].register, check_interval=None)
            back = await load.until(lambda: load.last(1).errors == {}, what="a success")
            back_at = load.now
            await load.reached(load.calls + CALLS // 2)
        gone = load.report.between(gone_at, until)
        return scene(
            load,
            instances,
            gone_calls=gone.calls,
            gone_ok=gone.calls - len(gone.failures),
            gone_p99=gone.latency(0.99),
            gone_slow=gone.slower_than(0.05),
            blocked_p99=sorted(late)[int(len(late) * 0.99)],
            back=back,
            failed_later=len(load.report.between(back_at).failures),
        )


async def break_consul(agent: ConsulAgent, fault: ConsulFault, connect: Connect = connect_ours) -> Scene:
    """Consul itself fails for two seconds; when it is back, one more instance registers.

    Emptied, it comes back as one that knows nobody, and nobody registers again for a second; otherwise the instances
    register themselves as services do. Figure: correct: from Consul's return, and the instances' to it, until the
    client lists exactly those who answer (NaN: it can't say).
    """
    service = _name()
    with ExitStack() as stack:
        itself = fault != "emptied"
        instances = stack.enter_context(
            running_instances(service, 3, consul=agent, registers_itself=itself, check_interval=1.0)
        )
        spares = stack.enter_context(running_instances(service, 2, consul=agent, check_interval=1.0, running=False))
        await asyncio.to_thread(_until_passing, agent, service, 3)
        async with calling(connect, agent, instances) as (client, load):
            await load.reached(WARM)
            alive = {each.instance.id for each in instances}
            if fault == "paused":
                agent.pause()
            else:
                await asyncio.to_thread(agent.stop if fault == "emptied" else agent.kill)
            at = load.now
            if fault == "restarted while instances change":
                await asyncio.to_thread(instances[0].kill)
                alive.remove(instances[0].instance.id)
            await asyncio.to_thread(spares[0].start)
            await load.until(lambda: load.now > at + 2.0)
            if fault == "paused":
                agent.resume()
            elif fault == "emptied":
                await asyncio.to_thread(agent.restart, keep_data=False)
                await load.until(lambda: not client.listed(), 10.0, what="an empty view")
                empty = load.now
                await load.until(lambda: load.now > empty + 1.0)
            else:
                await asyncio.to_thread(agent.start)
            back = load.now
            for each in instances if fault == "emptied" else ():
                await asyncio.to_thread(each.register, check_interval=1.0)
            await asyncio.to_thread(spares[0].register, check_interval=1.0)
            alive.add(spares[0].instance.id)
            correct = float("nan")
            if client.listed() is not None:
                await load.until(lambda: client.listed() == alive, 30.0, what=f"a view of {sorted(alive)}")
                correct = load.now - back
            await load.reached(max(CALLS, load.calls + 500))
        return scene(load, [*instances, *spares], correct=correct)


async def scale_to_and_back(
    agent: ConsulAgent, count: int = 20, connect: Connect = connect_ours, *, mesh: bool = False
) -> Scene:
    """1 → ``count`` → 1 instances, all at once each way; on the way down each drains for half a second.

    Figures: first_call: the longest that a new one waited for its first call once it answered; least and most: shares
    relative to equal ones while all are there.
    """
    service = _name()
    with ExitStack() as stack:
        (first,) = stack.enter_context(running_instances(service, consul=agent, connect=mesh))
        more = stack.enter_context(running_instances(service, count - 1, consul=agent, running=False, connect=mesh))
        # Work takes longer than what 20 processes on few cores wait for each other: that is no reason to avoid one.
        work = 0.005
        await asyncio.to_thread(first.set, delay=work)
        async with calling(connect, agent, [first]) as (_, load):
            await load.reached(WARM)
            answers: dict[str, float] = {}

            def start(each: RunningInstance) -> None:
                each.start()
                each.set(delay=work)
                answers[each.instance.id] = load.now
                each.register()

            async def stop(each: RunningInstance) -> None:
                await asyncio.to_thread(each.deregister)
                await asyncio.sleep(0.5)
                await asyncio.to_thread(each.terminate)

            await asyncio.gather(*(asyncio.to_thread(start, each) for each in more))
            await load.until(lambda: load.last(CALLS).shares.keys() >= answers.keys(), what=f"all {count} called")
            since = load.now
            await load.reached(load.calls + CALLS)
            shares = load.report.between(since).shares
            await asyncio.gather(*map(stop, more))
            await load.reached(load.calls + WARM)
        first_calls = dict[str | None, float]()
        for outcome in load.report.outcomes:
            first_calls[outcome.instance] = min(outcome.started, first_calls.get(outcome.instance, outcome.started))
        return scene(
            load,
            [first, *more],
            first_call=max(first_calls[id_] - at for id_, at in answers.items()),
            least=min(shares.values()) * count,
            most=max(shares.values()) * count,
        )


async def roll_three(
    agent: ConsulAgent, method: Method = "GET", connect: Connect = connect_ours, *, mesh: bool = False
) -> Scene:
    """Three instances, which register themselves, are restarted one after another, in good order.

    Figure: longest: of the restarts, until Consul had the instance again.
    """
    service = _name()
    with running_instances(service, 3, consul=agent, registers_itself=True, connect=mesh) as instances:
        await asyncio.to_thread(_until_passing, agent, service, 3)
        async with calling(connect, agent, instances, method=method) as (_, load):
            await load.reached(WARM)
            took = []
            for each in instances:
                at = load.now
                await asyncio.to_thread(each.terminate)
                await asyncio.to_thread(each.start)
                await asyncio.to_thread(_until_passing, agent, service, 3)
                took.append(load.now - at)
                await load.reached(load.calls + WARM)
        return scene(load, instances, longest=max(took))


async def outage(
    agent: ConsulAgent, kind: Outage, connect: Connect = connect_ours, seconds: float = 6.0, rate: float = 400.0
) -> Scene:
    """All three instances of an upstream fail at once, at a steady offered load, and come back together.

    Figures: during and after: requests that reached them in the outage and in the two seconds after, relative to the
    load offered meanwhile, without what lay in the queues of paused ones from calls long over; ok_last: the part of
    the calls in the last of these seconds that succeeded.
    """
    with running_instances(_name(), 3, consul=agent, check_interval=None) as instances:
        async with calling(connect, agent, instances, timeout=1.0, rate=rate) as (_, load):
            await load.reached(WARM)
            for each in instances:
                if kind == "killed":
                    await asyncio.to_thread(each.kill)
                elif kind == "paused":
                    each.pause()
                else:
                    await asyncio.to_thread(each.set, "error", status=503)
            at, before = load.now, Counter(received(instances).ids)
            await load.until(lambda: load.now > at + seconds)
            over = {outcome.id for outcome in load.report.outcomes}
            during, until = Counter(received(instances).ids), load.now
            for each in instances:
                if kind == "killed":
                    await asyncio.to_thread(each.start, wait=False)
                elif kind == "paused":
                    each.resume()
                else:
                    await asyncio.to_thread(each.set)
            for each in instances:
                if kind == "killed":
                    await asyncio.to_thread(each.wait_until_ready)
            back = load.now
            await load.until(lambda: load.now > back + 2.0)
            after = Counter(received(instances).ids)
        last = load.report.between(back + 1.0, back + 2.0)
        return scene(
            load,
            instances,
            during=sum((during - before).values()) / (rate * (until - at)),
            after=sum(times for id_, times in (after - during).items() if id_ not in over) / (rate * 2.0),
            ok_last=1 - len(last.failures) / last.calls,
        )


def _name() -> str:
    return f"scene-{uuid.uuid4().hex[:10]}"


def _until_passing(agent: ConsulAgent, service: str, count: int) -> None:
    deadline = time.monotonic() + 20.0
    headers = {} if agent.token is None else {"X-Consul-Token": agent.token}
    with httpx.Client(base_url=agent.url, headers=headers, trust_env=False) as consul:
        while len(consul.get(f"/v1/health/service/{service}?passing").json()) < count:
            assert time.monotonic() < deadline, f"{service} has not {count} instances"
            time.sleep(0.02)
