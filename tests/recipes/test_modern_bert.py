"""ModernBERT in the recipe: against transformers and against plain float64, windows, rotary positions, phases."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForMaskedLM, ModernBertForMaskedLM, ModernBertModel

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.configuration.config import ModelConfig, RecipeConfig
from trustratio.recipes.configuration.overrides import apply_overrides, from_dict, with_model_size
from trustratio.recipes.configuration.phases import describe_plan, phases_of
from trustratio.recipes.configuration.presets import PRESETS, get_preset
from trustratio.recipes.configuration.ranges import check_ranges
from trustratio.recipes.configuration.twins import twin
from trustratio.recipes.model import attention, build
from trustratio.recipes.model.attention import attention_of, describe_attention
from trustratio.recipes.model.build import build_parts
from trustratio.recipes.model.compiling import compile_regions
from trustratio.recipes.model.masked_language_model import build_model, stock_model
from trustratio.recipes.model.modern_bert import local_mask
from trustratio.recipes.model.optimizer import parameter_groups
from trustratio.recipes.runs.history import short_name
from trustratio.recipes.training.checks import _identity_of

VOCABULARY = 104
TINY = ModelConfig(
    architecture="modernbert",
    layers=4,
    hidden=16,
    heads=2,
    intermediate=24,
    max_positions=64,
    local_attention=8,
    global_rope_theta=1000.0,
    local_rope_theta=100.0,
)
SMALL = ("model.layers=4", "model.hidden=16", "model.heads=2", "model.intermediate=24", "model.local_attention=8")


def model_of(shape=TINY, **options):
    torch.manual_seed(0)
    return build_model(shape, VOCABULARY, **options)


def batch(length=40, rows=3):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    positions = torch.arange(0, rows * length, 7)
    return tokens, positions, torch.randint(0, VOCABULARY, (len(positions),), generator=generator)


def config_of(*overrides):
    return apply_overrides(with_model_size(get_preset("lamb-tiny"), "modernbert-tiny"), overrides)


# What is computed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 40])
def test_loss_hidden_states_and_gradients_are_those_of_transformers(length):
    """Within the window and beyond it; the stock model computes a head at every position, with masks of its own."""
    model = model_of().double()
    stock = ModernBertForMaskedLM(model.config).double()
    stock.load_state_dict(model.state_dict())
    tokens, positions, targets = batch(length)
    loss, correct = model(tokens, positions, targets)
    labels = torch.full((tokens.numel(),), -100)
    labels[positions] = targets
    full = stock(input_ids=tokens, labels=labels.view_as(tokens), output_hidden_states=True)
    torch.testing.assert_close(model.hidden_states(tokens), full.hidden_states[-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss / len(targets), full.loss, rtol=1e-6, atol=0)  # both in fp32
    assert int(correct) == int((full.logits.reshape(-1, VOCABULARY)[positions].argmax(-1) == targets).sum())
    loss.backward()
    full.loss.backward()
    for (name, one), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert (one.grad / len(targets) - other.grad).norm() <= 2e-6 * other.grad.norm(), name


def reference(weights, tokens, shape):
    """Hidden states of ModernBERT in float64, written from arXiv 2412.13663 without transformers."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name + ".weight"]

    def turned(x, theta):  # (rows, heads, length, width); the pairs are (i, i + width / 2)
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * theta ** (
            -torch.arange(half, dtype=torch.float64) / half
        )
        return torch.view_as_real(torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles))

    rows, length = tokens.shape
    apart = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    x = norm(weights["model.embeddings.tok_embeddings.weight"][tokens], "model.embeddings.norm")
    for layer in range(shape.layers):
        name, is_global = f"model.layers.{layer}.", layer % shape.global_attention_every == 0
        y = norm(x, name + "attn_norm") if layer else x
        qkv = (y @ weights[name + "attn.Wqkv.weight"].T).view(rows, length, 3, shape.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        theta = shape.global_rope_theta if is_global else shape.local_rope_theta
        scores = torch.einsum("bhicd,bhjcd->bhij", turned(q, theta), turned(k, theta)) / math.sqrt(q.shape[-1])
        if not is_global:
            scores = scores.masked_fill(apart > shape.local_attention / 2, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, -1)
        x = x + mixed @ weights[name + "attn.Wo.weight"].T
        inner, gate = (norm(x, name + "mlp_norm") @ weights[name + "mlp.Wi.weight"].T).chunk(2, -1)
        x = x + (F.gelu(inner) * gate) @ weights[name + "mlp.Wo.weight"].T
    return norm(x, "model.final_norm")


def test_hidden_states_are_those_of_a_plain_reference():
    """Rotary angles are fp32 in the model, so it agrees to that; a window one token wider or narrower does not."""
    model = model_of().double()
    for parameter in model.parameters():  # of a size that attention is not flat
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    tokens, _, _ = batch()
    found = model.hidden_states(tokens)
    expected = reference(model.state_dict(), tokens, TINY)
    assert (found - expected).norm() <= 2e-6 * expected.norm()
    for wrong in (
        {"local_attention": 10},
        {"local_attention": 6},
        {"global_rope_theta": 100.0},
        {"local_rope_theta": 1000.0},
        {"global_attention_every": 2},
    ):
        other = reference(model.state_dict(), tokens, dataclasses.replace(TINY, **wrong))
        assert (found - other).norm() > 1e-4 * other.norm(), wrong


def test_a_token_looks_at_half_a_window_on_either_side():
    mask = local_mask(5, 2, torch.device("cpu"))
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1],
    ]
    assert local_mask(5, 4, torch.device("cpu")) is None
    assert local_mask(5, 3, torch.device("cpu")) is not None


