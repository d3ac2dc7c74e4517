"""The workflows of .github: of GitHub's form, with the commands of README.md, and with no more rights than needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RELEASED = "startsWith(github.ref, 'refs/tags/v')"


def workflow(name: str) -> dict[str, Any]:
    # YAML 1.1 reads `on` as true.
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def steps(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in content["jobs"].values():
        yield from job["steps"]


def errors(content: Any) -> list[str]:
    """What a schema has to say against a workflow."""
    vendored = pytest.importorskip("check_jsonschema.builtin_schemas")
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((files(vendored) / "vendor" / "github-workflows.json").read_text())
    as_read = json.loads(json.dumps({("on" if key is True else key): value for key, value in content.items()}))
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [error.message for error in validator.iter_errors(as_read)]


def test_there_are_three() -> None:
    assert [path.stem for path in WORKFLOWS] == ["site", "tests", "wheels"]


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_workflows_have_githubs_form(name: str) -> None:
    assert errors(workflow(name)) == []
    spoilt = workflow(name)
    next(steps(spoilt))["use"] = "actions/checkout@v4"
    assert errors(spoilt)


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_workflows_may_do_no_more_than_they_need(name: str) -> None:
    content = workflow(name)
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert job["timeout-minutes"] <= 350
        assert job["runs-on"] != "ubuntu-latest"
        if "permissions" in job:  # what publishes does so for a tag only
            assert job["if"] == RELEASED
            assert set(job["permissions"]) <= {"id-token", "pages"}
    for step in steps(content):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+)*", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    assert "secrets." not in (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()


def command_of_readme() -> list[str]:
    part = (ROOT / "README.md").read_text().partition("\n## Test\n")[2]
    return part.partition("```bash\n")[2].partition("```")[0].split()


def test_the_test_command_is_that_of_the_readme() -> None:
    jobs = workflow("tests")["jobs"]
    assert jobs["quick"]["steps"][-1]["run"].split() == command_of_readme()
    assert jobs["all"]["steps"][-1]["run"] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_a_wheel_per_target_is_built_and_tried_before_it_is_published() -> None:
    jobs = workflow("wheels")["jobs"]
    targets = re.search(r"TARGETS = \((.*)\)", (ROOT / "setup.py").read_text())
    assert targets is not None
    for target in re.findall(r'"(\w+)"', targets[1]):
        assert {"run": f"TRUSTRATIO_TARGET={target} python -m build"} in jobs["build"]["steps"]
    assert len(jobs["try"]["strategy"]["matrix"]["machine"]) == 2
    assert (jobs["try"]["needs"], jobs["publish"]["needs"]) == ("build", "try")
    assert jobs["publish"]["if"] == RELEASED


def test_extras_that_are_installed_exist() -> None:
    promised = (ROOT / "pyproject.toml").read_text()
    for name in ("tests", "wheels"):
        for step in steps(workflow(name)):
            for extra in re.findall(r"\[(\w+)\]", step.get("run", "")):
                assert re.search(rf"^{extra} = \[", promised, re.MULTILINE), extra
