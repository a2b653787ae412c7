"""The manifests against the fields of KubeRay v1.7, Kubernetes and the cluster launcher."""

import importlib
import json
import shlex
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml
from typer.testing import CliRunner

from rayseg import config
from rayseg.cli import app
from rayseg.pipelines import PIPELINES, pipeline_of
from rayseg.serve.settings import ServeConfig

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.rayjob.yaml"))
KUBERAY = sorted((ROOT / "cluster/kuberay").glob("*.yaml"))
ANY = object()

# The fields of ray.io/v1 (KubeRay v1.7) and of Kubernetes that the manifests rely on; a dict's "*" is any key.
PROBE = {
    "httpGet": {"path": str, "port": int},
    "initialDelaySeconds": int,
    "periodSeconds": int,
    "timeoutSeconds": int,
    "failureThreshold": int,
}
LOCKED = {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}}
RESOURCES = {"requests": {"*": str}, "limits": {"*": str}}
CONTAINER = {
    "name": str,
    "image": str,
    "ports": [{"containerPort": int, "name": str}],
    "resources": RESOURCES,
    "securityContext": LOCKED,
    "livenessProbe": PROBE,
    "readinessProbe": PROBE,
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}
POD = {
    "serviceAccountName": str,
    "priorityClassName": str,
    "securityContext": {
        "runAsNonRoot": bool,
        "runAsUser": int,
        "runAsGroup": int,
        "fsGroup": int,
        "seccompProfile": {"type": str},
    },
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {"*": str},
    "tolerations": [{"key": str, "operator": str, "effect": str}],
    "containers": [CONTAINER],
    "volumes": [{"name": str, "emptyDir": {"sizeLimit": str}, "secret": {"secretName": str}}],
}
TEMPLATE = {"spec": POD}
HEAD_GROUP = {"serviceType": str, "rayStartParams": {"*": str}, "template": TEMPLATE}
WORKER_GROUP = {
    "groupName": str,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": {"*": str},
    "template": TEMPLATE,
}
CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": ("disabled", "token")},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "upscalingMode": ("Default", "Aggressive", "Conservative"),
        "idleTimeoutSeconds": int,
        "resources": RESOURCES,
        "securityContext": LOCKED,
    },
    "headGroupSpec": HEAD_GROUP,
    "workerGroupSpecs": [WORKER_GROUP],
}
JOB = {
    "entrypoint": str,
    "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": CLUSTER,
}
SERVICE = {"serveConfigV2": str, "rayClusterConfig": CLUSTER}
PEERS = [
    {
        "podSelector": {"matchLabels": {"*": str}},
        "namespaceSelector": {"matchLabels": {"*": str}},
        "ipBlock": {"cidr": str, "except": [str]},
    }
]
PORTS = [{"port": int, "protocol": ("TCP", "UDP")}]
POLICY = {
    "podSelector": {"matchLabels": {"*": str}},
    "policyTypes": [("Ingress", "Egress")],
    "ingress": [{"from": PEERS, "ports": PORTS}],
    "egress": [{"to": PEERS, "ports": PORTS}],
}
KINDS = {
    ("ray.io/v1", "RayCluster"): CLUSTER,
    ("ray.io/v1", "RayJob"): JOB,
    ("ray.io/v1", "RayService"): SERVICE,
    ("networking.k8s.io/v1", "NetworkPolicy"): POLICY,
    ("v1", "Namespace"): None,
    ("v1", "ServiceAccount"): None,
    ("scheduling.k8s.io/v1", "PriorityClass"): None,
}
REQUIRED = {
    "headGroupSpec": {"template"},
    "workerGroupSpecs": {"groupName", "template", "minReplicas", "maxReplicas"},
    "template": {"spec"},
    "containers": {"name", "image"},
    "volumeMounts": {"name", "mountPath"},
    "volumes": {"name"},
    "ports": {"containerPort"},
    "seccompProfile": {"type"},
    "secret": {"secretName"},
    "httpGet": {"port"},
}
"""Field -> what it, or each of its entries, has to have."""
NEEDED = {"RayCluster": {"headGroupSpec"}, "RayJob": {"entrypoint", "rayClusterSpec"}, "RayService": {"serveConfigV2"}}


