"""Write the manifests of jobs and service from that of the cluster: run `python jobs/write.py` after a change.

Every manifest is whole, so that `kubectl apply -f jobs/gpc.rayjob.yaml` needs nothing else.
"""

import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
IMAGERY = "--region s3://bucket/catalog/catalog.json#imagery"
COMMANDS = {
    "gpc": f"{IMAGERY} --config /opt/rayseg/configs/gpc/default.yaml "
    "--set chips.source=s3://bucket/labelled/catalog.json#chips",
    "agri": f"{IMAGERY} --config /opt/rayseg/configs/agri/default.yaml",
    "superpixel": f"{IMAGERY} --config /opt/rayseg/configs/superpixel/default.yaml",
    "landcover": f"{IMAGERY} --set classes=deepglobe --set labelled.source=s3://bucket/masked/catalog.json#imagery "
    "--set labelled.masks=s3://bucket/masked/catalog.json#masks",
    "al-s4gan": f"{IMAGERY} --config /opt/rayseg/configs/al-s4gan/default.yaml "
    "--set pool.images=s3://bucket/masked/catalog.json#imagery --set pool.masks=s3://bucket/masked/catalog.json#masks",
}
TRAINED = {"gpc", "agri", "landcover", "al-s4gan"}
"""Pipelines with a training: the head has no GPU, so a worker trains."""
SERVE = """\
http_options:
  request_timeout_s: 360
applications:
  - name: rayseg
    route_prefix: /
    import_path: rayseg.serve.deployment:build
    args:
      models: [s3://bucket/runs]
      runs: [s3://bucket/runs]
      token_file: /etc/rayseg/token
      hosts: [maps.example.org]
      gpus: 0.5
      replicas: 4
      batch: 16
      queue: 64
      api_replicas: 1
"""


def entrypoint(pipeline: str) -> str:
    """The command line, as a user would type it on the head."""
    trained = " --set workers=1" if pipeline in TRAINED else ""
    return (
        f"rayseg run pipeline {pipeline} {COMMANDS[pipeline]}{trained} --out s3://bucket/runs/{pipeline} --address auto"
    )


def job(pipeline: str, cluster: dict[str, Any]) -> dict[str, Any]:
    """A RayJob: it creates a cluster, runs the pipeline and deletes the cluster; a new cluster resumes after a loss."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": pipeline, "namespace": "rayseg"},
        "spec": {
            "entrypoint": entrypoint(pipeline),
            "submissionMode": "K8sJobMode",
            "backoffLimit": 3,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": cluster["spec"],
        },
    }


def service(cluster: dict[str, Any]) -> dict[str, Any]:
    """A RayService: the model server; its token is the Secret rayseg-serve (key token) on every node."""
    # Values that YAML aliases share become several: each group's lists are extended once.
    spec = json.loads(json.dumps(cluster["spec"]))
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        pod["volumes"].append({"name": "token", "secret": {"secretName": "rayseg-serve"}})
        (container,) = pod["containers"]
        container["volumeMounts"].append({"name": "token", "mountPath": "/etc/rayseg", "readOnly": True})
        container["ports"] = [*container.get("ports", []), {"containerPort": 8000, "name": "serve"}]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "rayseg-serve", "namespace": "rayseg"},
        "spec": {"serveConfigV2": SERVE, "rayClusterConfig": spec},
    }


def manifests() -> dict[str, str]:
    """Path below the repository -> the text of the manifest."""
    cluster = yaml.safe_load((ROOT / "cluster/kuberay/raycluster.yaml").read_text())
    texts = {f"jobs/{name}.rayjob.yaml": _text(job(name, cluster)) for name in COMMANDS}
    return texts | {"cluster/kuberay/rayservice.yaml": _text(service(cluster))}


def _text(manifest: dict[str, Any]) -> str:
    return f"# Written by jobs/write.py from cluster/kuberay/raycluster.yaml.\n{_dumped(manifest)}"


def _dumped(manifest: dict[str, Any]) -> str:
    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            """Write values instead of aliases: people read the manifests too."""
            return True

        def represent_text(self, text: str) -> yaml.Node:
            return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Plain.add_representer(str, Plain.represent_text)
    written: str = yaml.dump(manifest, Dumper=Plain, sort_keys=False, width=1000)
    return written


if __name__ == "__main__":
    for path, text in manifests().items():
        (ROOT / path).write_text(text)
