"""The network of the nodes: a bridge in a namespace of its own, and a cable from it to each node's."""

import subprocess
from pathlib import Path

from tools.kube.place import ADDRESS, FABRIC, NODES, address, inside

__all__ = ["lay", "namespace", "take_away", "unplug"]


def namespace(node: int) -> str:
    """The name of the network namespace of a node."""
    return f"{FABRIC}-{node}"


def lay() -> None:
    """Makes all of it."""
    if not Path("/proc/sys/net/bridge").exists():
        _run("modprobe", "br_netfilter")
    _run("ip", "netns", "add", FABRIC)
    _in(FABRIC, "ip", "link", "set", "lo", "up")
    _in(FABRIC, "ip", "link", "add", "nodes", "type", "bridge")
    _in(FABRIC, "ip", "address", "add", f"{ADDRESS}/24", "dev", "nodes")
    _in(FABRIC, "ip", "link", "set", "nodes", "up")
    _in(FABRIC, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    for node in NODES:
        name = namespace(node)
        _run("ip", "netns", "add", name)
        _in(FABRIC, "ip", "link", "add", f"node{node}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _in(FABRIC, "ip", "link", "set", f"node{node}", "master", "nodes", "up")
        _in(FABRIC, "ip", "route", "add", f"10.244.{node}.0/24", "via", address(node))
        _in(name, "ip", "link", "set", "lo", "up")
        _in(name, "ip", "address", "add", f"{address(node)}/24", "dev", "eth0")
        _in(name, "ip", "link", "set", "eth0", "up")
        _in(name, "ip", "route", "add", "default", "via", ADDRESS)
        # Policies hold between pods of one node, too, whose packets only cross a bridge.
        _in(name, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.bridge.bridge-nf-call-iptables=1")
        for other in NODES:
            if other != node:
                _in(name, "ip", "route", "add", f"10.244.{other}.0/24", "via", address(other))


def unplug(node: int) -> None:
    """What a restart of the node would forget: the bridge of its pods."""
    subprocess.run(inside(namespace(node), "ip", "link", "delete", "cni0"), capture_output=True, check=False)


def take_away() -> None:
    """All of it, as far as it is there."""
    for name in (*map(namespace, NODES), FABRIC):
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _in(name: str, *command: str) -> None:
    _run(*inside(name, *command))


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