def test_a_batch_without_masked_tokens_gives_zero_loss_and_gradient():
    model, empty = model_of(), torch.empty(0, dtype=torch.int64)
    loss, _ = model(batch()[0], empty, empty)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("how", ["training.activation_checkpointing=true", "training.compile=true"])
def test_checkpointing_and_compiling_give_the_same_gradient(how, monkeypatch):
    """Compiled by capturing the graph, which plain torch runs: also after the phase has changed the positions."""
    monkeypatch.setattr(build, "compile_regions", functools.partial(compile_regions, backend="eager"))
    overrides = (*SMALL, "phase_two.steps=4", "phase_two.global_rope_theta=5")

    def gradients(*more):
        config = config_of(*overrides, *more)
        parts = build_parts(config, VOCABULARY)
        found = []
        for phase in phases_of(config):
            parts.model.begin_phase(phase)
            parts.model.zero_grad()
            parts.model(*batch())[0].backward()
            found.append([p.grad for p in parts.model.parameters()])
        return found

    plain, other = gradients(), gradients(how)
    for before, after in zip(plain, other, strict=True):
        for one, two in zip(before, after, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(one, two, rtol=1e-3) for one, two in zip(*plain, strict=True))


# Rotary positions ----------------------------------------------------------------------------------------------------


def test_no_wrapper_can_round_the_rotary_positions():
    """bf16 training casts buffers, too; transformers' own frequencies would put far tokens at other angles."""
    shape = dataclasses.replace(TINY, hidden=128, heads=2, max_positions=8192)
    model, places = model_of(shape), torch.arange(8192)[None]
    assert not list(model.buffers())
    exact = torch.arange(8192, dtype=torch.float64)[:, None] * 1000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)

    def off(rotary):
        cosine, _ = rotary(torch.zeros(1), places, "full_attention")
        return (cosine[0, :, :32].double() - exact.cos()).abs().max().item()

    stock = ModernBertModel(model.config).bfloat16()
    assert off(model.bfloat16().model.rotary_emb) < 1e-3
    assert off(stock.rotary_emb) > 1


def test_the_second_phase_turns_the_global_layers_by_its_own_base():
    config = config_of(
        *SMALL, "phase_two.steps=2", "model.global_rope_theta=10000", "phase_two.global_rope_theta=160000"
    )
    one, two = phases_of(config)
    assert (one.global_rope_theta, two.global_rope_theta) == (10000.0, 160000.0)
    assert "global rotary base 10000 becomes 160000" in describe_plan(config, 1)[-1]
    begun = model_of(config.model)
    tokens = batch()[0]
    before = begun.hidden_states(tokens)
    begun.begin_phase(two)
    fresh = model_of(dataclasses.replace(config.model, global_rope_theta=160000.0))
    assert torch.equal(begun.hidden_states(tokens), fresh.hidden_states(tokens))
    assert not torch.allclose(begun.hidden_states(tokens), before, rtol=1e-5)
    assert begun.config.to_dict()["rope_parameters"] == fresh.config.to_dict()["rope_parameters"]
    stock = stock_model(begun)
    stock.load_state_dict(begun.state_dict())
    torch.testing.assert_close(stock.model(tokens).last_hidden_state, fresh.hidden_states(tokens))
    begun.begin_phase(one)
    assert torch.equal(begun.hidden_states(tokens), before)


