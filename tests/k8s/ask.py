"""What Consul's agent answers to the pod that calls by name, printed: `python -m tests.k8s.ask /v1/status/leader`."""

import os
import ssl
import sys
from pathlib import Path
from urllib.request import Request, urlopen


def ask(path: str) -> bytes:
    """The answer of the agent of this node. Raises: OSError."""
    token = os.environ.get("CONSUL_HTTP_TOKEN_FILE")
    authority = os.environ.get("CONSUL_CACERT")
    trust = ssl.create_default_context(cafile=authority)
    trust.check_hostname = False  # asked by its node's address, which is in no certificate
    scheme = "https" if authority else "http"
    headers = {"X-Consul-Token": Path(token).read_text()} if token else {}
    request = Request(f"{scheme}://{os.environ['CONSUL_HOST']}:8500{path}", headers=headers)
    with urlopen(request, context=trust) as answer:
        content: bytes = answer.read()
    return content


if __name__ == "__main__":
    sys.stdout.buffer.write(ask(sys.argv[1]))
