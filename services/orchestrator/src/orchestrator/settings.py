"""What an operator can set: ``SERVICE_*`` (see ``registry``) and the variables below."""

from pydantic import Field

from registry import ServiceSettings


class Settings(ServiceSettings):
    """Settings of orchestrator-api, read from the environment."""

    name: str = "orchestrator-api"
    port: int = 8003
    upstream_timeout: float = Field(default=5.0, gt=0)
    """Seconds that one attempt of a call to another service may take."""
    health_timeout: float = Field(default=4.0, gt=0)
    """Seconds that one upstream may take to say how it is; enough for the three attempts of a call that is refused."""
