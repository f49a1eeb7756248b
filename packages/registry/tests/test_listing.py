"""What others have registered: an entry that can't be called is left out, said once, and costs the others nothing."""

import asyncio
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import (
    ConsulResolver,
    ConsulSettings,
    Instance,
    InvalidInputError,
    RegistryUnavailableError,
    ServiceDiscoveryClient,
    ServiceRegistry,
)
from registry.consul.health import Listing
from registry.consul.reading import Reader, parse_listing
from registry.testing.fixtures import ConsulAgent
from registry.validation import check_address
from tests.support.server import Answer, Serve


def listed(**service: Any) -> dict[str, Any]:
    """An instance as Consul lists it, with these fields of its service."""
    known = {"ID": "odd", "Service": "cards", "Address": "10.0.0.2", "Port": 8000, "Tags": [], "Meta": {}}
    return {
        "Node": {"Node": "n1", "Address": "10.9.9.9"},
        "Service": {**known, "Weights": {"Passing": 1, "Warning": 1}, **service},
        "Checks": [{"CheckID": "health", "Status": "passing"}],
    }


def parsed(entries: object, *, mesh: bool = False) -> Listing:
    """What is read from these as JSON."""
    return parse_listing(json.dumps(entries, ensure_ascii=False).encode(errors="replace"), mesh=mesh)


GOOD = listed(ID="good", Address="10.0.0.1")

UNCALLABLE_ADDRESSES = [
    *("http://10.0.0.9", "10.0.0.9:80", "10.0.0.9/", "user@host", "a..b", ".a", "a b", " 10.0.0.9", "10.0.0.9\n"),
    *("127.1", "0", "1.2.3", "256.1.1.1", "1.2.3.4.5", "0.0.0.0", "::", "[::]", "[10.0.0.1]", "[::1", "::1]", "[]"),
    *("::g", "fe80::1%eth0", "x" * 64, "x" * 64 + ".internal", "a." * 127 + "a" * 9, "é.example", "a\x00b", "%31", "*"),
    *("-a", "a-", "${HOST}", "../..", "a\\b", "a?b", "a#b", "\ud800", "\u2028", "𝟏𝟎.0.0.1"),
]  # fmt: skip
ODD: dict[str, list[Any]] = {
    "Address": [*UNCALLABLE_ADDRESSES, 5, ["10.0.0.1"], True],
    "Port": [0, None, -1, 65_536, 70_000, 2**70, "8000", "", 80.5, True, [], {}],
    "ID": [None, 5, ["a"]],
    "Service": [None, 5],
}
UNCALLABLE = [{name: value} for name, values in ODD.items() for value in values]


@pytest.mark.parametrize("fields", UNCALLABLE, ids=repr)
def test_an_entry_that_can_not_be_called_hides_no_other(fields: dict[str, Any]) -> None:
    """It is left out with a reason that says what is wrong; the instance beside it is there."""
    listing = parsed([listed(**fields), GOOD])
    assert [instance.id for instance in listing.passing] == ["good"]
    (left_out,) = listing.left_out
    assert left_out.reason.startswith(("it can't be called: ", "not an entry of Consul's: "))
    assert len(left_out.reason) <= 200
    assert listing.registered == 2


SIDECAR = listed(
    Kind="connect-proxy", ID="1-sidecar-proxy", Service="cards-sidecar-proxy", Proxy={"DestinationServiceName": "cards"}
)
NATIVE = listed(ID="2", Connect={"Native": True})
GATEWAY = listed(Kind="terminating-gateway", ID="gw", Service="way-out")


def test_who_speaks_consul_connect_is_known() -> None:
    """A native instance is itself; a sidecar proxy stands for its service, under which it is called and verified."""
    listing = parsed([SIDECAR, NATIVE, listed(ID="3"), listed(ID="4", Connect={"Native": False})])
    known = [(each.id, each.service, each.connect, each.scheme) for each in listing.passing]
    assert known == [
        ("1-sidecar-proxy", "cards", True, "https"),
        ("2", "cards", True, "https"),
        ("3", "cards", False, "http"),
        ("4", "cards", False, "http"),
    ]