def test_without_its_own_base_the_second_phase_keeps_the_models():
    config = config_of("phase_two.steps=2")
    assert [phase.global_rope_theta for phase in phases_of(config)] == [160000.0] * 2
    assert "rotary" not in "".join(describe_plan(config, 1))
    bert = apply_overrides(get_preset("lamb-tiny"), ["phase_two.steps=2"])
    assert [phase.global_rope_theta for phase in phases_of(bert)] == [None, None]
    model_of(ModelConfig()).begin_phase(phases_of(bert)[0])


# Parameters ----------------------------------------------------------------------------------------------------------


def test_biases_and_norm_weights_get_no_weight_decay():
    model = model_of()
    decayed, undecayed = parameter_groups(model, 0.1)
    kinds = {id(p): type(module) for module in model.modules() for p in module.parameters(recurse=False)}
    assert {kinds[id(p)] for _, p in decayed["params"]} == {torch.nn.Linear}  # the embedding is the decoder's
    others = {name for name, p in undecayed["params"] if not issubclass(kinds[id(p)], torch.nn.LayerNorm)}
    assert others == {"decoder.bias"}
    assert len(decayed["params"]) + len(undecayed["params"]) == len(list(model.parameters()))
    assert model.decoder.weight is model.model.embeddings.tok_embeddings.weight


def test_a_fused_matrix_can_have_three_ratios():
    """Patterns go to the group that has such layers, with weight decay or without."""
    parts = parts_of('optimizer.segments={"*.Wqkv.weight":3,"decoder.bias":2}')
    assert [group["segments"] for group in parts.optimizer.param_groups] == [{"*.Wqkv.weight": 3}, {"decoder.bias": 2}]
    parts.model(*batch())[0].backward()
    parts.optimizer.step()
    assert len([name for name in parts.optimizer.trust_ratios() if "layers.1.attn.Wqkv" in name]) == 3
    with pytest.raises(RecipeError, match=r"segments has the name '\*\.query\.weight', which no parameter"):
        parts_of('optimizer.segments={"*.query.weight":3}')
    with pytest.raises(RecipeError, match="optimizer 'adamw' refused its options"):
        parts_of('optimizer.segments={"*.Wqkv.weight":3}', "optimizer.name=adamw")


def test_special_tokens_are_those_of_the_tokenizer():
    config = model_of(special_tokens={"cls": 2, "sep": 3, "pad": 0}).config
    assert (config.pad_token_id, config.cls_token_id, config.sep_token_id) == (0, 2, 3)
    assert (config.bos_token_id, config.eos_token_id) == (2, 3)
    left_open = model_of()  # and not transformers' 50283, which the embedding does not have
    assert left_open.config.pad_token_id is None
    assert left_open.model.embeddings.tok_embeddings.padding_idx is None
    assert model_of(special_tokens={"cls": 2, "sep": 3, "pad": None}).config.pad_token_id is None


def test_dropout_is_taken_over():
    config = model_of(dataclasses.replace(TINY, dropout=0.25)).config
    assert (config.embedding_dropout, config.attention_dropout, config.mlp_dropout) == (0.25, 0.25, 0.25)


def parts_of(*overrides):
    return build_parts(config_of(*SMALL, *overrides), VOCABULARY)


def test_initial_weights_are_loaded_or_refused(tmp_path):
    saved = parts_of("training.seed=5").model
    saved.save_pretrained(tmp_path / "modern")
    loaded = parts_of(f"model.initial_weights={tmp_path}/modern").model
    for (name, one), other in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(RecipeError, match="does not fit the model of this run"):
        parts_of(f"model.initial_weights={tmp_path}/modern", "model.intermediate=64")
    model_of(ModelConfig(hidden=16, intermediate=32)).save_pretrained(tmp_path / "bert")
    with pytest.raises(RecipeError, match="of the architecture bert, and this run trains modernbert"):
        parts_of(f"model.initial_weights={tmp_path}/bert")
    with pytest.raises(RecipeError, match="of the architecture modernbert, and this run trains bert"):
        model_of(ModelConfig(initial_weights=f"{tmp_path}/modern"))
    saved.model.save_pretrained(tmp_path / "headless")
    with pytest.raises(
        RecipeError, match=r"lacks decoder\.bias, head\.dense\.weight, head\.norm\.weight: give the folder"
    ):
        parts_of(f"model.initial_weights={tmp_path}/headless")


