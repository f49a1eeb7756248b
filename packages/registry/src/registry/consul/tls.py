"""TLS towards Consul: what is trusted and presented, and what to do when it fails."""

import ssl
from contextlib import suppress
from pathlib import Path

from registry.errors import InvalidInputError
from registry.settings import ConsulSettings

__all__ = ["Trust", "tls_advice", "tls_context"]


class Trust:
    """The TLS context of one client. An authority that joins those in ``CONSUL_CACERT`` counts at the next request.

    One that leaves them is trusted until this process ends: connections and handshakes under way rely on it.
    Raises: InvalidInputError, when a file can't be used.
    """

    def __init__(self, settings: ConsulSettings) -> None:
        self._file = settings.ca_file
        self._stamp = self._stamp_now()
        self.context = tls_context(settings)

    def refresh(self) -> None:
        """Reads the file again if it was replaced. Blocks briefly; what can't be read is left for the next time."""
        stamp = self._stamp_now()
        if stamp is None or stamp == self._stamp:
            return
        with suppress(OSError):
            self.context.load_verify_locations(self._file)
            self._stamp = stamp

    def _stamp_now(self) -> tuple[int, int] | None:
        with suppress(OSError):
            if self._file is not None:
                found = self._file.stat()
                return found.st_ino, found.st_mtime_ns
        return None


def tls_context(settings: ConsulSettings) -> ssl.SSLContext:
    """What ``CONSUL_CACERT`` and its siblings say. Raises: InvalidInputError, when a file can't be used."""
    files = [] if settings.ca_file is None else [("CONSUL_CACERT", settings.ca_file)]
    if settings.ca_path is not None and settings.ca_file is None:
        files = [("CONSUL_CAPATH", file) for file in _files(settings.ca_path)]
    context: ssl.SSLContext | None = None
    for variable, file in files:
        try:
            if context is None:
                context = ssl.create_default_context(cafile=file)
            else:
                context.load_verify_locations(file)
        except OSError as error:
            raise InvalidInputError(f"{variable} {file} holds no certificates that can be read ({error})") from error
    context = context or ssl.create_default_context()
    if settings.client_cert is not None:
        try:
            # An encrypted key must not make the start of a service ask for its password on a terminal.
            context.load_cert_chain(settings.client_cert, settings.client_key, password=lambda: "")
        except OSError as error:
            raise InvalidInputError(
                f"CONSUL_CLIENT_CERT {settings.client_cert} and CONSUL_CLIENT_KEY {settings.client_key} are no "
                f"certificate and its unencrypted key ({error})"
            ) from error
    if not settings.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _files(directory: Path) -> list[Path]:
    try:
        # All of them, as Consul reads it; OpenSSL would see only those whose names are hashes.
        files = sorted(file for file in directory.iterdir() if file.is_file())
    except OSError as error:
        raise InvalidInputError(f"CONSUL_CAPATH {directory} can't be read ({error.strerror})") from error
    if not files:
        raise InvalidInputError(f"CONSUL_CAPATH {directory} holds no file")
    return files


def tls_advice(error: BaseException | None) -> str | None:
    """What to do about it, if TLS is what failed."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    if isinstance(error, ssl.SSLCertVerificationError):
        if "mismatch" in str(error) or "not valid for" in str(error):
            return "set CONSUL_TLS_SERVER_NAME to the name in its certificate"
        return "set CONSUL_CACERT to the authority that signed its certificate"
    if error.reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"}:
        return "does it speak plain http there?"
    return "does it want CONSUL_CLIENT_CERT and CONSUL_CLIENT_KEY?"
