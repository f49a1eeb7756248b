"""The exported names are sorted, real, and the whole of what the package promises."""

import importlib
import pkgutil

import pytest

import registry
import registry.fastapi

MODULES = [m.name for m in pkgutil.walk_packages(registry.__path__, "registry.") if "instance_app" not in m.name]


def test_exported_names() -> None:
    """``registry`` exports what it imports from its modules, sorted, and nothing else."""
    exported = {name for name, value in vars(registry).items() if not name.startswith("_") and not is_module(value)}
    assert sorted(exported) == registry.__all__ == sorted(registry.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_exports_sorted_names_of_its_own(name: str) -> None:
    """Each public module says what it exports, sorted as the linter sorts, and each name exists and is documented."""
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        assert not [value for value in vars(module).values() if getattr(value, "__module__", None) == name]
        return
    assert len(set(module.__all__)) == len(module.__all__)
    for exported in module.__all__:
        value = getattr(module, exported)
        if getattr(value, "__module__", None) == name:
            assert value.__doc__, f"{name}.{exported} has no docstring"


def test_classes_document_their_methods() -> None:
    """Every public method of an exported class has a docstring, its own or that of the protocol it fulfils."""
    undocumented = [
        f"{name}.{method}"
        for name in registry.__all__
        if isinstance(kind := getattr(registry, name), type) and not hasattr(registry.Resolver, name)
        for method, value in vars(kind).items()
        if callable(value)
        and not method.startswith("_")
        and not value.__doc__
        and not hasattr(registry.Resolver, method)
    ]
    assert undocumented == ["DiscoveryTransport.handle_async_request"]


def is_module(value: object) -> bool:
    """Submodules are attributes of their package, too."""
    return type(value) is type(registry)
