"""The audit: what is exact passes under every configuration, and every check has an optimizer that fails it."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trustratio.integrations.audits.errors import CannotAudit
from trustratio.integrations.audits.examination import examine
from trustratio.integrations.audits.printing import described
from trustratio.integrations.audits.ranks import Ranks
from trustratio.integrations.audits.reading import configuration_of
from trustratio.integrations.audits.subject import Subject
from trustratio.integrations.audits.verdict import EXACT, REFUSED, WRONG, Report
from trustratio.optimizers import OPTIMIZERS

from . import audited
from .accelerate_runs import unbuilt_cpu_adam
from .cases import NaiveLAMB
from .pool import WorkerPool


def zero(stage: int, **others: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, **others}


BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
CONFIGURATIONS: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp1": {"fsdp": 1},
    "fsdp2": {"fsdp": 2},
    "zero 0": zero(0),
    "zero 0, bf16": zero(0, **BF16),
    "zero 1": zero(1),
    "zero 2, accumulation, no clipping": zero(2, gradient_accumulation_steps=3, gradient_clipping=0.0),
    "zero 3": zero(3, gradient_clipping=0.5),
    "zero 1, bf16": zero(1, **BF16),
    "zero 1, bf16, accumulation": zero(1, **BF16, gradient_accumulation_steps=16),
    "zero 1, BF16_Optimizer": zero(1, **BF16, data_types={"grad_accum_dtype": "fp32"}),
    "zero 2, fp16": zero(2, fp16={"enabled": True}),
    "zero 3, bf16": zero(3, **BF16),
    "offload": {"zero_optimization": OFFLOAD, "zero_force_ds_cpu_optimizer": False},
}
UNDER_FSDP1 = [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is None]
"""FSDP1 makes no gradients of single micro-batches."""


def audit(pool: WorkerPool, optimizer: Any, configuration: Any, model: Any = None, **options: Any) -> Report:
    return examine(Subject(optimizer, model, options), configuration_of(copy.deepcopy(configuration)), pool)


def kinds(report: Report) -> set[str]:
    return {found.kind for found in report.findings if found.is_wrong}


@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "lamb"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_is_exact_passes(pool: WorkerPool, configuration: str, optimizer: str, world_size: int) -> None:
    report = audit(pool, optimizer, CONFIGURATIONS[configuration], lr=0.02, weight_decay=0.1)
    assert report.verdict == EXACT, report.sentence
    assert report.worst is not None
    assert report.worst.error <= 2e-6
    sharded = not configuration.startswith(("ddp", "zero 0"))
    assert report.collectives == (1 if optimizer == "lamb" and sharded else 0)
    copies = 1 if sharded else world_size
    assert report.state_bytes_per_parameter == pytest.approx(8 * copies, rel=0.02)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("configuration", ["ddp", "fsdp1", "fsdp2", "zero 1", "zero 3"])
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.slow
def test_all_of_ours_are_exact(pool: WorkerPool, configuration: str, optimizer: str, world_size: int) -> None:
    options = {"keep": 2} if optimizer == "adashift" else {}  # which else begins after as many steps as it keeps
    lr = max(1e-3, OPTIMIZERS[optimizer].starting_rate)
    report = audit(pool, optimizer, CONFIGURATIONS[configuration], lr=lr, **options)
    refused = configuration == "fsdp1" and optimizer not in UNDER_FSDP1
    assert report.verdict == (REFUSED if refused else EXACT), report.sentence


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_norms_of_local_tensors_are_caught(pool: WorkerPool, stage: int, world_size: int) -> None:
    report = audit(pool, NaiveLAMB, zero(stage), lr=0.05)
    assert report.verdict == WRONG
    wrong = [layer for layer in report.layers if not layer.is_exact]
    assert len(wrong) == sum(layer.has_gradient for layer in report.layers)
    assert report.worst is not None
    assert report.worst.error > 1
    assert max(layer.factor for layer in wrong) > 5
    assert "padding read" in kinds(report)


@pytest.mark.parametrize("world_size", [2])
def test_whole_tensors_make_the_same_optimizer_exact(pool: WorkerPool, world_size: int) -> None:
    assert audit(pool, NaiveLAMB, "ddp", lr=0.05).verdict == EXACT


@pytest.mark.parametrize(
    ("optimizer", "configuration", "found"),
    [
        (audited.ReadsPadding, zero(1), ("padding read",)),
        (audited.ReadsPadding, zero(3), ("padding read",)),
        (audited.ReadsLargePadding, zero(1), ("padding read",)),
        (audited.ReadsLargePadding, zero(3), ("padding read",)),
        (audited.MovesRowsWithGradient, zero(1), ("decay added",)),
        (audited.MovesTensorsWithGradient, zero(1), ()),
        (audited.DecaysMatrices, zero(2), ("decay lost",)),
        (audited.DecaysVectors, zero(1), ("decay added",)),
        (audited.StepsMatrices, zero(1), ("never moved", "decay lost")),
        (audited.BreaksOnLarge, zero(1), ("not finite",)),
        (audited.StepsOnTheFirstRank, "ddp", ("ranks differ",)),
        (audited.StepsOnTheFirstRank, zero(0), ("ranks differ",)),
        (audited.LoadsOnTheFirstRank, "ddp", ("ranks differ",)),
        (audited.ForgetsMomentum, zero(1), ("checkpoint loses state",)),
        (audited.ForgetsMomentum, "ddp", ("checkpoint loses state",)),
        (audited.ForgetsMomentum, {"fsdp": 2}, ("checkpoint loses state",)),
        (audited.SetsUpInItsFirstStep, "ddp", ("checkpoint loses state",)),
        (audited.SetsUpInItsFirstStep, {"fsdp": 1}, ("checkpoint loses state",)),
        (audited.SetsUpInItsFirstStep, zero(1), ("checkpoint loses state",)),
        (audited.SetsUpInItsFirstStep, zero(3, **BF16), ("checkpoint loses state",)),
        (audited.CannotSave, zero(1), ("checkpoint fails",)),
        (audited.CannotLoad, zero(1), ("checkpoint fails",)),
        (audited.CannotLoad, {"fsdp": 2}, ("checkpoint fails",)),
        (audited.matrices_alone, zero(3), ("checkpoint leaves out",)),
        (audited.EstimatesTheModel, zero(1), ("groups differ",)),
        (audited.EstimatesTheModel, zero(3), ("groups differ",)),
        (audited.ChangesOptions, "ddp", ("checkpoint changes options", "checkpoint loses state")),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("world_size", [2])
def test_every_check_has_an_optimizer_that_fails_it(
    pool: WorkerPool, optimizer: Any, configuration: Any, found: tuple[str, ...], world_size: int
) -> None:
    report = audit(pool, optimizer, configuration)
    assert report.verdict == WRONG
    assert kinds(report) == set(found)
    assert all(one.text in report.sentence for one in report.findings if one.is_wrong)


def without_norms(model: torch.nn.Module) -> torch.optim.Optimizer:
    named = model.named_parameters()
    return torch.optim.AdamW([p for name, p in named if "norm" not in name and name != "decoder.bias"], lr=0.01)


@pytest.mark.parametrize(
    ("optimizer", "configuration", "words"),
    [
        ("torch.optim.Adagrad", zero(3), "DeepSpeed says, whose ZeRO-3 does not load again what it has made anew"),
        (without_norms, {"fsdp": 1}, "torch's FSDP1 says, where the optimizer was not given all layers"),
        (audited.MakesStateEarly, zero(1), "ZeRO steps other parameters than those that it made state for"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_whose_fault_a_checkpoint_is(
    pool: WorkerPool, optimizer: Any, configuration: Any, words: str, world_size: int
) -> None:
    report = audit(pool, optimizer, configuration)
    assert "checkpoint fails" in kinds(report)
    assert words in report.sentence


@pytest.mark.parametrize(
    ("section", "scale"), [({"loss_scale": 2**30}, "1.07374e.09"), ({"initial_scale_power": 60}, "1.15292e.18")]
)
@pytest.mark.parametrize("world_size", [2])
def test_loss_scales_that_are_too_large(pool: WorkerPool, section: dict[str, Any], scale: str, world_size: int) -> None:
    report = audit(pool, audited.adamw, zero(1, fp16={"enabled": True, **section}), audited.two_layers)
    assert report.verdict == REFUSED
    assert re.search(rf"in fp16, which began with a loss scale of {scale}: lower fp16.loss_scale", report.sentence)


@pytest.mark.parametrize("configuration", [{"fsdp": 2}, zero(0, **BF16)], ids=str)
@pytest.mark.parametrize("world_size", [2])
def test_a_wrapper_that_steps_before_it_loads(pool: WorkerPool, configuration: Any, world_size: int) -> None:
    """As a resumed run has it: what is set up in the first step is not lost."""
    report = audit(pool, audited.SetsUpInItsFirstStep, configuration)
    assert report.verdict == EXACT, report.sentence


@pytest.mark.parametrize("optimizer", ["clars", "vrlamb"])
@pytest.mark.parametrize("world_size", [2])
def test_gradient_statistics_before_the_first_forward(pool: WorkerPool, optimizer: str, world_size: int) -> None:
    """As torch's get_state_dict steps with gradients of zeros, to have state to load into."""
    report = audit(pool, optimizer, {"fsdp": 2}, lr=0.01)
    assert report.verdict == EXACT, report.sentence


