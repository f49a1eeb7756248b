"""The site's build is strict: whatever leads nowhere fails it, with a line that says what."""

import re
from pathlib import Path

import pytest

from tools.docs import __main__ as site

README = """# Home

[Here](docs/page.md#a-heading), and `x`.

```python file=x.py
x = 1
```
"""
PAGE = """# Page

## A heading

[Back](../README.md)

```bash containers
docker ps
```

```bash somewhere
ls
```
"""
REFERENCE = (
    "# Reference\n\n" + "\n\n".join(f"::: registry.conformance.{name}" for name in ("examine", "Finding")) + "\n"
)
NAVIGATION = '["README.md", "docs/page.md", "docs/reference/conformance.md"]'


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository with a site that builds, on the configuration and the package of this one."""
    configuration = (site.ROOT / "zensical.toml").read_text()
    configuration = re.sub(r"^nav = \[\n.*?^\]$", f"nav = {NAVIGATION}", configuration, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "zensical.toml").write_text(configuration)
    (tmp_path / "packages").symlink_to(site.ROOT / "packages")
    (tmp_path / "docs/reference").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs/page.md").write_text(PAGE)
    (tmp_path / "docs/reference/conformance.md").write_text(REFERENCE)
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "PAGES", ("*.md", "docs/**/*.*"))
    monkeypatch.setattr(site, "PUBLIC", ())
    return tmp_path


def test_a_sound_site_is_built(root: Path) -> None:
    """Pages keep their places, a block has the name of its file as title and no other word, and names have entries."""
    assert site.main() == 0
    html = root / ".site/html"
    assert 'class="filename">x.py<' in (html / "index.html").read_text()
    page = (html / "docs/page.html").read_text()
    assert page.count('class="highlight"') == 2
    assert "somewhere" not in page
    assert 'id="registry.conformance.examine"' in (html / "docs/reference/conformance.html").read_text()


@pytest.mark.parametrize(
    ("page", "old", "new", "reason"),
    [
        ("docs/page.md", "../README.md", "../READ.md", "page does not exist"),
        ("README.md", "#a-heading", "#another", "anchor does not exist"),
        ("README.md", "# Home", "# Home\n\n![x](https://example.org/x.png)", "parts from elsewhere"),
        ("README.md", "```python file=x.py", "```python of two words", "'```python of two words' is no fence"),
        ("docs/reference/conformance.md", "examine", "examined", "Could not collect 'registry.conformance.examined'"),
        ("zensical.toml", '"docs/page.md", ', "", "docs/page.md is not in the navigation"),
        ("zensical.toml", '"docs/page.md"', '"docs/page.md", "docs/other.md"', "docs/other.md is in the navigation"),
    ],
)
def test_what_leads_nowhere_fails(
    root: Path, capfd: pytest.CaptureFixture[str], page: str, old: str, new: str, reason: str
) -> None:
    """A broken link or anchor, a part from elsewhere, a name that is gone, a page without a place: each is named."""
    text = (root / page).read_text()
    assert old in text
    (root / page).write_text(text.replace(old, new))
    assert site.main() == 1
    assert reason in capfd.readouterr().err


def test_a_public_name_without_an_entry_fails(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a public module offers and the reference lacks is named, and only that."""
    monkeypatch.setattr(site, "PUBLIC", ("registry.conformance",))
    assert site.main() == 1
    said = capfd.readouterr().err
    assert "registry.conformance.PROMISES is not in docs/reference" in said
    assert "registry.conformance.examine is" not in said
