"""The Kubernetes files of recipes/launch: known fields of the right types, and what has to agree in them.

The schema has as much of both kinds as the files use, and nothing else: a misspelt field is unknown. In full, the files
were held once against the definitions of training-operator 1.9 and of jobset's v1alpha2, unknown fields refused.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from trustratio.recipes.common.errors import BAD_INPUT
from trustratio.recipes.configuration.command_line import AUTO, parse_command_line

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "recipes" / "launch"

TEXT, WHOLE, TRUTH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
QUANTITY = {"anyOf": [WHOLE, {"type": "string", "pattern": r"^\d+(m|Ki|Mi|Gi|Ti)?$"}]}


def fields(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def some(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


def texts(values: Any = TEXT) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


CONTAINER = fields(
    "name image command args resources volumeMounts",
    name=TEXT,
    image=TEXT,
    workingDir=TEXT,
    command=some(TEXT),
    args=some(TEXT),
    env=some(fields("name value", name=TEXT, value=TEXT)),  # numbers have to be quoted
    resources=fields("limits", limits=texts(QUANTITY)),
    volumeMounts=some(fields("name mountPath", name=TEXT, mountPath={"type": "string", "pattern": "^/"})),
)
VOLUME = fields(
    "name",
    name=TEXT,
    persistentVolumeClaim=fields("claimName", claimName=TEXT),
    emptyDir=fields("medium sizeLimit", medium={"const": "Memory"}, sizeLimit=QUANTITY),
)
POD = fields(
    "spec",
    metadata=fields(annotations=texts()),
    spec=fields(
        "containers volumes terminationGracePeriodSeconds",
        restartPolicy={"enum": ["Never", "OnFailure", "Always"]},
        terminationGracePeriodSeconds=WHOLE,
        containers=some(CONTAINER),
        volumes=some(VOLUME),
    ),
)
REPLICA = fields(
    "replicas restartPolicy template",
    replicas=WHOLE,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template=POD,
)
PYTORCHJOB = fields(
    "pytorchReplicaSpecs",
    nprocPerNode=TEXT,
    runPolicy=fields(cleanPodPolicy={"enum": ["None", "Running", "All"]}, backoffLimit=WHOLE),
    pytorchReplicaSpecs=fields("Master", Master=REPLICA, Worker=REPLICA),
)
EXIT_CODES = fields(
    "operator values", containerName=TEXT, operator={"enum": ["In", "NotIn"]}, values=some({"type": "integer"})
)
POD_RULE = fields("action onExitCodes", action={"enum": ["FailJob", "Ignore", "Count"]}, onExitCodes=EXIT_CODES)
JOB = fields(
    "template",
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    completions=WHOLE,
    parallelism=WHOLE,
    backoffLimit=WHOLE,
    podFailurePolicy=fields("rules", rules=some(POD_RULE)),
    template=POD,
)
SET_RULE = fields(
    "name action",
    name=TEXT,
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=some({"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]}),
)
JOBSET = fields(
    "replicatedJobs",
    network=fields(enableDNSHostnames=TRUTH),
    failurePolicy=fields(maxRestarts=WHOLE, rules=some(SET_RULE)),
    replicatedJobs=some(fields("name template", name=TEXT, replicas=WHOLE, template=fields("spec", spec=JOB))),
)


def document(version: str, kind: str, spec: Any) -> dict[str, Any]:
    return fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=fields("name", name=TEXT),
        spec=spec,
    )


SCHEMAS = {
    "pytorchjob": document("kubeflow.org/v1", "PyTorchJob", PYTORCHJOB),
    "jobset": document("jobset.x-k8s.io/v1alpha2", "JobSet", JOBSET),
}


def load(name: str) -> Any:
    return yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())


def flaws(name: str, content: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(SCHEMAS[name]).iter_errors(content)]


def pods(name: str) -> list[Any]:
    spec = load(name)["spec"]
    if name == "jobset":
        return [spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]]
    return [replica["template"]["spec"] for replica in spec["pytorchReplicaSpecs"].values()]


names = pytest.mark.parametrize("name", SCHEMAS)


@names
def test_the_fields_are_known_and_of_the_right_types(name):
    assert flaws(name, load(name)) == []


@names
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('"terminationGracePeriodSeconds": 300', '"terminationGracePeriodSecond": 300'),
        ('"terminationGracePeriodSeconds": 300', '"terminationGracePeriodSeconds": "5m"'),
        ('"mountPath": "/dev/shm"', '"mountPath": "dev/shm"'),
        ('"volumeMounts"', '"volumeMount"'),
        ('"value": "8"', '"value": 8'),
        ('"backoffLimit"', '"backOffLimit"'),
        ('"medium": "Memory"', '"medium": "memory"'),
        ('"apiVersion": "', '"apiVersion": "v1/'),
    ],
)
def test_a_field_that_is_wrong_is_seen(name, right, wrong):
    text = json.dumps(copy.deepcopy(load(name)))
    assert right in text
    assert flaws(name, json.loads(text.replace(right, wrong)))


@names
def test_a_pod_can_be_stopped_and_goes_on(name):
    for pod in pods(name):
        container = pod["containers"][0]
        assert container["command"][:2] == ["bash", "recipes/launch/node.sh"]
        assert (ROOT / container["command"][1]).exists()
        assert pod["terminationGracePeriodSeconds"] >= 120
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts.keys() == volumes.keys()
        assert mounts["shm"] == "/dev/shm"
        assert "persistentVolumeClaim" in volumes["runs"]
        output = recipe_line(container)[recipe_line(container).index("--output") + 1]
        assert output.startswith(mounts["runs"] + "/")


def recipe_line(container: Any) -> list[str]:
    words = [*container["command"], *container["args"]]
    line = words[words.index("recipes/bert.py") + 1 :]
    return [part for word in line for part in word.split("=", 1)]


@names
def test_the_recipe_takes_the_line_and_goes_on_where_it_was(name):
    line = recipe_line(pods(name)[0]["containers"][0])
    at = line.index("--resume")
    assert line[at : at + 2] == ["--resume", AUTO]
    parsed = parse_command_line([*line[:at], *line[at + 2 :]])
    assert parsed.config.preset == "lamb-64k-32k"


def test_numbers_of_ranks_and_pods_agree():
    spec = load("pytorchjob")["spec"]
    for pod in pods("pytorchjob"):
        assert pod["containers"][0]["name"] == "pytorch"
        assert str(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) == spec["nprocPerNode"]
    content = load("jobset")
    jobs = content["spec"]["replicatedJobs"][0]
    job, (pod,) = jobs["template"]["spec"], pods("jobset")
    environment = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert environment["NODES"] == str(job["completions"]) == str(job["parallelism"])
    assert environment["RANKS"] == str(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    name = content["metadata"]["name"]
    assert f"--master_addr={name}-{jobs['name']}-0-0.{name}" in pod["containers"][0]["args"]
    rule = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert rule["values"] == [BAD_INPUT]
    assert rule["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy takes no other
