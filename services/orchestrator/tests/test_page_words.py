"""What the page says: the journal, disagreements, states and shares, from one picture."""

import time
from dataclasses import replace

import pytest

from orchestrator.page.catalog import Listing, Outlook
from orchestrator.page.compose import compose
from orchestrator.page.disagreements import Disagreements
from orchestrator.page.journal import Journal
from orchestrator.page.routes import render
from orchestrator.page.sight import Picture, uses, whole
from orchestrator.page.state import Event, State
from orchestrator.page.words import per_second, reasons, seconds, shorten
from orchestrator.registry import LeftOut
from tests.pictures import instance, picture, state, told

ONE, TWO, THREE = (instance("backend-api", number) for number in range(3))
CALLER, OTHER = (instance("research-api", number) for number in range(2))


def event(kind: str, at: float, number: int = 1, reason: str = "", about: str | None = ONE.id) -> Event:
    return Event(number=number, at=at, kind=kind, service="backend-api", instance=about, reason=reason, detail="")


def test_what_several_saw_is_told_once() -> None:
    """Two callers that eject the same instance make one line with both; the same caller's next one is a new line."""
    journal = Journal()
    journal.heard([("b", event("ejected", 11.0, reason="refused")), ("a", event("ejected", 10.0, reason="refused"))])
    journal.heard([("a", event("ejected", 20.0, 2, "refused")), ("a", event("reinstated", 21.0, 3))])
    journal.heard([("b", event("ejected", 100.0, 2, "refused"))])
    assert [(entry.at, entry.kind, entry.by) for entry in journal] == [
        (100.0, "ejected", ("b",)),
        (21.0, "came back", ("a",)),
        (20.0, "ejected", ("a",)),
        (10.0, "ejected", ("a", "b")),
    ]


def test_who_was_there_before_has_not_joined() -> None:
    """The first answer of Consul is no news; the next ones say who joined, and how who left did."""
    journal = Journal()
    journal.heard(("a", event(kind, 1.0)) for kind in ("joined", "watch_changed", "probed"))
    journal.compared([Listing("backend-api", (ONE, TWO), ())], 2.0)
    assert list(journal) == []
    left = (LeftOut(ONE.id, "deregistered", "withdrew"), LeftOut(TWO.id, "check 'health' is critical", "critical"))
    journal.compared([Listing("backend-api", (THREE,), left)], 3.0)
    journal.heard([(THREE.id, event("registered", 2.5, reason="started", about=THREE.id))])
    found = {(entry.kind, entry.instance): entry for entry in journal}
    assert found["left", ONE.id].reason == "withdrew"
    assert (found["left", TWO.id].reason, found["left", TWO.id].detail) == ("critical", "check 'health' is critical")
    joined = found["joined", THREE.id]
    assert (joined.at, joined.reason, joined.by) == (2.5, "started", ("Consul", THREE.id))
    journal.compared([], 4.0)
    assert next((entry.kind, entry.reason) for entry in journal) == ("left", "vanished")


@pytest.fixture
def outlook() -> Outlook:
    return Outlook(
        "here", None, 0.1, (Listing("backend-api", (ONE, TWO), ()), Listing("research-api", (CALLER,), ())), 0
    )


def differences(outlook: Outlook, known: State, *times: float, error: str | None = None) -> list[str]:
    told_of = (told(CALLER, known, error),)
    watching = Disagreements()
    lines = [watching.between(whole(outlook, told_of), uses(told_of), now) for now in times]
    return [line.text for line in lines[-1]]


def test_a_long_journal_keeps_the_newest() -> None:
    """Whoever tells first, of a hundred instances with two hundred events each the newest are kept, and soon."""
    journal, begun = Journal(), time.process_time()
    journal.heard(
        (f"i-{caller}", event("ejected", float(at), at, "refused", f"x-{caller}-{at}"))
        for caller in range(100)
        for at in range(200)
    )
    assert time.process_time() - begun < 1
    assert [entry.at for entry in journal] == [199.0] * 100 + [198.0] * 100 + [197.0] * 100
    journal.heard([("other", event("ejected", 199.5, reason="refused", about="x-7-199"))])
    assert {entry.instance: entry.by for entry in journal}["x-7-199"] == ("i-7", "other")


def test_lists_may_differ_for_a_moment(outlook: Outlook) -> None:
    """That a caller does not know an instance yet is told after three seconds; that it has ejected one, at once."""
    knows_one = state(CALLER, [ONE], 1)
    assert differences(outlook, knows_one, 0.0, 2.9) == []
    [said] = differences(outlook, knows_one, 0.0, 3.0)
    assert said == f"{TWO.id}: Consul offers it; {CALLER.id} does not know it"
    [ejected] = differences(outlook, state(CALLER, [ONE, TWO], 1, ejected=1), 0.0)
    assert ejected == f"{ONE.id}: its checks pass, says Consul; {CALLER.id} ejected it (refused)"


def test_whom_consul_does_not_offer_a_caller_may_still_hold(outlook: Outlook) -> None:
    """A caller with an old list would call who is in maintenance; that it can't ask Consul is said, too."""
    gone = Listing("backend-api", (TWO,), (LeftOut(ONE.id, "in maintenance", "maintenance"),))
    changed = replace(outlook, listings=(gone, *outlook.listings[1:]))
    [said] = differences(changed, state(CALLER, [ONE, TWO], 1), 0.0, 5.0)
    assert said == f"{ONE.id}: Consul does not offer it (maintenance), but {CALLER.id} would call it"
    blind = state(CALLER, [ONE, TWO], 1).model_dump()
    blind["upstreams"][0]["view"]["error"] = "refused"
    [said] = differences(outlook, State.model_validate(blind), 0.0, 5.0)
    assert said == f"{CALLER.id} can't ask Consul for backend-api: refused"


