"""The plug-ins of the Hugging Face Trainer in one process: loss under accumulation, pairs, logs, refusals."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

from trustratio.integrations.accelerate import ReplacedOptimizerError, layerwise_optimizer, refuse_replacement
from trustratio.integrations.transformers import (
    TrainerBackend,
    TrustRatioCallback,
    masked_language_modeling_loss,
    optimizer_for_trainer,
)
from trustratio.optimizers import LAMB, OPTIMIZERS, TrustRatio

transformers.logging.set_verbosity_error()


def rows(count=64):
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        ids = torch.randint(31, (8,), generator=generator)
        predicted = torch.rand(8, generator=generator) < (0.2 if number % 2 else 0.7)
        predicted[number % 8] = True
        found.append({"input_ids": ids, "labels": ids.flip(0).where(predicted, -100)})
    return found


def small_bert():
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=31, max_position_embeddings=8, **shape, **dropout))


class Recorder(TrainerCallback):
    """Stands for a reporting integration: it sees what every reporter sees."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, **kwargs):
        self.logs.append((state.global_step, dict(kwargs["logs"])))


def trained(
    folder,
    micro=8,
    accumulation=8,
    steps=1,
    callback=None,
    count=64,
    logging="steps",
    *,
    trainer_class=Trainer,
    model=small_bert,
    optimizers=None,
    arguments=None,
    **options,
):
    """Train on `count` rows, 64 per step unless told otherwise; the trainer."""
    model = model()
    if optimizers is not None:
        options["optimizers"] = optimizers(model)
    else:
        options.setdefault("optimizer_cls_and_kwargs", (torch.optim.SGD, {"lr": 0.5}))
    given = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "max_grad_norm": 1e9,  # so that the norm is logged and nothing is clipped
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_strategy": logging,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **(arguments or {}),
    }
    recorder = Recorder()
    data = rows(count)
    trainer = trainer_class(
        model, TrainingArguments(str(folder), **given), train_dataset=data, callbacks=[recorder], **options
    )
    if callback is not None:
        trainer.add_callback(callback(trainer))
    with contextlib.redirect_stdout(None):
        trainer.train()
    trainer.recorder = recorder
    return trainer


def outcome(trainer):
    """Return the first step's loss and gradient norm, and all weights."""
    logs = next(logs for _, logs in trainer.recorder.logs if "loss" in logs)
    return logs["loss"], logs["grad_norm"], torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_the_loss_does_not_depend_on_how_the_batch_is_cut_and_the_stock_one_does(tmp_path):
    cuts = {(64, 1), (8, 8), (1, 64)}
    repaired = {
        cut: outcome(trained(tmp_path, *cut, steps=3, compute_loss_func=masked_language_modeling_loss)) for cut in cuts
    }
    loss, norm, weights = repaired[64, 1]
    for found in repaired.values():
        assert found[0] == pytest.approx(loss, rel=1e-5)
        assert found[1] == pytest.approx(norm, rel=1e-5)
        assert torch.allclose(found[2], weights, rtol=1e-4, atol=1e-6)
    stock = {cut: outcome(trained(tmp_path, *cut)) for cut in cuts}
    # One micro-batch is right without help; with accumulation loss and gradient are too large by about its length.
    assert stock[64, 1][:2] == pytest.approx((loss, norm), rel=1e-5)
    for (_, accumulation), found in stock.items():
        assert found[0] == pytest.approx(accumulation * loss, rel=0.2)
    assert stock[8, 8][1] > 6 * norm
    assert stock[1, 64][1] > 40 * norm


