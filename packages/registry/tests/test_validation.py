"""Nothing that a user supplies changes the host or reaches Consul unchecked; property-based, by the real client."""

import asyncio
import contextlib
import re
import string
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from registry import (
    DiscoveryTransport,
    Instance,
    InvalidInputError,
    RegistryError,
    ServiceDiscoveryClient,
    ServiceRegistry,
    ServiceSettings,
    StaticResolver,
)
from registry.presence.registration import Registration
from registry.validation import (
    check_address,
    check_duration,
    check_headers,
    check_id,
    check_known_service,
    check_meta,
    check_path,
    check_port,
    check_service,
    check_tag,
)
from tests.support.server import Answer, RecordingServer, Serve, recording_server

CARDS = Instance("cards-1", "cards", "10.1.2.3", 8123)
RESOLVER = StaticResolver({"cards": [CARDS], "other": [Instance("other-1", "other", "10.9.9.9", 9999)]})

hostile_parts = st.sampled_from(
    [
        *(
            "/",
            "//",
            "///",
            "\\",
            "@",
            ":",
            "?",
            "#",
            "%",
            "&",
            "=",
            ";",
            ".",
            "..",
            "/../",
            "%2e%2e",
            "%2E.",
            "%2f",
            "%5c",
        ),
        *(
            "@evil.example/",
            "//evil.example",
            "http://evil.example/",
            "https:",
            "evil.example",
            ":80",
            "[::1]",
            "127.0.0.1",
        ),
        *(
            "\r\n",
            "\n",
            "\r",
            "\t",
            "\0",
            " ",
            "\x7f",
            "\x85",
            "\u2028",
            "\u202e",
            "é",
            "．",
            "／",
            "＠",
            "\ud800",
            "%0d%0a",
        ),
        *("cards", "other", "api", "user:password@", "localhost", "\r\nHost: evil.example\r\n", "xn--80ak6aa92e"),
    ]
)
hostile = st.one_of(st.lists(hostile_parts, max_size=6).map("".join), st.text(max_size=40))
hostile_paths = st.one_of(hostile, hostile.map("/{}".format), hostile.map("/api/{}".format))


class Recorder(httpx.AsyncBaseTransport):
    """An inner transport that sends nothing and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        return httpx.Response(200, content=b"{}")


def call(*arguments: Any, **keywords: Any) -> list[httpx.Request]:
    """One call through the real client; what the inner transport was asked for. Raises what the client raises."""
    recorder = Recorder()

    async def run() -> None:
        async with ServiceDiscoveryClient(RESOLVER, transport=recorder) as client:
            await client.call_service(*arguments, **keywords)

    try:
        asyncio.run(run())
    except BaseException:
        assert recorder.asked == []
        raise
    return recorder.asked


def assert_only_cards(asked: list[httpx.Request]) -> None:
    """Each request went to the instance of ``cards``, at its port, with no credentials or other Host in it."""
    for request in asked:
        assert (request.url.scheme, request.url.host, request.url.port) == ("http", CARDS.address, CARDS.port)
        assert (request.url.userinfo, request.url.fragment) == (b"", "")
        assert request.headers["host"] == "cards"
        assert request.url.raw_path.startswith(b"/")
        assert re.fullmatch(rb"[!-~]*", request.url.raw_path)


def rejected(check: Callable[[Any], object], value: object) -> bool:
    """Whether the check refuses the value; with InvalidInputError, or this fails."""
    try:
        check(value)
    except InvalidInputError:
        return True
    return False


# -- paths -------------------------------------------------------------------------------------------------------------

HOSTILE_PATHS = [
    "@evil.example/",
    ":80/",
    ".evil.example/",
    "//evil.example",
    "///evil.example",
    "/\\evil.example",
    "\\\\evil.example",
    "http://evil.example/",
    "https:evil.example",
    "",
    "relative",
    "?query",
    "#fragment",
    "/#fragment",
    "/a b",
    "/a\r\nHost: evil.example",
    "/a\nb",
    "/a\tb",
    "/a\0b",
    "/a\x7fb",
    "/..",
    "/../admin",
    "/api/../../admin",
    "/api/..",
    "/%2e%2e/admin",
    "/api/%2E%2e",
    "/api/.%2e/admin",
    "/api/%2e./admin",
    "/api/..%2fadmin",
    "/api%2f..%2fadmin",
    "/a\\..\\b",
    "/\ud800",
    "/" + "a" * 100_000,
]


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_hostile_paths_are_refused(path: str) -> None:
    """Each of these is an InvalidInputError before anything is sent."""
    with pytest.raises(InvalidInputError):
        call("cards", path)


@given(hostile_paths)
@settings(max_examples=400, deadline=None)
@example("/@evil.example/")
@example("/x//evil.example")
@example("/x?next=//evil.example/..")
@example("/\x85")
def test_no_path_leads_elsewhere(path: str) -> None:
    """Whatever the path: a request to the instance and to nobody else, or an InvalidInputError and nothing sent."""
    with contextlib.suppress(InvalidInputError):
        assert_only_cards(call("cards", path))


@given(st.text(string.ascii_letters + string.digits + "-._~!$&'()*+,;=:@/%äß€", max_size=40), st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_harmless_paths_arrive(tail: str, value: str) -> None:
    """A path that is accepted arrives as it was given, once encoded; params are encoded, whatever they hold."""
    path = f"/api/{tail}"
    try:
        check_path(path)
        value.encode()
    except (InvalidInputError, UnicodeEncodeError):
        return
    asked = call("cards", path, params={"q": value})
    assert_only_cards(asked)
    (request,) = asked
    assert dict(request.url.params) == {"q": value}
    if "%" not in path and not re.search(r"/\.+(/|$)", path):
        assert request.url.path == path


# -- service names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "cards/", "cards@evil.example", "evil.example", "cards:80", "http://cards", "//cards", "[::1]"),
        *(
            "127.0.0.1",
            "-cards",
            "cards-",
            "ca_rds",
            "cards\r\n",
            "cards\0",
            "kärten",
            "ｃａｒｄｓ",
            "a" * 64,
            "cards#",
        ),
        *(
            "cards?",
            "cards\\",
            "*",
            ".",
            "..",
            "cards.",
            "cards%2eevil",
            "ﬁ",
            "\ud800",
            "cards\u200b",
            None,
            7,
            b"cards",
        ),
    ],
)
def test_hostile_names_are_refused(name: Any) -> None:
    """What is no RFC 1123 label is no name of one's own; nobody has it whom a call could reach."""
    with pytest.raises(RegistryError):
        call(name, "/")
    with pytest.raises(InvalidInputError):
        check_service(name)
    if not isinstance(name, bytes):
        with pytest.raises(ValueError):
            ServiceSettings(name=name, port=1)


