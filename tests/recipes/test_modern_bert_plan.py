"""What ModernBERT needs: operations against those that torch counts, memory against what autograd keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trustratio.recipes.configuration.phases import phases_of
from trustratio.recipes.model.flops import ModelFlops, tokens_in_window
from trustratio.recipes.model.masked_language_model import build_model
from trustratio.recipes.model.modern_bert import local_mask
from trustratio.recipes.planning.memory import memory_parts, model_size
from trustratio.recipes.planning.plan import main

from .test_modern_bert import TINY, VOCABULARY, batch, config_of, model_of


def test_flops_are_those_that_torch_counts():
    """Where the windows hold the sequence: torch counts what is masked, too."""
    model = model_of(attention="eager")  # torch's counter does not know the CPU's fused attention
    tokens, positions, targets = batch(length=5)
    with FlopCounterMode(display=False) as counter:
        model(tokens, positions, targets)[0].backward()
    flops = ModelFlops.of(TINY, VOCABULARY)
    assert flops.update(tokens=15, predicted=len(positions), length=5) == counter.get_total_flops()


def test_flops_of_windows_count_what_is_attended_to():
    flops = ModelFlops.of(TINY, VOCABULARY)
    assert (flops.local_layers, flops.reach) == (2, 4)
    for length in (4, 5, 6, 9, 40):
        mask = local_mask(length, 4, torch.device("cpu"))
        attended = length if mask is None else mask.sum().item() / length
        assert tokens_in_window(length, 4) == pytest.approx(attended)
        dense = dataclasses.replace(flops, local_layers=0).forward(30, 0, length)
        saved = dense - flops.forward(30, 0, length)
        assert saved == pytest.approx(30 * 2 * 4 * 16 * (length - attended), abs=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(dropout, checkpointing):
    shape = dataclasses.replace(TINY, layers=7, hidden=128, intermediate=192, local_attention=32, dropout=dropout)
    config = dataclasses.replace(
        config_of("training.precision=fp32", f"training.activation_checkpointing={str(checkpointing).lower()}"),
        model=shape,
    )
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, sequence_length=64, mask_probability=0.3)
    )
    micro, length, vocabulary = 8, 64, 2000
    model = build_model(shape, vocabulary).train()
    for layer in model.model.layers:  # the CPU has no fused attention with dropout; a GPU has
        layer.attn.attention_dropout = 0.0
    if checkpointing:
        model.checkpoint_activations()
    masked = torch.arange(0, micro * length, 3)[: round(0.3 * micro * length)]
    kept = kept_bytes(model, torch.randint(5, 100, (micro, length)), masked)
    parts = memory_parts(model_size(config, vocabulary), config, phases_of(config)[0], micro, 1)
    planned = next(part.bytes for part in parts if part.name == "activations")
    planned -= len(masked) * vocabulary * 4  # the gradient of the logits, which backward makes
    if checkpointing:  # the layer that is computed again, and the layers' inputs, which autograd does not see
        planned -= micro * length * ((10 * 128 + 4 * 192) * 4 + (128 + 192) * (dropout > 0)) + length**2 * 4
        kept += 7 * micro * length * 128 * 4
        assert kept < 0.5 * 31e6
    assert kept == pytest.approx(planned, rel=0.15)


def test_the_masks_of_windows_are_planned_where_there_are_any():
    """One of length x length numbers in each of the two local layers; none where the window holds the sequence."""
    config = dataclasses.replace(
        config_of("training.precision=bf16"), model=dataclasses.replace(TINY, max_positions=8192)
    )

    def activations(length, **changed):
        shape = dataclasses.replace(config.model, **changed)
        phase = dataclasses.replace(phases_of(config)[0], sequence_length=length)
        with_shape = dataclasses.replace(config, model=shape)
        parts = memory_parts(model_size(with_shape), with_shape, phase, 1, 1)
        return next(part.bytes for part in parts if part.name == "activations")

    whole = {"local_attention": 16384}
    assert activations(4096) - activations(4096, **whole) == 2 * 2 * 4096**2
    assert activations(5) == activations(5, **whole)


def kept_bytes(model, tokens, masked):
    """Bytes of what autograd keeps of a forward pass, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = model(tokens, masked, torch.randint(5, 100, (len(masked),)))
    assert loss.requires_grad
    return sum(count for count, _ in kept.values())


def test_the_plan_says_what_it_plans(capsys):
    assert (
        main(["--model", "modernbert-base", "--gpus", "8", "data.vocabulary=50368", "--sequence_length", "1024"]) == 0
    )
    assert "ModernBERT 22 x 768, 149.7 million parameters in 137 layers" in capsys.readouterr().out
