"""The documentation's tables match the code, and its links lead somewhere."""

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import AliasChoices

import registry
import registry.environment
import registry.fastapi
import registry.logs
import registry.mesh.settings
import registry.testing.archive
import registry.testing.binary
from registry import ServiceDiscoveryClient, ServiceRegistry, ServiceSettings
from registry.conformance import PROMISES
from registry.families import FAMILIES
from tools.services import SERVICES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
API = ROOT / "docs/reference/api.md"
ENVIRONMENT = ROOT / "docs/reference/environment.md"
PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "services/*/*.md", "packages/*/*.md") for path in ROOT.glob(pattern)
)
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    """A page as a test id."""
    return page.relative_to(ROOT).as_posix()


def section(heading: str) -> str:
    """The part of the list of names under this heading."""
    found = re.search(rf"^(#+) {re.escape(heading)}$(.*?)(?=^#{{1,3}} |\Z)", API.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"no heading {heading!r}"
    return found[2]


def documented_variables() -> dict[str, tuple[str, str]]:
    """Variable → (default, who reads it), from the table of variables."""
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \| (.*) \|$", ENVIRONMENT.read_text(), re.MULTILINE)
    assert len(rows) == len({row[0] for row in rows}), "a variable stands there twice"
    return {variable: (default, reader) for variable, default, reader in rows}


def service_variables(settings: type[ServiceSettings], inherited: type[ServiceSettings] | None) -> dict[str, str]:
    """Variable → its default as the table has it, of the fields that are not inherited."""
    found = {}
    for name, info in settings.model_fields.items():
        if inherited and name in inherited.model_fields:
            continue
        alias = info.validation_alias
        assert not isinstance(alias, AliasChoices)
        default = None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
        text = f"{default:g}" if isinstance(default, float) else str(default)
        words = "the service's own" if info.is_required() else "unset" if default is None else "none"
        words = "`false`" if default is False else words
        found[str(alias or f"SERVICE_{name.upper()}")] = f"`{text}`" if default else words
    return found


def test_the_front_page_is_short() -> None:
    """README says what this is, shows a service and a call, and leads on, in at most 160 lines."""
    assert len(README.read_text().splitlines()) <= 160


def test_examples_import_from_the_package() -> None:
    """Examples import from ``registry``; one page shows that ``orchestrator.registry`` has the same names."""
    pages = [path for path in PAGES if "orchestrator.registry import" in path.read_text()]
    assert [name_of(page) for page in pages] == ["docs/howto/register.md"]


def test_service_variables_are_documented() -> None:
    """Every variable that a settings class reads stands in the table with its default, and no other.

    A service's own variables may stand in its own README instead.
    """
    expected = {(name, "every service"): default for name, default in service_variables(ServiceSettings, None).items()}
    documented = {
        (name, who): default
        for name, (default, who) in documented_variables().items()
        if not name.startswith(("CONSUL_", "LOG_"))
    }
    for service in SERVICES:
        settings = importlib.import_module(f"{service.folder}.settings").Settings
        own = service_variables(settings, ServiceSettings)
        expected |= {(name, service.name): default for name, default in own.items()}
        page = (ROOT / "services" / service.folder / "README.md").read_text()
        rows = re.findall(r"^\| `([A-Z_]+)` \| .* \| (.*) \|$", page, re.MULTILINE)
        documented |= {(name, service.name): default for name, default in rows}
    assert documented == expected


def test_log_variables_are_documented() -> None:
    """Every LOG_* variable that the package reads stands in the table, and no other."""
    documented = {name for name in documented_variables() if name.startswith("LOG_")}
    assert documented == set(re.findall(r'environ.get\("(LOG_\w+)"', inspect.getsource(registry.logs)))


def test_consul_variables_are_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every CONSUL_* variable that the package reads stands in the table, and no other; the defaults are right."""
    modules = (registry.environment, registry.mesh.settings, registry.testing.archive, registry.testing.binary)
    sources = "".join(inspect.getsource(module) for module in modules)
    documented = {name: row for name, row in documented_variables().items() if name.startswith("CONSUL_")}
    assert documented.keys() == set(re.findall(r'"(CONSUL_\w+)"', sources))
    for variable in documented:
        monkeypatch.delenv(variable, raising=False)
    found = registry.ConsulSettings()
    assert documented["CONSUL_HOST"][0] == f"`{found.host}`"
    assert documented["CONSUL_PORT"][0] == f"`{found.port}`"
    assert documented["CONSUL_WAIT"][0] == f"`{found.wait:g}`"
    assert (found.scheme, found.token, found.token_file, found.ca_file) == ("http", None, None, None)


def documented_calls(text: str) -> dict[str, list[str]]:
    """Name → parameters, of every `name(parameters)` in a table's first column."""
    rows = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    calls = re.findall(r"`(\w+)\((.*?)\)`", "\n".join(rows))
    return {name: re.findall(r"\w+", parameters) for name, parameters in calls}


def parameters(function: Any) -> list[str]:
    """Its parameters as the reference names them."""
    found = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in found if parameter.name not in {"self", "kwargs"}]