def test_berts_initial_weights_are_not_lacking(tmp_path):
    """The tied decoder is in no file."""
    shape = ModelConfig(hidden=16, intermediate=32)
    BertForMaskedLM(model_of(shape).config).save_pretrained(tmp_path)
    model_of(dataclasses.replace(shape, initial_weights=str(tmp_path)))


OLDER = r"Validation error for field 'rope_parameters'"
"""What transformers 5.6 says itself where rotations are for another kind of layer."""


@pytest.mark.parametrize(
    ("size", "values", "message"),
    [
        ("tiny", {"num_attention_heads": 4}, r"num_attention_heads 4 \(this run's: 2\).*: set model\.heads=4$"),
        (
            "tiny",
            {"hidden_act": "relu"},
            r"hidden_act relu \(this run's: gelu\), and the recipe trains bert with no other",
        ),
        ("tiny", {"layer_norm_eps": 1e-3}, r"layer_norm_eps 0\.001 \(this run's: 1e-12\)"),
        ("tiny", {"is_decoder": True}, r"is_decoder True \(this run's: False\)"),
        (
            "modernbert-tiny",
            {"hidden_activation": "relu"},
            r"hidden_activation relu \(this run's: gelu\), and the recipe trains modern",
        ),
        ("modernbert-tiny", {"classifier_activation": "relu"}, r"classifier_activation relu"),
        (
            "modernbert-tiny",
            {"norm_eps": 1e-3, "local_attention": 8},
            r"local_attention 8 .*: 32\), norm_eps 0\.001 .*no other value",
        ),
        (
            "modernbert-tiny",
            {"local_attention": 8},
            r"local_attention 8 \(this run's: 32\).*: set model\.local_attention=8$",
        ),
        ("tiny", {"tie_word_embeddings": False}, r"tie_word_embeddings False \(this run's: True\)"),
        (
            "modernbert-tiny",
            {"layer_types": ["full_attention"] * 3},
            rf"layer_types .*: set model\.global_attention_every=1$|{OLDER}",
        ),
        (
            "modernbert-tiny",
            {"layer_types": ["sliding_attention"] * 3},
            rf"layer_types .*with no other value: give other weights|{OLDER}",
        ),
    ],
)
def test_weights_of_a_model_that_computes_something_else_are_refused(size, values, message, tmp_path):
    shape = ModelConfig().of_size(size)
    model_of(shape).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(RecipeError, match=message):
        model_of(dataclasses.replace(shape, initial_weights=str(tmp_path)))


def test_weights_may_begin_with_another_base_of_the_global_positions(tmp_path):
    shape = ModelConfig().of_size("modernbert-tiny")
    model_of(dataclasses.replace(shape, global_rope_theta=1e4)).save_pretrained(tmp_path)
    model_of(dataclasses.replace(shape, initial_weights=str(tmp_path)))
    with pytest.raises(RecipeError, match=r"local rope_theta 10000\.0 .*500.*: set model\.local_rope_theta=10000\.0"):
        model_of(dataclasses.replace(shape, local_rope_theta=500.0, initial_weights=str(tmp_path)))


def test_layers_have_short_names_in_reports():
    assert short_name("model.layers.3.attn.Wqkv.weight") == "layer 3 attention query, key, value"
    assert short_name("model.layers.3.mlp.Wo.weight") == "layer 3 feed-forward out"
    assert short_name("model.embeddings.tok_embeddings.weight") == "embeddings word"
    assert short_name("bert.embeddings.word_embeddings.weight") == "embeddings word"
    assert len({short_name(name) for name, _ in model_of().named_parameters()}) == len(list(model_of().parameters()))


# Configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.architecture=roberta",), "model.architecture='roberta' is out of range: allowed is bert, modernbert"),
        (("model.local_attention=7",), "model.local_attention=7 is out of range: allowed is an even number"),
        (("model.local_attention=0",), "model.local_attention=0 is out of range: allowed is 2 to"),
        (("model.global_attention_every=0",), "model.global_attention_every=0 is out of range"),
        (("model.global_rope_theta=0",), "model.global_rope_theta=0.0 is out of range: allowed is 1 to 1e12"),
        (("model.local_rope_theta=NaN",), "model.local_rope_theta=nan is out of range"),
        (("phase_two.global_rope_theta=0.5",), "phase_two.global_rope_theta=0.5 is out of range"),
        (("model.hidden=6", "model.heads=2"), "makes heads of 3, and rotary positions turn pairs"),
        (
            ("model.attention=flash",),
            "model.attention='flash' is out of range: allowed is auto, sdpa, flash_attention_2",
        ),
    ],
)
def test_bad_values_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        check_ranges(config_of(*overrides))


