"""Runs of ModernBERT on two ranks: every wrapper and loop, two phases with bases of their own, the exported model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.data.preparation import prepare
from trustratio.recipes.model.masked_language_model import build_model, padded_vocabulary
from trustratio.recipes.training.export import export_checkpoint

from .recipe_runs import TWO_PHASES, losses, recipe, records, train, trained_tensors
from .test_wrappers import NO_DROPOUT, REFERENCE, WRAPPERS

MODERN = (
    *("--model", "modernbert-tiny", *TWO_PHASES, "model.local_attention=8"),
    *("data.mask_probability=0.3", "model.global_rope_theta=100", "phase_two.global_rope_theta=5"),
)
"""Ten updates in two phases; windows that are shorter than the sequences, bases that matter for them."""

BASES = {"step-00000006": 100.0, "step-00000010": 5.0}
"""The base that a checkpoint was trained with: at the border, the first phase's."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def weights(text_folder, cache, tmp_path_factory):
    """A folder of initial weights that are large enough for attention to depend on positions."""
    folder = tmp_path_factory.mktemp("weights")
    config = parse_command_line(recipe(text_folder, folder, settings=MODERN)).config
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUSTRATIO_CACHE", str(cache))
        size = prepare(config.data, Reporter(active=False)).vocabulary_size
    torch.manual_seed(0)
    model = build_model(config.model, padded_vocabulary(size))
    for name, parameter in model.named_parameters():
        parameter.data.mul_(8 if "Wqkv" in name or "Wo" in name else 1)
    model.save_pretrained(folder)
    return f"model.initial_weights={folder}"


@pytest.fixture(scope="module")
def launch(text_folder, cache, weights, pools, tmp_path_factory):
    root = tmp_path_factory.mktemp("modern")

    def start(name, wrapper, *arguments):
        environment, script, own = WRAPPERS[wrapper]
        line = recipe(text_folder, root / name, *own, weights, *arguments, settings=MODERN)
        return root / name, pools.get(2).run(train, str(cache), environment, script, line)

    return start


@pytest.fixture(scope="module")
def runs(launch):
    """The folder of a finished run per wrapper and arguments, made when first asked for."""
    made = {}

    def run(wrapper, *arguments):
        key = (wrapper, *arguments)
        if key not in made:
            made[key], endings = launch(f"{wrapper}{len(made)}", wrapper, *arguments)
            assert endings == ["finished"] * 2, endings
        return made[key]

    return run


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != REFERENCE])
def test_every_wrapper_gives_the_same_losses_in_both_phases(runs, wrapper):
    expected = losses(runs(REFERENCE, NO_DROPOUT))
    assert len(expected) == 10
    assert losses(runs(wrapper, NO_DROPOUT)) == pytest.approx(expected, rel=1e-4)


def test_the_second_phases_base_is_used_from_its_first_update_on(runs):
    """So the test above can fail: a wrapper that kept the first phase's would have other losses."""
    with_it, without = (
        losses(runs(REFERENCE, NO_DROPOUT, *more)) for more in ((), ("phase_two.global_rope_theta=100",))
    )
    assert with_it[:6] == without[:6]
    assert with_it[6] != pytest.approx(without[6], rel=1e-5)


@pytest.mark.parametrize(
    ("wrapper", "step"), [(REFERENCE, 5), (REFERENCE, 6), ("accelerate-ddp", 6), ("accelerate-zero-3", 6)]
)
def test_a_run_resumed_before_or_at_the_border_is_bit_exact(runs, launch, wrapper, step):
    straight = runs(wrapper)
    checkpoint = straight / "checkpoints" / f"step-{step:08d}"
    resumed, endings = launch(f"{wrapper}-from-{step}", wrapper, "--resume", str(checkpoint))
    assert endings == ["finished"] * 2, endings
    assert losses(resumed) == losses(straight)[step:]
    one, other = (trained_tensors(folder / "checkpoints" / "step-00000010") for folder in (straight, resumed))
    assert len(one) > 20
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_run_resumed_within_the_second_phase_has_its_base(runs, launch):
    straight = runs(REFERENCE, "run.checkpoint_every=4")
    checkpoint = straight / "checkpoints" / "step-00000008"
    resumed, endings = launch("within", REFERENCE, "run.checkpoint_every=4", "--resume", str(checkpoint))
    assert endings == ["finished"] * 2, endings
    assert losses(resumed) == losses(straight)[8:]


