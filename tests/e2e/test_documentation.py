"""The commands of the documentation that need running containers are typed here, as they stand there."""

import shlex
from pathlib import Path

import pytest

from deploy.compose.stack import compose_command
from tests.e2e.system import BACKENDS, System
from tests.pages import Block, Shell, blocks
from tools.services import ROOT, SERVICES

PAGES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
COMMANDS = [
    (page, block) for page in sorted(PAGES) for block in blocks(page.read_text()) if block.options == "containers"
]


def name(value: Path | Block) -> str:
    """As a test id."""
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else f"line {value.line}"


@pytest.mark.parametrize(("page", "block"), COMMANDS, ids=name)
def test_commands(system: System, page: Path, block: Block) -> None:
    """Each block succeeds; one that scales and then calls is answered by every replica."""
    system.settle()
    code = block.code
    for service in SERVICES:
        code = code.replace(f"localhost:{service.port}", system.edge[service.name].removeprefix("http://"))
    shell = Shell(ROOT, system.stack.environment())
    try:
        shell.type(f'docker-compose() {{ {shlex.join(compose_command())} "$@"; }}')
        printed = shell.type(code, 120.0)
    finally:
        shell.close()
    if "for call" in code:
        assert len(set(printed.split("\n")) - {""}) == BACKENDS, printed
