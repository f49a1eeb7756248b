"""What the nodes of `nox -s k8s` are made with, as far as it takes neither root nor minutes."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from registry.testing import golang
from registry.testing.binary import pinned_version
from tools.kube import pki, place
from tools.kube.cluster import VOLUMES
from tools.kube.programs import BESIDE, HERE, KUBERNETES


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of the test's own; the folder in which it notes what runs."""
    monkeypatch.setattr(place, "PLACE", tmp_path)
    monkeypatch.setattr(place, "_RUN", tmp_path / "run")
    return tmp_path / "run"


def test_what_was_started_is_found_and_ended(run: Path) -> None:
    """A process is known by its pid and its birth, until it is ended; then nothing of it is left."""
    pid = place.start("sleeper", ["sleep", "60"])
    assert place.running("sleeper") == pid
    place.end("sleeper")
    assert place.running("sleeper") is None
    assert list(run.iterdir()) == []
    place.end("sleeper")  # which is no error


def test_nobody_else_is_ended(run: Path) -> None:
    """A pid that somebody else has by now, as after a restart of the machine, is left alone."""
    run.mkdir()
    with subprocess.Popen(["sleep", "60"]) as somebody:
        (run / "sleeper").write_text(f"{somebody.pid} 1")
        assert place.running("sleeper") is None
        place.end("sleeper")
        assert somebody.poll() is None
        somebody.kill()


def test_every_program_is_in_the_recipe() -> None:
    """Kubernetes' recipe has each program, and each is found by its name; every recipe pins one version."""
    recipe = HERE / "kubernetes"
    found = re.findall(r'^import _ "(.+)"$', (recipe / "tools.go").read_text(), re.MULTILINE)
    assert {package.rpartition("/")[2] for package in found} == set(KUBERNETES)
    assert [golang._package(recipe, name) for name in KUBERNETES] == [f"k8s.io/kubernetes/cmd/{n}" for n in KUBERNETES]
    assert pinned_version(recipe, "k8s.io/kubernetes")
    assert all(pinned_version(HERE / name, module) for name, module in BESIDE.items())


def test_certificates_name_who_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node is `system:node:NAME` of `system:nodes`, as Kubernetes wants; a kubeconfig names files that exist."""
    monkeypatch.setattr(pki, "PKI", tmp_path)
    pki.make_certificates()
    certificate = x509.load_pem_x509_certificate((tmp_path / "node2.crt").read_bytes())
    names = {name.oid: name.value for name in certificate.subject}
    assert names[x509.NameOID.COMMON_NAME] == "system:node:node2"
    assert names[x509.NameOID.ORGANIZATION_NAME] == "system:nodes"
    config = json.loads((tmp_path / "node2.kubeconfig").read_text())
    assert all(Path(file).is_file() for file in config["users"][0]["user"].values())


def test_every_claim_of_the_manifests_has_a_volume() -> None:
    """The nodes have no storage but what is made for a claim by its name."""
    claims = set()
    for file in (HERE.parent.parent / "deploy/kubernetes").rglob("*.yaml"):
        for document in yaml.safe_load_all(file.read_text()):
            if document["kind"] == "StatefulSet":
                name, spec = document["metadata"]["name"], document["spec"]
                for claim in spec.get("volumeClaimTemplates", ()):
                    claims |= {f"{claim['metadata']['name']}-{name}-{number}" for number in range(spec["replicas"])}
    assert claims == set(VOLUMES)
