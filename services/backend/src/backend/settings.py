"""What an operator can set: ``SERVICE_*`` (see ``registry``) and the variables below."""

from pydantic import Field

from registry import ServiceSettings


class Settings(ServiceSettings):
    """Settings of backend-api, read from the environment."""

    name: str = "backend-api"
    port: int = 8002
    database_url: str = Field(default="sqlite+aiosqlite:///backend.db", validation_alias="DATABASE_URL")
    """SQLAlchemy URL. ``sqlite://`` and ``postgresql://`` get their asynchronous driver by themselves."""
    database_password: str | None = Field(default=None, repr=False, validation_alias="DATABASE_PASSWORD")
    """Takes the place of the URL's, where ``@``, ``/`` and ``%`` would have to be escaped."""
    database_password_file: str | None = Field(default=None, validation_alias="DATABASE_PASSWORD_FILE")
    """A file that holds it: what stands in a variable, the engine of containers shows."""
    database_timeout: float = Field(default=5.0, gt=0, validation_alias="DATABASE_TIMEOUT")
    """Seconds that a session may take before it is a 503: connecting and its statements together."""
    enrich_timeout: float = Field(default=2.0, gt=0)
    """Seconds that publishing waits for suggestions before it goes on without them."""
    key_age: float = Field(default=604_800.0, gt=0)
    """Seconds after which an Idempotency-Key is forgotten; until then it publishes one card. A week."""
