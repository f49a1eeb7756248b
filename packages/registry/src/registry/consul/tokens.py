"""Where the token of each request comes from: it was given, a file has it, or a login gets it (``login.py``)."""

from registry.settings import ConsulSettings

__all__ = ["TokenFile", "TokenSource"]


class TokenSource:
    """The token that was given, or none: it never changes. Thread-safe, as are those that inherit."""

    blocks = False
    """Whether any method may ask Consul, and so block for as long as that takes."""

    def __init__(self, settings: ConsulSettings) -> None:
        self.settings = settings

    def current(self) -> str | None:
        """The token to send now; None: none. Raises: RegistryError."""
        return self.settings.read_token()

    def renewed(self, refused: str | None, *, unknown: bool) -> str | None:
        """What to send once more, now that Consul denied a request with ``refused``; None: it stays denied.

        ``unknown``: Consul does not know the token, rather than that it lacks a right. Raises: RegistryError.
        """
        return None

    def hold(self, service_id: str) -> None:
        """Consul's agent has this instance registered with our token, and uses it to tell the servers of its health."""

    def drop(self, service_id: str) -> None:
        """No longer, as it was deregistered."""

    def leave(self, user: object) -> None:
        """One connection that used this is closed. Blocks for at most a second, and raises nothing."""


class TokenFile(TokenSource):
    """The token in a file, which somebody may replace at any time: read at each request."""

    def renewed(self, refused: str | None, *, unknown: bool) -> str | None:
        # Even the same one: a token that was just made may not be known everywhere, and the file may come late.
        return self.current()
