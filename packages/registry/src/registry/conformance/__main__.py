"""``python -m registry.conformance URL``: one line for each promise; status 0 when no promise is broken or unclear."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from registry.conformance.examination import PROMISES, CannotExamineError, Finding, examine
from registry.settings import ConsulSettings

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Examines, tells on stdout, and returns the status: 1 after a broken or unclear promise, 2 without any answer."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.sicken is None) != (options.heal is None):
        parser.error("--sicken and --heal go together")
    if options.consul:
        os.environ["CONSUL_HTTP_ADDR"] = options.consul
    stop = _command(options.stop) if options.pid is None else partial(os.kill, options.pid, signal.SIGTERM)
    try:
        findings = examine(
            options.url,
            ConsulSettings(),
            path=options.path,
            replica=options.replica,
            sicken=_command(options.sicken),
            heal=_command(options.heal),
            forget=options.forget,
            stop=stop,
            patience=options.patience,
            tell=_tell,
        )
    except (CannotExamineError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    count = Counter(finding.verdict for finding in findings)
    told = [f"{number} {verdict}" for verdict, number in count.items()]
    sys.stdout.write(f"\n{', '.join(told)}, of {len(findings)} promises.\n")
    return 1 if count["broken"] or count["unclear"] else 0


def _tell(finding: Finding) -> None:
    sys.stdout.write(f"{finding}\n")
    sys.stdout.flush()


def _command(line: str | None) -> Callable[[], object] | None:
    # What the command prints is no line of ours; what it complains of still shows.
    return None if line is None else partial(subprocess.run, shlex.split(line), check=True, stdout=subprocess.DEVNULL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m registry.conformance",
        description="Is this running service a good citizen? Asked over HTTP and over Consul only.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="promises:\n" + "\n".join(f"  {name:<18}{text}" for name, text in PROMISES.items()),
    )
    parser.add_argument("url", help="one instance, such as http://localhost:8004; no load balancer")
    parser.add_argument("--consul", metavar="URL", help="the agent that it registers with; else as CONSUL_* say")
    parser.add_argument("--path", default="/health", help="what a GET with a deadline may ask (%(default)s)")
    parser.add_argument("--replica", metavar="URL", help="a second instance: its id must be another")
    parser.add_argument("--patience", type=float, default=15.0, metavar="SECONDS", help="(%(default)g)")
    disturbing = parser.add_argument_group("these disturb the service")
    disturbing.add_argument("--sicken", metavar="COMMAND", help="makes one of its components fail")
    disturbing.add_argument("--heal", metavar="COMMAND", help="makes it work again")
    disturbing.add_argument("--forget", action="store_true", help="take it out of Consul: it must come back")
    ends = disturbing.add_mutually_exclusive_group()
    ends.add_argument("--pid", type=int, help="send SIGTERM to this process")
    ends.add_argument("--stop", metavar="COMMAND", help="stop it, such as 'docker stop billing'")
    return parser


if __name__ == "__main__":
    sys.exit(main())
