"""State of 16 bits, and bf16 weights without masters, through state_dicts, copies and files: every bit goes on."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trustratio.integrations.checkpoints import convert_state, load_optimizer_state, save_optimizer_state
from trustratio.optimizers import LAMB, OPTIMIZERS, LayerwiseOptimizer, TrustRatio, create_optimizer
from trustratio.optimizers.formulas.chunk_view import COMPENSATION

SHAPES = {"dense": (6, 5), "conv": (3, 2, 3), "bias": (7,), "scale": ()}
WITHOUT_STATISTICS = [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is None]
KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "state": (torch.float32, {"state_dtype": "bfloat16"}),
    "stochastic": (torch.bfloat16, {"state_dtype": "bfloat16", "master": "stochastic"}),
    "kahan": (torch.bfloat16, {"master": "kahan"}),
    "kahan and state": (torch.bfloat16, {"state_dtype": "bfloat16", "master": "kahan", "rounding_seed": 3}),
}
Layers = dict[str, torch.nn.Parameter]
Run = tuple[Layers, LayerwiseOptimizer]


def make(name: str = "lamb", dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Run:
    generator = torch.Generator().manual_seed(seed)
    layers = {k: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for k, s in SHAPES.items()}
    matrices = {"params": [(k, p) for k, p in layers.items() if p.dim() > 1], "weight_decay": 0.1}
    others = {"params": [(k, p) for k, p in layers.items() if p.dim() < 2], "weight_decay": 0.0}
    return layers, create_optimizer(name, [matrices, others], lr=0.01, implementation="eager", **options)


def train(run: Run, first: int, last: int) -> None:
    layers, optimizer = run
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in layers.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same(one: Run, other: Run) -> None:
    """The same bits in weights and state, in the same dtypes."""
    for name, parameter in one[0].items():
        assert bits(parameter) == bits(other[0][name]), name
        ours, theirs = one[1].state[parameter], other[1].state[other[0][name]]
        assert ours.keys() == theirs.keys()
        for what, value in ours.items():
            assert value.dtype == theirs[what].dtype, what
            assert bits(value) == bits(theirs[what]), f"{what} of {name}"


def load_weights(run: Run, other: Run) -> None:
    """As a model's own state_dict does."""
    with torch.no_grad():
        for name, parameter in run[0].items():
            parameter.copy_(other[0][name])


def reloaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def sentences(run: Run, state_dict: dict[str, Any]) -> list[str]:
    """Load, and return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run[1].load_state_dict(state_dict)
    assert all(one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


# Going on -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
def test_state_dict_goes_on_to_the_bit(name: str, kept: str) -> None:
    dtype, options = KEPT[kept]
    straight = make(name, dtype, **options)
    train(straight, 0, 3)
    resumed = make(name, dtype, seed=1, **options)
    load_weights(resumed, straight)
    assert sentences(resumed, reloaded(straight[1].state_dict())) == []
    train(straight, 3, 6)
    train(resumed, 3, 6)
    assert_same(straight, resumed)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
def test_copies_go_on_to_the_bit(by: str, kept: str) -> None:
    dtype, options = KEPT[kept]
    straight = make("lamb", dtype, **options)
    train(straight, 0, 3)
    resumed = copy.deepcopy(straight) if by == "deepcopy" else pickle.loads(pickle.dumps(straight))
    train(straight, 3, 6)
    train(resumed, 3, 6)
    assert_same(straight, resumed)


def test_chance_follows_the_step_that_was_loaded() -> None:
    """What fails where a resumed run draws the first steps' numbers again."""
    dtype, options = KEPT["stochastic"]
    straight, anew = make("lamb", dtype, **options), make("lamb", dtype, **options)
    train(straight, 0, 3)
    load_weights(anew, straight)
    anew[1].load_state_dict(straight[1].state_dict())
    for parameter in anew[0].values():
        anew[1].state[parameter]["step"].fill_(9.0)
        straight[1].state[straight[0]["dense"]]["step"].fill_(9.0)
    train(straight, 3, 4)
    train(anew, 3, 4)
    assert bits(straight[0]["dense"]) == bits(anew[0]["dense"])
    assert bits(straight[0]["conv"]) != bits(anew[0]["conv"])


