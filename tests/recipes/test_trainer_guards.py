"""What the Trainer was asked for and would not do is said before the first weight moves."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from trustratio.integrations.accelerate import ConflictingSettingsError, ReplacedOptimizerError
from trustratio.integrations.transformers import masked_language_modeling_loss, optimizer_for_trainer
from trustratio.optimizers import LAMB, LARS

from .test_trainer import rows, small_bert, trained

QUIET = {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "train_sampling_strategy": "sequential"}
LAMB_PAIR = {"optimizer_cls_and_kwargs": optimizer_for_trainer("lamb", lr=0.01)}


# The loss under accumulation ----------------------------------------------------------------------------------------


class MeanAgain(Trainer):
    """Computes a loss of its own, as many scripts do, and takes no notice of the number of items."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class MeanSaidSo(MeanAgain):
    loss_is_scaled_for_ga = False


class Handed(Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


SMOOTHED_BY_ITEMS = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
"""Not by transformers 5.14 and older."""


class Smoothing(Trainer):
    """As those: its smoothed loss is the mean of the micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        smoother = LabelSmoother(epsilon=self.args.label_smoothing_factor)
        self.label_smoother = lambda outputs, labels, num_items_in_batch=None: smoother(outputs, labels)


def mean_of_micro_batch(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())


class Dividing(torch.nn.Module):
    """A model of one's own whose loss is divided by the number of items."""

    def __init__(self):
        super().__init__()
        self.bert = small_bert()

    def forward(self, input_ids, labels, num_items_in_batch=None, **kwargs):
        outputs = self.bert(input_ids=input_ids)
        return {"loss": masked_language_modeling_loss(outputs, labels, num_items_in_batch)}


def readable(value: object) -> str:
    """A parameter's id: the same in every process, so without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))[:60]


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({}, "BertForMaskedLM"),
        ({"trainer_class": MeanAgain}, "MeanAgain.compute_loss"),
        ({"trainer_class": Handed}, "Handed.compute_loss"),
        ({"compute_loss_func": mean_of_micro_batch}, "compute_loss_func=mean_of_micro_batch"),
        ({"accumulation": 1}, None),
        ({"compute_loss_func": masked_language_modeling_loss}, None),
        ({"compute_loss_func": masked_language_modeling_loss, "trainer_class": Handed}, None),
        ({"trainer_class": MeanSaidSo}, None),
        ({"model": Dividing}, None),
        ({"arguments": {"label_smoothing_factor": 0.1}}, None if SMOOTHED_BY_ITEMS else "label_smoothing_factor=0.1"),
        ({"arguments": {"label_smoothing_factor": 0.1}, "trainer_class": Smoothing}, "label_smoothing_factor=0.1"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}, None),
    ],
    ids=readable,
)
def test_a_loss_that_is_too_large_by_the_accumulation_is_said_once(options, culprit, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(tmp_path, steps=2, **{"accumulation": 4, **LAMB_PAIR, **options})
    said = [str(warning.message) for warning in caught if "num_items_in_batch" in str(warning.message)]
    if culprit is None:
        assert said == []
    else:
        (sentence,) = said
        assert sentence.startswith(f"{culprit} does not divide its loss by num_items_in_batch")
        assert "about 4 times too large" in sentence
        assert "compute_loss_func=masked_language_modeling_loss" in sentence


def change_for_scripts():
    """The script before and after the change that docs/trainer.md shows."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "trainer.md").read_text()
    lines = text.split("```diff\n")[1].split("```")[0].splitlines()
    assert sum(line.startswith("+") for line in lines) == 2
    stock = [line[1:] for line in lines if not line.startswith("+")]
    return "\n".join(stock), "\n".join(line[1:] for line in lines)


def test_the_two_lines_of_the_documentation_repair_a_script(tmp_path):
    losses = []
    for script in change_for_scripts():
        training_args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=1, **QUIET
        )
        names = {"Trainer": Trainer, "model": small_bert(), "training_args": training_args, "train_dataset": rows()}
        exec(script, names)
        losses.append(names["trainer"].train().training_loss)
    assert losses[0] == pytest.approx(2 * losses[1], rel=0.1)


