"""Joint parameter groups under formulas of one's own: which keys part them, what is a vector, and what errors say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LayerwiseOptimizer, TrustRatio
from trustratio.optimizers.formulas.chunk_view import ChunkView
from trustratio.optimizers.formulas.layer_table import LayerTable
from trustratio.optimizers.formulas.stages import Sums
from trustratio.optimizers.stepping.step import Step

from .joint_runs import SHAPES, all_optimizers, groups_of, joined, make, train
from .test_generic import make_parameters

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step.*", "ignore:.*group.* of samples per step.*", "ignore:.*sample of the curvature.*"
)

Formula = Callable[[dict[str, Any], LayerTable, ChunkView], torch.Tensor]

KEYS: dict[str, tuple[Any, ...]] = {
    "lr_scale": (1.0, 0.5, 0.25),
    "freeze": (False, True, False),
    "head": (None, True, False),
    "cycle": (2, (1, 2), [1, 2]),
    "tensor": (torch.tensor(0.5), torch.tensor(0.25), torch.tensor(0.5)),
}
"""What formulas of others may read, three groups' values each."""


def own(formula: Formula, **said: Any) -> type[LayerwiseOptimizer]:
    """SGD without state that steps by a formula of its own, and says that it takes vectors."""

    def __init__(self: Any, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        LayerwiseOptimizer.__init__(self, params, {"lr": lr, "weight_decay": weight_decay})

    def stages(self: Any, group: dict[str, Any], layers: LayerTable) -> Any:
        layers.step = layers.step + 1
        yield Sums("g")

    change = staticmethod(formula)
    body = {"__init__": __init__, "stages": stages, "change": lambda self, *args: change(*args)}
    vectors = {"vector_options": ("lr", "weight_decay", "adapt")}
    made: type[LayerwiseOptimizer] = type("Own", (LayerwiseOptimizer,), {**body, **vectors, **said})
    return made


def three(cls: type[LayerwiseOptimizer], *options: dict[str, Any], shape: tuple[int, ...] = (4,)) -> Any:
    """Of ones, each in a group of its own, stepped once by a gradient of ones; and the optimizer."""
    parameters = [torch.nn.Parameter(torch.ones(shape)) for _ in options]
    given: Any = [{"params": [p], **of_group} for p, of_group in zip(parameters, options, strict=True)]
    optimizer: Any = cls(given)  # type: ignore[call-arg, arg-type]
    for parameter in parameters:
        parameter.grad = torch.ones(shape)
    return parameters, optimizer


def moved(parameters: list[torch.nn.Parameter]) -> list[float]:
    return [round(1 - p.detach().reshape(-1)[0].item(), 6) for p in parameters]


# Keys ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*group key.*")
@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_a_formula_may_read_parts_groups(key: str) -> None:
    """Equal but distinct tensors too: nobody looks into them."""
    seen: list[Any] = []
    cls = own(lambda group, layers, x: (seen.append(group[key]), x.of(group["lr"] * torch.ones_like(layers.step)))[1])
    _, optimizer = three(cls, *({key: value} for value in KEYS[key]))
    optimizer.step()
    together = [[1, 2]] if key == "cycle" else []
    assert joined(optimizer) == together
    assert seen == list(KEYS[key]) if not together else len(seen) == 2


def test_a_formula_may_scale_the_rate_by_a_key() -> None:
    cls = own(lambda group, layers, x: x.of(group["lr"] * group.get("lr_scale", 1.0) * torch.ones_like(layers.step)))
    parameters, optimizer = three(cls, {"lr_scale": 0.5}, {}, {"lr_scale": 0.25}, {"lr_scale": 0.25, "lr": 0.2})
    optimizer.step()
    assert moved(parameters) == pytest.approx([0.05, 0.1, 0.025, 0.05])
    assert joined(optimizer) == [[2, 3]]


def test_what_schedulers_write_is_a_vector() -> None:
    cls = own(lambda group, layers, x: x.of(group["initial_lr"] * torch.ones_like(layers.step)))
    parameters, optimizer = three(cls, {"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3})
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    optimizer.step()
    assert moved(parameters) == pytest.approx([0.1, 0.2, 0.3])
    assert joined(optimizer) == [[0, 1, 2]]


@pytest.mark.parametrize("said", [{}, {"step_options": ("lr", "initial_lr")}])
def test_no_scheduler_wrote_it_everywhere(said: dict[str, Any]) -> None:
    cls = own(lambda group, layers, x: x.of(group.get("initial_lr", 0.5) * torch.ones_like(layers.step)), **said)
    parameters, optimizer = three(cls, {"initial_lr": 0.1}, {}, {"initial_lr": 0.3}, {"initial_lr": 0.2})
    optimizer.step()
    assert moved(parameters) == pytest.approx([0.1, 0.5, 0.3, 0.2])
    assert joined(optimizer) == [[2, 3]]


def test_an_option_of_a_schedulers_name_is_an_option() -> None:
    def __init__(self: Any, params: Any, min_lr: float = 0.0) -> None:
        LayerwiseOptimizer.__init__(self, params, {"lr": 0.1, "min_lr": min_lr})

    cls = own(lambda group, layers, x: x.g.mul(max(group["min_lr"], 0.1)), __init__=__init__)
    parameters, optimizer = three(cls, {"min_lr": 0.5}, {"min_lr": 0.0})
    optimizer.step()
    assert moved(parameters) == pytest.approx([0.5, 0.1])


def test_joined_groups_have_all_names() -> None:
    seen: list[Any] = []
    cls = own(lambda group, layers, x: (seen.append(group["param_names"]), x.g * 0.1)[1])
    parameters = [(f"layer{index}", torch.nn.Parameter(torch.ones(3))) for index in range(3)]
    optimizer: Any = cls([{"params": [pair], "lr": 0.1 + index} for index, pair in enumerate(parameters)])
    for _, parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer.step()
    assert seen == [["layer0", "layer1", "layer2"]]


def test_an_option_that_is_no_number_everywhere_parts_groups() -> None:
    cls = own(lambda group, layers, x: x.plus(x.g, x.w, group["weight_decay"] or 0.0) * 0.1)
    parameters, optimizer = three(cls, {"weight_decay": 0.5}, {"weight_decay": None}, {"weight_decay": 0.5})
    optimizer.step()
    assert moved(parameters) == pytest.approx([0.15, 0.1, 0.15])
    assert joined(optimizer) == []


@pytest.mark.filterwarnings("ignore:.*group key.*")
def test_a_class_may_say_which_keys_it_reads() -> None:
    cls = own(lambda group, layers, x: x.g * 0.1, step_options=("lr", "read"))
    _, optimizer = three(cls, {"lr_scale": 1.0}, {"lr_scale": 0.5}, {"lr_scale": 0.5, "read": 1})
    optimizer.step()
    assert joined(optimizer) == [[0, 1]]
    stored = cls([{"params": [torch.nn.Parameter(torch.ones(2))], "state_dtype": d} for d in (None, "bfloat16")])  # type: ignore[call-arg, arg-type]
    for group in stored.param_groups:
        group["params"][0].grad = torch.ones(2)
    stored.step()
    assert joined(stored) == []


def test_a_subclass_says_again_what_it_reads() -> None:
    assert type("Reader", (TrustRatio,), {"vector_options": ("lr",)}).step_options is None  # type: ignore[attr-defined]
    assert TrustRatio.step_options is not None


PASSENGERS = {"lr_scale": 0.1, "initial_lr": 0.2, "group_name": 0.3, "no_weight_decay": 0.4}


@all_optimizers
def test_the_package_stays_joined_whatever_is_beside_the_options(name: str) -> None:
    parameters = make_parameters(torch.float32, SHAPES)
    groups = tuple(
        (layers, {**options, **{key: value * index for key, value in PASSENGERS.items()}})
        for index, (layers, options) in enumerate(groups_of(name))
    )
    optimizer = make(name, parameters, groups)
    train(optimizer, parameters, range(1))
    assert joined(optimizer) == [[0, 1, 2]]


class Recorded(dict[str, Any]):
    """Options that keep which of them were read."""

    read: set[str]

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


@all_optimizers
def test_formulas_of_the_package_read_options_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    options_of = Step._options

    def recorded(self: Step, index: int) -> dict[str, Any]:
        options = Recorded(options_of(self, index))
        options.read = read
        return options

    monkeypatch.setattr(Step, "_options", recorded)
    parameters = make_parameters(torch.float32, SHAPES)
    optimizer = make(name, parameters, groups_of(name))
    train(optimizer, parameters, range(2))
    assert "lr" in read
    assert read <= optimizer.defaults.keys()


# Errors -------------------------------------------------------------------------------------------------------------


def with_alpha(group: dict[str, Any], layers: LayerTable, x: ChunkView) -> torch.Tensor:
    return x.g.add(x.w, alpha=group["weight_decay"])


def with_product(group: dict[str, Any], layers: LayerTable, x: ChunkView) -> torch.Tensor:
    return x.g + x.w * group["weight_decay"]


def with_question(group: dict[str, Any], layers: LayerTable, x: ChunkView) -> torch.Tensor:
    return x.g + x.w if group["weight_decay"] else x.g


def with_number(group: dict[str, Any], layers: LayerTable, x: ChunkView) -> torch.Tensor:
    return x.g * float(group["weight_decay"])


@pytest.mark.parametrize("formula", [with_alpha, with_product, with_question, with_number])
def test_a_formula_that_takes_a_number_is_told_that_it_has_a_vector(formula: Formula) -> None:
    _, optimizer = three(own(formula), {"weight_decay": 0.1}, {"weight_decay": 0.2}, {"weight_decay": 0.0})
    with pytest.raises((TypeError, RuntimeError, ValueError)) as caught:
        optimizer.step()
    message = str(caught.value)
    assert "parameter groups 0, 1, 2 are stepped together" in message
    assert "where they differ (weight_decay)" in message
    assert "x.plus" in message
    assert caught.value.__cause__ is not None
    assert type(caught.value) is type(caught.value.__cause__)


SIZES = [
    ((1,), (1,)),
    ((1,), (1,), (1,)),
    ((2,), (1,), (1,)),
    ((3,), (5000, 300), (1,)),
    ((5000, 300), (2,)),
    ((2,), (2,)),
]


@pytest.mark.parametrize("shapes", SIZES)
def test_a_vector_of_layers_never_fits_elements(shapes: tuple[tuple[int, ...], ...]) -> None:
    """Where there are as many elements as layers, in one chunk, torch would multiply them one by one."""
    for formula in (with_product, lambda group, layers, x: x.g * layers.step):
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        given: Any = [{"params": [p], "weight_decay": 0.1 * index} for index, p in enumerate(parameters)]
        optimizer: Any = own(formula)(given)  # type: ignore[call-arg, arg-type]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises((RuntimeError, ValueError)):
            optimizer.step()


@pytest.mark.parametrize("shapes", SIZES)
def test_and_what_is_spread_is_right(shapes: tuple[tuple[int, ...], ...]) -> None:
    cls = own(lambda group, layers, x: 0.1 * x.plus(x.g, x.w, group["weight_decay"]))
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    given: Any = [{"params": [p], "weight_decay": 0.1 * index} for index, p in enumerate(parameters)]
    optimizer: Any = cls(given)  # type: ignore[call-arg, arg-type]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for index, parameter in enumerate(parameters):
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 1 - 0.1 * (1 + 0.1 * index)))


@pytest.mark.parametrize("where", ["stages", "update"])
def test_the_same_where_layers_are_measured_and_steps_described(where: str) -> None:
    body = {
        where: lambda self, group, layers: getattr(LAMB, where)(self, {**group, "eps": 1 / float(group["lr"])}, layers)
    }
    cls: Any = type("Own", (LAMB,), {**body, "vector_options": ("lr", "weight_decay", "adapt")})
    _, optimizer = three(cls, {"lr": 0.1}, {"lr": 0.2})
    with pytest.raises((TypeError, RuntimeError, ValueError), match="parameter groups 0, 1 are stepped together"):
        optimizer.step()


class OwnError(RuntimeError):
    pass


@pytest.mark.parametrize("error", [OwnError("as it is"), NotImplementedError("as it is"), KeyError("as it is")])
def test_errors_of_another_kind_are_left_as_they_are(error: Exception) -> None:
    def formula(group: dict[str, Any], layers: LayerTable, x: ChunkView) -> torch.Tensor:
        raise error

    _, optimizer = three(own(formula), {"lr": 0.1}, {"lr": 0.2})
    with pytest.raises(type(error)) as caught:
        optimizer.step()
    assert caught.value is error


def test_so_are_errors_of_groups_with_the_same_options() -> None:
    _, optimizer = three(own(lambda group, layers, x: x.g[None, :, None].view(7)), {}, {})
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert joined(optimizer) == [[0, 1]]
    assert "stepped together" not in str(caught.value)