def test_every_point_of_view_has_its_own_figures() -> None:
    """All callers: sums, and how many ejected it; one of them: its own; one who calls nobody says so."""
    shown = picture(4)
    everybody, one = compose(shown), compose(shown, CALLER.id)
    first, alone = everybody.instances[0].rows[0].cells, one.instances[0].rows[0].cells
    assert (first[1].text, alone[1].text) == ("ejected: refused", "ejected: refused")
    assert first[1].detail == "by 3 of 3 callers, may be tried in 2.5 s"
    assert alone[1].detail == f"by {CALLER.id}, may be tried in 2.5 s"
    assert (first[3].text, alone[3].text) == ("300", "100")
    assert (len(everybody.calls), len(one.calls)) == (3, 1)
    assert [choice.value for choice in one.choices] == [
        "",
        *(instance("research-api", number).id for number in range(3)),
    ]
    assert sum(float(row.cells[2].meter) for row in everybody.instances[0].rows if row.cells[2].meter) == pytest.approx(
        1
    )
    nobody = compose(shown, "nobody-1")
    assert (nobody.calls, nobody.choices[-1].label) == ((), "nobody-1 (calls nobody now)")
    assert nobody.instances[0].rows[1].cells[1].detail == "nobody calls it"


def test_who_is_gone_says_why() -> None:
    """An instance that Consul lists and does not offer has a row with the reason; one that withdrew has none."""
    shown = picture(1)
    left = (LeftOut("a", "check 'health' is critical", "critical"), LeftOut("b", "deregistered", "withdrew"))
    listings = (replace(shown.outlook.listings[0], left_out=left), *shown.outlook.listings[1:])
    sheet = compose(replace(shown, outlook=replace(shown.outlook, listings=listings)))
    last = sheet.instances[0].rows[-1].cells
    assert (last[0].text, last[1].text, last[1].detail) == ("a", "gone: critical", "check 'health' is critical")
    assert sheet.instances[0].detail == "1 ejected, 1 gone"


def test_zones_are_shown_when_there_are_any() -> None:
    """A column, and a part of the label in the drawing; without a zone anywhere, neither. One may have none."""
    plain, zoned = compose(picture(3)), compose(picture(3, zones=("eu-1a", "eu-1b")))
    assert "Zone" not in plain.columns
    assert zoned.columns.index("Zone") == 2
    for sheet in (plain, zoned):
        assert {len(row.cells) for group in sheet.instances for row in group.rows} == {len(sheet.columns)}
    shown = [row.cells[2].text for row in zoned.instances[0].rows]
    assert shown == ["eu-1a", "eu-1b", "eu-1a", "–"]
    labels = [shape.text for shape in zoned.drawing.shapes if shape.tag == "text"]
    assert f"eu-1b: {instance('backend-api', 1).id}" in labels
    assert not [shape.text for shape in plain.drawing.shapes if "eu-1" in shape.text]


def test_who_is_gone_has_the_zone_that_callers_know() -> None:
    """Consul offers it no more, and those who called it know where it was."""
    shown = picture(1, zones=("eu-1a",))
    gone = replace(shown.outlook.listings[0], passing=(), left_out=(LeftOut(ONE.id, "critical", "critical"),))
    sheet = compose(replace(shown, outlook=replace(shown.outlook, listings=(gone,))))
    [row] = sheet.instances[0].rows
    assert (row.cells[1].text, row.cells[2].text) == ("gone: critical", "eu-1a")


def test_an_outage_is_told_with_the_age_of_the_list() -> None:
    """The banner says how old the list is; with nothing known, that nothing is."""
    assert compose(picture(1, outage="no answer")).outage.startswith(
        "Consul can't be asked: this is its list of 12 s ago"
    )
    empty = Picture("0", 1, 0.0, Outlook("here", "no answer", None, (), 0), (), (), ())
    assert compose(empty).outage == "Consul can't be asked, and nothing is known yet. no answer"
    assert compose(empty).summary == "0 services, 0 instances"


def test_markup_is_text() -> None:
    """Whatever is registered, the page's text holds it as text."""
    html = render(compose(picture(1, tags=["<script>alert(1)</script>", "\"'><img>"])))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert html.count("<script") == 1
    assert "<img" not in html


def test_a_large_system_is_drawn_in_part() -> None:
    """Fifteen boxes at most for a service, those with something to tell among them; the rest as a number."""
    drawing = compose(picture(1000)).drawing
    texts = [shape.text for shape in drawing.shapes if shape.tag == "text"]
    assert "and 987 more" in texts
    assert any(text.startswith("✕ ") for text in texts)
    keys = [shape.key for shape in drawing.shapes]
    assert len(keys) == len(set(keys))


def test_numbers_are_for_people() -> None:
    assert [seconds(value) for value in (0.00042, 0.0123, 0.999, 1.5, 99.0, 1234.0)] == [
        "0.4 ms", "12 ms", "999 ms", "1.5 s", "99.0 s", "1,234 s",
    ]  # fmt: skip
    assert [per_second(value) for value in (0.0, 12.34, 1234.5)] == ["0.0", "12.3", "1,234"]
    assert reasons({"p2c_cost": 3, "p2c_turn": 1}) == "75 % the cheaper, 25 % its turn"
    assert shorten("backend-api-10.0.0.7-8002", 12) == "backe…7-8002"