def test_the_loss_outside_training_is_the_mean():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -100, 2], [-100, 4, 0]])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(masked_language_modeling_loss({"logits": logits}, labels), expected)
    assert masked_language_modeling_loss((logits,), torch.full((2, 3), -100)) == 0
    with pytest.raises(ValueError, match="needs a batch with `labels`"):
        masked_language_modeling_loss((logits,), None)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_class_works_and_the_callback_names_the_layers(name, tmp_path):
    trainer = trained(
        tmp_path,
        steps=2,
        callback=lambda trainer: TrustRatioCallback(trainer, noise=True),
        compute_loss_func=masked_language_modeling_loss,
        optimizer_cls_and_kwargs=(OPTIMIZERS[name].optimizer_class, {"lr": 0.01, "adapt": None}),
    )
    names = {layer for layer, _ in trainer.model.named_parameters()}
    assert set(layerwise_optimizer(trainer.optimizer).trust_ratios()) == names
    logged = [logs for _, logs in trainer.recorder.logs]
    assert sum("loss" in logs for logs in logged) == 2
    assert sum("trust_ratio/min" in logs and "gradient_noise/scale" in logs for logs in logged) == 2


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.Rprop])
def test_trust_ratio_as_a_plain_class_and_by_name(base, tmp_path):
    pairs = [
        (TrustRatio, {"base_class": base, "lr": 0.01}),
        optimizer_for_trainer("trust_ratio", base_class=base, lr=0.01),
    ]
    if base is torch.optim.AdamW:
        pairs[1][1]["weight_decay"] = 0.0  # as the Trainer gives the other
    one, other = (
        trained(tmp_path, compute_loss_func=masked_language_modeling_loss, optimizer_cls_and_kwargs=pair)
        for pair in pairs
    )
    assert [*layerwise_optimizer(one.optimizer).trust_ratios().values()] != [1.0] * len(list(one.model.parameters()))
    for weights, wanted in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(weights, wanted)


def test_what_the_callback_logs(tmp_path):
    trainer = trained(
        tmp_path,
        steps=2,
        callback=lambda trainer: TrustRatioCallback(trainer, per_layer=True),
        compute_loss_func=masked_language_modeling_loss,
        optimizer_cls_and_kwargs=optimizer_for_trainer("lamb", lr=0.01, weight_decay=0.1),
    )
    optimizer = layerwise_optimizer(trainer.optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    ratios = optimizer.trust_ratios()
    logs = next(logs for step, logs in trainer.recorder.logs if step == 2 and "trust_ratio/min" in logs)
    for layer, ratio in ratios.items():
        assert logs[f"trust_ratio/{layer}"] == ratio
    matrices = [ratios[layer] for layer, p in trainer.model.named_parameters() if p.dim() > 1]
    assert logs["trust_ratio/min"] == pytest.approx(min(matrices))
    assert logs["trust_ratio/max"] == pytest.approx(max(matrices))
    assert min(matrices) <= logs["trust_ratio/median"] <= max(matrices)
    assert logs["trust_ratio/max"] != 1.0
    assert any("trust_ratio/min" in entry for entry in trainer.state.log_history)


def logging_lamb(folder, noise=True, **options):
    return trained(
        folder,
        callback=lambda trainer: TrustRatioCallback(trainer, noise=noise),
        compute_loss_func=masked_language_modeling_loss,
        optimizer_cls_and_kwargs=optimizer_for_trainer("lamb", lr=0.01),
        **options,
    )


def test_the_callback_logs_once_per_epoch_if_the_trainer_does(tmp_path):
    trainer = logging_lamb(tmp_path, steps=4, accumulation=4, logging="epoch")
    steps = [step for step, logs in trainer.recorder.logs if "trust_ratio/min" in logs]
    assert steps == [step for step, logs in trainer.recorder.logs if "loss" in logs] == [2, 4]


def test_noise_of_a_single_micro_batch_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"there is 1 \(gradient_accumulation_steps=1 x 1 rank\): halve"):
        logging_lamb(tmp_path, accumulation=1)


def test_a_short_step_at_the_end_of_an_epoch_has_no_noise(tmp_path):
    trainer = logging_lamb(tmp_path, steps=2, count=72)  # 9 micro-batches, so that the second step has one of 8
    noise = {step: "gradient_noise/scale" in logs for step, logs in trainer.recorder.logs if "trust_ratio/min" in logs}
    assert noise == {1: True, 2: False}


def test_a_callback_without_trainer_is_told_what_to_do():
    with pytest.raises(TypeError, match=r"given NoneType: .* call trainer.add_callback\(TrustRatioCallback\(trainer"):
        TrustRatioCallback()


def test_unknown_names_and_options_are_refused_before_training():
    with pytest.raises(ValueError, match="nearest: lamb"):
        optimizer_for_trainer("lam", lr=0.1)
    with pytest.raises(ValueError, match="has no option 'weight_dekay'; nearest: weight_decay"):
        optimizer_for_trainer("lamb", weight_dekay=0.1)
    with pytest.raises(ValueError, match="lr"):
        optimizer_for_trainer("lamb", lr=-1.0)
    with pytest.raises(ValueError, match="lr must be given"):
        optimizer_for_trainer("lars")
    with pytest.raises(ValueError, match="trust_ratio needs the option base_class"):
        optimizer_for_trainer("trust_ratio", lr=0.1)
    with pytest.raises(ValueError, match="'beta'; nearest: betas"):
        optimizer_for_trainer("trust_ratio", base_class=torch.optim.AdamW, lr=0.1, beta=0.9)