@pytest.mark.parametrize("configuration", [zero(1), "ddp", {"fsdp": 2}], ids=str)
@pytest.mark.parametrize("world_size", [2])
def test_what_they_have_in_common_passes(pool: WorkerPool, configuration: Any, world_size: int) -> None:
    """So it is what they change that is caught."""
    report = audit(pool, audited.Plain, configuration)
    assert report.verdict == EXACT, report.sentence


@pytest.mark.parametrize("optimizer", [audited.MovesRowsWithGradient, audited.MovesTensorsWithGradient])
@pytest.mark.parametrize("world_size", [2])
def test_what_looks_for_zeros_passes_where_layers_are_whole(pool: WorkerPool, optimizer: Any, world_size: int) -> None:
    report = audit(pool, optimizer, "ddp")
    assert report.verdict == EXACT, report.sentence


@pytest.mark.parametrize("world_size", [2])
def test_what_no_zeros_can_be_given_is_audited_without(pool: WorkerPool, world_size: int) -> None:
    report = audit(pool, audited.BreaksOnZeros, "ddp")
    assert report.verdict == EXACT, report.sentence
    assert report.notes == ("no gradients of zeros were tried, with which BreaksOnZeros fails in one process already",)


@pytest.mark.parametrize("world_size", [2])
def test_what_begins_late_needs_more_steps(pool: WorkerPool, world_size: int) -> None:
    subject, configuration = Subject(audited.BeginsLate), configuration_of(zero(1))
    few, many = examine(subject, configuration, pool), examine(subject, configuration, pool, steps=10)
    assert (few.verdict, few.steps) == (EXACT, 5)
    assert (many.verdict, many.steps) == (WRONG, 10)
    assert "every layer goes in 5 steps where one process takes it" in few.sentence
    assert "do not go in 10 steps where one process takes them" in many.sentence


