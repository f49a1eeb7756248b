"""The addresses of this host."""

import asyncio
import ipaddress
import socket
from contextlib import suppress

__all__ = ["address_towards", "is_loopback", "is_ours", "leads_astray"]


def is_loopback(address: str) -> bool:
    """Whether it leads everybody back to his own host; looks up no name but localhost."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.lower().removesuffix(".") == "localhost"


def is_ours(address: str) -> bool:
    """Whether this host has this address; sends nothing."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


async def address_towards(host: str, port: int) -> str:
    """The address that this host uses to reach another one; sends nothing. Raises: OSError, if it has no address."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise OSError(f"no address of {host} is known: {error.strerror or error}") from error
    # IPv4 first, for that is where uvicorn listens: "localhost" may well be ::1 before it is 127.0.0.1.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe, suppress(OSError):
            probe.connect(address)
            return str(probe.getsockname()[0])
    raise OSError(f"no route to {host}")


async def leads_astray(address: str, host: str, port: int) -> bool:
    """Whether it is a loopback address, while that other host, which others have in common with us, is elsewhere."""
    if not is_loopback(address):
        return False
    try:
        return not is_loopback(await address_towards(host, port))
    except OSError:
        return False