def test_in_the_mesh_nobody_is_called_plainly() -> None:
    """Consul lists gateways among those who speak for a service: they are left out, and so is what is not native."""
    listing = parsed([SIDECAR, NATIVE, GATEWAY, listed(ID="3")], mesh=True)
    assert [each.id for each in listing.passing] == ["1-sidecar-proxy", "2"]
    assert [(each.id, each.kind) for each in listing.left_out] == [("3", "uncallable"), ("gw", "uncallable")]
    assert "'terminating-gateway'" in listing.left_out[1].reason


@pytest.mark.parametrize("connect", [None, True, "yes", [], {"Native": "true"}, {"Native": 1}], ids=repr)
def test_what_does_not_plainly_say_so_is_not_of_the_mesh(connect: object) -> None:
    """Only Consul's own way of saying it counts."""
    assert [each.connect for each in parsed([listed(Connect=connect)]).passing] == [False]


@pytest.mark.parametrize("proxy", [None, 5, {}, {"DestinationServiceName": None}], ids=repr)
def test_a_proxy_for_nobody_hides_no_other(proxy: object) -> None:
    """It is left out, and the instance beside it is there."""
    listing = parsed([SIDECAR | {"Service": SIDECAR["Service"] | {"Proxy": proxy}}, GOOD], mesh=False)
    assert [each.id for each in listing.passing] == ["good"]


ZONES: list[tuple[str | None, dict[str, Any], Any, Any]] = [
    ("own", {"zone": "own"}, {"Zone": "service"}, {"Zone": "node"}),
    ("service", {}, {"Region": "r", "Zone": "service"}, {"Zone": "node"}),
    ("node", {}, None, {"Region": "r", "Zone": "node"}),
    ("node", {"zone": "no zone"}, {"Zone": 5}, {"Zone": "node"}),
    (None, {"zone": ""}, {"Region": "r"}, "node"),
    (None, {"zone": "z" * 64}, [], None),
]


@pytest.mark.parametrize(("zone", "meta", "service", "node"), ZONES)
def test_a_zone_is_what_the_registration_says_or_else_consul(
    zone: str | None, meta: dict[str, Any], service: Any, node: Any
) -> None:
    """The metadata first, then the locality of the service, then of its node; what names no zone is passed over."""
    entry = listed(Meta=meta, Locality=service)
    entry["Node"]["Locality"] = node
    assert [each.zone for each in parsed([entry]).passing] == [zone]


def test_consul_tells_the_locality_that_was_registered(consul_agent: ConsulAgent) -> None:
    """What others register as the locality of a service is its zone here; our own metadata are, too."""
    name = f"zoned-{uuid.uuid4().hex[:8]}"
    with httpx.Client(base_url=consul_agent.url, trust_env=False) as consul:
        for fields in ({"Locality": {"Region": "eu", "Zone": "eu-1"}}, {"Meta": {"zone": "eu-2"}}, {}):
            entry = {"Name": name, "ID": f"{name}-{len(fields)}{'Meta' in fields}", "Address": "10.0.0.1", "Port": 80}
            consul.put("/v1/agent/service/register", json=entry | fields).raise_for_status()
    with ServiceRegistry("127.0.0.1", consul_agent.http_port) as registry:
        zones = {instance.zone for instance in registry.discover_service(name)}
        for instance in registry.discover_service(name):
            registry.deregister_service(instance.id)
    assert zones == {"eu-1", "eu-2", None}


LAYOUTS: dict[str, dict[str, Any]] = {
    "compact": {"separators": (",", ":")},
    "spaced": {},
    "pretty": {"indent": 4},
    "sorted": {"sort_keys": True},  # begins with the checks, a list: can't be cut
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 7, 300, 10_000])
def test_an_answer_is_read_alike_however_it_is_cut_and_laid_out(layout: str, size: int) -> None:
    """In pieces of any size, pretty-printed as Consul does with -dev or not, with metadata that look like entries."""
    like = {"a": '},{"Node":{', "b": '{"Node": {', "c": ']\\"}]'}
    nested: dict[str, Any] = {"Proxy": {"Config": {"x": [{"Node": {}}, {"Node": {}}]}}}
    entries = [GOOD, listed(ID="b", Meta=like), listed(ID="c", **nested), listed(ID="d", Port=0), listed(ID="e")]
    body, reader = json.dumps(entries, **LAYOUTS[layout]).encode(), Reader()
    for at in range(0, len(body), size):
        reader.feed(body[at : at + size])
    listing = reader.listing()
    assert [each.id for each in listing.passing] == ["b", "c", "e", "good"]
    assert listing.passing[0].meta == like
    assert listing.registered == len(entries)


