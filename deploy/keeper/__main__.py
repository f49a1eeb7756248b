"""The keeper's jobs, in a container: `make` before Consul starts, `grant` once it leads, the others when asked for."""

import argparse
import sys
from pathlib import Path

from deploy.keeper import backup, rotation
from deploy.keeper.access import grant
from deploy.keeper.api import Consul, ConsulError
from deploy.keeper.cluster import Cluster, keep
from deploy.keeper.grants import CALLS, KUBERNETES
from deploy.keeper.passes import sign_pass
from deploy.keeper.vault import Vault

_JOBS = (
    "make",
    "grant",
    "cluster",
    "pass",
    "tokens",
    "gossip",
    "ca",
    "whole",
    "save",
    "restore-vault",
    "restore-consul",
)


def main() -> int:
    """Does one job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="keeper", description=__doc__)
    parser.add_argument("job", choices=_JOBS)
    parser.add_argument("--subject", default="somebody", help="whom a pass names")
    options = parser.parse_args()
    try:
        if options.job == "cluster":
            keep_cluster(Vault(Path("/tmp/vault"), Path("/tmp/readers"), users=False, place=KUBERNETES))  # noqa: S108
        else:
            run(options.job, Vault(), options.subject)
    except ConsulError as error:
        say(str(error))
        return 1
    return 0


def keep_cluster(vault: Vault) -> None:
    """All that Kubernetes needs: Secrets, and once servers start with them, Consul's rules. Raises: ConsulError."""
    tell(keep(Cluster.around(), vault), "given out")
    consul = Consul(vault)
    consul.wait_until_led()
    tell(grant(consul, vault), "written")


def run(job: str, vault: Vault, subject: str) -> None:
    """Does this job. Raises: ConsulError."""
    if job == "make":
        vault.make()
        tell(vault.deliver(), "given out")
        return
    if job == "pass":
        sys.stdout.write(f"{sign_pass(vault, subject)}\n")
        return
    if job == "restore-vault":
        backup.restore_vault(sys.stdin.buffer.read(), vault)
        return
    consul = Consul(vault)
    consul.wait_until_led()
    match job:
        case "grant":
            tell(grant(consul, vault), "written")
        case "tokens":
            for name in CALLS:
                say(f"{name}: a new token is in use, {rotation.rotate_token(consul, vault, name)} deleted")
        case "gossip":
            rotation.rotate_gossip(consul, vault)
        case "ca":
            rotation.rotate_authority(vault)
        case "whole":
            consul.wait_until_whole()
        case "save":
            backup.save(consul, vault, sys.stdout.buffer)
        case "restore-consul":
            backup.restore_consul(consul, sys.stdin.buffer.read())


def tell(changed: list[str], verb: str) -> None:
    """Names, never contents."""
    say(f"{verb}: {', '.join(changed)}" if changed else "nothing to do: all of it is there")


def say(line: str) -> None:
    """One line of the log."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