@given(hostile)
@settings(max_examples=300, deadline=None)
def test_no_name_leads_elsewhere(name: str) -> None:
    """Whatever the name: its own service, or an error of the registry and nothing sent."""
    with contextlib.suppress(RegistryError):
        asked = call(name, "/")
        assert {request.url.host for request in asked} <= {"10.1.2.3", "10.9.9.9"}


@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True))
@settings(max_examples=200, deadline=None)
@example("123")
@example("0x7f")
@example("a--b")
def test_every_label_can_be_called(name: str) -> None:
    """Any name that is accepted can be resolved and called, even one that looks like a number."""
    if rejected(check_service, name):
        return
    recorder = Recorder()

    async def run() -> None:
        resolver = StaticResolver({name: [Instance("i", name, "10.1.2.3", 8123)]})
        async with ServiceDiscoveryClient(resolver, transport=recorder) as client:
            await client.get(name, "/")

    asyncio.run(run())
    assert [request.url.host for request in recorder.asked] == ["10.1.2.3"]
    assert recorder.asked[0].headers["host"] == name


@given(st.one_of(hostile, hostile_paths, hostile.map("http://{}".format), hostile.map("//{}".format)))
@settings(max_examples=400, deadline=None)
@example("http://evil.example/")
@example("http://cards@evil.example/")
@example("http://cards:99/")
@example("http://10.0.0.1/")
@example("http://xn--a/")
@example("//evil.example")
def test_no_url_leaves_through_the_transport(url: str) -> None:
    """An httpx client over the transport reaches instances only, whatever URL it is given."""
    recorder = Recorder()

    async def run() -> None:
        transport = DiscoveryTransport(RESOLVER, transport=recorder)
        async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
            await client.get(url)

    # UnicodeError: httpx's own answer to a host or path that can't be encoded, before the transport is asked.
    with contextlib.suppress(RegistryError, httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError):
        asyncio.run(run())
    assert {(r.url.host, r.url.port) for r in recorder.asked} <= {("10.1.2.3", 8123), ("10.9.9.9", 9999)}