@pytest.mark.parametrize("body", ["[", "[{", '[{"Node": {', "[{}", "]", "", "nope", "{}", "null", "5", '"x"', "[]]"])
def test_what_is_no_list_is_an_error(body: str) -> None:
    """And no empty list."""
    with pytest.raises(TypeError, match="not a list"):
        parse_listing(body.encode())


def test_what_breaks_off_is_an_error() -> None:
    """Wherever that is."""
    body = json.dumps([GOOD, listed(ID="b")]).encode()
    for end in range(len(body)):
        with pytest.raises(TypeError, match="not a list"):
            parse_listing(body[:end])


def test_an_entry_that_says_the_same_is_not_built_again() -> None:
    """Of an answer in which one of many has changed, all others are the objects from before."""
    before, entries = Reader(), [listed(ID=f"i{n}", Meta={"version": "1"}) for n in range(50)]
    before.feed(json.dumps(entries).encode())
    known = {each.id: each for each in before.listing().passing}
    assert len(known) == 50
    entries[7] = listed(ID="i7", Meta={"version": "2"})
    after = Reader(before.known)
    after.feed(json.dumps([listed(ID="new"), *entries]).encode())
    built = {each.id for each in after.listing().passing if known.get(each.id) is not each}
    assert built == {"i7", "new"}
    assert len(after.known) == 51


NO_CHECKS: list[object] = [5, [None], [{}], ["passing"], {"a": 1}]
NO_ENTRIES: list[object] = [
    *(None, 5, "x", [], {}, {"Service": None}, {"Service": {}}, GOOD | {"Node": None}, GOOD | {"Service": 5}),
    *(GOOD | {"Checks": checks} for checks in NO_CHECKS),
]


