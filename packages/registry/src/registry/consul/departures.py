"""Who has left the list, and on whose order: an operator's and an instance's own are obeyed, a loss is doubted.

An instance that is in maintenance, or was deregistered while Consul went on, is not to be asked any more. One that went
missing because Consul restarted, came back empty, or lost the node it was on, may answer as before; so may one whose
checks fail. These are *lost*: worth a try while nobody else is left.
"""

import time
from collections.abc import Callable, Collection

from registry.consul.health import Listing
from registry.model import Key, LeftOut

__all__ = ["Departures"]

KEEP = 60.0
"""Seconds that one who has left is remembered while others serve."""
MAX_WITHDRAWN = 100
"""So many who withdrew are named, the last ones: there may be one for each deployment of a fleet."""


class Departures:
    """Compares each answer about one service with the one before."""

    def __init__(self, tag: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._withdrew = "deregistered" if tag is None else f"deregistered, or registered without the tag {tag!r}"
        self._passing: frozenset[Key] = frozenset()
        self._nodes: dict[Key, str] = {}
        self._forgotten: dict[Key, float] = {}
        self._withdrawn: dict[Key, float] = {}
        self.lost: frozenset[Key] | None = None
        """Who is not offered any more and still worth a try; the same object as long as nothing changed.

        None: nobody has been listed yet, so that nothing can be said of those whom others know from before.
        """
        self.left_out: tuple[LeftOut, ...] = ()
        """Everybody who is not offered, and why."""

    def last_left(self, listing: Listing) -> bool:
        """Whether this answer takes the last that could be called off the list, without a word about them."""
        if listing.passing:
            return False
        return bool(self._passing - listing.nodes.keys()) or (bool(self._nodes) and not listing.registered)

    def nodes_left(self, listing: Listing) -> set[str]:
        """On which nodes those were that this answer lists no more."""
        return {self._nodes[key] for key in self._nodes.keys() - listing.nodes.keys()}

    def update(self, listing: Listing, *, continuous: bool, lost_nodes: Collection[str] = ()) -> None:
        """The next answer. ``continuous``: Consul has gone on since the last one, without a restart or an outage.

        ``lost_nodes``: whose registrations vanished with them.
        """
        now = self._clock()
        offered = self._passing | (self.lost or frozenset())
        for key in self._nodes.keys() - listing.nodes.keys():
            if continuous and self._nodes[key] not in lost_nodes:
                self._withdrawn[key] = now
            elif key in offered:  # one in maintenance stays out, whoever forgot it
                self._forgotten[key] = now
        self._passing = listing.passing_keys
        self._nodes = listing.nodes
        self._forgotten = {
            key: since
            for key, since in self._forgotten.items()
            if key not in listing.nodes and (now - since < KEEP or not listing.passing)
        }
        kept = [(key, at) for key, at in self._withdrawn.items() if key not in listing.nodes and now - at < KEEP]
        self._withdrawn = dict(kept[-MAX_WITHDRAWN:])
        lost = (listing.failing & offered) | self._forgotten.keys()
        if lost != self.lost and (listing.registered or self.lost is not None):
            self.lost = lost
        gone = [
            LeftOut(key[0], "Consul lost it: asked while nobody else is left", "vanished") for key in self._forgotten
        ]
        gone += [LeftOut(key[0], self._withdrew, "withdrew") for key in self._withdrawn]
        self.left_out = (*listing.left_out, *gone)