# -- headers, methods, tags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["a\r\nX-Evil: 1", "a\nb", "a\rb", "a\0b", "\r\n"])
def test_line_breaks_in_headers_are_refused(bad: str) -> None:
    """CR, LF and NUL in a header's name or value are an InvalidInputError before anything is sent."""
    with pytest.raises(InvalidInputError):
        call("cards", "/", headers={"X-Value": bad})
    with pytest.raises(InvalidInputError):
        call("cards", "/", headers={bad: "value"})


@pytest.mark.parametrize("method", ["", "GET /", "GET\r\n", "G E T", "GET\0", "ÄG", "A" * 40, "GET:"])
def test_hostile_methods_are_refused(method: str) -> None:
    """A method is a word of letters."""
    with pytest.raises(InvalidInputError):
        call("cards", "/", method)


@pytest.mark.parametrize("tag", ["", "a\nb", "a\0", "\u2028", "a" * 4097, "\ud800"])
def test_hostile_tags_are_refused(tag: str) -> None:
    """A tag is printable text, for calls, discovery and registration alike."""
    with pytest.raises(InvalidInputError):
        check_tag(tag)
    with pytest.raises(ValueError):
        ServiceSettings(name="cards", port=1, tags=(tag,))
    with pytest.raises(InvalidInputError):
        call("cards", "/", tag=tag)


@pytest.mark.parametrize(
    "headers", [{"X-Evil": "a\r\nX-Injected: 1"}, {"X-Evil\r\nX-Injected": "1"}, {"Cookie": "a=b\nX-Injected: 1"}]
)
async def test_nothing_is_injected_on_a_real_connection(serve: Serve, headers: dict[str, str]) -> None:
    """Past the facade, through a plain httpx client, a line break in a header injects nothing either."""
    server = serve()
    transport = DiscoveryTransport(StaticResolver({"cards": [server.of("cards")]}))
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        with pytest.raises((httpx.HTTPError, ValueError)):
            await client.get("/", headers=headers)
    assert server.requests == []


# -- what Consul is told -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impostor() -> Iterator[RecordingServer]:
    """Stands where Consul should be, and must never be asked."""
    with recording_server(lambda _: Answer(200, b"[]", {"X-Consul-Index": "1"})) as server:
        yield server


@pytest.fixture(scope="module")
def registry(impostor: RecordingServer) -> Iterator[ServiceRegistry]:
    """A registry that talks to the impostor."""
    with ServiceRegistry("127.0.0.1", impostor.port) as registry:
        yield registry


anything = st.one_of(
    hostile, st.none(), st.integers(), st.floats(), st.booleans(), st.binary(max_size=8), st.lists(st.text(max_size=3))
)
FIELDS: dict[str, tuple[Callable[[Any], object], st.SearchStrategy[Any]]] = {
    "name": (check_service, anything),
    "address": (check_address, anything),
    "port": (check_port, anything),
    "service_id": (check_id, anything.filter(lambda value: value is not None)),
    "tags": (lambda value: [check_tag(tag) for tag in value], st.lists(hostile, min_size=1, max_size=3)),
    "meta": (check_meta, st.dictionaries(hostile, anything, min_size=1, max_size=3)),
    "health_check_interval": (check_duration, anything),
    "health_check_timeout": (check_duration, anything),
    "health_check_path": (check_path, anything),
    "deregister_critical_service_after": (check_duration, anything.filter(lambda value: value is not None)),
}
GOOD: dict[str, Any] = {"name": "cards", "address": "10.0.0.1", "port": 8000}


@pytest.mark.parametrize("field", FIELDS)
@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bad_registrations_never_reach_consul(
    registry: ServiceRegistry, impostor: RecordingServer, field: str, data: st.DataObject
) -> None:
    """Whatever is wrong with one field: an InvalidInputError, and Consul hears nothing."""
    check, strategy = FIELDS[field]
    value = data.draw(strategy)
    if rejected(check, value):
        with pytest.raises(InvalidInputError):
            registry.register_service(**(GOOD | {field: value}))
        assert impostor.requests == []


KNOWN = [
    "my_service",
    "my.service",
    "team/service",
    "a" * 64,
    "a" * 512,
    "a b",
    "é",
    "a?x=1",
    "x#y",
    "a%2Fb",
    "a//b",
    "xn--a",
]


