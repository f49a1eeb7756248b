"""Consul's official release archive for this platform, from its maker's download site or from a mirror of it."""

import hashlib
import os
import platform
import re
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import httpx

from registry.testing.progress import Progress, UnavailableError

__all__ = ["download"]

_SITE = "https://releases.hashicorp.com"
# Where the site is out of reach, another way should start within seconds.
_PATIENCE_SECONDS = 5.0
_DOWNLOAD_SECONDS = 600.0
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


def download(version: str, target: Path, patience: float = _PATIENCE_SECONDS) -> None:
    """Make `target` the binary of Consul's official release of this version, after checking its SHA-256 sum.

    `$CONSUL_RELEASES_URL` names a mirror with the site's layout; the sum is the one that the same address states.
    Blocks for a minute or so, at most for ten; `patience` is how many seconds the site may take to state its sums, and
    how long it may fall silent afterwards.

    Raises: UnavailableError, OSError.
    """
    site = _site()
    name = f"consul_{version}_{sys.platform}_{_MACHINES.get(platform.machine(), platform.machine())}.zip"
    folder = f"{site}/consul/{version}"
    sums = _reach(f"{folder}/consul_{version}_SHA256SUMS", patience)
    stated = re.search(rf"^([0-9a-f]{{64}}) [ *]{re.escape(name)}$", sums, re.MULTILINE)
    if stated is None:
        raise UnavailableError(f"the release has no {name}")
    archive, half_done = target.with_suffix(".zip"), target.with_suffix(".new")
    try:
        if _fetch(f"{folder}/{name}", archive, patience) != stated[1]:
            raise UnavailableError(f"{name} is not what the release's SHA256SUMS states, and is not used")
        with zipfile.ZipFile(archive) as opened, opened.open("consul") as binary, half_done.open("wb") as file:
            shutil.copyfileobj(binary, file)
        half_done.chmod(0o755)
        # A rename is atomic: whoever looks in the cache meanwhile sees a whole binary or none.
        half_done.replace(target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UnavailableError(f"{name} holds no Consul: {error}") from error
    finally:
        archive.unlink(missing_ok=True)
        half_done.unlink(missing_ok=True)


def _site() -> str:
    named = os.environ.get("CONSUL_RELEASES_URL") or _SITE
    try:
        url = httpx.URL(named)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in {"http", "https"} or not url.host:
        # Its value may hold a password.
        raise UnavailableError("CONSUL_RELEASES_URL is no http or https address: correct it, or unset it")
    return named.rstrip("/")


def _reach(url: str, seconds: float) -> str:
    """The text at this address, within this time or not at all."""
    text: Future[str] = Future()

    def ask() -> None:
        try:
            text.set_result(b"".join(chunk for chunk, _ in _chunks(url, seconds, seconds)).decode())
        except Exception as error:
            text.set_exception(error)

    # In a thread, because looking up the host's name knows no time-out.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return text.result(timeout=seconds)
    except TimeoutError:
        raise UnavailableError(f"{_host(url)} did not answer within {seconds:g} s") from None
    except UnicodeDecodeError as error:
        raise UnavailableError(f"{_host(url)} answered something else than SHA-256 sums") from error


def _fetch(url: str, file: Path, patience: float) -> str:
    """Save what is at this address, and return its SHA-256 sum."""
    digest, size, progress, state = hashlib.sha256(), 0, Progress(), "nothing yet"
    with file.open("wb") as output:
        for chunk, total in _chunks(url, patience, _DOWNLOAD_SECONDS):
            output.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            state = f"{size / 1e6:.0f} of {total / 1e6:.0f} MB"
            progress.show(state)
    progress.show(state, last=True)
    return digest.hexdigest()


def _chunks(url: str, stall: float, limit: float) -> Iterator[tuple[bytes, int]]:
    """Each piece of what is at this address as it arrives, with the size of the whole (0: unknown)."""
    deadline = time.monotonic() + limit
    try:
        with (
            httpx.Client(timeout=stall, follow_redirects=True, headers={"Accept-Encoding": "identity"}) as client,
            client.stream("GET", url) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise UnavailableError(f"{_host(url)} answered {response.status_code} for {response.url.path}")
            total = int(response.headers.get("Content-Length", 0))
            for chunk in response.iter_bytes():
                if time.monotonic() > deadline:
                    raise UnavailableError(f"{_host(url)} was still sending after {limit:g} s, given up")
                yield chunk, total
    except (ImportError, ValueError) as error:
        # Its value, too, may hold a password.
        raise UnavailableError("a proxy variable of the environment names no proxy that httpx can use") from error
    except httpx.HTTPError as error:
        # The address stays out of the message: a mirror's may hold a password.
        raise UnavailableError(f"{_host(url)}: {str(error) or type(error).__name__}") from error


def _host(url: str) -> str:
    return httpx.URL(url).netloc.decode()