@pytest.mark.parametrize(
    "given", ["model.local_attention=64", "model.global_rope_theta=10000", "phase_two.global_rope_theta=10000"]
)
def test_what_bert_has_no_use_for_is_refused(given):
    with pytest.raises(RecipeError, match="has no effect in BERT"):
        check_ranges(apply_overrides(get_preset("lamb-tiny"), [given]))


def test_another_architecture_brings_its_own_values():
    modern = config_of(
        "model.global_rope_theta=10000", "phase_two.global_rope_theta=160000", "model.max_positions=1024"
    )
    assert with_model_size(modern, "modernbert-base").model.max_positions == 1024
    bert = with_model_size(modern, "tiny")
    check_ranges(bert)
    assert bert.model == dataclasses.replace(ModelConfig(), max_positions=512)


def test_twins_stay_of_their_architecture():
    preset = get_preset("lamb-64k-32k")
    published = dataclasses.replace(preset, model=preset.model.of_size("modernbert-base"))
    small = twin(dataclasses.replace(PRESETS["lamb-64k-32k"], config=published), "tiny").config
    assert small.model == published.model.of_size("modernbert-tiny")
    assert (small.model.architecture, small.model.local_attention) == ("modernbert", 32)


def test_a_run_of_an_earlier_release_goes_on_as_it_was():
    new = (
        "architecture",
        "global_attention_every",
        "local_attention",
        "global_rope_theta",
        "local_rope_theta",
        "attention",
    )
    config = apply_overrides(get_preset("lamb-tiny"), ["phase_two.steps=3"])
    saved = config.to_dict()
    for name in new:
        del saved["model"][name]
    del saved["phase_two"]["global_rope_theta"]
    assert from_dict(saved) == config
    identity = _identity_of(config)
    assert set(identity["model"]) == set(saved["model"])
    assert "global_rope_theta" not in identity["phase_two"]
    modern = _identity_of(config_of("phase_two.steps=3", "phase_two.global_rope_theta=7"))
    assert set(modern["model"]) == {*saved["model"], *new} - {"attention"}
    assert modern["phase_two"]["global_rope_theta"] == 7.0


def test_attention_is_chosen_or_refused(monkeypatch):
    def on(device="cuda", installed=True):
        monkeypatch.setattr(
            "deepspeed.accelerator.get_accelerator", lambda: type("A", (), {"device_name": lambda _: device})()
        )
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)

    bf16, fp32 = "training.precision=bf16", "training.precision=fp32"
    flash = "model.attention=flash_attention_2"
    on()
    assert attention_of(config_of(bf16)) == "flash_attention_2"
    assert describe_attention(config_of(bf16)).startswith("attention by FlashAttention 2; windows of 32 tokens")
    assert attention_of(config_of(fp32)) == attention_of(config_of(bf16, "model.attention=sdpa")) == "sdpa"
    assert attention_of(apply_overrides(RecipeConfig(), [bf16])) == "sdpa"
    assert attention_of(apply_overrides(RecipeConfig(), [bf16, flash])) == "flash_attention_2"
    with pytest.raises(RecipeError, match="computes in 16 bits alone, and --precision is fp32; leave it at auto"):
        attention_of(config_of(fp32, flash))
    with pytest.raises(RecipeError, match="takes heads of at most 256 numbers"):
        attention_of(config_of(bf16, flash, "model.hidden=1024", "model.heads=2"))
    on(installed=False)
    assert attention_of(config_of(bf16)) == "sdpa"
    with pytest.raises(RecipeError, match="needs the package flash-attn, which is not installed"):
        attention_of(config_of(bf16, flash))
    on("cpu")
    assert describe_attention(config_of(bf16)).startswith("attention by torch's scaled_dot_product_attention; windows")
    assert describe_attention(RecipeConfig()) == "attention by torch's scaled_dot_product_attention"
    with pytest.raises(RecipeError, match="needs an NVIDIA or AMD GPU, and this run is on 'cpu'"):
        attention_of(config_of(bf16, flash))
