"""`nox -s docs`: the site, from the pages of this repository and the docstrings of the package, strictly.

It fails on a link, an anchor or a name that leads nowhere, on a page that the navigation lacks, on a public name that
the reference lacks, and on a page that would load anything from elsewhere. It needs no network.
"""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
PAGES = ("*.md", "LICENSE", "docs/**/*.*", "services/*/*.md", "packages/*/*.md")
PUBLIC = (
    "registry",
    "registry.fastapi",
    "registry.logs",
    "registry.metrics",
    "registry.conformance",
    "registry.tracing",
    "registry.testing.fixtures",
    "registry.testing.agent",
    "registry.testing.instances",
)
"""The modules whose ``__all__`` the reference must have."""
_FENCE = re.compile(r"^```(\w+) (?:file=(\S+)|(background)|\w+)$", re.MULTILINE)
_ELSEWHERE = re.compile(r"<(?:script|img|iframe|link(?![^>]*canonical))\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")
_ESCAPES = re.compile(r"\x1b\[[\d;]*m")


def main() -> int:
    """Builds into .site/html; returns 1, with a line for each shortfall, when anything is wrong."""
    site = ROOT / ".site"
    shutil.rmtree(site, ignore_errors=True)
    _stage(site / "pages")
    shutil.copy2(ROOT / "zensical.toml", site)
    problems = [*_missing_in_navigation(site / "pages"), *_unreadable_fences(site / "pages"), *_build(site)]
    if not problems:
        problems = [*_missing_in_reference(site / "html"), *_loaded_from_elsewhere(site / "html")]
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    if not problems:
        sys.stdout.write(f"{site / 'html' / 'index.html'}\n")
    return 1 if problems else 0


def _stage(folder: Path) -> None:
    """Copies the pages as they lie in the repository, so that every link between them stays right.

    Our fences say how a block is tested; the site's say what a reader sees.
    """
    for path in (path for pattern in PAGES for path in ROOT.glob(pattern) if path.is_file()):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            copy.write_text(_FENCE.sub(_fence, path.read_text()))
        else:
            shutil.copy2(path, copy)


def _fence(found: re.Match[str]) -> str:
    language, file, background = found.groups()
    title = file or (background and "in a terminal of its own")
    return f'```{language} title="{title}"' if title else f"```{language}"


def _build(site: Path) -> Iterator[str]:
    """Runs zensical, whose strict mode stops at every warning."""
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)
    if done.returncode:
        said = _ESCAPES.sub("", done.stdout + done.stderr)
        yield re.sub(r"Traceback \(most recent call last\):\n(?:  .*\n)+", "", said).strip()


def _missing_in_navigation(pages: Path) -> Iterator[str]:
    named = set(_leaves(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    present = {path.relative_to(pages).as_posix() for path in pages.glob("docs/**/*.md")}
    yield from (f"{page} is not in the navigation: add it to zensical.toml." for page in sorted(present - named))
    # zensical leaves out a page that is not there, and says nothing.
    absent = [page for page in sorted(named) if not (pages / page).exists()]
    yield from (f"{page} is in the navigation of zensical.toml, but not there." for page in absent)


def _leaves(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    else:
        for child in node.values() if isinstance(node, dict) else node:
            yield from _leaves(child)


def _unreadable_fences(pages: Path) -> Iterator[str]:
    # zensical takes them, and often much of what follows, for text, and says nothing.
    for page in sorted(pages.glob("**/*.md")):
        for fence in re.findall(r"^ *```\w+ (?!title=).*$", page.read_text(), re.MULTILINE):
            yield f"{page.relative_to(pages)}: {fence!r} is no fence: a word after the language, or file=, is one."


def _missing_in_reference(html: Path) -> Iterator[str]:
    text = "".join(page.read_text() for page in html.glob("docs/reference/*.html"))
    documented = set(re.findall(r'\bid="([\w.]+)"', text))
    public = {
        f"{module}.{name}": getattr(importlib.import_module(module), name)
        for module in PUBLIC
        for name in importlib.import_module(module).__all__
    }
    present = [thing for path, thing in public.items() if path in documented]
    for path, thing in public.items():
        # One entry is enough for what two modules offer.
        if not any(thing is each for each in present):
            yield f"{path} is not in docs/reference: add `::: {path}` to a page."


def _loaded_from_elsewhere(html: Path) -> Iterator[str]:
    for page in sorted(html.glob("**/*.html")):
        for found in _ELSEWHERE.findall(page.read_text()):
            yield f"{page.relative_to(html)} would be loaded with parts from elsewhere: {found}"


if __name__ == "__main__":
    sys.exit(main())