@pytest.mark.parametrize("entry", NO_ENTRIES, ids=lambda entry: json.dumps(entry)[:40])
def test_what_is_no_entry_hides_no_other(entry: object) -> None:
    """Consul never says it; beside a real entry it is left out, and alone it makes the answer a broken one."""
    listing = parsed([entry, GOOD])
    assert [instance.id for instance in listing.passing] == ["good"]
    with pytest.raises(TypeError, match="not Consul's entries"):
        parsed([entry])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"Address": "[::1]"}, {"address": "::1"}),  # in brackets, as in a URL
        ({"Address": "2001:db8::1"}, {"address": "2001:db8::1"}),
        ({"Address": ""}, {"address": "10.9.9.9"}),
        ({"Address": None}, {"address": "10.9.9.9"}),
        ({"Tags": None}, {"tags": ()}),
        ({"Tags": "blue"}, {"tags": ()}),
        ({"Tags": ["blue", None, 5]}, {"tags": ("blue",)}),
        ({"Meta": None}, {"meta": {}}),
        ({"Meta": []}, {"meta": {}}),
        ({"Meta": {"a": "1", "b": 2, "c": None}}, {"meta": {"a": "1"}}),
        *(({"Weights": weights}, {"weight": 1}) for weights in (None, 5, {"Passing": None}, {"Passing": "9"})),
        *(({"Weights": {"Passing": weight}}, {"weight": 1}) for weight in (0, -5, 0.5, True)),
        ({"Weights": {"Passing": 7}}, {"weight": 7}),
        ({"Weights": {"Passing": 10**12}}, {"weight": 65_535}),
    ],
    ids=repr,
)
def test_odd_fields_are_read_for_what_they_can_mean(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    """Brackets are taken off, what is missing has its default, and what can't be meant is left away."""
    (instance,) = parsed([listed(**fields)]).passing
    assert {name: instance[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("meta", "scheme"),
    [({}, "http"), ({"secure": "true"}, "https"), ({"secure": "True"}, "https"), ({"secure": "false"}, "http")],
)
def test_the_scheme_is_what_the_metadata_say(meta: dict[str, str], scheme: str) -> None:
    """`secure=true` is how a provider says that it serves https."""
    assert Instance("a", "cards", "10.0.0.1", 80, meta=meta).scheme == scheme


def register(agent: ConsulAgent, name: str, **entry: Any) -> httpx.Response:
    """What Consul says to such an entry."""
    body = json.dumps({"Name": name, **entry}).encode(errors="replace")
    return httpx.put(f"{agent.url}/v1/agent/service/register", content=body, trust_env=False)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return once the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        await asyncio.sleep(0.01)


@contextmanager
def one_good_one_bad(agent: ConsulAgent, serve: Serve, name: str) -> Iterator[int]:
    """An instance that answers, and one without a port; the former's port."""
    server = serve()
    register(agent, name, ID=f"{name}-good", Address="127.0.0.1", Port=server.port).raise_for_status()
    register(agent, name, ID=f"{name}-bad", Address="127.0.0.1").raise_for_status()
    yield server.port
    for kind in ("good", "bad"):
        httpx.put(f"{agent.url}/v1/agent/service/deregister/{name}-{kind}", trust_env=False)


def test_what_is_left_out_is_said_once(
    consul_agent: ConsulAgent,
    service_registry: ServiceRegistry,
    service_name: str,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However often it is looked up or called, there is one warning each, with the instance and the reason."""
    with one_good_one_bad(consul_agent, serve, service_name) as port:
        for _ in range(5):
            found = service_registry.discover_service(service_name)
            assert [instance.port for instance in found] == [port]
            assert service_registry.get_service_url(service_name) == f"http://127.0.0.1:{port}"
        assert len(caplog.records) == 1

        async def call() -> None:
            async with ServiceDiscoveryClient(service_registry) as client:

                def left_out(count: int) -> Callable[[], bool]:
                    return lambda: len(client.explain(service_name).left_out) == count

                for number in range(5):
                    assert (await client.get(service_name, "/")).status_code == 200
                    register(consul_agent, service_name, ID=f"{service_name}-{number}", Address="a b", Port=1)
                    await until(left_out(2 + number))
                reasons = {each.id: each.reason for each in client.explain(service_name).left_out}
                assert reasons[f"{service_name}-bad"] == "it can't be called: it is registered without a port"
                assert "'a b' is not an address" in reasons[f"{service_name}-0"]
                assert client.explain(service_name).view.registered == 7

        asyncio.run(call())
        for number in range(5):
            httpx.put(f"{consul_agent.url}/v1/agent/service/deregister/{service_name}-{number}", trust_env=False)
    assert len(caplog.records) == 1 + 1 + 5
    assert f"{service_name}-bad': it can't be called: it is registered without a port" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_broken_answer_is_an_unavailable_registry(serve: Serve) -> None:
    """A list of anything else than entries is no absence, and no error of another kind."""
    for body in (b'[{"a": 1}]', b"{}", b"null", b"[5]"):
        server = serve(lambda _, body=body: Answer(200, body, {"X-Consul-Index": "5"}))
        with (
            ServiceRegistry("127.0.0.1", server.port) as registry,
            pytest.raises(RegistryUnavailableError, match="sent a broken answer"),
        ):
            registry.discover_service("cards")


def test_a_secure_instance_has_an_https_url(
    consul_agent: ConsulAgent, service_registry: ServiceRegistry, service_name: str
) -> None:
    """Whatever scheme is asked for by default: that port speaks nothing else."""
    service_id = f"{service_name}-1"
    register(consul_agent, service_name, ID=service_id, Address="10.0.0.1", Port=8443, Meta={"secure": "true"})
    try:
        assert service_registry.get_service_url(service_name) == "https://10.0.0.1:8443"
    finally:
        service_registry.deregister_service(service_id)


# -- any entry ---------------------------------------------------------------------------------------------------------


def nobodys(address: str) -> bool:
    """Whether no stranger's host could be meant: what the tests connect to is chosen below."""
    try:
        check_address(address.removeprefix("[").removesuffix("]"))
    except InvalidInputError:
        return True
    return False


CLOSED = ["127.0.0.1", "127.9.9.9", "[::1]", "::1", "::ffff:127.0.0.1", "0x7f000001", "localhost", "nobody.invalid"]
UNREACHABLE = ["224.0.0.1", "255.255.255.255", "fe80::1", "ff02::1"]
addresses = st.one_of(
    st.text(max_size=80).filter(nobodys), st.sampled_from(UNCALLABLE_ADDRESSES), st.sampled_from(CLOSED + UNREACHABLE)
)
good_ports = st.integers(1, 19)  # where nobody listens
ports = st.one_of(good_ports, good_ports, good_ports, st.integers(-(2**31), 0), st.integers(65_536, 2**63))
names = st.text(st.characters(codec="utf-8"), max_size=20)
entries = st.fixed_dictionaries(
    {"ID": st.text(max_size=40).map("bad{}".format), "Port": ports},
    optional={
        "Address": addresses,
        "Tags": st.none() | st.lists(names, max_size=4),
        "Meta": st.none() | st.dictionaries(names, names, max_size=4),
        "Weights": st.none()
        | st.fixed_dictionaries({"Passing": st.integers(-2, 70_000), "Warning": st.integers(0, 9)}),
        "EnableTagOverride": st.booleans(),
        "TaggedAddresses": st.dictionaries(
            st.sampled_from(["lan", "wan"]), st.fixed_dictionaries({"Address": addresses, "Port": ports}), max_size=2
        ),
        "Kind": st.sampled_from(["", "typical", "connect-proxy"]),
    },
)


def test_any_entry_that_consul_accepts_costs_a_call_one_attempt_at_most(
    consul_agent: ConsulAgent, service_registry: ServiceRegistry, serve: Serve
) -> None:
    """Beside a good instance it hides nobody, and no call that has two attempts fails."""
    server, counts, calls = serve(), Counter[str](), 6
    node = f"strange-{uuid.uuid4().hex[:8]}"

    async def call(name: str) -> int:
        resolver = ConsulResolver(ConsulSettings.model_validate({"host": "127.0.0.1", "port": consul_agent.http_port}))
        async with ServiceDiscoveryClient(resolver, timeout=1, max_retries=2, retry_delay=0.01) as client:
            for _ in range(calls):
                assert (await client.get(name, "/")).status_code == 200
            return sum(each.picks for each in client.explain(name).endpoints if each.id != f"{name}-good")

    @settings(max_examples=150, deadline=None)
    @given(entry=entries, external=st.booleans())
    def beside_a_good_one(entry: dict[str, Any], external: bool) -> None:
        name = f"cards-{uuid.uuid4().hex[:10]}"
        if external:
            there = {"Node": node, "Address": "127.0.0.2", "Service": {"Service": name, **entry}}
            url, body = "/v1/catalog/register", json.dumps(there).encode(errors="replace")
            said = httpx.put(f"{consul_agent.url}{url}", content=body, trust_env=False)
        else:
            said = register(consul_agent, name, **entry)
        counts["accepted" if said.is_success else "refused"] += 1
        if not said.is_success:
            return
        register(consul_agent, name, ID=f"{name}-good", Address="127.0.0.1", Port=server.port).raise_for_status()
        found = {instance.id for instance in service_registry.discover_service(name)}
        assert f"{name}-good" in found
        counts["left out" if len(found) == 1 else "callable"] += 1
        counts["attempts there"] += asyncio.run(call(name))
        counts["calls"] += calls
        for service_id in (f"{name}-good", entry["ID"]):
            path = quote(service_id, safe="")
            httpx.put(f"{consul_agent.url}/v1/agent/service/deregister/{path}", trust_env=False)
        if external:
            httpx.put(f"{consul_agent.url}/v1/catalog/deregister", json={"Node": node}, trust_env=False)

    beside_a_good_one()
    print(dict(counts))  # noqa: T201
    assert counts["left out"] >= 20
    assert counts["callable"] >= 10
    assert counts["attempts there"] <= counts["calls"]