def wrong(value, known, path):
    """Messages about the parts of a value that the fields do not allow, each with its path."""
    if isinstance(known, dict):
        if not isinstance(value, dict):
            return [f"{path} is not an object"]
        found = [f"{path}.{key} is unknown" for key in value if key not in known and "*" not in known]
        allowed = {key: known.get(key, known.get("*")) for key in value if key in known or "*" in known}
        return found + [line for key, kind in allowed.items() for line in wrong(value[key], kind, f"{path}.{key}")]
    if isinstance(known, list):
        if not isinstance(value, list):
            return [f"{path} is not a list"]
        return [line for at, one in enumerate(value) for line in wrong(one, known[0], f"{path}[{at}]")]
    if isinstance(known, tuple):
        return [] if value in known else [f"{path} = {value!r} is not one of {known}"]
    return [] if type(value) is known else [f"{path} = {value!r} is not {known.__name__}"]


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def clusters():
    for path in [*JOBS, *KUBERAY]:
        for document in documents(path):
            spec = document.get("spec", {})
            found = {"RayCluster": spec, **{k: spec.get(v) for k, v in CLUSTERS.items()}}.get(document["kind"])
            if found:
                yield path.name, found


CLUSTERS = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}


LIST_KEYS = {
    **dict.fromkeys(("containers", "initContainers", "volumes", "env"), "name"),
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "workerGroupSpecs": "groupName",
}
"""Lists that the API server keys by a field, and refuses if two entries have the same."""


def doubled(value, path=""):
    """Paths of lists in which two entries have the same key."""
    if isinstance(value, list):
        return [found for at, one in enumerate(value) for found in doubled(one, f"{path}[{at}]")]
    if not isinstance(value, dict):
        return []
    # The ports of a NetworkPolicy have no such key.
    found = {name: [one.get(LIST_KEYS[name]) for one in value[name]] for name in LIST_KEYS.keys() & value.keys()}
    here = [f"{path}.{name}: {keys}" for name, keys in found.items() if None not in keys and len(set(keys)) < len(keys)]
    return here + [line for name, inner in value.items() for line in doubled(inner, f"{path}.{name}")]


def lacking(value, path=""):
    """Paths of required fields that are not there."""
    if isinstance(value, list):
        return [found for at, one in enumerate(value) for found in lacking(one, f"{path}[{at}]")]
    if not isinstance(value, dict):
        return []
    found = []
    for name, inner in value.items():
        found += lacking(inner, f"{path}.{name}")
        for one in inner if isinstance(inner, list) else [inner]:
            found += (
                [f"{path}.{name}.{key}" for key in sorted(REQUIRED.get(name, set()) - one.keys())]
                if isinstance(one, dict)
                else []
            )
    return found


@pytest.mark.parametrize("path", [*JOBS, *KUBERAY], ids=lambda path: path.name)
def test_all_required_fields_are_there(path):
    # The ports of a NetworkPolicy are others.
    assert not [line for d in documents(path) if d["kind"] != "NetworkPolicy" for line in lacking(d)]


def test_the_check_of_required_fields_finds_what_is_missing():
    group = {"groupName": "a", "minReplicas": 0, "template": {"spec": {"containers": [{"name": "x"}]}}}
    assert lacking({"workerGroupSpecs": [group]}) == [
        ".workerGroupSpecs[0].template.spec.containers.image",
        ".workerGroupSpecs.maxReplicas",
    ]


@pytest.mark.parametrize("path", [*JOBS, *KUBERAY], ids=lambda path: path.name)
def test_no_list_has_two_entries_of_one_key(path):
    assert not [line for document in documents(path) for line in doubled(document)]


@pytest.mark.parametrize("path", [*JOBS, *KUBERAY], ids=lambda path: path.name)
def test_manifests_use_the_fields_that_kuberay_and_kubernetes_know(path):
    assert documents(path)
    for document in documents(path):
        plain = {"value", "globalDefault", "description"} if document["kind"] == "PriorityClass" else {"spec"}
        assert document.keys() <= {"apiVersion", "kind", "metadata"} | plain
        known = KINDS[document["apiVersion"], document["kind"]]
        assert NEEDED.get(document["kind"], set()) <= document.get("spec", {}).keys()
        assert known is None or wrong(document["spec"], known, document["kind"]) == []


