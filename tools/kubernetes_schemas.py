"""Kubernetes' own schemas of the kinds that the manifests use: `python -m tools.kubernetes_schemas SWAGGER`.

SWAGGER is `api/openapi-spec/swagger.json` of Kubernetes' repository or Go module, or an API server's `/openapi/v2`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tools.services import ROOT

__all__ = ["SCHEMAS"]

SCHEMAS = ROOT / "deploy/kubernetes/schemas.json"
_KINDS = {
    "io.k8s.api.apps.v1": ("DaemonSet", "Deployment", "StatefulSet"),
    "io.k8s.api.batch.v1": ("Job",),
    "io.k8s.api.core.v1": ("ConfigMap", "Namespace", "Secret", "Service", "ServiceAccount"),
    "io.k8s.api.networking.v1": ("Ingress", "NetworkPolicy"),
    "io.k8s.api.policy.v1": ("PodDisruptionBudget",),
    "io.k8s.api.rbac.v1": ("Role", "RoleBinding"),
}
_PREFIX = "#/definitions/"


def reduce(swagger: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema that takes one object of one of these kinds, and no field that Kubernetes does not know."""
    all_definitions = swagger["definitions"]
    wanted = [f"{group}.{kind}" for group, kinds in _KINDS.items() for kind in kinds]
    found: dict[str, Any] = {}
    left = list(wanted)
    while left:
        name = left.pop()
        if name not in found:
            found[name] = _strict(all_definitions[name], left)
    kinds = {}
    for name in wanted:
        [known] = all_definitions[name]["x-kubernetes-group-version-kind"]
        version = "/".join(filter(None, (known["group"], known["version"])))
        kinds[f"{version} {known['kind']}"] = {"$ref": f"{_PREFIX}{name}"}
    return {"version": swagger["info"]["version"], "kinds": kinds, "definitions": found}


def _strict(schema: Any, references: list[str]) -> Any:
    if isinstance(schema, list):
        return [_strict(each, references) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        references.append(schema["$ref"].removeprefix(_PREFIX))
    if schema.get("format") == "int-or-string":
        return {"type": ["string", "integer"]}
    kept = {key: value for key, value in schema.items() if key in {"$ref", "type", "items", "required", "enum"}}
    kept = {key: _strict(value, references) for key, value in kept.items()}
    if "properties" in schema:
        kept["properties"] = {name: _strict(each, references) for name, each in schema["properties"].items()}
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = _strict(schema["additionalProperties"], references)
    return kept


if __name__ == "__main__":
    SCHEMAS.write_text(json.dumps(reduce(json.loads(Path(sys.argv[1]).read_text())), sort_keys=True, indent=0) + "\n")