# Rates, decay and pairs ---------------------------------------------------------------------------------------------


def of_lamb(**options):
    return {"model": small_bert, "optimizers": lambda model: (LAMB(model.parameters(), **options), None)}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"learning_rate": 0.02}, LAMB_PAIR, r"learning_rate=0.02\) is not read .* LAMB has lr=0.01: write lr=0.02"),
        ({"learning_rate": 0.02}, {"optimizer_cls_and_kwargs": (LARS, {"lr": 0.5})}, "LARS has lr=0.5"),
        # The class's default is no more asked for than the Trainer's.
        ({"learning_rate": 0.02}, {"optimizer_cls_and_kwargs": (LAMB, {})}, "LAMB has lr=0.001: write lr=0.02"),
        ({"learning_rate": 0.02}, of_lamb(lr=0.01), "LAMB has lr=0.01"),
        ({"weight_decay": 0.3}, LAMB_PAIR, r"weight_decay=0.3\) is not read .* LAMB has weight_decay=0.01"),
        ({"learning_rate": 0.01}, LAMB_PAIR, None),
        ({"weight_decay": 0.01}, LAMB_PAIR, None),
        ({"weight_decay": 0.3}, {"optimizer_cls_and_kwargs": (LAMB, {"lr": 0.1})}, None),  # which the Trainer gives it
        ({"learning_rate": 0.02}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}, None),
        ({"learning_rate": 0.02, "lr_scheduler_type": "linear", "warmup_steps": 1}, of_lamb(lr=0.02), None),
    ],
    ids=readable,
)
def test_arguments_that_are_not_read_are_refused(arguments, options, message, tmp_path):
    options = {"compute_loss_func": masked_language_modeling_loss, "arguments": arguments, **options}
    if message is None:
        assert trained(tmp_path, **options).state.global_step == 1
        return
    with pytest.raises(ConflictingSettingsError, match=message):
        trained(tmp_path, **options)


class DividedByAccelerateToo(Trainer):
    """As from transformers 5.2 to 5.5."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps


@pytest.mark.parametrize("steps", [1, 2])
def test_a_loss_that_would_be_divided_twice_is_refused(steps, tmp_path):
    options = {"compute_loss_func": masked_language_modeling_loss, **LAMB_PAIR}
    options |= {"trainer_class": DividedByAccelerateToo, "accumulation": steps}
    if steps == 1:
        assert trained(tmp_path, **options).state.global_step > 0
        return
    with pytest.raises(ConflictingSettingsError, match=r"gradient_accumulation_steps=2, .* too small by a factor of 2"):
        trained(tmp_path, **options)


class OwnOptimizer(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        return self.optimizer


class OwnLamb(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = LAMB(self.model.parameters(), lr=0.5)
        return self.optimizer


class WithMore(Trainer):
    def create_optimizer(self, model=None):
        return super().create_optimizer() if model is None else super().create_optimizer(model)


@pytest.mark.parametrize("pair", [optimizer_for_trainer("lamb", lr=0.01), (LARS, {"lr": 0.01})], ids=["made", "plain"])
@pytest.mark.parametrize("trainer_class", [OwnOptimizer, OwnLamb])
def test_a_pair_that_nobody_calls_is_refused(trainer_class, pair, tmp_path):
    with pytest.raises(
        ReplacedOptimizerError, match=f"from {trainer_class.__name__}.create_optimizer, which overrides"
    ):
        trained(tmp_path, trainer_class=trainer_class, optimizer_cls_and_kwargs=pair)


def test_a_pair_that_an_override_passes_on_is_called(tmp_path):
    assert trained(tmp_path, trainer_class=WithMore, **LAMB_PAIR).state.global_step == 1
