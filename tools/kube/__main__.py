"""`nox -s k8s -- up` and `-- down`: three nodes with the system on them, which go on until they are removed."""

import argparse
import signal
import sys
import time

from registry.testing.progress import UnavailableError
from tools.kube.cluster import Cluster
from tools.kube.place import KubeError
from tools.kube.programs import find_programs


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s k8s --", description=__doc__)
    parser.add_argument("command", choices=["up", "down"])
    parser.add_argument("--locked", action="store_true", help="the overlay `locked` in place of `plain`")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    # Both end it as Ctrl-C does, with everything removed, even where a shell started it in the background.
    for polite in (signal.SIGINT, signal.SIGTERM):
        signal.signal(polite, signal.default_int_handler)

    def say(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - begun:6.1f} s  {text}\n")

    try:
        cluster = Cluster(find_programs(), "locked" if options.locked else "plain")
        if options.command == "down":
            cluster.down()
            say("everything is removed")
            return 0
        try:
            cluster.up(say)
        except BaseException:
            cluster.down()
            raise
        sys.stdout.write(f"{' '.join(cluster.command('get', 'pods', '--output=wide'))}\n")
    except (KubeError, UnavailableError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
