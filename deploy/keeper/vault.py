"""The secrets of the locked deployment: made once, kept in the vault, and given to each reader as files of its own.

The vault is a volume that the keeper's jobs alone mount. A reader is a container with a volume that the keeper fills:
its files belong to the reader's user and nobody else may read them. Compose can't do that: it ignores the owner and the
mode of secrets that come from files.
"""

import base64
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.keeper.grants import CALLS, COMPOSE, DATACENTER, FRONT_DOOR, Place, identities

__all__ = ["MANAGEMENT", "READERS", "Token", "Vault", "encode"]

MANAGEMENT = "management"
"""The token that may do everything."""
READERS = Path("/readers")
_SERVICE, _CONSUL, _POSTGRES = 10001, 100, 999
"""The users that the containers run as."""
_DAYS = "--days=3650"


@dataclass(frozen=True)
class Token:
    """A token's public name in Consul, and its secret."""

    accessor: str
    secret: str

    def __repr__(self) -> str:
        return f"Token({self.accessor!r})"

    @classmethod
    def new(cls) -> "Token":
        """One that nobody has yet."""
        return cls(str(uuid.uuid4()), str(uuid.uuid4()))


class Vault:
    """The folder with all secrets. Everything blocks; what is missing is made, what is there stays."""

    def __init__(
        self, folder: Path = Path("/vault"), readers: Path = READERS, *, users: bool = True, place: Place = COMPOSE
    ) -> None:
        """``users``: whether readers are containers with users of their own, for which it takes root."""
        self.folder = folder
        self.readers = readers
        self._users = users
        self.place = place

    @property
    def trusted(self) -> Path:
        """The certificates of the authorities that everybody trusts: one, and two while one replaces another."""
        return self.folder / "trusted.pem"

    @property
    def callers_key(self) -> Path:
        """The key that signs the tokens of those who call the front door."""
        return self.folder / "callers-key.pem"

    def callers(self) -> bytes:
        """Its public half, as a JWK set (RFC 7517, RFC 8037)."""
        command = ["openssl", "pkey", "-in", str(self.callers_key), "-pubout", "-outform", "DER"]
        public = subprocess.run(command, check=True, capture_output=True).stdout[-32:]
        key = {"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "x": encode(public)}
        return json.dumps({"keys": [key | {"kid": hashlib.sha256(public).hexdigest()[:16]}]}).encode()

    def make(self) -> None:
        """Makes every secret that is missing."""
        self._make_private(self.folder)
        if not self.trusted.exists():
            self.make_authority("ca")
            self.write("trusted.pem", (self.folder / "ca.pem").read_bytes())
        for name in (*self.place.servers, self.place.agent):
            if not (self.folder / f"{name}-key.pem").exists():
                self.make_certificate(name)
        if not (self.folder / "gossip").exists():
            self.write("gossip", new_gossip_key().encode())
        if not (self.folder / "database-password").exists():
            self.write("database-password", secrets.token_urlsafe(24).encode())
        if not self.callers_key.exists():
            made = subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519"], check=True, capture_output=True)
            self.write(self.callers_key.name, made.stdout)
        for name in (MANAGEMENT, *identities(self.place)):
            if not (self.folder / f"{name}.token").exists():
                self.keep(name, Token.new())

    def token(self, name: str) -> Token:
        """The token of this name, as it is now."""
        found = json.loads((self.folder / f"{name}.token").read_bytes())
        return Token(found["accessor"], found["secret"])

    def keep(self, name: str, token: Token) -> None:
        """From now on, this is the token of this name."""
        self.write(f"{name}.token", json.dumps({"accessor": token.accessor, "secret": token.secret}).encode())

    def write(self, name: str, content: bytes) -> None:
        """Puts a file in the vault, in place of the one of this name."""
        place(self.folder / name, content, self._user(_SERVICE))

    def make_authority(self, name: str) -> None:
        """A new authority: its certificate and its key, under this name."""
        with tempfile.TemporaryDirectory() as folder:
            _consul(folder, "tls", "ca", "create", _DAYS)
            self.write(f"{name}-key.pem", Path(folder, "consul-agent-ca-key.pem").read_bytes())
            self.write(f"{name}.pem", Path(folder, "consul-agent-ca.pem").read_bytes())

    def make_certificate(self, reader: str) -> None:
        """A new certificate of an agent, for both ends of its connections, by the authority."""
        nodes = self.place.servers.get(reader)
        kind, names = ("server", [*nodes, *self.place.servers_names]) if nodes else ("client", [self.place.agent_host])
        with tempfile.TemporaryDirectory() as folder:
            authority = [f"--ca={self.folder / 'ca.pem'}", f"--key={self.folder / 'ca-key.pem'}"]
            named = [f"--additional-dnsname={name}" for name in names]
            _consul(folder, "tls", "cert", "create", f"--{kind}", *authority, _DAYS, *named)
            made = Path(folder, f"{DATACENTER}-{kind}-consul-0")
            self.write(f"{reader}.pem", made.with_name(f"{made.name}.pem").read_bytes())
            self.write(f"{reader}-key.pem", made.with_name(f"{made.name}-key.pem").read_bytes())

    def deliver(self) -> list[str]:
        """Gives every reader its files, and takes back what is not its own any more; returns what changed."""
        changed = []
        for reader, (user, files) in self._contents().items():
            folder = self.readers / reader
            self._make_private(folder, user)
            for name, content in files.items():
                changed += [f"{reader}/{name}"] if place(folder / name, content, self._user(user)) else []
            for path in folder.iterdir():
                if path.name not in files:
                    path.unlink()
                    changed.append(f"{reader}/{path.name}")
        return changed

    def _contents(self) -> dict[str, tuple[int, Mapping[str, bytes]]]:
        """Reader → its user, and file → content. Nobody gets more than it needs."""
        trusted = {"ca.pem": self.trusted.read_bytes()}
        password = {"database-password": (self.folder / "database-password").read_bytes()}
        found: dict[str, tuple[int, Mapping[str, bytes]]] = {"postgres": (_POSTGRES, password)}
        for name in (*CALLS, *([self.place.edge] if self.place.edge else [])):
            found[name] = (_SERVICE, trusted | {"token": self.token(name).secret.encode()})
        found["backend-api"] = (_SERVICE, {**found["backend-api"][1], **password})
        found[FRONT_DOOR] = (_SERVICE, {**found[FRONT_DOOR][1], "callers.json": self.callers()})
        for name in self.place.servers:
            management = self.token(MANAGEMENT).secret
            tokens = {"initial_management": management, "agent": self.token(name).secret}
            found[name] = (_CONSUL, trusted | self._agent(name, tokens) | {"token": management.encode()})
        agent = self.place.agent
        tokens = {"agent": self.token(agent).secret}
        if self.place.edge:  # which asks Consul's DNS, where nobody shows a token
            tokens["dns"] = self.token("dns").secret
        # For commands in its container: they look; on a node that had another agent, they make Consul forget that one.
        own = self.token("ui" if self.place.known_nodes else agent).secret
        found[agent] = (_CONSUL, trusted | self._agent(agent, tokens) | {"token": own.encode()})
        return found

    def _agent(self, reader: str, tokens: Mapping[str, str]) -> dict[str, bytes]:
        settings = {"encrypt": (self.folder / "gossip").read_text(), "acl": {"tokens": dict(tokens)}}
        return {
            "cert.pem": (self.folder / f"{reader}.pem").read_bytes(),
            "key.pem": (self.folder / f"{reader}-key.pem").read_bytes(),
            "secrets.json": json.dumps(settings).encode(),
        }

    def _make_private(self, folder: Path, user: int = _SERVICE) -> None:
        folder.mkdir(exist_ok=True)
        folder.chmod(0o700)
        if self._users:
            shutil.chown(folder, user, user)

    def _user(self, user: int) -> int | None:
        return user if self._users else None


def encode(part: bytes) -> str:
    """Base64 as tokens have it (RFC 7515, 2)."""
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def new_gossip_key() -> str:
    """A key for what agents tell each other."""
    return base64.b64encode(secrets.token_bytes(32)).decode()


def place(path: Path, content: bytes, user: int | None) -> bool:
    """Whether the file had to be written: then it is replaced in one step, and nobody but this user can read it.

    ``user``: None for whoever runs this.
    """
    if path.exists() and path.read_bytes() == content:
        return False
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
        file.write(content)
    if user is not None:
        shutil.chown(new, user, user)
    new.replace(path)
    return True


def _consul(folder: str, *arguments: str) -> None:
    subprocess.run(["consul", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
