"""TLS towards Consul: what is trusted and presented, and what to do when it fails."""

import ssl
from pathlib import Path

from registry.errors import InvalidInputError
from registry.settings import ConsulSettings

__all__ = ["tls_advice", "tls_context"]


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