@pytest.mark.parametrize("name", KNOWN)
def test_other_peoples_names_are_read_as_consul_has_them(name: str) -> None:
    """What Consul takes for a name may be asked for, though one's own could not be called so."""
    assert check_known_service(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/../b", "./a", "a/..", "a\n", "a\x00", "\u2028", "\ud800", "a" * 513, None, 5]
)
def test_what_can_not_be_asked_for_is_no_name(name: Any) -> None:
    """Nothing that Consul or something before it would resolve, cut off or refuse."""
    with pytest.raises(InvalidInputError):
        check_known_service(name)


@given(name=st.one_of(hostile, st.text(min_size=1, max_size=600), st.sampled_from(KNOWN)))
@settings(max_examples=300, deadline=None)
def test_no_name_leads_to_another_path(name: str) -> None:
    """Whatever may be asked for reaches Consul as one segment, in one request, and reads there as it was given."""
    if rejected(check_known_service, name):
        return
    asked: list[httpx.Request] = []

    def consul(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json=[], headers={"X-Consul-Index": "5"})

    with ServiceRegistry("127.0.0.1", 1) as registry:
        registry._consul.http.client = httpx.Client(transport=httpx.MockTransport(consul))
        assert registry.discover_service(name) == []
    (request,) = asked
    assert request.url.raw_path.startswith(b"/v1/health/service/")
    segment, _, query = request.url.raw_path.removeprefix(b"/v1/health/service/").partition(b"?")
    assert (b"/" in segment, query) == (False, b"passing=1")
    assert unquote(segment.decode()) == name
    assert (request.url.host, request.url.port) == ("127.0.0.1", 1)


@given(name=anything, tag=anything.filter(lambda value: value is not None), service_id=anything)
@settings(max_examples=200, deadline=None)
def test_bad_questions_never_reach_consul(
    registry: ServiceRegistry, impostor: RecordingServer, name: Any, tag: Any, service_id: Any
) -> None:
    """Nor do the names, tags and ids of other calls."""
    for ask in (registry.discover_service, registry.get_service_url):
        if rejected(check_known_service, name):
            with pytest.raises(InvalidInputError):
                ask(name)
        if rejected(check_tag, tag):
            with pytest.raises(InvalidInputError):
                ask("cards", tag=tag)
    if rejected(check_id, service_id):
        for about in (registry.deregister_service, registry.get_service_health):
            with pytest.raises(InvalidInputError):
                about(service_id)
    assert impostor.requests == []


@pytest.mark.parametrize("scheme", ["", "ftp", "http://", "HTTP", "javascript", None])
def test_bad_schemes_never_reach_consul(registry: ServiceRegistry, impostor: RecordingServer, scheme: Any) -> None:
    """A URL's scheme is http or https."""
    with pytest.raises(InvalidInputError):
        registry.get_service_url("cards", scheme=scheme)
    assert impostor.requests == []


@pytest.mark.parametrize(
    "address",
    [
        *("", " ", "0.0.0.0", "::", "0", "127.1", "1.2.3", "999.1.1.1", "10.0.0.1:80", "[::1]", "::1%eth0"),
        *(
            "fe80::1%@evil.example/",
            "http://10.0.0.1",
            "10.0.0.1/",
            "user@host",
            "host name",
            "host\n",
            "-host",
            "höst",
        ),
        *(
            "a" * 64,
            f"{'a.' * 127}ab",
            "host..name",
            "host..",
            ".host",
            ".",
            "127.1.",
            "1.",
            "2130706433",
            2130706433,
            b"\x7f\0\0\1",
            True,
            None,
        ),
    ],
)
def test_hostile_addresses_are_refused(address: Any) -> None:
    """An address is an IP address that can be reached or a host name, and nothing that could become more in a URL."""
    with pytest.raises(InvalidInputError):
        check_address(address)
    with pytest.raises(InvalidInputError):
        Registration(name="cards", address=address, port=80, service_id="cards-1")


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "::1",
        "fd00::17",
        "localhost",
        "cards.internal",
        "7.example",
        "a-1",
        "my_api_1",
        "_a.b_",
        "localhost.",
        "cards.internal.",
    ],
)
def test_good_addresses_are_taken(address: str) -> None:
    """IPv4, IPv6 and host names are addresses, with underscores or a dot at the end, too, as resolvers take them."""
    assert check_address(address) == address


@given(anything)
@settings(max_examples=300, deadline=None)
def test_an_accepted_address_is_the_urls_host(address: Any) -> None:
    """Whatever is accepted as an address is the host, the whole host and nothing but the host of the instance's URL."""
    if rejected(check_address, address):
        return
    url = httpx.URL(f"http://{Instance('i', 'cards', address, 80).netloc}/health")
    assert (url.raw_host.decode(), url.path, url.userinfo) == (address.lower(), "/health", b"")


