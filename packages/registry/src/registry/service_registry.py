"""The synchronous control plane: register, deregister and query. To call services, use ServiceDiscoveryClient."""

import random
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from consul.base import Response
from consul.callback import CB

from registry.consul.connection import SyncConsul, UnprovenEmptyError, consul_errors
from registry.consul.health import Listing, health_path, parse_local_health, right_path, tell_left_out
from registry.consul.reading import parse_listing
from registry.consul.resolver import ConsulResolver
from registry.errors import InvalidInputError, RegistryError, RegistryUnavailableError
from registry.model import Instance, LeftOut, ServiceHealth
from registry.presence.entry import ATTEMPTS, holders, parse_nodes, take_out
from registry.presence.registration import Registration
from registry.settings import ConsulSettings
from registry.validation import check_id, check_known_service, check_tag

__all__ = ["ServiceRegistry"]


class ServiceRegistry:
    """Registers, deregisters and finds services through one Consul agent. Every method blocks; thread-safe.

    All methods but ``is_healthy`` raise RegistryUnavailableError if Consul can't be reached (this never looks like
    "not found"), RegistryError if Consul rejects the request (for example because of the token), and InvalidInputError
    before anything is sent.
    """

    def __init__(
        self,
        host: str = "localhost",
        port: int = 8500,
        token: str | None = None,
        scheme: Literal["http", "https"] = "http",
        consistency: Literal["default", "consistent", "stale"] = "default",
        *,
        ca_file: str | Path | None = None,
        timeout: float = 5.0,
        settings: ConsulSettings | None = None,
    ) -> None:
        """Uses these arguments and no environment variable; ``settings=ConsulSettings()`` uses the environment.

        ``timeout``: time limit for one request to Consul, in seconds. Sends nothing yet.
        """
        given = {"host": host, "port": port, "token": token, "scheme": scheme, "consistency": consistency}
        given |= {"ca_file": ca_file, "timeout": timeout}
        defaults = {name: field.default for name, field in ConsulSettings.model_fields.items()}
        self.settings = settings or ConsulSettings.model_validate(defaults | given)
        self._consul = SyncConsul(self.settings)
        self._told: dict[str, frozenset[LeftOut]] = {}

    def __repr__(self) -> str:
        return f"ServiceRegistry({self.settings.url!r})"

    def register_service(
        self,
        name: str,
        address: str,
        port: int,
        service_id: str | None = None,
        tags: Sequence[str] | None = None,
        meta: dict[str, str] | None = None,
        health_check_interval: str = "10s",
        health_check_timeout: str = "5s",
        health_check_path: str = "/health",
        deregister_critical_service_after: str | None = "1m",
    ) -> str:
        """Registers an instance with an HTTP check, and returns its id, by default ``"{name}-{address}-{port}"``.

        The instance is critical until its first check, which Consul runs within one interval and which counts alone.
        After that it becomes critical on exactly the third failure in a row; critical instances are not discovered.
        Consul removes it from the catalog later: ``deregister_critical_service_after`` counts from the first failed
        check, has a minimum of one minute, and is evaluated every 30 s; None: never.
        Intervals are Consul durations, such as ``"10s"``.
        A service that uses registry.fastapi registers itself, as passing: do not register it here as well.

        Source: https://developer.hashicorp.com/consul/api-docs/agent/check#register-check
        """
        registration = Registration(
            name=name,
            address=address,
            port=port,
            service_id=service_id,
            tags=tuple(tags or ()),
            meta=meta or {},
            health_check_interval=health_check_interval,
            health_check_timeout=health_check_timeout,
            health_check_path=health_check_path,
            deregister_critical_service_after=deregister_critical_service_after,
        )
        with consul_errors(self.settings):
            self._consul.agent.service.register(**registration.arguments(passing=False))
        self._consul.http.tokens.hold(registration.id)
        return registration.id

    def deregister_service(self, service_id: str) -> bool:
        """True: the instance has been removed from Consul. False: neither this agent nor the catalog knew that id.

        Behind a load balancer, this may ask several agents until it reaches the one that has the instance. If it does
        not reach that one, it removes the instance from the catalog; its agent may restore it within a minute.
        """
        check_id(service_id)
        path, nodes = f"/v1/agent/service/deregister/{service_id}", set[str]()
        with consul_errors(self.settings):
            for _ in range(ATTEMPTS):
                if self._consul.http.last("PUT", CB.boolean(), path):
                    self._consul.http.tokens.drop(service_id)
                    return True
                nodes = self._consul.http.get(parse_nodes, *holders(service_id))
                if not nodes:
                    return False
            for node in nodes:
                take_out(self._consul, node, service_id)
        return True

    def discover_service(self, name: str, tag: str | None = None, passing: bool = True) -> list[Instance]:
        """The service's instances, sorted by id, may be empty. ``passing=False`` includes unhealthy ones.

        An entry without a port or with an invalid address is left out, and logged once.
        """
        check_known_service(name)
        params = [("passing", "1")] if passing else []
        if tag is not None:
            params.append(("tag", check_tag(tag)))
        http = self._consul.http
        try:
            with consul_errors(self.settings):
                try:
                    listing: Listing = http.get(_parse, health_path(name), params)
                except UnprovenEmptyError:
                    http.get(CB.json(), right_path(name))
                    if not http.get(CB.json(), "/v1/catalog/nodes"):
                        raise
                    listing = Listing.of(())
        except TypeError as error:
            raise RegistryUnavailableError(f"Consul at {self.settings.url} sent a broken answer: {error}") from error
        if told := tell_left_out(listing, name, self._told.pop(name, ())):
            self._told[name] = told
        return list(listing.instances)

    def discover_all_services(self) -> dict[str, list[str]]:
        """All service names that the token may read, each with the tags of its instances; includes ``consul``."""
        with consul_errors(self.settings):
            services: dict[str, list[str]] = self._consul.catalog.services()[1]
            return services

    def get_service_url(
        self, name: str, tag: str | None = None, load_balance: bool = True, scheme: str = "http"
    ) -> str | None:
        """``scheme://host:port`` of a healthy instance; None if there is none.

        ``scheme`` applies to instances without a scheme of their own; those with the metadata ``secure=true`` get
        ``https``. ``load_balance=True`` picks a random instance, False always the first by id.
        """
        if scheme not in {"http", "https"}:
            raise InvalidInputError(f"{scheme!r} is not a scheme: pass 'http' or 'https'")
        instances = self.discover_service(name, tag)
        if not instances:
            return None
        instance = random.choice(instances) if load_balance else instances[0]
        return f"{'https' if instance.scheme == 'https' else scheme}://{instance.netloc}"

    def get_service_health(self, service_id: str) -> ServiceHealth | None:
        """The health of an instance that is registered with this agent; None if this agent does not know the id."""
        check_id(service_id)
        with consul_errors(self.settings):
            path = f"/v1/agent/health/service/id/{service_id}"
            health: ServiceHealth | None = self._consul.http.get(parse_local_health, path)
            return health

    def is_healthy(self) -> bool:
        """Whether Consul answers and its cluster has a leader. Never raises."""
        try:
            with consul_errors(self.settings):
                return bool(self._consul.status.leader())
        except RegistryError:
            return False

    def resolver(self) -> ConsulResolver:
        """A resolver that watches the same Consul, for a client. Sends nothing yet."""
        return ConsulResolver(self.settings)

    def close(self) -> None:
        """Closes the connections to Consul; deregisters nothing."""
        self._consul.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _parse(response: Response) -> Listing:
    CB.boolean()(response)  # raises what an error status means
    return parse_listing(response.body.encode())
