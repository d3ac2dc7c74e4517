"""The plan: activations against what autograd keeps, the choice of micro-batches, the text, JSON and refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.configuration.config import ModelConfig, RecipeConfig, TrainingConfig
from trustratio.recipes.configuration.phases import phases_of
from trustratio.recipes.configuration.presets import PRESETS, get_preset
from trustratio.recipes.model.masked_language_model import build_model
from trustratio.recipes.planning.memory import GIB, memory_parts, model_size
from trustratio.recipes.planning.phase_plan import (
    Machine,
    check_fits,
    divisors,
    flops_per_sequence,
    growth,
    plan_phase,
)
from trustratio.recipes.planning.plan import main
from trustratio.recipes.planning.traffic import traffic
from trustratio.recipes.rules.global_batch import plan_batch

IN_BF16 = {"data_types": {"grad_accum_dtype": "bf16"}}


def with_training(config, **values):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **values))


def part(parts, name):
    return next(p.bytes for p in parts if p.name == name)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(dropout, checkpointing):
    config = RecipeConfig(
        model=ModelConfig(layers=4, hidden=128, heads=4, intermediate=512, dropout=dropout),
        training=TrainingConfig(precision="fp32", activation_checkpointing=checkpointing),
    )
    micro, length, vocabulary = 8, 64, 2000
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=length))
    size = model_size(config, vocabulary)
    model = build_model(config.model, vocabulary).train()
    # The CPU has no fused attention with dropout; a GPU has.
    model.bert.encoder.layer[0].attention.self.dropout.p = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
        layer.attention.self.dropout_prob = 0.0
    if checkpointing:
        model.checkpoint_activations()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(5, 100, (micro, length))
    masked = torch.arange(0, micro * length, 7)[: round(0.15 * micro * length)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = model(tokens, masked, torch.randint(5, 100, (len(masked),)))
    measured = sum(count for count, _ in kept.values())
    expected = part(memory_parts(size, config, phases_of(config)[0], micro, 1), "activations")
    # The plan adds the gradient of the logits, which backward makes.
    expected -= len(masked) * vocabulary * 4
    if checkpointing:  # and the layer that is computed again
        whole = part(
            memory_parts(size, with_training(config, activation_checkpointing=False), phases_of(config)[0], micro, 1),
            "activations",
        )
        assert measured < 0.6 * whole
        expected -= micro * length * ((7 * 128 + 2 * 512) * 4 + 2 * 128 * (dropout > 0))
        measured += (
            4 * micro * length * 128 * 4
        )  # the layers' inputs, which checkpointing holds out of autograd's sight
    assert measured == pytest.approx(expected, rel=0.15)
    del loss


def test_the_model_is_measured_without_being_built():
    size = model_size(get_preset("lamb-64k-32k"))
    model = sum(n for n in size.layers)
    assert size.elements == model == pytest.approx(335e6, rel=0.01)
    assert size.states == 2
    assert size.norm_sums == (3,)
    assert model_size(get_preset("vr-lamb-64k-32k")).statistics == "squares"
    assert model_size(get_preset("adamw-64k")).norm_sums == ()


@pytest.mark.parametrize(
    ("name", "options", "states", "sums"),
    [
        ("adashift", {}, 10, (2,)),
        ("adashift", {"keep": 4, "reduction": None}, 5, None),
        ("adabelief", {}, 2, (1,)),
        ("adabelief", {"adapt": None}, 2, None),
        ("fastadabelief", {}, 3, (1,)),
    ],
)
def test_state_and_sums_that_depend_on_options(name, options, states, sums):
    config = get_preset("lamb-tiny")
    optimizer = dataclasses.replace(config.optimizer, name=name, options=options)
    size = model_size(dataclasses.replace(config, optimizer=optimizer))
    assert (size.states, size.norm_sums) == (states, sums)


def test_zero_stages_divide_what_they_divide():
    config = with_training(get_preset("lamb-64k-32k"), precision="bf16")
    size, phase = model_size(config), phases_of(config)[0]
    n = size.elements

    def of(stage, ranks):
        return {p.name: p.bytes for p in memory_parts(size, with_training(config, zero_stage=stage), phase, 8, ranks)}

    for stage in (1, 2, 3):
        assert of(stage, 8)["optimizer state"] == pytest.approx(8 * n / 8)
        assert of(stage, 8)["fp32 master weights"] == pytest.approx(4 * n / 8)
    assert of(0, 8)["optimizer state"] == 8 * n
    assert of(2, 8)["gradients"] == of(3, 8)["gradients"] == pytest.approx(4 * n / 8)  # summed in fp32
    in_bf16 = memory_parts(size, with_training(config, zero_stage=2), phase, 8, 8, IN_BF16)
    assert part(in_bf16, "gradients") == pytest.approx(2 * n / 8)
    assert of(3, 8)["weights"] == pytest.approx(2 * n / 8)
    assert of(1, 8)["weights"] == 2 * n
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    left = memory_parts(size, with_training(config, zero_stage=2), phase, 8, 8, offload)
    assert not {"optimizer state", "fp32 master weights"} & {p.name for p in left}


def test_the_largest_micro_batch_that_fits_and_divides_is_chosen():
    config = get_preset("lamb-64k-32k")
    size, phase = model_size(config), phases_of(config)[0]
    machine = Machine(memory=40 * GIB)
    plan = plan_phase(size, config, phase, 8, machine)
    assert plan.fits
    assert plan.micro * plan.accumulation * 8 == phase.global_batch
    larger = min(n for n in divisors(phase.global_batch // 8) if n > plan.micro)
    assert plan_phase(size, config, phase, 8, machine, micro=larger).total > machine.memory >= plan.total
    again = plan_phase(size, with_training(config, activation_checkpointing=True), phase, 8, machine)
    assert again.micro > plan.micro
    assert not plan_phase(size, config, phase, 1, Machine(memory=4 * GIB)).fits


def test_the_table_reaches_1024_gpus_and_names_batches_that_cannot_be_divided():
    config = get_preset("lamb-64k-32k")
    size = model_size(config)
    table = growth(size, config, phases_of(config)[0], Machine())
    assert [plan.gpus for plan in table] == [2**i for i in range(11)]
    speeds = [plan.sequences_per_second for plan in table]
    assert speeds == sorted(speeds)
    assert table[0].traffic.bytes == {}
    assert max(plan.total for plan in table) <= Machine().memory
    odd = with_training(config, global_batch=100)
    plan = plan_phase(size, odd, phases_of(odd)[0], 64, Machine())
    assert plan.problem == "100 sequences are not divisible by 64 GPUs; nearest: 64 and 128"


def test_stage_2_and_3_send_once_per_micro_batch():
    config = get_preset("lamb-64k-32k")
    size = model_size(config)
    once = {s: traffic(size, with_training(config, zero_stage=s), 1, 8).bytes["gradients"] for s in range(4)}
    often = {s: traffic(size, with_training(config, zero_stage=s), 16, 8).bytes["gradients"] for s in range(4)}
    assert [often[s] / once[s] for s in range(4)] == [1, 1, 16, 16]
    assert once[0] == pytest.approx(2 * 7 / 8 * 2 * size.elements)


def test_squares_of_a_large_model_travel_with_every_micro_batch_from_stage_2_on():
    config = get_preset("vr-lamb-64k-32k")
    size = model_size(config)
    once = 4 * size.elements * 7 / 8

    def sent(stage):
        plan = traffic(size, with_training(config, zero_stage=stage), 4, 8)
        return plan.bytes["squares of gradients"] / once, plan.collectives["squares of gradients"]

    buckets = -(-size.elements // 2**23)
    assert sent(0) == (2, buckets)
    assert sent(1) == (1, -(-size.elements // 2**22) + 7)
    assert sent(2) == (4, -(-4 * size.elements // 2**22) + 4 * 7)
    assert sent(3) == (4, -(-4 * size.elements // 2**22))


def test_flops_are_six_per_weight_and_token_and_attention():
    config = get_preset("lamb-64k-32k")
    size, phase = model_size(config), phases_of(config)[0]
    useful = flops_per_sequence(size, config, phase)
    encoder = 24 * (4 * 1024**2 + 2 * 1024 * 4096)
    attention = 24 * 12 * 128 * 1024
    head = 0.15 * 6 * (1024**2 + 1024 * size.vocabulary)
    assert useful == pytest.approx(128 * (6 * encoder + attention + head))
    assert 1.25 < flops_per_sequence(size, config, phase, recomputed=True) / useful < 4 / 3


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_has_a_plan(preset, capsys):
    assert main(["--preset", preset, "--gpus", "1", "--most_gpus", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["phases"][0]["micro"] >= 1


def test_the_command_prints_tables(capsys):
    assert main(["--preset", "lamb-64k-32k", "--gpus", "8", "--memory", "80"]) == 0
    printed = capsys.readouterr().out
    for words in ("phase 2: 1,563 steps", "memory per GPU", "fp32 master weights", "norms", "assumed:", "  1024"):
        assert words in printed


def test_a_micro_batch_that_does_not_divide_is_a_problem_with_the_nearest_sizes(capsys):
    arguments = ["--preset", "lamb-64k-32k", "--gpus", "8", "--memory", "80", "--most_gpus", "1"]
    assert main([*arguments, "--micro_batch", "48"]) == 1
    printed = capsys.readouterr().out
    assert "micro-batch x ranks = 48 x 8 = 384; nearest possible global batches: 65280 and 65664" in printed
    assert "or keep 65536 with --micro_batch 32" in printed
    assert "= micro-batch 48" not in printed
    main([*arguments, "--micro_batch", "32"])
    assert "= micro-batch 32 x accumulation 256 x 8 GPUs" in capsys.readouterr().out


def test_the_model_is_chosen_by_name_as_in_the_recipe(capsys):
    assert main(["--preset", "lamb-64k-32k", "--model", "base", "--most_gpus", "1"]) == 0
    assert "BERT 12 x 768" in capsys.readouterr().out
    assert main(["--model", "bsae"]) == 2
    assert "unknown model size 'bsae'" in capsys.readouterr().err


def test_the_recipe_refuses_what_the_plan_calls_too_large():
    config = with_training(get_preset("lamb-64k-32k"), precision="bf16")
    size, phase = model_size(config), phases_of(config)[0]
    plan = plan_phase(size, config, phase, 8, Machine())
    config = with_training(config, micro_batch=plan.micro)
    config = dataclasses.replace(config, phase_two=dataclasses.replace(config.phase_two, steps=0))
    check_fits(config, None, 8, plan.total)
    with pytest.raises(RecipeError, match=r"reserved 2\.00 GiB"):
        check_fits(config, None, 8, plan.total - 1)


def test_bad_input_and_what_does_not_fit_have_exit_codes(capsys):
    assert main(["--preset", "lamb-64k-32"]) == 2
    assert "nearest: lamb-64k-32k" in capsys.readouterr().err
    assert main(["--gpus", "0"]) == 2
    assert "--gpus 0 is out of range" in capsys.readouterr().err
    assert main(["--utilization", "1.5"]) == 2
    assert main(["--nonsense"]) == 2
    assert main(["--preset", "lamb-64k-32k", "--memory", "4"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_a_preset_that_does_not_fit_is_refused_with_the_numbers():
    config = with_training(get_preset("lamb-64k-32k"), precision="bf16", micro_batch=512)
    check_fits(config, None, 8, 80 * GIB)
    with pytest.raises(RecipeError) as refused:
        check_fits(config, None, 8, 24 * GIB)
    message = str(refused.value)
    assert "phase 1 of lamb-64k-32k needs 5" in message
    assert "a GPU here has 24.00 GiB: activations 52.2" in message
    assert "--micro_batch 128 fits" in message
    assert "training.activation_checkpointing=true, --micro_batch" in message


def test_the_recipe_refuses_before_it_builds_anything(monkeypatch):
    from trustratio.recipes.configuration.command_line import parse_command_line
    from trustratio.recipes.training import checks

    invocation = parse_command_line(["--preset", "lamb-64k-32k-small", "--precision", "bf16"])
    monkeypatch.setattr(checks, "device_memory", lambda: 80 * GIB)
    checks.check_run(invocation)
    monkeypatch.setattr(checks, "device_memory", lambda: GIB // 4)
    with pytest.raises(
        RecipeError, match=r"phase 1 of lamb-64k-32k-small needs .* GPU here has 0\.25 GiB: reserved 2\.00 GiB, optim"
    ):
        checks.check_run(invocation)


def test_too_many_ranks_for_a_batch_are_told_how_to_start_fewer():
    with pytest.raises(RecipeError, match=r"start 2 of 8 ranks: .*--num_gpus, --nproc_per_node or --num_processes"):
        plan_batch(64, 32, 8)
    with pytest.raises(RecipeError, match=r"nearest possible global batches: 12$"):
        plan_batch(10, 3, 4)
