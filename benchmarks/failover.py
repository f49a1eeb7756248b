"""The failover scenes of tests/failover, counted here; the tests assert the same."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from registry.testing.agent import ConsulAgent, running_agent
from tests.failover import scenes
from tests.failover.scenes import Scene

__all__ = ["SCENES", "Outcome", "play"]

CALLERS = 4
"""So many that the scenes have."""


@dataclass(frozen=True)
class Outcome:
    """What came of one scene."""

    scene: str
    promise: str
    seen: str
    """The figures that the promise speaks of."""
    kept: bool
    calls: int
    failed: int
    duplicated: int
    """Requests that instances received more than once: retries, which only calls that may be repeated get."""
    p50: float
    """Milliseconds, over all calls."""
    p99: float


@dataclass(frozen=True)
class _Scene:
    name: str
    promise: str
    run: Callable[[ConsulAgent], Awaitable[Scene]]
    kept: Callable[[Scene, dict[str, float]], bool]
    seen: str
    """A format for the figures."""


def _none_failed(scene: Scene) -> bool:
    return not scene.report.failures


def _killed(method: scenes.Method) -> _Scene:
    post = method == "POST"
    return _Scene(
        f"kill -9 one of three, {method}",
        f"0 {'sent twice, 0 failed but those it had received' if post else 'failed'}; p99 ≤ 3 × warm",
        lambda agent: scenes.kill_one_of_three(agent, method),
        lambda scene, figures: (
            (
                scene.duplicated == figures["failed_later"] == 0 and len(scene.report.failures) <= CALLERS
                if post
                else _none_failed(scene)
            )
            and figures["p99"] <= 3 * figures["warm_p99"]
        ),
        "failed of those begun after the kill: {failed_later:.0f}; p99 {p99:.4f} s, warm {warm_p99:.4f} s",
    )


def _sick(sickness: scenes.Sickness) -> _Scene:
    return _Scene(
        f"one of three: {sickness}",
        "0 failed; its share < 5 % after 2 s; returns",
        lambda agent: scenes.sicken_one_of_three(agent, sickness),
        lambda scene, figures: _none_failed(scene) and figures["share"] < 0.05,
        "share {share:.1%}; back {back:.1f} s after it healed",
    )


def _gone(absence: scenes.Absence) -> _Scene:
    return _Scene(
        f"all three {absence}, then one back",
        "an error in < 50 ms while gone; traffic again in < 1 s",
        lambda agent: scenes.lose_all_then_one_back(agent, absence),
        lambda scene, figures: figures["gone_p99"] < 0.05 and figures["back"] < 1 and not figures["failed_later"],
        "error p99 {gone_p99:.4f} s; event loop late p99 {blocked_p99:.4f} s; back {back:.2f} s; "
        "failed later: {failed_later:.0f}",
    )


def _consul(fault: scenes.ConsulFault) -> _Scene:
    return _Scene(
        f"Consul {fault}",
        "0 failed; view right < 5 s after it is back",
        lambda agent: scenes.break_consul(agent, fault),
        lambda scene, figures: _none_failed(scene) and figures["correct"] < 5,
        "right after {correct:.2f} s",
    )


def _outage(kind: scenes.Outage, seconds: float) -> _Scene:
    return _Scene(
        f"all three {kind} for {seconds:.0f} s, steady load",
        "requests reaching them ≤ 1.3 × offered; then all answered",
        lambda agent: scenes.outage(agent, kind, seconds=seconds),
        lambda scene, figures: figures["during"] <= 1.3 and figures["after"] <= 1.3 and figures["ok_last"] == 1,
        "during {during:.2f} ×, after {after:.2f} ×; answered in the second second: {ok_last:.1%}",
    )


SCENES = [
    _killed("GET"),
    _killed("POST"),
    _Scene(
        "SIGSTOP one of two, time-out 2 s",
        "0 failed; only calls on it pay one time-out",
        scenes.stop_one_of_two,
        lambda scene, figures: _none_failed(scene) and figures["slow"] <= CALLERS and figures["slow_later"] == 0,
        "slow: {slow:.0f}, later: {slow_later:.0f}",
    ),
    _sick("500 always"),
    _sick("500 on half"),
    _sick("300 ms slow"),
    _gone("killed"),
    _gone("deregistered"),
    _consul("killed"),
    _consul("emptied"),
    _consul("paused"),
    _consul("restarted while instances change"),
    _Scene(
        "scale 1 → 20 → 1",
        "0 failed; first call < 1 s; shares within ± 20 %",
        scenes.scale_to_and_back,
        lambda scene, figures: (
            _none_failed(scene) and figures["first_call"] < 1 and 0.8 <= figures["least"] <= figures["most"] <= 1.2
        ),
        "first call {first_call:.2f} s; shares {least:.2f} to {most:.2f} of equal",
    ),
    _outage("500 always", 30.0),
    _outage("killed", 30.0),
]


def play(quick: bool) -> list[Outcome]:
    """All scenes, each with a Consul of its own; ``quick``: only the first, with few calls."""
    if quick:
        scenes.WARM, scenes.CALLS = 100, 400
    outcomes = []
    for scene in SCENES[:1] if quick else SCENES:
        try:
            with running_agent() as agent:
                found = asyncio.run(_run(scene, agent))
        except Exception as error:
            # Minutes of measuring before it must not be lost.
            outcomes.append(Outcome(scene.name, scene.promise, f"broke off: {error!r}", False, 0, 0, 0, 0.0, 0.0))
            print(f"✗ {scene.name}: {error!r}", flush=True)
            continue
        outcomes.append(_outcome(scene, found))
        print(f"{'✓' if outcomes[-1].kept else '✗'} {scene.name}: {found}", flush=True)
    return outcomes


async def _run(scene: _Scene, agent: ConsulAgent) -> Scene:
    return await scene.run(agent)


def _outcome(scene: _Scene, found: Scene) -> Outcome:
    return Outcome(
        scene=scene.name,
        promise=scene.promise,
        seen=scene.seen.format(**found.figures),
        kept=scene.kept(found, found.figures) and not found.miscounted,
        calls=found.report.calls,
        failed=len(found.report.failures),
        duplicated=found.duplicated,
        p50=found.report.latency(0.5) * 1e3,
        p99=found.report.latency(0.99) * 1e3,
    )