def test_the_callback_refuses_another_optimizer(tmp_path):
    with pytest.raises(ReplacedOptimizerError, match="SGD steps, which is no optimizer of trustratio"):
        trained(tmp_path, callback=TrustRatioCallback)


def test_a_trainer_that_is_given_the_optimizer_itself(tmp_path):
    """Nothing drops it without DeepSpeed, and a subclass may hold on to it."""
    model_optimizers = []

    class Holding(Trainer):
        def create_optimizer(self, model=None):
            model_optimizers.append(LAMB(self.model.parameters(), lr=0.01))
            self.optimizer = model_optimizers[-1]
            return self.optimizer

    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True)
    with contextlib.redirect_stdout(None):
        Holding(small_bert(), arguments, train_dataset=rows()).train()
    assert model_optimizers[0].state


def test_groups_in_another_optimizer_are_told_from_wrappers():
    lamb = LAMB([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
    refuse_replacement(lamb)
    refuse_replacement(torch.optim.Adam([torch.nn.Parameter(torch.ones(2, 2))]))
    taken = torch.optim.Adam(lamb.param_groups)
    taken.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    with pytest.raises(ReplacedOptimizerError, match="Adam was made from the parameter groups"):
        taken.step()
    assert torch.equal(lamb.param_groups[0]["params"][0].detach(), torch.ones(2, 2))


def test_an_optimizer_that_has_loaded_our_state_has_not_taken_our_place():
    weights = torch.nn.Parameter(torch.ones(2, 2))
    weights.grad = torch.ones(2, 2)
    lamb = LAMB([weights], lr=0.1)
    lamb.step()
    adam = torch.optim.Adam([weights], lr=0.1)
    adam.load_state_dict(lamb.state_dict())
    before = weights.detach().clone()
    adam.step()
    assert not torch.equal(weights, before)


LATE_IMPORT = """
import sys
import torch
from trustratio.optimizers import LAMB

assert not {"accelerate", "transformers"} & set(sys.modules)
lamb = LAMB([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
model = torch.nn.Linear(2, 2)
dropped = LAMB(model.parameters(), lr=0.1)
from transformers import Trainer, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

assert "trustratio.integrations.accelerate" not in sys.modules
trainer = Trainer(model, TrainingArguments(use_cpu=True, report_to=[]), optimizers=(dropped, None))
# What deepspeed_init does: the optimizer is forgotten, and another one steps copies of the parameters.
adam = torch.optim.AdamW([torch.nn.Parameter(torch.ones(4))], lr=0.1)
trainer.optimizer = trainer.callback_handler.optimizer = adam
del dropped
taken = torch.optim.Adam(lamb.param_groups)
unrelated = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
for optimizer in (adam, taken, unrelated, lamb):
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    before = parameter.detach().clone()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert torch.equal(parameter, before)
        print(f"{type(error).__name__}: {error}")
    else:
        print(type(optimizer).__name__)
print([callback.__name__ for callback in DEFAULT_CALLBACKS].count("DroppedOptimizerGuard"))
"""


def test_replaced_optimizers_are_noticed_where_the_trainer_is_imported_after_ours_was_constructed():
    found = subprocess.run(
        [sys.executable, "-W", "error:trustratio", "-c", LATE_IMPORT], capture_output=True, text=True, timeout=120
    )
    dropped, taken, unrelated, ours, guards = found.stdout.splitlines() or found.stderr
    assert dropped.startswith("ReplacedOptimizerError: the Trainer was given LAMB but would train with AdamW"), dropped
    assert taken.startswith("ReplacedOptimizerError: Adam was made from the parameter groups"), taken
    assert (unrelated, ours, guards) == ("SGD", "LAMB", "1")
    assert "trustratio cannot use" not in found.stderr


def test_a_trainer_that_steps_with_its_optimizer_of_ours_is_left_in_peace(tmp_path):
    model = torch.nn.Linear(2, 2)
    lamb = LAMB(model.parameters(), lr=0.1)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), optimizers=(lamb, None))
    backend = TrainerBackend()
    backend.before_step(lamb)
    backend.before_step(torch.optim.SGD(model.parameters(), lr=0.1))
    lamb.zero_grad()
    lamb.step()
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # chosen after training with the first
    backend.before_step(trainer.optimizer)
