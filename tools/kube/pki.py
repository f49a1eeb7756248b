"""Who is who among nodes and control plane: one authority, a certificate and a kubeconfig for each."""

import json
from pathlib import Path

import trustme

from tools.kube.place import ADDRESS, NODES, PLACE

__all__ = ["PKI", "make_certificates"]

PKI = PLACE / "pki"
_SERVICE = "10.96.0.1"
"""Of the API server's own Service: the first of their range."""
_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
_USERS = {
    "admin": ("admin", "system:masters"),
    "kubelet-client": ("apiserver-kubelet", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", "none"),
    "scheduler": ("system:kube-scheduler", "none"),
    "proxy": ("system:kube-proxy", "none"),
    "router": ("kube-router", "none"),
    **{f"node{node}": (f"system:node:node{node}", "system:nodes") for node in NODES},
}
"""File → user and group."""


def make_certificates() -> None:
    """Writes all of them into PKI, anew."""
    PKI.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = trustme.CA(organization_name="registry-kube")
    authority.cert_pem.write_to_path(PKI / "ca.crt")
    _keep("apiserver", authority.issue_cert(ADDRESS, _SERVICE, "127.0.0.1", *_NAMES, common_name="kube-apiserver"))
    for name, (user, group) in _USERS.items():
        _keep(name, authority.issue_cert("client", common_name=user, organization_name=group))
        _kubeconfig(name)
    # Signs the tokens of service accounts; the API server takes the public half out of it.
    trustme.CA().private_key_pem.write_to_path(PKI / "accounts.key")


def _keep(name: str, certificate: trustme.LeafCert) -> None:
    certificate.private_key_pem.write_to_path(PKI / f"{name}.key")
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(PKI / f"{name}.crt", append=pem is not certificate.cert_chain_pems[0])


def _kubeconfig(name: str) -> None:
    cluster = {"server": f"https://{ADDRESS}:6443", "certificate-authority": str(PKI / "ca.crt")}
    user = {"client-certificate": str(PKI / f"{name}.crt"), "client-key": str(PKI / f"{name}.key")}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": name, "namespace": "registry"}}],
        "current-context": "here",
    }
    Path(PKI / f"{name}.kubeconfig").write_text(json.dumps(document))