@pytest.mark.parametrize("world_size", [2])
def test_saving_does_not_disturb_the_compared_steps(pool: WorkerPool, world_size: int) -> None:
    report = audit(pool, audited.CountsInItsGroups, {"fsdp": 2})
    assert report.verdict == EXACT, report.sentence
    assert [found.text.rpartition(": ")[2] for found in report.findings] == ["step 5 became 6"]


@pytest.mark.parametrize("configuration", ["ddp", zero(1), {"fsdp": 1}], ids=str)
@pytest.mark.parametrize("world_size", [2])
def test_an_optimizer_around_another_one(pool: WorkerPool, configuration: Any, world_size: int) -> None:
    report = audit(pool, audited.AroundAnother, configuration)
    assert report.verdict == EXACT, report.sentence


@pytest.mark.parametrize("world_size", [2])
def test_a_step_that_the_wrapper_takes_as_it_is_made(pool: WorkerPool, world_size: int) -> None:
    report = audit(pool, audited.adamw, zero(0, **BF16))
    assert report.verdict == EXACT, report.sentence
    assert "stepped early" in {found.kind for found in report.findings}


@pytest.mark.parametrize("world_size", [2])
def test_layers_without_gradient_show_how_far_they_moved(pool: WorkerPool, world_size: int) -> None:
    for configuration, moves in ((zero(1), True), ("ddp", False)):
        report = audit(pool, audited.adamw, configuration)
        idle = [layer for layer in report.layers if not layer.has_gradient]
        assert [layer.change > 0 for layer in idle] == [moves, moves]
        assert all(math.isnan(layer.moved) for layer in idle)
        assert not any(word in row for row in described(report).splitlines() for word in (" inf", " nan"))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2])
