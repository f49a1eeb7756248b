"""What goes over the wire, with the examples that the OpenAPI page shows."""

from pydantic import BaseModel, Field


class Neighbour(BaseModel):
    """Another service, as a call by name met it."""

    service: str = Field(examples=["backend-api"])
    instance: str = Field(description="Which of its instances answered.", examples=["backend-api-10.0.0.7-8002"])
    status: str = Field(description="How it says it is.", examples=["healthy"])
