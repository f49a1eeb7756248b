"""Ends with 0 when this container's service says that it is healthy. A bare socket, for it starts every few seconds."""

import os
import socket

with socket.create_connection(("127.0.0.1", int(os.environ["SERVICE_PORT"])), timeout=2) as connection:
    if os.environ.get("CONSUL_CONNECT", "").lower() in {"true", "t", "1"}:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = context.wrap_socket(connection)
    connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
    status = connection.recv(64).split()[1]
raise SystemExit(status != b"200")
