"""Consul Connect without a sidecar: this service's certificate, whom it lets in, and uvicorn serving mutual TLS."""
