"""One way to Consul: py-consul's endpoints over an httpx client, sync or async, and its errors in our words."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlencode

import httpx
from consul.base import Consul, HTTPClient, Response
from consul.exceptions import (
    ACLDisabled,
    ACLPermissionDenied,
    BadRequest,
    ClientError,
    ConsulException,
    NotFound,
)

from registry.consul.tls import tls_advice, tls_context
from registry.errors import RegistryError, RegistryUnavailableError
from registry.settings import ConsulSettings

__all__ = ["AsyncConsul", "SyncConsul", "UnprovenEmptyError", "consul_errors"]

Params = Sequence[tuple[str, Any]] | None
Callback = Callable[[Response], Any]


@contextmanager
def consul_errors(settings: ConsulSettings) -> Iterator[None]:
    """Turns what py-consul and httpx raise into RegistryUnavailableError (try again) or RegistryError (refused)."""
    where = f"Consul at {settings.url}"

    def brief(error: Exception) -> str:
        return str(error) if len(str(error)) <= 300 else f"{str(error)[:300]}…"

    try:
        yield
    except (ACLPermissionDenied, ACLDisabled) as error:
        raise RegistryError(f"{where} denied the request: {brief(error)}; pass a token that has this right") from error
    except (BadRequest, NotFound) as error:
        raise RegistryError(f"{where} refused the request: {brief(error)}") from error
    except (ClientError, ConsulException) as error:
        raise RegistryUnavailableError(f"{where} answered with an error: {brief(error)}") from error
    except (httpx.TransportError, OSError) as error:  # an alert of TLS may come as it is
        what = str(error) or type(error).__name__
        advice = tls_advice(error)
        how = f"can't be asked: {what}; {advice}" if advice else f"can't be reached: {what}; is it running?"
        raise RegistryUnavailableError(f"{where} {how}") from error
    except httpx.DecodingError as error:
        raise RegistryUnavailableError(f"{where} sent a broken answer: {error}") from error


class UnprovenEmptyError(ACLPermissionDenied):  # type: ignore[misc]  # py-consul has no types
    """An empty list for a request without a token, where nothing is allowed by default.

    Without a token, rights come from the anonymous or the agent's default one, and Consul does not say what it hid from
    the former: there may be nobody, or nobody that may be seen.
    """

    def __init__(self, index: str) -> None:
        super().__init__("reading a service needs service:read and node:read")
        self.index = index


class _Requests(HTTPClient):  # type: ignore[misc]  # py-consul has no types
    """What the sync and the async client share: how a request is built and how an answer is read."""

    def __init__(self, settings: ConsulSettings) -> None:
        super().__init__(settings.host, settings.port, settings.scheme)
        self.base_uri = settings.url if settings.socket is None else f"{settings.scheme}://localhost"
        self.settings = settings

    def options(self) -> dict[str, Any]:
        auth = self.settings.auth.get_secret_value().partition(":") if self.settings.auth else None
        return {
            "auth": (auth[0], auth[2]) if auth else None,
            "timeout": self.settings.timeout,
            "trust_env": False,  # a proxy for the outside world is none for the agent beside us
        }

    def uri(self, path: str, params: Params = None) -> str:
        """As py-consul's, but what is percent-encoded stays as it is: a service's name may hold a slash."""
        return f"{self.base_uri}{quote(path, safe='/:%')}{'?' if params else ''}{urlencode(params or ())}"

    def transport_options(self) -> dict[str, Any]:
        return {
            "verify": tls_context(self.settings) if self.settings.scheme == "https" else False,
            "uds": None if self.settings.socket is None else str(self.settings.socket),
        }

    def request(self, method: str, path: str, params: Params, data: str | bytes = "") -> dict[str, Any]:
        query = list(params or ())
        if self.settings.consistency != "default" and path.startswith("/v1/health/"):
            query.append((self.settings.consistency, "1"))
        # Set here, for every endpoint: py-consul forgets it on some, and prefers its environment over its argument.
        token = self.settings.read_token()
        headers = {"X-Consul-Token": token} if token else {}
        timeout = httpx.Timeout(self.settings.timeout)
        asked = dict(query).get("wait")
        if asked:
            wait = min(float(asked.removesuffix("s")), self.settings.wait)
            query = [(name, f"{wait:g}s" if name == "wait" else value) for name, value in query]
            # "a small random amount of additional wait time is added ... up to wait / 16"
            # Source: https://developer.hashicorp.com/consul/api-docs/features/blocking
            timeout.read = self.settings.timeout + wait * 17 / 16
        return {
            "method": method,
            "url": self.uri(path, query),
            "content": data.encode() if isinstance(data, str) else data,
            "headers": headers,
            "timeout": timeout,
            "extensions": {"sni_hostname": self.settings.tls_server_name} if self.settings.tls_server_name else {},
        }

    def answer(self, callback: Callback, answer: httpx.Response) -> Any:
        # Consul signs whatever it says. Without that, a 404 would read as "no such service", wherever it came from.
        if answer.status_code < 500 and not any(name.startswith("x-consul-") for name in answer.headers):
            said = " ".join(answer.text.split())[:200]
            raise ConsulException(f"{answer.status_code} {said!r}, without the headers by which Consul is known")
        path, text = answer.request.url.path, answer.text.strip()
        if answer.status_code == 403 and text == "Permission denied" and path.startswith("/v1/health/connect/"):
            service = path.rpartition("/")[2]
            raise ACLPermissionDenied(f'reading it needs service:read: service "{service}" {{ policy = "read" }}')
        if (path.startswith(("/v1/health/service/", "/v1/health/connect/")) and text == "[]") or (
            path == "/v1/catalog/services" and text == "{}"
        ):
            # A token without rights gets an empty list and 200, just as a service without instances does.
            filtered = answer.headers.get("X-Consul-Results-Filtered-By-ACLs") == "true"
            denied = answer.headers.get("X-Consul-Default-ACL-Policy") == "deny"
            if filtered:
                raise ACLPermissionDenied("reading a service needs service:read and node:read")
            if denied and "X-Consul-Token" not in answer.request.headers:
                raise UnprovenEmptyError(answer.headers.get("X-Consul-Index", "0"))
        return callback(Response(answer.status_code, answer.headers, answer.text))


class _SyncRequests(_Requests):
    def __init__(self, settings: ConsulSettings) -> None:
        super().__init__(settings)
        self._connect()

    def _connect(self) -> None:
        self.pid = os.getpid()
        self.client = httpx.Client(transport=httpx.HTTPTransport(**self.transport_options()), **self.options())

    def send(self, callback: Callback, **request: Any) -> Any:
        if self.pid != os.getpid():
            # Parent and child would read each other's answers from one socket. Not closed here: a thread that this
            # process does not have may hold its lock.
            self.inherited = self.client
            self._connect()
        return self.answer(callback, self.client.request(**request))

    def last(self, method: str, callback: Callback, path: str, params: Params = None) -> Any:
        """A request that ends its connection: behind a load balancer, the next one may reach another agent."""
        request = self.request(method, path, params)
        request["headers"]["Connection"] = "close"
        return self.send(callback, **request)

    def get(self, callback: Callback, path: str, params: Params = None, headers: Any = None, raw: bool = False) -> Any:
        return self.send(callback, **self.request("GET", path, params))

    def put(
        self,
        callback: Callback,
        path: str,
        params: Params = None,
        data: str | bytes = "",
        headers: Any = None,
    ) -> Any:
        return self.send(callback, **self.request("PUT", path, params, data))

    def delete(
        self,
        callback: Callback,
        path: str,
        params: Params = None,
        data: str | bytes = "",
        headers: Any = None,
    ) -> Any:
        return self.send(callback, **self.request("DELETE", path, params, data))

    def post(self, callback: Callback, path: str, params: Params = None, data: str = "", headers: Any = None) -> Any:
        return self.send(callback, **self.request("POST", path, params, data))

    def close(self) -> None:
        self.client.close()


class _AsyncRequests(_SyncRequests):
    """The same verbs; each returns an awaitable instead of its result."""

    def __init__(self, settings: ConsulSettings) -> None:
        _Requests.__init__(self, settings)
        # A parked watch holds its connection: a pool limit would starve every call behind it.
        limits = httpx.Limits(max_connections=None)
        transport = httpx.AsyncHTTPTransport(limits=limits, **self.transport_options())
        self.async_client = httpx.AsyncClient(transport=transport, **self.options())

    async def send(self, callback: Callback, **request: Any) -> Any:
        return self.answer(callback, await self.async_client.request(**request))

    def close(self) -> Any:
        return self.async_client.aclose()


class SyncConsul(Consul):  # type: ignore[misc]  # py-consul has no types
    """py-consul over ``httpx.Client``: every call blocks. Thread-safe."""

    requests: type[_SyncRequests] = _SyncRequests

    def __init__(self, settings: ConsulSettings) -> None:
        self.settings = settings
        # All of them given, so that py-consul reads none from the environment.
        super().__init__(settings.host, settings.port, scheme=settings.scheme, verify=True)

    def http_connect(self, *_: Any, **__: Any) -> _SyncRequests:
        return self.requests(self.settings)


class AsyncConsul(SyncConsul):
    """py-consul over ``httpx.AsyncClient``: every call returns an awaitable."""

    requests = _AsyncRequests
