import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run every async test on asyncio: it is the loop the service runs on."""
    return "asyncio"
