"""Whatever the services' own OpenAPI pages make possible, and what they forbid: no answer is a 500."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from registry.testing.agent import ConsulAgent
from tests.processes import running_services
from tools.services import SERVICES

CASES = 300
"""Of each service, half of them against the schema."""


@pytest.fixture(scope="module")
def addresses(consul_agent: ConsulAgent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where each service is, by name: processes that call each other."""
    with running_services(consul_agent, tmp_path_factory.mktemp("services")) as services:
        yield {name: f"http://{instance.address}:{instance.port}" for name, (instance, _) in services.items()}


@pytest.mark.parametrize("name", [service.name for service in SERVICES])
def test_no_request_is_answered_500(addresses: dict[str, str], name: str) -> None:
    """Hundreds of requests per service, every route among them, valid and invalid: none is a 500, all are answered."""
    url = addresses[name]
    page = httpx.get(f"{url}/openapi.json", trust_env=False).json()
    found = list(schemathesis.openapi.from_dict(page).get_all_operations())
    operations = [result.ok() for result in found if isinstance(result, Ok)]
    assert len(operations) == len(found)
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    statuses: Counter[int] = Counter()
    for operation in operations:
        for mode in modes:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=CASES // len(operations) // len(modes),
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.explicit, Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            def ask(case: schemathesis.Case[Any]) -> None:
                answer = case.call(base_url=url)
                statuses[answer.status_code] += 1
                assert answer.status_code != 500, case.as_curl_command()

            with suppress(Unsatisfiable):  # nothing about a request without a parameter can be wrong
                ask()
    sys.stderr.write(f"\n{name}: {statuses.total()} cases, {dict(sorted(statuses.items()))}\n")
    assert statuses.total() >= CASES / 2