def test_an_error_on_one_rank_alone_is_reported_before_the_time_limit(world_size: int) -> None:
    with contextlib.closing(Ranks(world_size, timeout=10_000.0)) as ranks:
        report = examine(Subject(audited.StepsOnOneRankOnly), configuration_of(zero(1)), ranks)
        assert report.verdict == REFUSED
        assert report.sentence.startswith("rank 1: ValueError: not on this rank")
        report = examine(Subject(audited.RaisesOnNaN), configuration_of(zero(1)), ranks)
        assert kinds(report) == {"padding read"}  # the last rank alone has some
        report = examine(Subject(audited.LoadsOnOneRankOnly), configuration_of("ddp"), ranks)
        assert kinds(report) == {"checkpoint fails"}
        assert "rank 1: ValueError: not on this rank" in report.sentence
        assert all(layer.is_exact for layer in report.layers)


@pytest.mark.parametrize("peak", [0.1, 0.3])
@pytest.mark.parametrize("world_size", [2])
def test_rates_of_a_scheduler_section(pool: WorkerPool, peak: float, world_size: int) -> None:
    parameters = {"warmup_max_lr": peak, "warmup_num_steps": 4, "warmup_type": "linear"}
    configuration = zero(1, scheduler={"type": "WarmupLR", "params": parameters})
    report = audit(pool, audited.Plain, configuration)
    assert kinds(report) == (set() if peak == 0.1 else {"rates overwritten"})
    assert all(layer.is_exact for layer in report.layers)  # the one process takes the rates that were taken
    assert report.verdict == (EXACT if peak == 0.1 else WRONG)


@pytest.mark.parametrize("world_size", [2])
def test_momenta_of_a_scheduler_section(pool: WorkerPool, world_size: int) -> None:
    parameters = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 3}
    configuration = zero(1, scheduler={"type": "OneCycle", "params": parameters})
    report = audit(pool, "torch.optim.AdamW", configuration, lr=0.1)
    assert all(layer.is_exact for layer in report.layers), report.sentence


@pytest.mark.parametrize("world_size", [2])
def test_counts_in_groups_are_told_under_zero_3(pool: WorkerPool, world_size: int) -> None:
    report = audit(pool, audited.CountsInItsGroups, zero(3))
    assert report.verdict == EXACT, report.sentence
    assert [found.kind for found in report.findings if "sub_group_size" in found.text] == ["counts in groups"]
    configuration = zero(3)
    configuration["zero_optimization"]["sub_group_size"] = 2000
    report = audit(pool, audited.CountsInItsGroups, configuration)
    assert report.verdict == WRONG
    assert "groups differ" in kinds(report)


