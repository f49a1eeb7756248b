"""What stands between this tree and a release, in sentences; with a tag it must be nothing. `nox -s release` begins so.

The version stands in packages/registry/pyproject.toml and nowhere else.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime

from tools.services import ROOT

__all__ = ["changelog_obstacles", "main", "tag_obstacles", "tree_obstacles", "version"]

_HEADING = re.compile(r"^## \[(.+?)\](?: - (\S+))?$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def version() -> str:
    """The version that would be released."""
    document = tomllib.loads((ROOT / "packages/registry/pyproject.toml").read_text())
    return str(document["project"]["version"])


def changelog_obstacles(changelog: str, version: str) -> list[str]:
    """What must change in this changelog for it to tell of this version."""
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    sections = _HEADING.findall(changelog)
    if sections and sections[0][0] == "Unreleased":
        if sections[0][2].strip():
            return [
                f"CHANGELOG.md has changes under [Unreleased]: put the heading `## [{version}] - {today}` above them, "
                "and leave [Unreleased] empty."
            ]
        sections = sections[1:]
    newest, date, text = sections[0] if sections else ("nothing", "", "")
    if newest != version:
        return [
            f"The newest version in CHANGELOG.md is {newest}, packages/registry/pyproject.toml says {version}: "
            "give both the version to release."
        ]
    found = []
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        found.append(f"The heading of {version} in CHANGELOG.md has no date: write `## [{version}] - {today}`.")
    if not text.strip():
        found.append(f"CHANGELOG.md says nothing about {version}: write what a user will notice.")
    return found


def tag_obstacles(tag: str, version: str) -> list[str]:
    """What is wrong with this tag for this version."""
    if tag == f"v{version}":
        return []
    return [
        f"The tag {tag} does not name the version {version} of packages/registry/pyproject.toml: "
        f"tag it v{version}, or change the version first."
    ]


def tree_obstacles(status: str) -> list[str]:
    """What `git status --porcelain` says against a release: it must be possible to make it again from a commit."""
    changed = [line[3:] for line in status.splitlines()]
    if not changed:
        return []
    more = "" if len(changed) <= 3 else f" and {len(changed) - 3} more"
    return [f"There are changes that no commit has ({', '.join(changed[:3])}{more}): commit or remove them."]


def main(arguments: Sequence[str]) -> int:
    """Says what it found; 1 when a tag is given and there is anything."""
    tag = arguments[0] if arguments else None
    if len(arguments) > 1 or (tag or "").startswith("-"):
        sys.stderr.write("Say which tag is released, or nothing to try a release out: nox -s release -- v0.1.0\n")
        return 2
    git = ["git", "status", "--porcelain"]
    status = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    obstacles = tree_obstacles(status) + changelog_obstacles((ROOT / "CHANGELOG.md").read_text(), version())
    if tag:
        obstacles += tag_obstacles(tag, version())
    for obstacle in obstacles:
        sys.stderr.write(f"{obstacle}\n")
    if tag and obstacles:
        sys.stderr.write(f"So {tag} can't be released.\n")
        return 1
    if not tag:
        sys.stderr.write("No tag is given, so this only tries it out.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
