"""What is released: the built files hold what they must, and only what is ready is released."""

import email.message
import email.parser
import email.policy
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.clone import succeed
from tools.release import changelog_obstacles, main, tag_obstacles, tree_obstacles, version
from tools.services import ROOT

PACKAGE = ROOT / "packages/registry"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel: what `nox -s release` has built, else built now."""
    if built := os.environ.get("RELEASE_DIST"):
        return Path(built)
    folder = tmp_path_factory.mktemp("dist")
    succeed(ROOT, "uv", "build", "--quiet", "--offline", "packages/registry", "--out-dir", str(folder))
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    """The wheel of this version."""
    return zipfile.ZipFile(dist / f"registry-{version()}-py3-none-any.whl")


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    """What an index would show of it."""
    return email.parser.BytesParser(policy=email.policy.compat32).parsebytes(
        wheel.read(f"registry-{version()}.dist-info/METADATA")
    )


def sources() -> set[str]:
    """Every file of the package that git knows or would take, relative to src."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src"]
    names = subprocess.run(git, cwd=PACKAGE, capture_output=True, text=True, check=True).stdout.split()
    return {name.removeprefix("src/") for name in names if (PACKAGE / name).is_file()}


def test_the_wheel_has_every_file_and_no_other(wheel: zipfile.ZipFile) -> None:
    """All of src is inside, byte for byte, the recipe of Consul and py.typed among it; beside it only metadata."""
    info = f"registry-{version()}.dist-info/"
    names = {name for name in wheel.namelist() if not name.endswith("/")}
    inside = {name for name in names if not name.startswith(info)}
    assert inside == sources()
    assert inside >= {"registry/py.typed"} | {
        f"registry/testing/build/{name}" for name in ("go.mod", "go.sum", "go.txt", "tools.go")
    }
    assert {name.removeprefix(info) for name in names - inside} == {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
    for name in inside:
        assert wheel.read(name) == (PACKAGE / "src" / name).read_bytes(), name
    assert wheel.read(f"{info}licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_is_enough_to_build_from(dist: Path) -> None:
    """It has the sources, the README, the license and the recipe to build them; `uv build` made the wheel of it."""
    [file] = dist.glob("*.tar.gz")
    assert file.name == f"registry-{version()}.tar.gz"
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", *(f"src/{name}" for name in sources())}
    assert names >= wanted
    folders = {str(parent) for name in wanted for parent in Path(name).parents}
    # uv normalises pyproject.toml and keeps what it was made from.
    assert names - wanted - folders <= {"", "pyproject.toml.orig"}


def test_the_metadata_says_what_it_is(metadata: email.message.Message) -> None:
    """Name, version, description, README and extras arrive; no address of a host is among them."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    assert (metadata["Name"], metadata["Version"], metadata["Summary"]) == (
        "registry",
        version(),
        project["description"],
    )
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    assert metadata.get_payload() == (PACKAGE / "README.md").read_text()
    assert metadata.get_all("Provides-Extra") == sorted(project["optional-dependencies"])
    assert metadata.get_all("Classifier") == project["classifiers"]
    assert "://" not in str(metadata)


def test_the_classifiers_are_what_is_tested(metadata: email.message.Message) -> None:
    """Each Python of the matrix in CI is promised, and no other."""
    [matrix] = re.findall(r"python: \[(.*)\]", (ROOT / ".github/workflows/ci.yml").read_text())
    promised = re.findall(r"Python :: (3\.\d+)$", "\n".join(metadata.get_all("Classifier") or []), re.MULTILINE)
    assert promised == re.findall(r"3\.\d+", matrix)


def test_an_index_would_take_it(dist: Path) -> None:
    """twine finds no fault with either file."""
    files = sorted(str(path) for path in dist.glob("registry-*"))
    assert len(files) == 2
    succeed(ROOT, "-m", "twine", "check", "--strict", *files)


def test_the_version_stands_in_one_place() -> None:
    """No source repeats it: who wants to know asks the metadata."""
    texts = {path: path.read_text() for path in (PACKAGE / "src").rglob("*.py")}
    assert not [path for path, text in texts.items() if "__version__" in text or f'"{version()}"' in text]


@pytest.mark.parametrize(
    ("changelog", "obstacle"),
    [
        ("## [Unreleased]\n\n- more\n\n## [1.2.3] - 2026-11-24\n\n- this\n", "under [Unreleased]"),
        ("## [Unreleased]\n\n## [1.2.3] - 2026-11-24\n\n- this\n", None),
        ("## [1.2.3] - 2026-11-24\n\n### Added\n\n- this\n\n## [1.2.2] - 2026-11-01\n\n- that\n", None),
        ("## [1.2.2] - 2026-11-01\n\n- that\n", "is 1.2.2, packages/registry/pyproject.toml says 1.2.3"),
        ("# Changelog\n", "is nothing"),
        ("## [1.2.3]\n\n- this\n", "no date"),
        ("## [1.2.3] - 2026-11-24\n\n## [1.2.2] - 2026-11-01\n\n- that\n", "says nothing about 1.2.3"),
    ],
)
def test_the_changelog_must_tell_of_the_version(changelog: str, obstacle: str | None) -> None:
    """A release needs its own heading, with a date and with text, and nothing unreleased above it."""
    found = changelog_obstacles(f"# Changelog\n\n{changelog}", "1.2.3")
    assert len(found) == (obstacle is not None)
    assert obstacle is None or obstacle in found[0]


def test_what_is_not_committed_or_misnamed_is_told() -> None:
    """A dirty tree and a tag of another version each give one sentence that says what to do."""
    assert tree_obstacles("") == []
    [sentence] = tree_obstacles(" M a.py\n?? b.py\n?? c.py\n?? d.py\n")
    assert sentence == "There are changes that no commit has (a.py, b.py, c.py and 1 more): commit or remove them."
    assert tag_obstacles("v1.2.3", "1.2.3") == []
    [sentence] = tag_obstacles("1.2.3", "1.2.3")
    assert "tag it v1.2.3" in sentence


def test_only_a_tag_makes_obstacles_fatal(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a tag a release can always be tried out; with a wrong one it ends before anything is built."""
    assert main([]) == 0
    assert "only tries it out" in capsys.readouterr().err
    assert main(["v0.0.0-wrong"]) == 1
    assert "v0.0.0-wrong can't be released" in capsys.readouterr().err
    assert main(["--help"]) == 2


def test_fixtures_without_their_extra_say_what_to_install() -> None:
    """Where pytest is missing, the import of what needs it names the extra."""
    program = "import sys; sys.modules['pytest'] = None; import registry.testing.fixtures"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pytest" in done.stderr
    assert done.stderr.endswith("install registry[testing]\n")
