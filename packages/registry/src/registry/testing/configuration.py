"""How the agents for tests are configured."""

from collections.abc import Mapping
from pathlib import Path

__all__ = ["server_configuration"]


def server_configuration(
    data: Path, ports: Mapping[str, int], datacenter: str, join_wan: int | None, token: str | None
) -> dict[str, object]:
    """Of a single server on loopback, as Consul reads it. ``join_wan``: a port of another datacenter's server."""
    # With -dev the data directory is ignored, and a restart forgets everything; but the server elects itself at
    # once. Otherwise it waits for others first, for one or two seconds.
    settings: dict[str, object] = {
        "server": True,
        "bootstrap": True,
        "datacenter": datacenter,
        "bind_addr": "127.0.0.1",
        "client_addr": "127.0.0.1",
        "data_dir": str(data),
        "ports": {**ports, "https": -1, "grpc_tls": -1},
        "performance": {"raft_multiplier": 1},
        # The output of a check is seen at once, not with the next change of its status.
        "check_update_interval": "0s",
        "disable_update_check": True,
        "log_level": "INFO",
        "ui_config": {"enabled": True},
    }
    if join_wan is not None:
        settings |= {"retry_join_wan": [f"127.0.0.1:{join_wan}"], "retry_interval_wan": "1s"}
    if token is not None:
        settings["acl"] = {
            "enabled": True,
            "default_policy": "deny",
            # Without a token of its own, an agent answers 200 to a deregistration and does nothing.
            "tokens": {"initial_management": token, "agent": token},
        }
    return settings
