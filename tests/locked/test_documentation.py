"""The commands of the documentation that need the locked system are typed here, as they stand there."""

import shlex
from pathlib import Path

import pytest

from deploy.compose.stack import compose_command
from tests.locked.system import LockedSystem
from tests.pages import Block, Shell, blocks
from tools.services import ROOT, SERVICES

COMMANDS = [
    (page, block)
    for page in sorted(ROOT.glob("docs/**/*.md"))
    for block in blocks(page.read_text())
    if block.options == "locked"
]


def name(value: Path | Block) -> str:
    """As a test id."""
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else f"line {value.line}"


@pytest.mark.parametrize(("page", "block"), COMMANDS, ids=name)
def test_commands(system: LockedSystem, page: Path, block: Block) -> None:
    """Each block succeeds, and says something."""
    system.settle()
    shell = Shell(ROOT, system.stack.environment())
    try:
        # Compose would read what is typed next.
        shell.type(f'docker-compose() {{ {shlex.join(compose_command())} "$@" < /dev/null; }}')
        code = block.code
        for service in SERVICES:
            code = code.replace(f"localhost:{service.port}", system.edge[service.name].removeprefix("http://"))
        assert shell.type(code, 120.0).strip()
    finally:
        shell.close()
