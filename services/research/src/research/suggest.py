"""From a text and related cards to suggestions: counting words, always the same answer. No I/O."""

import re
from collections import Counter
from collections.abc import Iterable

from research.clients import Card
from research.schemas import Suggestion

# Words too common to relate two texts; shorter ones than four letters are left out anyway.
_COMMON_WORDS = """
about after also another because been before being between both could does each every from have here into just like
made make many more most much must only other over same should some such than that their them themselves then there
these they this those through under very want well were what when where which while will with without would your
"""
_COMMON = frozenset(_COMMON_WORDS.split())
_WORD = re.compile(r"\w{4,40}")


def words(text: str) -> list[str]:
    """The words that say what a text is about, case-folded, in order, with repetitions."""
    return [word for word in _WORD.findall(text.casefold()) if word not in _COMMON]


def keywords(text: str, count: int) -> list[str]:
    """The ``count`` most frequent words, the earlier first among equals. May be empty."""
    return [word for word, _ in Counter(words(text)).most_common(count)]


def suggest(text: str, cards: Iterable[Card], limit: int) -> list[Suggestion]:
    """At most ``limit`` tags and then at most ``limit`` cards, by the words they share with the text.

    A card's score is the number of different words that it shares; a tag's the sum over the cards that bear it.
    """
    wanted = set(words(text))
    tags: Counter[str] = Counter()
    related: list[Suggestion] = []
    for card in {card.id: card for card in cards}.values():
        score = len(wanted.intersection(words(" ".join([card.title, card.content, *card.tags]))))
        if score:
            related.append(Suggestion(kind="card", value=card.title, score=score, card_id=card.id))
            tags.update(dict.fromkeys(card.tags, score))
    related.sort(key=lambda suggestion: (-suggestion.score, suggestion.card_id))
    best_tags = sorted(tags.items(), key=lambda item: (-item[1], item[0]))
    return [Suggestion(kind="tag", value=tag, score=score) for tag, score in best_tags[:limit]] + related[:limit]