def in_two_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    return audited.CountsInAnAttribute([{"params": [p]} for p in model.parameters()])


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [(audited.CountsInAnAttribute, "(calls)"), (audited.CountsInItsState, "(state.whole.step)")],
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_counts_outside_groups_are_told(
    pool: WorkerPool, stage: int, optimizer: Any, told: str, world_size: int
) -> None:
    """With one group nothing goes wrong, and with two everything does."""
    report = audit(pool, optimizer, zero(stage), audited.two_layers)
    assert all(layer.is_exact for layer in report.layers), report.sentence
    notes = [found for found in report.findings if found.kind == "counts outside groups"]
    assert [(told in found.text, found.is_wrong) for found in notes] == [(True, False)] * (stage > 0)
    report = audit(pool, in_two_groups, zero(stage), audited.two_layers)
    assert all(layer.is_exact for layer in report.layers) == (stage == 0)


@pytest.mark.parametrize(
    ("optimizer", "options"), [("torch.optim.NAdam", {}), ("tvlars", {"lr": 0.1}), (audited.CountsInItsGroups, {})]
)
@pytest.mark.parametrize("world_size", [2])
def test_what_counts_rightly_is_not_told(
    pool: WorkerPool, optimizer: Any, options: dict[str, Any], world_size: int
) -> None:
    report = audit(pool, optimizer, zero(1), **options)
    assert not [found for found in report.findings if found.kind.startswith("counts")]


@pytest.mark.parametrize("world_size", [2])
def test_weights_in_another_memory_format(pool: WorkerPool, world_size: int) -> None:
    subject = Subject("torch.optim.AdamW", audited.images, {"lr": 0.01})
    report = examine(subject, configuration_of("ddp"), pool)
    assert report.verdict == EXACT, report.sentence


@pytest.mark.parametrize("world_size", [2])
def test_fsdp1_loads_the_state_of_such_weights_in_another_order(pool: WorkerPool, world_size: int) -> None:
    report = audit(pool, audited.adamw, {"fsdp": 1}, audited.images)
    assert kinds(report) == {"checkpoint loses state"}
    assert "Of 0.weight that is torch's doing" in report.sentence
    report = audit(pool, audited.ForgetsMomentum, "ddp", audited.images)
    assert kinds(report) == {"checkpoint loses state"}
    assert "torch's doing" not in report.sentence


class WithoutExtension:
    """Workers that have DeepSpeed's CPU Adam without building it."""

    def __init__(self, pool: WorkerPool):
        self.pool, self.world_size = pool, pool.world_size

    def run(self, function: Any, *arguments: Any) -> list[Any]:
        return self.pool.run(call_without_extension, function, *arguments)


def call_without_extension(function: Any, *arguments: Any) -> Any:
    with unbuilt_cpu_adam():
        return function(*arguments)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("world_size", [2])
def test_an_accelerate_file(pool: WorkerPool, offload: bool, world_size: int, tmp_path: Path) -> None:
    section = {"zero_stage": 2, "gradient_clipping": 0.5, "gradient_accumulation_steps": 2}
    if offload:
        section["offload_optimizer_device"] = "cpu"  # type: ignore[assignment]
    path = tmp_path / "zero2.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": section}))
    if offload:
        report = examine(Subject(audited.Plain), configuration_of(path), WithoutExtension(pool))
        assert report.verdict == WRONG
        assert "DeepSpeedCPUAdam stepped in the place of the optimizer that was given" in report.sentence
        return
    report = audit(pool, "lamb", path, lr=0.05)
    assert report.verdict == EXACT, report.sentence
    assert report.configuration == "accelerate DeepSpeed ZeRO-2"


@pytest.mark.parametrize("world_size", [2])
def test_flat_parameters_of_fsdp1(pool: WorkerPool, world_size: int) -> None:
    flat = {"fsdp": 1, "use_orig_params": False}
    assert audit(pool, audited.adamw, flat).verdict == EXACT
    assert audit(pool, NaiveLAMB, flat, lr=0.05).verdict == WRONG


@pytest.mark.parametrize("world_size", [2])
def test_a_model_and_an_optimizer_of_the_users(pool: WorkerPool, world_size: int) -> None:
    report = audit(pool, audited.of_the_model, zero(1), audited.two_layers)
    assert report.verdict == EXACT, report.sentence
    assert [layer.name for layer in report.layers] == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("world_size", [2])