def test_the_check_of_fields_finds_what_is_wrong():
    assert wrong({"entrypont": "x"}, JOB, "RayJob") == ["RayJob.entrypont is unknown"]
    assert wrong({"backoffLimit": "3"}, JOB, "RayJob") == ["RayJob.backoffLimit = '3' is not int"]
    assert wrong({"submissionMode": "Http"}, JOB, "RayJob") != []
    group = {"groupName": "gpu", "template": {"spec": {"containers": [{"resources": {"limits": {"cpu": 8}}}]}}}
    assert wrong({"workerGroupSpecs": [group]}, CLUSTER, "c") == [
        "c.workerGroupSpecs[0].template.spec.containers[0].resources.limits.cpu = 8 is not str"
    ]


def test_written_manifests_are_those_that_the_script_writes():
    spec = importlib.util.spec_from_file_location("write", ROOT / "jobs/write.py")
    write = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write)
    for path, text in write.manifests().items():
        assert (ROOT / path).read_text() == text, f"{path}: run python jobs/write.py"
    assert {path.name.split(".")[0] for path in JOBS} == set(write.COMMANDS) == set(PIPELINES)
    assert {path.stem for path in KUBERAY} == {"namespace", "raycluster", "rayservice"}
    assert len(list(clusters())) == len(JOBS) + 2