@pytest.mark.parametrize("documented", [ServiceRegistry, ServiceDiscoveryClient])
def test_reference_has_every_method(documented: type) -> None:
    """The reference has every public method with all its parameters, and the constructor's defaults are right."""
    text = section(documented.__name__)
    methods = {name: parameters(value) for name, value in vars(documented).items() if name[0] != "_"}
    methods = {name: found for name, found in methods.items() if callable(getattr(documented, name))}
    assert documented_calls(text) == methods
    constructor = re.search(rf"`({documented.__name__}\([^`]*\))`", text)
    assert constructor
    call = ast.parse(constructor[1], mode="eval").body
    assert isinstance(call, ast.Call)
    signature = inspect.signature(documented).parameters
    for keyword in call.keywords:
        assert keyword.arg
        assert signature[keyword.arg].default == ast.literal_eval(keyword.value)


def test_reference_has_every_name() -> None:
    """The reference has every public name of ``registry`` and of ``registry.fastapi``, and no other."""
    text = section("The other names")
    first, second = text.split("| in `registry.fastapi` | is |")
    names = set(re.findall(r"^\| `(\w+)` \|", first, re.MULTILINE))
    assert names | {"ServiceRegistry", "ServiceDiscoveryClient"} == set(registry.__all__)
    assert set(re.findall(r"^\| `(\w+)[(`]", second, re.MULTILINE)) == set(registry.fastapi.__all__)
    for name, found in documented_calls(second).items():
        assert found == parameters(getattr(registry.fastapi, name))


def first_column(page: Path) -> list[str]:
    """Every backticked word in the first column of the page's tables."""
    rows = re.findall(r"^\| (`.*?) \|", page.read_text(), re.MULTILINE)
    return re.findall(r"`(.*?)`", " ".join(rows))


def test_architecture_has_every_module() -> None:
    """The tables of modules have every module of the package and of its wings, every other folder, and no more."""
    package = Path(registry.__file__).parent
    wings = {"consul", "discovery", "mesh", "presence"}
    files = [path.relative_to(package) for path in package.rglob("*.py") if path.name != "__init__.py"]
    modules = {path.as_posix() for path in files if path.parent.name in {"", *wings}}
    folders = {f"{path.parts[0]}/" for path in files if len(path.parts) > 1} - {f"{wing}/" for wing in wings}
    assert sorted(first_column(ROOT / "docs/architecture.md")) == sorted(modules | folders)


def test_dependencies_are_all_explained() -> None:
    """Every direct dependency of the members and of the dev group has its line, and nothing else has."""
    requirements: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    for member in (*ROOT.glob("packages/*/pyproject.toml"), *ROOT.glob("services/*/pyproject.toml")):
        project = tomllib.loads(member.read_text())["project"]
        for group in (project["dependencies"], *project.get("optional-dependencies", {}).values()):
            requirements += group
    names = {re.split(r"[\[<>=;, ]", requirement)[0] for requirement in requirements}
    documented = first_column(ROOT / "docs/dependencies.md")
    assert sorted(documented) == sorted(names)


def test_metrics_are_documented() -> None:
    """The table of metrics is the one that the code makes."""
    lines = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for family in FAMILIES:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        lines.append(f"| `{family.name}` | {family.kind} | {labels} | {family.help} |")
    table = "\n".join(lines)
    assert table in (ROOT / "docs/reference/metrics.md").read_text(), f"make the table this one:\n{table}"


def rows(page: Path) -> list[list[str]]:
    """The cells of every row of the page's tables."""
    return [re.split(r" *\| *", line)[1:-1] for line in page.read_text().splitlines() if line.startswith("|")]


@pytest.mark.parametrize("page", ["README.md", "docs/failures.md", "docs/howto/scale.md"])
def test_figures_are_measured(page: str) -> None:
    """Every "N of M calls failed" is what the last benchmark counted in one of its scenes."""
    measured = {(row[2], row[1]) for row in rows(ROOT / "docs/benchmarks/README.md") if len(row) == 9}
    said = set(re.findall(r"(\d[\d,]*) of (\d[\d,]*\d)", (ROOT / page).read_text()))
    assert said
    assert said <= measured


def test_promises_are_documented() -> None:
    """The guide to conformance has every promise, in the order and in the words of the examination."""
    documented = [(row[0].strip("`"), row[1]) for row in rows(ROOT / "docs/howto/conformance.md")]
    assert [row for row in documented if row[0] in PROMISES] == list(PROMISES.items())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings: lower case, spaces to hyphens, other punctuation dropped."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link within the repository leads to a file that exists, and to a heading that it has."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []
