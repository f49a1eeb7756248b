"""What a service's lifespan has of the mesh, as ``CONSUL_CONNECT`` says."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette

from registry.mesh.guard import Guard, only_judged
from registry.mesh.identity import MeshIdentity, choose_source
from registry.mesh.intentions import Intentions
from registry.mesh.server import mutual_tls, running_uvicorn
from registry.mesh.settings import MeshSettings
from registry.settings import ConsulSettings, ServiceSettings

__all__ = ["Membership", "joined"]


@dataclass(frozen=True, slots=True)
class Membership:
    """A service's part in the mesh; made by ``joined``."""

    settings: MeshSettings
    identity: MeshIdentity | None = None
    """By which it calls others; None: it is no member."""
    intentions: Intentions | None = None
    """Who may call it; None: it serves plainly."""

    @property
    def serves(self) -> bool:
        """Whether it serves mutual TLS, and nothing else."""
        return self.intentions is not None

    def hindrance(self) -> str | None:
        """Why nobody would be let in yet, in words; None: it can serve."""
        if self.identity is None or self.intentions is None:
            return None
        waiting = [part.complaint for part in (self.identity, self.intentions) if not part.ready.is_set()]
        return waiting[0] if waiting else None

    def protect(self, app: Starlette) -> None:
        """From now on it lets in nothing that did not come by mutual TLS, if that is what is served."""
        if self.serves:
            app.middleware_stack = only_judged(app.middleware_stack or app.build_middleware_stack())


@asynccontextmanager
async def joined(
    service: ServiceSettings, consul: ConsulSettings, instance_id: Callable[[], str | None]
) -> AsyncIterator[Membership]:
    """Within it, this service has its certificate, and the running uvicorn is about to serve mutual TLS, if it is to.

    ``instance_id`` names this instance, once it is known. Waits for Consul, at most 2 s; if it is away, the service
    starts, and refuses handshakes until there is a certificate.

    Raises: InvalidInputError under another server than uvicorn; UnsafeAgentError.
    """
    settings = MeshSettings()
    if settings.mode == "false":
        yield Membership(settings)
        return
    server = running_uvicorn() if settings.mode == "true" else None
    async with AsyncExitStack() as stack:
        identity = await stack.enter_async_context(MeshIdentity(service.name, choose_source(settings, consul)))
        intentions = None
        if server is not None:
            intentions = await stack.enter_async_context(Intentions(service.name, consul))
            guard = Guard(identity, intentions, service.health_check_path, instance_id)
            stack.enter_context(mutual_tls(server, guard))
        yield Membership(settings, identity, intentions)