def test_lists_in_lists_are_sharded_by_their_members(pool: WorkerPool, world_size: int) -> None:
    report = audit(pool, audited.Plain, {"fsdp": 2}, audited.lists_in_lists)
    assert report.verdict == EXACT, report.sentence


@pytest.mark.parametrize("world_size", [2])
def test_refusals_and_what_cannot_be_audited(pool: WorkerPool, world_size: int) -> None:
    report = audit(pool, audited.RaisesWhenCut, zero(1))
    assert (report.verdict, report.status) == (REFUSED, 2)
    assert report.sentence.startswith("ValueError: a tensor that is no layer")
    with pytest.raises(CannotAudit, match="not deterministic"):
        audit(pool, audited.Chance, "ddp")
    with pytest.raises(CannotAudit, match="needs a closure"):
        audit(pool, audited.NeedsClosure, "ddp")


@pytest.mark.parametrize(
    "configuration",
    [
        *(zero(stage, gradient_clipping=0.5) for stage in (0, 1, 2)),
        *(zero(stage, gradient_clipping=0.5, **BF16) for stage in (0, 1)),
        zero(1, gradient_clipping=0.5, **BF16, data_types={"grad_accum_dtype": "fp32"}),
        zero(2, gradient_clipping=0.5, fp16={"enabled": True, "loss_scale": 1000}),
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", [audited.matrices_alone, audited.vectors_alone])
@pytest.mark.parametrize("world_size", [2])
def test_layers_that_are_left_out(pool: WorkerPool, optimizer: Any, configuration: Any, world_size: int) -> None:
    """Which take no part in the clipping of ZeRO and of 16 bits, and have no fp32 weights there."""
    report = audit(pool, optimizer, configuration)
    assert report.verdict == EXACT, report.sentence


@pytest.mark.parametrize("world_size", [2])
def test_layers_that_are_left_out_of_zero_3_in_16_bits(pool: WorkerPool, world_size: int) -> None:
    report = audit(pool, audited.matrices_alone, zero(3, **BF16))
    assert kinds(report) == {"checkpoint leaves out"}
    assert all(layer.is_exact for layer in report.layers)


@pytest.mark.parametrize(
    "configuration",
    ["ddp", zero(1), zero(2, **BF16), zero(1, **BF16, data_types={"grad_accum_dtype": "fp32"}), zero(3)],
    ids=str,
)
@pytest.mark.parametrize("world_size", [2])
def test_a_group_without_trained_parameters(pool: WorkerPool, configuration: Any, world_size: int) -> None:
    report = audit(pool, audited.with_a_group_at_rest, configuration, audited.half_frozen)
    if configuration in ("ddp", zero(3)):
        assert report.verdict == EXACT, report.sentence
        return
    assert (report.verdict, report.status) == (REFUSED, 2)
    assert report.sentence.startswith("group 1 of the optimizer has no parameter that is trained")
    report = audit(pool, audited.with_a_group_at_rest, configuration, audited.two_layers)
    assert report.verdict == EXACT, report.sentence  # DeepSpeed leaves out groups of nothing


@pytest.mark.parametrize("configuration", ["ddp", zero(1), {"fsdp": 2}], ids=str)
@pytest.mark.parametrize("world_size", [2])
def test_models_that_depend_on_the_rank(pool: WorkerPool, configuration: Any, world_size: int) -> None:
    with pytest.raises(
        CannotAudit, match=r"other layers on rank 0 than in one process \(of_0.bias; of_0.weight; of_none"
    ):
        audit(pool, audited.adamw, configuration, audited.of_the_rank)


@pytest.mark.parametrize("world_size", [2])
def test_what_rounding_hides_is_not_called_exact(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CannotAudit, match="rounded so coarsely beside their movement"):
        audit(pool, "torch.optim.AdamW", "ddp", audited.bf16_model, lr=1e-3)