# Files of another number of bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "loaded"), [("float32", "bfloat16"), (None, "bfloat16"), ("bfloat16", None)])
def test_options_stay_and_state_is_converted_with_one_warning(saved: str | None, loaded: str | None) -> None:
    source = make(state_dtype=saved, rounding_seed=5)
    train(source, 0, 2)
    target = make(state_dtype=loaded, rounding_seed=7)
    load_weights(target, source)
    (sentence,) = sentences(target, reloaded(source[1].state_dict()))
    old, new = ("float32", "bfloat16") if loaded else ("bfloat16", "float32")
    how = "rounded to nearest, as" if loaded else "as"
    assert sentence == (
        f"the loaded state exp_avg, exp_avg_sq is {old} in the file and kept in {new} here, {how} state_dtype says"
    )
    for group in target[1].param_groups:
        assert (group["state_dtype"], group["rounding_seed"], group["master"]) == (loaded, 7, None)
    for name, parameter in target[0].items():
        theirs = source[1].state[source[0][name]]["exp_avg_sq"]
        assert bits(target[1].state[parameter]["exp_avg_sq"]) == bits(theirs.to(getattr(torch, new)))
        assert target[1].state[parameter]["step"].dtype == torch.float32
    train(target, 2, 3)


@pytest.mark.parametrize("master", [None, "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compensation_that_nobody_keeps_is_dropped_and_said(dtype: torch.dtype, master: str | None) -> None:
    source = make(dtype=torch.bfloat16, master="kahan")
    train(source, 0, 2)
    target = make(dtype=dtype, master=master)
    load_weights(target, source)
    (sentence,) = sentences(target, source[1].state_dict())
    assert sentence.startswith('the rest of bf16 weights that the file has of master="kahan" is left behind')
    assert all(COMPENSATION not in target[1].state[parameter] for parameter in target[0].values())
    assert [group["master"] for group in target[1].param_groups] == [master] * 2
    train(target, 2, 3)


def test_both_are_said_in_one_warning() -> None:
    source = make(dtype=torch.bfloat16, master="kahan")
    train(source, 0, 2)
    (sentence,) = sentences(make(dtype=torch.bfloat16, state_dtype="bfloat16"), source[1].state_dict())
    assert "exp_avg, exp_avg_sq is float32 in the file" in sentence
    assert "; the rest of bf16 weights" in sentence


def test_a_file_without_compensation_begins_with_none() -> None:
    source = make(dtype=torch.bfloat16, master="stochastic")
    train(source, 0, 2)
    target = make(dtype=torch.bfloat16, master="kahan", seed=1)
    train(target, 0, 2)  # its own compensation must not be added to other weights
    load_weights(target, source)
    assert sentences(target, source[1].state_dict()) == []
    assert all(COMPENSATION not in target[1].state[parameter] for parameter in target[0].values())
    train(target, 2, 3)
    assert all(target[1].state[p][COMPENSATION].dtype == torch.bfloat16 for p in target[0].values())


def test_a_compensation_of_another_shape_is_refused_before_anything_is_loaded() -> None:
    source, target = (make(dtype=torch.bfloat16, master="kahan") for _ in range(2))
    train(source, 0, 2)
    state_dict = source[1].state_dict()
    state_dict["state"][0][COMPENSATION] = torch.zeros(5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"compensation of parameter dense has shape \(5,\) instead of \(6, 5\)"):
        target[1].load_state_dict(state_dict)
    assert not target[1].state


def test_a_state_named_compensation_of_another_optimizer_is_its_own() -> None:
    class Named(torch.optim.SGD):
        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)

    layers = {"dense": torch.nn.Parameter(torch.ones(3, 4))}
    optimizers = [TrustRatio(Named, layers.values(), lr=0.1, momentum=0.9) for _ in range(2)]
    layers["dense"].grad = torch.ones(3, 4)
    optimizers[0].step()
    optimizers[0].state[layers["dense"]][COMPENSATION] = torch.ones(3, 4)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    optimizers[1].step()
    assert COMPENSATION in optimizers[1].state[layers["dense"]]


# Options that are set in the middle of a run ------------------------------------------------------------------------


def test_another_state_dtype_converts_what_is_there() -> None:
    run = make()
    train(run, 0, 2)
    kept = {name: run[1].state[p]["exp_avg"].clone() for name, p in run[0].items()}
    loaded = make(seed=1, state_dtype="bfloat16")
    load_weights(loaded, run)
    sentences(loaded, run[1].state_dict())
    for group in run[1].param_groups:
        group["state_dtype"] = torch.bfloat16
    train(run, 2, 4)
    train(loaded, 2, 4)
    assert_same(run, loaded)
    assert {value.dtype for value in kept.values()} == {torch.float32}
    for group in run[1].param_groups:
        group["state_dtype"] = None
    train(run, 4, 5)
    assert {run[1].state[p]["exp_avg"].dtype for p in run[0].values()} == {torch.float32}


def test_a_compensation_is_forgotten_when_its_master_goes() -> None:
    """Added later, it would be the rest of weights that are long gone."""
    run = make(dtype=torch.bfloat16, master="kahan")
    train(run, 0, 3)
    assert any(bool(run[1].state[p][COMPENSATION].any()) for p in run[0].values())
    for group in run[1].param_groups:
        group["master"] = "stochastic"
    train(run, 3, 5)
    assert all(COMPENSATION not in run[1].state[p] for p in run[0].values())
    for group in run[1].param_groups:
        group["master"] = "kahan"
        group["lr"] = 0.0
    before = {name: bits(p) for name, p in run[0].items()}
    train(run, 5, 6)
    assert {name: bits(p) for name, p in run[0].items()} == before
    assert not any(bool(run[1].state[p][COMPENSATION].any()) for p in run[0].values())


# The consolidated file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
def test_consolidated_file_goes_on_to_the_bit(name: str, kept: str, tmp_path: Path) -> None:
    dtype, options = KEPT[kept]
    straight = make(name, dtype, **options)
    train(straight, 0, 3)
    save_optimizer_state(straight[1], tmp_path / "state")
    stored = load_file(tmp_path / "state")
    for layer, parameter in straight[0].items():
        for what, value in straight[1].state[parameter].items():
            assert stored[f"{what}/{layer}"].dtype == value.dtype
            assert bits(stored[f"{what}/{layer}"]) == bits(value)
    assert any(key.startswith(COMPENSATION) for key in stored) == ("kahan" in kept)
    resumed = make(name, dtype, seed=1, **options)
    train(resumed, 0, 1)  # so that it has a compensation of its own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_optimizer_state(resumed[1], tmp_path / "state")
    train(straight, 3, 6)
    train(resumed, 3, 6)
    assert_same(straight, resumed)


def test_compensation_is_written_for_the_layers_that_have_it(tmp_path: Path) -> None:
    layers, optimizer = make(dtype=torch.bfloat16, master="kahan")
    layers["bias"].data = layers["bias"].data.float()
    train((layers, optimizer), 0, 1)
    save_optimizer_state(optimizer, tmp_path / "state")
    found = {key for key in load_file(tmp_path / "state") if key.startswith(COMPENSATION)}
    assert found == {f"{COMPENSATION}/{name}" for name in ("dense", "conv", "scale")}


def test_the_consolidated_file_leaves_the_options_of_storage(tmp_path: Path) -> None:
    source, target = make(state_dtype="bfloat16", rounding_seed=5), make(rounding_seed=7)
    train(source, 0, 2)
    source[1].param_groups[1]["state_dtype"] = None  # which does not keep groups apart
    save_optimizer_state(source[1], tmp_path / "state")
    with pytest.warns(UserWarning, match="exp_avg, exp_avg_sq is bfloat16 in the file and kept in float32 here, as"):
        load_optimizer_state(target[1], tmp_path / "state")
    assert [(group["state_dtype"], group["rounding_seed"]) for group in target[1].param_groups] == [(None, 7)] * 2
    assert target[1].state[target[0]["dense"]]["exp_avg"].dtype == torch.float32


def test_fp32_weights_are_split_into_two_numbers_and_put_together_again(tmp_path: Path) -> None:
    source = make()
    train(source, 0, 2)
    save_optimizer_state(source[1], tmp_path / "fp32")
    split = make(dtype=torch.bfloat16, seed=1, master="kahan")
    load_optimizer_state(split[1], tmp_path / "fp32")
    for name, parameter in split[0].items():
        whole, rest = source[0][name].detach(), split[1].state[parameter][COMPENSATION]
        assert bits(parameter) == bits(whole.bfloat16())
        assert bits(rest) == bits((whole - whole.bfloat16()).bfloat16())
    save_optimizer_state(split[1], tmp_path / "kahan")
    whole = make(seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_optimizer_state(whole[1], tmp_path / "kahan")
    for name, parameter in whole[0].items():
        sum_of_both = split[0][name].float() + split[1].state[split[0][name]][COMPENSATION].float()
        assert bits(parameter) == bits(sum_of_both)
        assert torch.allclose(parameter, source[0][name], rtol=2**-15, atol=0)
    nearest = make(dtype=torch.bfloat16, seed=3, master="stochastic")
    with pytest.warns(UserWarning, match='the rest of bf16 weights that the file has of master="kahan" is left behind'):
        load_optimizer_state(nearest[1], tmp_path / "kahan")
    assert all(bits(nearest[0][name]) == bits(parameter) for name, parameter in split[0].items())


def test_weights_that_are_left_alone_get_the_rest_of_the_same_weights_only(tmp_path: Path) -> None:
    source = make(dtype=torch.bfloat16, master="kahan")
    train(source, 0, 3)
    save_optimizer_state(source[1], tmp_path / "state")
    target = make(dtype=torch.bfloat16, master="kahan", seed=1)
    load_weights(target, source)
    with torch.no_grad():
        target[0]["dense"][2] += 1.0
    load_optimizer_state(target[1], tmp_path / "state", weights=False)
    rest, theirs = (run[1].state[run[0]["dense"]][COMPENSATION] for run in (target, source))
    same = torch.arange(6) != 2
    assert bits(rest[same]) == bits(theirs[same])
    assert not rest[2].any()
    assert theirs[2].any()


def test_state_that_is_loaded_before_the_model_warns_of_the_rest(tmp_path: Path) -> None:
    source = make(dtype=torch.bfloat16, master="kahan")
    train(source, 0, 3)
    save_optimizer_state(source[1], tmp_path / "state")
    target = make(dtype=torch.bfloat16, master="kahan", seed=1)
    with torch.no_grad():
        for name, parameter in target[0].items():
            parameter.copy_(source[0][name] if name == "dense" else source[0][name] + 1)
    with pytest.warns(UserWarning, match="none of these is: load the model first") as caught:
        load_optimizer_state(target[1], tmp_path / "state", weights=False)
    (text,) = [str(warning.message) for warning in caught if "load the model first" in str(warning.message)]
    assert all((name in text) == (name != "dense") for name in target[0])
    load_weights(target, source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_optimizer_state(target[1], tmp_path / "state", weights=False)


# The state of others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", KEPT)
def test_the_state_of_torch_s_adamw_is_converted(kept: str) -> None:
    dtype, options = KEPT[kept]
    layers, optimizer = make("lamb", dtype, **options)
    groups = [{**group, "params": group["params"]} for group in optimizer.param_groups]
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in groups], lr=0.1)
    for parameter in layers.values():
        parameter.grad = torch.randn_like(parameter)
    adamw.step()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        optimizer.load_state_dict(convert_state(optimizer, adamw.state_dict()))
    for parameter in layers.values():
        wanted = torch.bfloat16 if "state_dtype" in options else torch.float32
        theirs = adamw.state[parameter]["exp_avg"].to(wanted)
        assert bits(optimizer.state[parameter]["exp_avg"]) == bits(theirs)
    train((layers, optimizer), 0, 1)


def test_compensation_passes_conversion_where_it_is_kept() -> None:
    source = make("lamb", torch.bfloat16, master="kahan")
    train(source, 0, 2)
    target = make("lambc", torch.bfloat16, master="kahan")
    target[1].load_state_dict(convert_state(target[1], source[1].state_dict()))
    for name, parameter in target[0].items():
        assert bits(target[1].state[parameter][COMPENSATION]) == bits(source[1].state[source[0][name]][COMPENSATION])
    other = make("lambc", torch.bfloat16)
    with pytest.raises(ValueError, match="it has compensation, which LAMBC does not keep: name it in drop"):
        convert_state(other[1], source[1].state_dict())
    other[1].load_state_dict(convert_state(other[1], source[1].state_dict(), drop=("compensation",)))


def test_channels_last_weights_go_on_to_the_bit(tmp_path: Path) -> None:
    """Their elements lie in another order than that of the indices, by which chance and files go."""
    runs = []
    for resumed in (False, True):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 3, 3, 2).bfloat16().to(memory_format=torch.channels_last))
        optimizer = LAMB([("conv", weight)], lr=0.01, state_dtype="bfloat16", master="kahan", implementation="eager")
        run = ({"conv": weight}, optimizer)
        if resumed:
            load_optimizer_state(optimizer, tmp_path / "state")
        else:
            train(run, 0, 3)
            save_optimizer_state(optimizer, tmp_path / "state")
        train(run, 3, 5)
        runs.append(run)
    assert bits(runs[0][0]["conv"]) == bits(runs[1][0]["conv"])
    states = [optimizer.state[layers["conv"]] for layers, optimizer in runs]
    assert all(bits(states[0][what]) == bits(states[1][what]) for what in states[0])


@pytest.mark.parametrize("kept", KEPT)
def test_a_file_with_another_seed_is_told(kept: str) -> None:
    """The run that loads it draws by its own."""
    dtype, options = KEPT[kept]
    source, target = make(dtype=dtype, **{**options, "rounding_seed": 9}), make(dtype=dtype, **options)
    train(source, 0, 2)
    own = options.get("rounding_seed", 0)
    with pytest.warns(UserWarning, match=f"rounding_seed is 9 in the file and stays {own} here") as told:
        target[1].load_state_dict(reloaded(source[1].state_dict()))
    assert len(told) == 1
    assert {group["rounding_seed"] for group in target[1].param_groups} == {own}
