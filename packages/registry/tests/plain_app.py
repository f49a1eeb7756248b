"""A service as many are written, without the package: plain FastAPI. `plain_register.py` registers it."""

from fastapi import FastAPI

app = FastAPI()


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}
