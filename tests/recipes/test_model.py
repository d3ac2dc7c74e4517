"""The gathered head, and the gradient of a global batch however it is cut."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForMaskedLM

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.configuration.config import ModelConfig, OptimizerConfig, RecipeConfig
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.data.rows import MaskedRows
from trustratio.recipes.model.build import build_parts
from trustratio.recipes.model.masked_language_model import build_model, first_rows, padded_vocabulary, stock_model
from trustratio.recipes.model.optimizer import build_optimizer, parameter_groups
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.training.loop import accumulate_step, seed_step, validate
from trustratio.recipes.training.session import special_tokens_of, vocabulary_rows_of

TINY = ModelConfig(layers=2, hidden=16, heads=2, intermediate=32, max_positions=32)


class RankOfMany:
    """One of several simulated ranks that share a model in one process: gradients add up in the parameters."""

    device = torch.device("cpu")

    def __init__(self, model, rank, ranks, masked_tokens):
        self.model, self.rank, self.ranks, self.masked_tokens = model, rank, ranks, masked_tokens

    def begin_micro_batch(self, last):
        pass

    def loss(self, batch):
        return self.model(batch.input_ids, batch.positions, batch.labels)

    def backward(self, loss):
        loss.backward()

    def step(self):
        pass

    def train(self, training):
        self.model.train(training)

    def sum_over_ranks(self, values):
        return torch.tensor([self.masked_tokens, 0.0], dtype=torch.float64) if len(values) == 2 else values


def gradient(rows, vocabulary, plan):
    torch.manual_seed(0)
    model = build_model(TINY, 104)
    masked = MaskedRows(rows, vocabulary, 0.3, seed=7)
    shares = [masked.step_batches(0, plan, rank) for rank in range(plan.ranks)]
    tokens = sum(len(batch.labels) for share in shares for batch in share)
    losses = [
        accumulate_step(RankOfMany(model, rank, plan.ranks, tokens), share, False)[0]
        for rank, share in enumerate(shares)
    ]
    return sum(losses), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("plan", [BatchPlan(8, 8, 1), BatchPlan(1, 64, 1), BatchPlan(8, 4, 2), BatchPlan(2, 4, 8)])
def test_the_gradient_does_not_depend_on_micro_batch_and_ranks(rows, vocabulary, plan):
    loss, expected = gradient(rows, vocabulary, BatchPlan(64, 1, 1))
    other_loss, other = gradient(rows, vocabulary, plan)
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
    scale = max(g.abs().max() for g in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(other[name], grad, rtol=2e-5, atol=1e-6 * scale.item())


def test_a_mean_of_means_would_give_another_gradient(rows, vocabulary):
    """The test above can fail: micro-batches have different numbers of masked tokens."""
    batches = MaskedRows(rows, vocabulary, 0.3, seed=7).step_batches(0, BatchPlan(1, 64, 1), 0)
    torch.manual_seed(0)
    model = build_model(TINY, 104)
    losses = [model(b.input_ids, b.positions, b.labels)[0] for b in batches]
    counts = [len(b.labels) for b in batches]
    right = sum(losses) / sum(counts)
    wrong = sum(loss / count for loss, count in zip(losses, counts, strict=True)) / len(batches)
    assert abs(right - wrong) / right > 1e-5


def test_gathering_first_gives_the_loss_of_the_full_head(rows, vocabulary):
    torch.manual_seed(0)
    model = build_model(TINY, 104)
    stock = BertForMaskedLM(model.config)
    stock.load_state_dict(model.state_dict())
    (batch,) = MaskedRows(rows, vocabulary, 0.3, seed=7).step_batches(0, BatchPlan(32, 1, 1), 0)
    loss, correct = model(batch.input_ids, batch.positions, batch.labels)
    labels = torch.full((batch.input_ids.numel(),), -100)
    labels[batch.positions] = batch.labels
    full = stock(input_ids=batch.input_ids, labels=labels.view_as(batch.input_ids))
    torch.testing.assert_close(loss / len(batch.labels), full.loss, rtol=1e-6, atol=0)
    predicted = full.logits.reshape(-1, 104)[batch.positions].argmax(-1)
    assert int(correct) == int((predicted == batch.labels).sum())


def test_a_batch_without_masked_tokens_gives_zero_loss_and_gradient(rows):
    model = build_model(TINY, 104)
    empty = torch.empty(0, dtype=torch.int64)
    loss, _ = model(torch.from_numpy(rows[:2].astype("int64")), empty, empty)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_validation_counts_every_masked_token_once(rows, vocabulary):
    torch.manual_seed(0)
    model = build_model(TINY, 104)
    batches = MaskedRows(rows, vocabulary, 0.3, seed=7).validation_batches(8, 0, 1, limit=30)
    loss, accuracy = validate(RankOfMany(model, 0, 1, 0), batches)
    (whole,) = MaskedRows(rows, vocabulary, 0.3, seed=7).validation_batches(30, 0, 1, limit=30)
    logits = model.cls(model.bert(whole.input_ids).last_hidden_state.reshape(-1, 16)[whole.positions])
    assert loss == pytest.approx(F.cross_entropy(logits, whole.labels).item(), rel=1e-6)
    assert accuracy == pytest.approx((logits.argmax(-1) == whole.labels).double().mean().item())
    assert model.training


def test_attention_is_sdpa_and_the_head_is_tied():
    model = build_model(TINY, 104)
    assert model.config._attn_implementation == "sdpa"
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_the_vocabulary_is_padded_to_a_multiple_of_sixty_four():
    assert [padded_vocabulary(n) for n in (1, 64, 65, 8192, 28996, 30522)] == [64, 64, 128, 8192, 29056, 30528]


@pytest.mark.parametrize(
    ("saved", "rows"),
    [
        (None, 29056),  # a run that begins
        ({}, 29000),  # a checkpoint of an earlier release
        ({"vocabulary_rows": 29056}, 29056),
        ({"vocabulary_rows": 29000}, 29000),
    ],
)
def test_a_resumed_run_keeps_its_rows(saved, rows):
    run = SimpleNamespace(config=SimpleNamespace(model=TINY), saved_identity=saved)
    assert vocabulary_rows_of(run, SimpleNamespace(vocabulary_size=28996)) == rows


@pytest.mark.parametrize(("rows", "expected"), [(104, 104), (128, 128), (96, 128)])
def test_initial_weights_keep_the_rows_of_an_earlier_release(tmp_path, rows, expected):
    build_model(TINY, rows).save_pretrained(tmp_path)
    overrides = [
        "model.hidden=16",
        "model.intermediate=32",
        "model.max_positions=32",
        f"model.initial_weights={tmp_path}",
    ]
    config = apply_overrides(RecipeConfig(), overrides)
    assert first_rows(config.model, 100) == expected
    if rows == expected:
        assert build_parts(config, 100).model.config.vocab_size == rows
        return
    with pytest.raises(RecipeError, match="does not fit the model of this run"):
        build_parts(config, 100)


def test_rows_of_initial_weights_that_cannot_be_read_are_the_usual_ones(tmp_path):
    shape = dataclasses.replace(TINY, initial_weights=str(tmp_path))
    assert first_rows(shape, 100) == 128
    for content in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(content)
        assert first_rows(shape, 100) == 128


def test_rows_may_be_given():
    assert build_parts(RecipeConfig(), 100, rows=104).model.config.vocab_size == 104


def test_dropout_draws_depend_on_seed_step_and_rank():
    def draw(*key):
        seed_step(*key)
        return torch.rand(3).tolist()

    assert draw(1, 5, 0) == draw(1, 5, 0)
    assert len({tuple(draw(*key)) for key in ((1, 5, 0), (2, 5, 0), (1, 6, 0), (1, 5, 1))}) == 4


def test_biases_and_norm_weights_get_no_weight_decay():
    model = build_model(TINY, 104)
    decayed, undecayed = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    assert all("LayerNorm" in name or name.endswith("bias") for name, _ in undecayed["params"])
    assert all(name.endswith("weight") and "LayerNorm" not in name for name, _ in decayed["params"])
    assert len(decayed["params"]) + len(undecayed["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["lamb", "LARS", "lambc", "adamw", "sgd"])
def test_optimizers_are_built_by_name(name):
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=0.02), build_model(TINY, 104))
    assert type(optimizer).__name__.lower() == name.lower()
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, 0.02]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]


def test_refused_optimizer_options_are_named():
    model = build_model(TINY, 104)
    built = build_optimizer(OptimizerConfig(options={"betas": [0.8, 0.9]}), model)
    assert built.param_groups[0]["betas"] == (0.8, 0.9)
    with pytest.raises(RecipeError, match="optimizer 'lamb' refused its options"):
        build_optimizer(OptimizerConfig(options={"no_such_option": 1}), model)
    with pytest.raises(RecipeError, match="optimizer 'adamw' refused its options"):
        build_optimizer(OptimizerConfig(name="adamw", options={"trust_clip": 1}), model)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("adamw", {"betas": ""}, "betas must be 2 numbers, got ''"),
        ("adamw", {"betas": [0.9]}, r"betas must be 2 numbers, got \(0.9,\)"),
        ("adamw", {"betas": {"a": 1}}, "betas must be 2 numbers, got {'a': 1}"),
        ("adamw", {"betas": ["a", "b"]}, "betas must be 2 numbers"),
        ("adamw", {"eps": True}, "eps must be a number, got True"),
        ("adamw", {"maximize": "no"}, "maximize must be True or False, got 'no'"),
        ("adamw", {"fused": "x"}, "fused must be True or False, got 'x'"),
        ("sgd", {"momentum": "x"}, "momentum must be a number, got 'x'"),
        ("sgd", {"momentum": 0.9, "nesterov": "no"}, "nesterov must be True or False, got 'no'"),
    ],
)
def test_options_of_the_baselines_are_of_the_kinds_of_their_defaults(name, options, named):
    """Torch would take any text for True."""
    with pytest.raises(RecipeError, match=f"optimizer '{name}' refused its options .*: {named}"):
        build_optimizer(OptimizerConfig(name=name, options=options), build_model(TINY, 104))


def test_options_of_the_baselines_are_passed_on():
    options = {"betas": [0.8, 0.9], "eps": 1, "fused": None, "foreach": True, "amsgrad": True}
    built = build_optimizer(OptimizerConfig(name="adamw", options=options), build_model(TINY, 104))
    assert {name: built.param_groups[0][name] for name in options} == {**options, "betas": (0.8, 0.9)}


def parts_of(*overrides):
    config = apply_overrides(RecipeConfig(), ["model.hidden=16", "model.intermediate=32", *overrides])
    return build_parts(config, 104)


def gradients_of(parts, rows, vocabulary):
    (batch,) = MaskedRows(rows, vocabulary, 0.3, seed=7).step_batches(0, BatchPlan(8, 1, 1), 0)
    seed_step(1, 0, 0)
    parts.model.train()
    loss, _ = parts.model(batch.input_ids, batch.positions, batch.labels)
    loss.backward()
    return [p.grad for p in parts.model.parameters()]


def test_activation_checkpointing_gives_the_same_gradient_with_dropout(rows, vocabulary):
    plain = gradients_of(parts_of("model.dropout=0.1"), rows, vocabulary)
    parts = parts_of("model.dropout=0.1", "training.activation_checkpointing=true")
    assert parts.model.is_gradient_checkpointing
    for expected, found in zip(plain, gradients_of(parts, rows, vocabulary), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_initial_weights_are_loaded_or_refused(tmp_path):
    saved = parts_of("training.seed=5").model
    saved.save_pretrained(tmp_path)
    loaded = parts_of(f"model.initial_weights={tmp_path}").model
    for (name, one), other in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(RecipeError, match="does not fit the model of this run"):
        parts_of(f"model.initial_weights={tmp_path}", "model.intermediate=64")
    with pytest.raises(RecipeError, match="'/no/folder' is not a folder"):
        parts_of("model.initial_weights=/no/folder")


@pytest.mark.parametrize("padding", [0, 1, None])
def test_the_padding_is_that_of_the_tokenizer(padding):
    """It begins at zero and gets no gradient as input; every other token, the first one too, does."""
    torch.manual_seed(0)
    model = build_model(TINY, 104, {"cls": 2, "sep": 3, "pad": padding}).double()
    assert model.config.pad_token_id == stock_model(model).config.pad_token_id == padding
    rows = model.get_input_embeddings().weight
    assert [row for row in range(104) if not rows[row].any()] == ([] if padding is None else [padding])
    tokens = torch.arange(104)[None, : TINY.max_positions]
    hidden = model.hidden_states(tokens)
    (gradient,) = torch.autograd.grad(hidden.square().sum() + hidden.sin().sum(), rows)
    assert [row for row in tokens[0].tolist() if not gradient[row].any()] == ([] if padding is None else [padding])


def test_a_vocabulary_of_bert_keeps_its_bits():
    models = []
    for special in (None, {"cls": 2, "sep": 3, "pad": 0}):
        torch.manual_seed(0)
        models.append(build_model(TINY, 104, special))
    assert models[0].config.to_dict() == models[1].config.to_dict()
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("architecture", "saved", "padding"),
    [
        ("bert", None, 1),  # a run that begins
        ("bert", {}, 0),  # a checkpoint of an earlier release
        ("bert", {"pad_token_id": 1}, 1),
        ("bert", {"pad_token_id": None}, None),
        ("modernbert", {}, 1),  # which always had the tokenizer's
    ],
)
def test_a_resumed_run_keeps_its_padding(architecture, saved, padding):
    tokens = {"cls": 0, "sep": 2, "mask": 4, "pad": 1, "unk": 3}
    config = SimpleNamespace(model=dataclasses.replace(TINY, architecture=architecture))
    run = SimpleNamespace(config=config, saved_identity=saved)
    assert special_tokens_of(run, SimpleNamespace(special_tokens=lambda: tokens)) == {**tokens, "pad": padding}
