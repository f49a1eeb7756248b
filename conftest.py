import pytest

pytest_plugins = ["registry.testing"]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run every async test on asyncio: it is the loop the services run on."""
    return "asyncio"
