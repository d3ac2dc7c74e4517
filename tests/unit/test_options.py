"""Options of every optimizer: kinds of numbers, who may write them when, and keys that are none."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LAMBC, LARS, OPTIMIZERS, create_optimizer

from .test_torch_contract import backward, same, train, values, weights

np = pytest.importorskip("numpy")

pytestmark = pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")
all_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)

COMMON = ("adapt", "segments", "maximize", "implementation", "foreach", "fused", "capturable", "differentiable")
PAIRS = ("betas", "trust_bounds")
COUNTS = ("keep", "rounding_seed")
A_NUMBER = {"max_grad_norm": 1.0, "lr": 0.5}
"""Of options whose default is none."""


def numeric_options(name: str) -> dict[str, float | tuple[float, ...]]:
    """An allowed value of every option that is a number or a pair of them."""
    parameters = inspect.signature(OPTIMIZERS[name].optimizer_class).parameters
    defaults = {option: A_NUMBER.get(option, p.default) for option, p in parameters.items()}
    return {
        option: default
        for option, default in defaults.items()
        if option not in COMMON and (option in PAIRS or (isinstance(default, int | float) and default is not True))
        if not isinstance(default, bool) and option not in COUNTS
    }


KINDS: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "array": np.array,
    "tensor": torch.tensor,
    "with gradient": lambda number: torch.tensor(number, dtype=torch.float64, requires_grad=True),
    "one element": lambda number: torch.tensor([number]),
    "decimal": Decimal,
    "fraction": lambda number: Fraction(number) if math.isfinite(number) else number,
    "int": lambda number: int(number) if number == number and abs(number) < math.inf else number,
    "numpy int": lambda number: np.int64(number) if abs(number) < math.inf else number,
}


@all_optimizers
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_other_kinds_become_floats(name: str, kind: str) -> None:
    for option, value in numeric_options(name).items():
        if "int" in kind and option not in ("lr", "max_grad_norm", "eps", "weight_decay", "trust_coefficient"):
            continue
        if "int" in kind:
            value = 1.0
        given = tuple(map(KINDS[kind], value)) if isinstance(value, tuple) else KINDS[kind](value)
        optimizer = create_optimizer(name, weights().values(), **{"lr": 0.1, option: given})
        for kept in (optimizer.param_groups[0][option], optimizer.defaults[option]):
            if option == "lr" and isinstance(given, torch.Tensor):
                assert kept is given
            elif isinstance(value, tuple):
                assert [type(number) for number in kept] == [float, float]
                assert kept == pytest.approx(value, rel=1e-6)
            else:
                assert type(kept) is float
                assert kept == pytest.approx(value, rel=1e-6)


def refused(value: Any) -> list[tuple[Any, str]]:
    """What is no number, with a part of the message."""
    return [
        ("6e-3", r"'6e-3', which is text: write 0\.006"),
        ("fast", "'fast', which is text"),
        (True, "True"),
        (math.nan, "nan"),
        (complex(value, 1.0), "1j"),
        ([value], "without brackets"),
        (np.array([value]), "got"),
        (torch.tensor(value, device="meta"), "got tensor"),
        (object(), "object"),
        (torch.tensor([value, value]), "got"),
    ]


@all_optimizers
def test_what_is_no_number_is_refused_by_name(name: str) -> None:
    for option, value in numeric_options(name).items():
        first = value[0] if isinstance(value, tuple) else value
        for bad, message in refused(first):
            given = (bad, value[1]) if isinstance(value, tuple) else bad
            if option == "betas" and isinstance(bad, torch.Tensor) and bad.numel() == 2:
                continue
            with pytest.raises(ValueError, match=f"(?s){option}.*{message}"):
                create_optimizer(name, weights().values(), **{"lr": 0.1, option: given})
            with pytest.raises(ValueError, match=f"(?s){option}.*{message}"):
                create_optimizer(name, [{"params": [layer], option: given} for layer in weights().values()], lr=0.1)
    with pytest.raises(ValueError, match="lr must be given, to the constructor or to every group"):
        create_optimizer(name, weights().values(), lr=None)
    with pytest.raises(ValueError, match="lr must be given"):
        create_optimizer(name, [{"params": [layer], "lr": None} for layer in weights().values()], lr=None)


@pytest.mark.parametrize("betas", ["09", ("0.9", 0.99), [0.9], {0.9, 0.99}, {"beta1": 0.9, "beta2": 0.99}, None, 0.9])
def test_betas_that_are_none(betas: Any) -> None:
    with pytest.raises(ValueError, match="betas"):
        LAMB(weights().values(), betas=betas)


@pytest.mark.parametrize(
    "betas", [[0.5, 0.75], np.array([0.5, 0.75]), torch.tensor([0.5, 0.75]), (Fraction(1, 2), 0.75)]
)
def test_betas_of_any_sequence(betas: Any) -> None:
    assert LAMB(weights().values(), betas=betas).param_groups[0]["betas"] == (0.5, 0.75)


def test_flags_and_counts_of_other_kinds() -> None:
    optimizer = LARS([("w", torch.nn.Parameter(torch.ones(4, 2)))], lr=1, nesterov=np.bool_(True), segments=np.int64(2))
    assert optimizer.param_groups[0]["nesterov"] is True
    assert type(optimizer.param_groups[0]["segments"]) is int


# Options that are assigned later ------------------------------------------------------------------------------------


@all_optimizers
def test_what_is_assigned_later_is_checked_by_the_next_step(name: str) -> None:
    for option, value in numeric_options(name).items():
        layers = weights()
        optimizer = create_optimizer(name, layers.values(), lr=0.1)
        train(optimizer, layers, 0)
        before = values(layers)
        for bad, message in refused(0.5)[:5]:
            kept = optimizer.param_groups[0][option]
            optimizer.param_groups[0][option] = (bad, 0.5) if isinstance(value, tuple) else bad
            optimizer.zero_grad()
            backward(layers, 1)
            with pytest.raises(ValueError, match=f"(?s)group 0: {option}.*{message}"):
                optimizer.step()
            assert same(values(layers), before)
            optimizer.param_groups[0][option] = kept
        kind = (np.float64, Decimal)[len(option) % 2]
        optimizer.param_groups[0][option] = tuple(map(kind, value)) if isinstance(value, tuple) else kind(value)
        train(optimizer, layers, 2)
        assert optimizer.param_groups[0][option] == value
        assert type(optimizer.param_groups[0][option]) is type(value if isinstance(value, tuple) else 0.5)


@all_optimizers
def test_a_lacking_option_is_an_error_by_name(name: str) -> None:
    layers = weights()
    optimizer = create_optimizer(name, layers.values(), lr=0.1)
    del optimizer.param_groups[0]["weight_decay"]
    with pytest.raises(ValueError, match="group 0: the group must have the options weight_decay"):
        train(optimizer, layers, 0)


def test_a_rate_on_another_device_is_not_waited_for() -> None:
    """What stands for a device here holds no numbers, so a look at it would fail."""
    layers = weights()
    optimizer = LAMB(layers.values(), lr=0.1)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    optimizer._options.check_changes(optimizer)


@all_optimizers
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_of_one_rate(name: str, shape: tuple[int, ...]) -> None:
    one, other = weights(), weights()
    train(create_optimizer(name, one.values(), lr=torch.full(shape, 0.5, requires_grad=True)), one, 0, 1)
    train(create_optimizer(name, other.values(), lr=0.5), other, 0, 1)
    for layer in one:
        torch.testing.assert_close(one[layer], other[layer], rtol=1e-6, atol=1e-7)


# Options that all have ----------------------------------------------------------------------------------------------


@all_optimizers
def test_options_of_torch_that_change_no_number(name: str) -> None:
    plain = weights()
    train(create_optimizer(name, plain.values(), lr=0.1), plain, 0, 1)
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}, {"capturable": True}):
        layers = weights()
        optimizer = create_optimizer(name, layers.values(), lr=0.1, **options)
        train(optimizer, layers, 0, 1)
        assert same(values(layers), values(plain))
        assert {key: optimizer.param_groups[0][key] for key in options} == options
    with pytest.raises(ValueError, match="differentiable must be False, got True: a step changes weights and state in"):
        create_optimizer(name, weights().values(), lr=0.1, differentiable=True)


@all_optimizers
def test_signatures_and_defaults_have_the_common_options(name: str) -> None:
    cls = OPTIMIZERS[name].optimizer_class
    assert set(COMMON) < set(inspect.signature(cls).parameters)
    assert set(COMMON) < set(OPTIMIZERS[name].defaults)
    optimizer = cls(weights().values(), lr=0.1)
    assert set(optimizer.defaults) == set(inspect.signature(cls).parameters) - {"params"}
    assert set(optimizer.defaults) - {"implementation"} < set(optimizer.param_groups[0])
    assert "implementation" not in optimizer.param_groups[0]
    optimizer.implementation = "eager"
    assert cls(weights().values(), **optimizer.defaults).implementation == "eager"
    with pytest.raises(ValueError, match="implementation is an option of the whole optimizer"):
        cls([{"params": layer, "implementation": "cpu"} for layer in weights().values()], lr=0.1)


def test_a_class_of_a_user() -> None:
    class Mine(LARS):
        def __init__(self, params: Any, lr: float, mine: int = 3, **options: Any):
            super().__init__(params, lr, **options)

    assert list(inspect.signature(Mine).parameters) == ["params", "lr", "mine", "options"]
    assert Mine(weights().values(), 1, adapt=True).param_groups[0]["adapt"] is True
    with pytest.raises(TypeError, match=r"Mine\(\) got an unexpected keyword argument 'adpat'"):
        Mine(weights().values(), 1, adpat=True)


def test_the_bound_of_lambc_is_an_option_of_its_groups() -> None:
    one, other = weights(), weights()
    clipped = LAMBC([{"params": one["matrix"], "trust_clip": 0.25}, {"params": one["bias"]}, {"params": one["other"]}])
    bounded = LAMB([{"params": other["matrix"], "trust_bounds": (0.0, 0.25)}, {"params": other["bias"]}])
    bounded.add_param_group({"params": other["other"], "trust_bounds": (0.0, 1.0)})
    train(clipped, one, 0)
    train(bounded, other, 0)
    assert clipped.trust_ratios()["0.0"] == 0.25
    assert same(values(one), values(other))
    older = copy.deepcopy(clipped.state_dict())
    for group in older["param_groups"]:
        group["trust_bounds"] = (0.0, 2 * group.pop("trust_clip"))
    clipped.load_state_dict(older)
    assert [group["trust_clip"] for group in clipped.param_groups] == [0.5, 2.0, 2.0]
    assert "trust_bounds" not in clipped.param_groups[0]


# Keys ---------------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, str, Any, str]] = [
    ("lars", "lerning_rate", 1, "nearest: lr"),
    ("lars", "learning_rate", 1, "nearest: lr"),
    ("lamb", "LR", 1, "nearest: lr"),
    ("lamb", "weightdecay", 0.1, "nearest: weight_decay"),
    ("lamb", "weight-decay", 0.1, "nearest: weight_decay"),
    ("lamb", "wd", 0.1, "nearest: weight_decay"),
    ("lamb", "beta1", 0.1, "nearest: betas"),
    ("lars", "maximise", True, "nearest: maximize"),
    ("lars", "momentun", 0.5, "nearest: momentum"),
    ("lars", "trust_coeff", 0.1, "nearest: trust_coefficient"),
    ("lars", "lars_adaptation_filter", True, "adapt=False"),
    ("lars", "lars_exclude", True, "adapt=False"),
    ("lars", "layer_adaptation", False, "adapt=False"),
    ("lars", "trust_clip", True, "trust_bounds"),
    ("lars", "trust_clip", 1.0, "trust_bounds"),
    ("lars", "betas", (0.9, 0.99), "an option of"),
    ("lamb", "momentum", 0.9, "an option of"),
    ("lamb", "gsnr_floor", 0.9, "an option of VR"),
    ("lamb", "amsgrad", True, "largest second moment"),
    ("lamb", "max_coeff", 10.0, "trust_bounds"),
]


@pytest.mark.parametrize(("name", "key", "value", "message"), MISTAKES)
def test_keys_that_are_mistakes(name: str, key: str, value: Any, message: str) -> None:
    layers = weights()
    with pytest.raises(ValueError, match=f"(?s)no group option '{key}'.*{message}"):
        create_optimizer(name, [{"params": [layer], key: value} for layer in layers.values()], lr=0.1)
    optimizer = create_optimizer(name, [layers["matrix"]], lr=0.1)
    with pytest.raises(ValueError, match=f"'{key}'"):
        optimizer.add_param_group({"params": [layers["bias"]], key: value})
    assert len(optimizer.param_groups) == 1


PASSING: dict[str, Any] = {
    **{"initial_lr": 0.1, "max_lr": 1.0, "min_lr": 0.0, "base_momentum": 0.8, "max_momentum": 0.9, "swa_lr": 0.1},
    **{"name": "decayed", "step": 0, "wd_mult": 0.0, "lr_mult": 1.0, "lr_scale": 0.5, "is_expert": False},
    **{"pre_clip": 1.0, "is_expert_parallel": True, "is_decoupled_lr": False, "moe": True, "default_config": True},
    **{"lars_exclude": False, "trust_clip": False, "amsgrad": False, "dampening": 0, "decoupled_weight_decay": True},
    **{"lars_adaptation_filter": None, "always_adapt": None},
}


@all_optimizers
def test_keys_of_schedulers_and_wrappers_pass(name: str) -> None:
    layers = weights()
    own = inspect.signature(OPTIMIZERS[name].optimizer_class).parameters
    keys = {key: value for key, value in PASSING.items() if key not in own}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = create_optimizer(name, [{"params": [layer], **keys} for layer in layers.values()], lr=0.1)
    train(optimizer, layers, 0)
    assert {key: optimizer.param_groups[0][key] for key in keys} == {**keys, "step": 1}


def test_other_keys_are_kept_with_a_warning() -> None:
    layers = weights()
    with pytest.warns(UserWarning, match="LAMB keeps the group key 'who_knows' without using it"):
        optimizer = LAMB([{"params": [layers["matrix"]], "who_knows": 1}])
    assert optimizer.param_groups[0]["who_knows"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.param_groups[0]["lerning_rate"] = 1  # nobody's business
        train(optimizer, layers, 0)


def test_a_lamb_of_the_groups_of_an_adamw() -> None:
    groups = torch.optim.AdamW(weights().values(), lr=0.1).param_groups
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LAMB(groups).param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("step", [-1, 0.5, True, "3", None, math.nan])
def test_counts_of_steps_that_are_none(step: Any) -> None:
    with pytest.raises(ValueError, match="step must be the number of steps"):
        LAMB([{"params": list(weights().values()), "step": step}])
