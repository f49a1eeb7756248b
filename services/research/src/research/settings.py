"""What an operator can set: ``SERVICE_*`` (see ``registry``) and the variables below."""

from pydantic import Field

from registry import ServiceSettings


class Settings(ServiceSettings):
    """Settings of research-api, read from the environment."""

    name: str = "research-api"
    port: int = 8001
    search_timeout: float = Field(default=1.5, gt=0)
    """Seconds that all searches for one text may take together; less than its callers wait for the answer."""