@pytest.mark.parametrize("options", [("training.state_dtype=bfloat16",), ("training.master=stochastic",)])
def test_sixteen_bits_train_both_phases(runs, options):
    """Weights of 16 bits stand for themselves; rotary positions stay in fp32, or far tokens would be elsewhere."""
    found, exact = (losses(runs(REFERENCE, NO_DROPOUT, *more)) for more in (options, ()))
    assert found == pytest.approx(exact, rel=0.02)
    assert found[1:] != exact[1:]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["training.compile=true", "training.activation_checkpointing=true"])
@pytest.mark.parametrize("wrapper", [REFERENCE, "accelerate-ddp", "trainer-zero-3"])
def test_a_compiled_or_checkpointed_model_gives_the_same_losses(runs, wrapper, option):
    assert losses(runs(wrapper, NO_DROPOUT, option)) == pytest.approx(losses(runs(REFERENCE, NO_DROPOUT)), rel=1e-4)


@pytest.mark.parametrize("wrapper", [REFERENCE, "accelerate-ddp", "accelerate-zero-3"])
@pytest.mark.parametrize("step", BASES)
def test_an_exported_checkpoint_is_transformers_own_model(runs, cache, tmp_path, monkeypatch, wrapper, step):
    monkeypatch.setenv("TRUSTRATIO_CACHE", str(cache))
    run = runs(wrapper, NO_DROPOUT)
    export_checkpoint(run / "checkpoints" / step, tmp_path, Reporter(active=False))
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(model).__name__ == "ModernBertForMaskedLM"
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ModernBertForMaskedLM"]
    assert model.config.rope_parameters["full_attention"]["rope_theta"] == BASES[step]
    assert model.decoder.weight is model.model.embeddings.tok_embeddings.weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert list(tokenizer("trust ratio", "large batch")) == ["input_ids", "attention_mask"]
    for name in ("pad", "cls", "sep"):
        assert getattr(model.config, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id") is not None
    filled = pipeline("fill-mask", model=model, tokenizer=tokenizer)("the [MASK] ratio")
    assert len(filled) == 5


@pytest.mark.parametrize("wrapper", ["trainer-ddp", "trainer-zero-3"])
def test_the_trainer_leaves_a_model_that_loads(runs, cache, tmp_path, monkeypatch, wrapper):
    """The one that an exported checkpoint of the other loop is."""
    monkeypatch.setenv("TRUSTRATIO_CACHE", str(cache))
    export_checkpoint(runs(REFERENCE, NO_DROPOUT), tmp_path, Reporter(active=False))
    exported = AutoModelForMaskedLM.from_pretrained(tmp_path)
    folder = runs(wrapper, NO_DROPOUT) / "model"
    trained = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(trained).__name__ == "ModernBertForMaskedLM"
    assert trained.config.rope_parameters == exported.config.rope_parameters
    assert trained.config.pad_token_id == exported.config.pad_token_id
    for (name, one), other in zip(exported.named_parameters(), trained.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5), name
    ids = AutoTokenizer.from_pretrained(folder)("trust ratio", "large batch")
    assert ids == AutoTokenizer.from_pretrained(tmp_path)("trust ratio", "large batch")


def test_records_name_layers_and_operations(runs):
    done = records(runs(REFERENCE, NO_DROPOUT))
    assert all(record["model_flops_per_second"] > 0 for record in done)