@pytest.mark.parametrize("name", ["", "a b", "a:", "é", "a\n", "a" * 129, 7])
@pytest.mark.parametrize("value", ["", "Bearer x"])
def test_hostile_header_names_are_refused(name: Any, value: str) -> None:
    """A header's name is a token of HTTP."""
    with pytest.raises(InvalidInputError):
        check_headers({name: value})


@pytest.mark.parametrize("value", ["a\r\nb", "a\n", " a", "a\0", "é", "\ud800", 7])
def test_hostile_header_values_are_refused_unseen(value: Any) -> None:
    """A header's value is printable ASCII without blanks around it; the message does not repeat it."""
    with pytest.raises(InvalidInputError) as caught:
        check_headers({"Authorization": value})
    assert str(value).strip() not in str(caught.value).split("'")


@pytest.mark.parametrize("port", [0, -1, 65536, "80", 80.0, True, None, b"80"])
def test_hostile_ports_are_refused(port: Any) -> None:
    """A port is a whole number from 1 to 65535."""
    with pytest.raises(InvalidInputError):
        check_port(port)


@pytest.mark.parametrize(
    "meta",
    [
        {"": "x"},
        {"a b": "x"},
        {"a" * 129: "x"},
        {"é": "x"},
        {"a": "x" * 513},
        {"a": "é" * 257},
        {"a": "\ud800"},
        {"a": 1},
        {1: "a"},
        {"consul-version": "1"},
        {f"key{n}": "x" for n in range(65)},
    ],
)
def test_hostile_metadata_is_refused(meta: Any) -> None:
    """Metadata that Consul would refuse or mangle is refused here."""
    with pytest.raises(InvalidInputError):
        check_meta(meta)


@pytest.mark.parametrize(
    "duration",
    ["", "10", "s", "-1s", "0s", "0.0s", "1 s", "1S", "1d", "1e3s", "inf", "1s\n", "0.0001ms", "9" * 20 + "h", 10],
)
def test_hostile_durations_are_refused(duration: Any) -> None:
    """A duration is what Go reads, above zero and below a year."""
    with pytest.raises(InvalidInputError):
        check_duration(duration)


# -- what is accepted works --------------------------------------------------------------------------------------------

tag_text = st.text(st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(", "), min_size=1, max_size=20)
meta_text = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9_-]{1,30}", fullmatch=True).filter(lambda key: not key.lower().startswith("consul-")),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    max_size=5,
)
durations = st.lists(
    st.tuples(st.integers(1, 999).map(str), st.sampled_from(["ms", "s", "m", "h"])), min_size=1, max_size=3
).map(lambda parts: "".join(number + unit for number, unit in parts))


@given(
    address=st.one_of(
        st.ip_addresses().filter(lambda ip: not ip.is_unspecified).map(str),
        st.from_regex(r"[a-z0-9_]([a-z0-9_-]{0,20}[a-z0-9_])?(\.[a-z]{2,5}){0,2}\.?", fullmatch=True),
    ),
    port=st.integers(1, 65535),
    tags=st.lists(tag_text, max_size=4, unique=True),
    meta=meta_text,
    interval=durations,
    timeout=durations,
    suffix=st.from_regex(r"[A-Za-z0-9._:+=@-]{1,40}", fullmatch=True),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_accepted_comes_back_from_consul(
    service_registry: ServiceRegistry,
    address: str,
    port: int,
    tags: list[str],
    meta: dict[str, str],
    interval: str,
    timeout: str,
    suffix: str,
) -> None:
    """A registration that passes our checks passes Consul's, and is discovered exactly as it was given."""
    name = f"cards-{uuid.uuid4().hex[:10]}"
    if rejected(check_address, address) or rejected(check_duration, interval) or rejected(check_duration, timeout):
        return
    service_id = service_registry.register_service(
        name,
        address,
        port,
        service_id=f"{name}{suffix}",
        tags=tags,
        meta=meta,
        health_check_interval=interval,
        health_check_timeout=timeout,
    )
    try:
        (instance,) = service_registry.discover_service(name, passing=False)
        assert instance == Instance(service_id, name, address, port, tuple(tags), meta, 1)
        for tag in tags:
            assert service_registry.discover_service(name, tag, passing=False) == [instance]
        assert service_registry.get_service_health(service_id) is not None
    finally:
        assert service_registry.deregister_service(service_id) is True
