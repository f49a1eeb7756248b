"""The exported names are sorted, real, and the whole of what the package promises."""

import importlib
import inspect
import pkgutil
import typing

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
        and not any(hasattr(protocol, method) for protocol in (registry.Resolver, registry.Observer))
    ]
    assert undocumented == ["DiscoveryTransport.handle_async_request"]


def is_module(value: object) -> bool:
    """Submodules are attributes of their package, too."""
    return type(value) is type(registry)


def types_of(function: object) -> set[type]:
    """Every class of this package in the function's annotations."""
    hints = typing.get_type_hints(function)
    found, left = set(), list(hints.values())
    while left:
        hint = left.pop()
        left += [part for part in typing.get_args(hint) if not isinstance(part, list)]
        left += [each for part in typing.get_args(hint) if isinstance(part, list) for each in part]
        if isinstance(hint, type) and hint.__module__.startswith("registry."):
            found.add(hint)
    return found


def test_every_type_of_a_public_call_is_exported() -> None:
    """What a public function or method takes or returns has a name that users may import."""
    exported = {getattr(module, name) for module in (registry, registry.fastapi) for name in module.__all__}
    public = [value for value in exported if inspect.isfunction(value)]
    public += [
        method
        for kind in exported
        if inspect.isclass(kind) and kind.__module__.startswith("registry.")
        for name, method in vars(kind).items()
        if inspect.isfunction(method) and (not name.startswith("_") or name == "__init__")
    ]
    used = set().union(*map(types_of, public))
    assert {f"{kind.__module__}.{kind.__name__}" for kind in used - exported} <= INTERNAL


INTERNAL = {"registry.discovery.resolver.HasResolver", "registry.presence.probe.Mesh", "registry.telemetry._Answer"}
"""Protocols that a user fulfils without naming them."""
