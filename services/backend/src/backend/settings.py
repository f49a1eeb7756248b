"""What an operator can set: ``SERVICE_*`` (see ``registry``) and the variables below."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from registry import InvalidInputError, ServiceSettings


class Settings(ServiceSettings):
    """Settings of backend-api, read from the environment."""

    name: str = "backend-api"
    port: int = 8002
    database_url: str = Field(default="sqlite+aiosqlite:///backend.db", validation_alias="DATABASE_URL")
    """SQLAlchemy URL. ``sqlite://`` and ``postgresql://`` get their asynchronous driver by themselves."""
    database_password: str | None = Field(default=None, repr=False, validation_alias="DATABASE_PASSWORD")
    """Takes the place of the URL's, where ``@``, ``/`` and ``%`` would have to be escaped."""
    database_password_file: Path | None = Field(default=None, validation_alias="DATABASE_PASSWORD_FILE")
    """A file that holds it, read at the start: what stands in a variable, the engine of containers shows."""
    database_timeout: float = Field(default=5.0, gt=0, validation_alias="DATABASE_TIMEOUT")
    """Seconds that a session may take before it is a 503: connecting and its statements together."""
    enrich_timeout: float = Field(default=2.0, gt=0)
    """Seconds that publishing waits for suggestions before it goes on without them."""
    key_age: float = Field(default=604_800.0, gt=0)
    """Seconds after which an Idempotency-Key is forgotten; until then it publishes one card. A week."""

    @model_validator(mode="after")
    def _one_password(self) -> Self:
        if self.database_password and self.database_password_file:
            raise InvalidInputError("DATABASE_PASSWORD and DATABASE_PASSWORD_FILE are both set: unset one")
        return self

    def read_database_password(self) -> str | None:
        """The password of the database, without the line's end if it is from a file; None: the URL's. Blocks briefly.

        Raises: InvalidInputError, if the file can't be read or holds none.
        """
        if self.database_password_file is None:
            return self.database_password
        what = f"DATABASE_PASSWORD_FILE {self.database_password_file}"
        try:
            password = self.database_password_file.read_text().rstrip("\r\n")
        except OSError as error:
            raise InvalidInputError(f"{what} can't be read ({error.strerror}): mend or unset it") from None
        except UnicodeDecodeError:
            raise InvalidInputError(f"{what} is not a text in UTF-8") from None
        if not password:
            raise InvalidInputError(f"{what} is empty: write the password into it")
        return password
