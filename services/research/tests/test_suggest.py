from hypothesis import given
from hypothesis import strategies as st

from research.clients import Card
from research.suggest import keywords, suggest, words


def card(number: int, title: str, text: str = "", *tags: str) -> Card:
    return Card(id=number, title=title, content=text, tags=list(tags))


def test_words_are_long_enough_and_telling() -> None:
    """Short and common words say nothing about a text; case does not matter, accents do."""
    assert words("These Services find each other BY name: Äpfel, 2026 and snake_case!") == [
        "services",
        "find",
        "name",
        "äpfel",
        "2026",
        "snake_case",
    ]


def test_keywords_are_the_most_frequent_words() -> None:
    """Frequency first, then the order of appearance; a text without words has none."""
    assert keywords("consul agent consul server agent consul", 2) == ["consul", "agent"]
    assert keywords("delta alpha charlie", 2) == ["delta", "alpha"]
    assert keywords("a b c, with these", 5) == []


def test_cards_are_ranked_by_shared_words_and_tags_by_their_cards() -> None:
    """The closest card comes first; a tag scores the sum of its cards; unrelated cards count for nothing."""
    cards = [
        card(1, "Consul", "", "registry"),
        card(2, "Consul agents", "register services", "registry", "agents"),
        card(3, "Gardening", "apples", "fruit"),
    ]
    found = suggest("Consul agents register", cards, limit=5)
    assert [(s.kind, s.value, s.score, s.card_id) for s in found] == [
        ("tag", "registry", 4, None),
        ("tag", "agents", 3, None),
        ("card", "Consul agents", 3, 2),
        ("card", "Consul", 1, 1),
    ]


def test_limit_holds_for_each_kind() -> None:
    """At most so many tags and so many cards, equals in a fixed order."""
    cards = [card(number, "Consul", "", f"tag{number}") for number in range(9, 0, -1)]
    assert [s.value for s in suggest("consul", cards, limit=2)] == ["tag1", "tag2", "Consul", "Consul"]
    assert [s.card_id for s in suggest("consul", cards, limit=2)] == [None, None, 1, 2]


def test_a_card_found_twice_counts_once() -> None:
    """Two searches that find the same card do not double its weight."""
    one = card(1, "Consul agents", "", "registry")
    assert suggest("consul agents", [one, one], 5) == suggest("consul agents", [one], 5)


@given(text=st.text(), titles=st.lists(st.text(), max_size=5), limit=st.integers(1, 50))
def test_any_text_has_an_answer_that_never_changes(text: str, titles: list[str], limit: int) -> None:
    """Whatever the characters and whatever the order in which cards were found: the same suggestions, within limits."""
    cards = [card(number, title, text, title[:5]) for number, title in enumerate(titles)]
    found = suggest(text, cards, limit)
    assert found == suggest(text, reversed(cards), limit)
    assert all(s.score > 0 for s in found)
    assert max(sum(s.kind == kind for s in found) for kind in ("tag", "card")) <= limit
