"""The database's password, which an operator may keep in a file."""

from pathlib import Path

from backend.settings import Settings
from registry import InvalidInputError


def read_password(settings: Settings) -> str | None:
    """What takes the place of the password in the database's URL, without the file's line end; None: nothing does.

    Blocks briefly. Raises: InvalidInputError, when the file can't be read, holds none, or is not the only place of it.
    """
    if not settings.database_password_file:
        return settings.database_password
    if settings.database_password:
        raise InvalidInputError("DATABASE_PASSWORD and DATABASE_PASSWORD_FILE are both set: unset one")
    what = f"DATABASE_PASSWORD_FILE {settings.database_password_file}"
    try:
        password = Path(settings.database_password_file).read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise InvalidInputError(f"{what} can't be read ({error.strerror}): mend or unset it") from None
    except UnicodeDecodeError:
        raise InvalidInputError(f"{what} is not a text in UTF-8") from None
    if not password:
        raise InvalidInputError(f"{what} is empty: write the password into it")
    return password