@pytest.mark.parametrize(("name", "spec"), list(clusters()), ids=lambda value: value if isinstance(value, str) else "")
def test_clusters_are_closed_and_nothing_in_them_is_root(name, spec):
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["rayVersion"] in (ROOT / "constraints.txt").read_text()
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu", "gpu-spot"}
    assert all(group["minReplicas"] < group["maxReplicas"] for group in groups.values())
    assert groups["gpu-spot"]["template"]["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    for group in [spec["headGroupSpec"], *groups.values()]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"livenessProbe", "readinessProbe"} <= container.keys()
        sizes = [container["resources"]["limits"].get("nvidia.com/gpu") for container in pod["containers"]]
        assert sizes == (["1"] if group.get("groupName", "").startswith("gpu") else [None])


SIZES = {"head": (4, 16), "cpu": (8, 32), "gpu": (8, 32), "gpu-spot": (8, 32)}
"""CPUs and GiB of the machine that a pod of a group is meant for."""


@pytest.mark.parametrize(("name", "spec"), list(clusters()), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_fit_on_the_machines_they_are_meant_for(name, spec):
    """An emptyDir counts as ephemeral storage; half a CPU and half a GiB are left to the pods of the platform."""
    known = {d["metadata"]["name"] for p in KUBERAY for d in documents(p) if d["kind"] == "PriorityClass"}
    assert spec["headGroupSpec"]["template"]["spec"]["priorityClassName"] in known
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        cpus, memory = SIZES[group.get("groupName", "head")]
        pod = group["template"]["spec"]
        autoscaler = spec["autoscalerOptions"]["resources"]["requests"] if "groupName" not in group else {}
        wanted = pod["containers"][0]["resources"]["requests"]
        sidecar = float(autoscaler.get("cpu", "0m").removesuffix("m")) / 1000, gib(autoscaler.get("memory", "0Gi"))
        assert float(wanted["cpu"]) + sidecar[0] <= cpus - 0.5
        assert gib(wanted["memory"]) + sidecar[1] <= memory - kept(memory) - 0.5
        emptied = sum(gib(volume["emptyDir"]["sizeLimit"]) for volume in pod["volumes"] if "emptyDir" in volume)
        assert gib(wanted["ephemeral-storage"]) > emptied > 0


def kept(memory):
    """GiB that GKE keeps of a machine, which is more than EKS does: a share of each part of the memory."""
    parts = ((0, 4, 0.25), (4, 8, 0.2), (8, 16, 0.1), (16, 128, 0.06))
    return 0.1 + sum(share * max(0, min(memory, end) - start) for start, end, share in parts)


def gib(text):
    return float(text.removesuffix("Gi"))


def test_only_rays_own_pods_the_operator_and_submitters_reach_the_dashboard():
    policies = {d["metadata"]["name"]: d["spec"] for p in KUBERAY for d in documents(p) if d["kind"] == "NetworkPolicy"}
    peers = [
        (set(peer), port["port"])
        for spec in policies.values()
        for rule in spec["ingress"]
        for peer in rule["from"]
        for port in rule.get("ports", [{"port": 0}])
    ]
    assert ({"ipBlock"}, 8265) not in peers
    assert {port for kinds, port in peers if "namespaceSelector" in kinds} == {8265, 8000, 52365}
    rules = [rule for spec in policies.values() for rule in spec["ingress"]]
    assert rules
    assert all("from" in rule for rule in rules)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_entrypoints_are_lines_that_the_command_line_takes(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (job,) = documents(path)
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["rayseg", "run", "pipeline"]
    assert words[3] in PIPELINES
    given = options_of(words[1:])
    assert given["address"] == "auto"
    assert given["out"].startswith("s3://")
    assert words[3] == path.name.split(".")[0]
    file = (given["config"] or "").replace("/opt/rayseg", str(ROOT))
    options = [*(["--config", file] if file else []), *(f"--set={text}" for text in given["set_"])]
    checked = CliRunner().invoke(app, ["config", "validate", words[3], *options])
    assert (checked.exit_code, checked.stdout) == (0, "valid\n"), checked.output
    # A word that is read as a path would be a path below the working folder.
    assert str(tmp_path) not in config.load(pipeline_of(words[3]).Config, file or None, given["set_"]).model_dump_json()
    assert ("--set workers=1" in job["spec"]["entrypoint"]) == ("workers" in pipeline_of(words[3]).Config.model_fields)


PLACES = {
    "s3://bucket/masked/catalog.json#masks": "{demo}#truth/landcover",
    "s3://bucket/masked/catalog.json": "{demo}",
    "s3://bucket/catalog/catalog.json": "{demo}",
    "s3://bucket/labelled/catalog.json": "{demo}",
    "/opt/rayseg": str(ROOT),
}
"""What the entrypoints name -> what there is of it here."""
ITS_OWN = {
    "agri": ["sam.checkpoint=random"],
    "landcover": ["labelled.absent=[unknown]"],
    "al-s4gan": [
        "pool.absent=[unknown]",
        "pool.size=128",
        "segmenter.size=128",
        "active.classifier.size=128",
        "active.ratio=.5",
    ],
}
"""The demo has six of the seven classes, two images and no weights of Segment Anything."""


class Checked(Exception):
    """A plan whose check has passed."""


@pytest.mark.more
@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_entrypoints_pass_the_check_of_a_plan_and_of_a_run(path, demo_region, monkeypatch):
    """On a catalogue as their buckets have it; weights are on the web, and what a plan tries would take minutes."""
    (job,) = documents(path)
    line = job["spec"]["entrypoint"]
    for place, here in PLACES.items():
        line = line.replace(place, here.format(demo=demo_region))
    words = shlex.split(line)[3:]
    at = words.index("--out")
    assert words[at + 2 :] == ["--address", "auto"]
    module = pipeline_of(words[0])

    def forecast(*_):
        raise Checked

    monkeypatch.setattr(module, "forecast", forecast)
    monkeypatch.setattr("rayseg.steps.models.expect_weights", lambda *_, **__: None)
    more = [word for text in ITS_OWN.get(words[0], []) for word in ("--set", text)]
    found = CliRunner().invoke(app, ["plan", "pipeline", *words[:at], *more])
    assert isinstance(found.exception, Checked), found.output


def options_of(words):
    """The parameters that the command line reads; unknown options raise."""
    command = typer.main.get_command(app)
    context = typer.Context(command)
    for word in ("run", "pipeline"):
        command = command.get_command(context, word)
        context = typer.Context(command, parent=context, info_name=word)
    return command.make_context("pipeline", words[2:]).params


def test_the_cluster_launcher_takes_its_file():
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    asked = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())
    jsonschema.validate(asked, schema)
    assert asked["head_node_type"] in asked["available_node_types"]
    assert asked["available_node_types"]["head"]["resources"]["CPU"] == 0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(asked | {"min_workers": 1}, schema)


def test_the_service_serves_what_the_serve_file_names():
    (service,) = documents(ROOT / "cluster/kuberay/rayservice.yaml")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (served,) = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())["applications"]
    for args in (application["args"], served["args"]):
        assert ServeConfig.model_validate(args).models == ("s3://bucket/runs",)
    assert application["import_path"] == served["import_path"]
    module, name = served["import_path"].split(":")
    assert hasattr(importlib.import_module(module), name)


def test_the_image_is_pinned_not_root_and_has_what_jobs_name():
    lines = (ROOT / "cluster/Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 10001"]
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == sum("--constraint constraints.txt" in line for line in installs) == 2
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert copied >= {"constraints.txt", "pyproject.toml", "rayseg", "configs", "stac"}
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {f"!{name}" for name in copied} <= set(ignored)
