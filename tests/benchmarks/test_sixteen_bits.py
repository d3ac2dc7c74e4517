"""The measurements of state and weights of sixteen bits: that they run, count right and go on; never how fast."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.sixteen_bits import __main__ as command
from benchmarks.sixteen_bits import memory, peers, standstill, steps, training
from benchmarks.sixteen_bits.page import TABLES, filled, mark, training_table
from benchmarks.sixteen_bits.training import Corpus, Run, Training, state_bytes, train
from benchmarks.sixteen_bits.variants import VARIANTS, Variant, rounding_to_nearest
from trustratio.optimizers import LAMB
from trustratio.recipes.data.masking import MaskedBatch

SHAPES = [(8, 4), (4,)]
TINY = Training("tiny", 3, {"LAMB": 0.01, "AdamW": 0.002}, batch=2, length=8, vocabulary=64, validation_sequences=2)
LOSSES = {"fp32 weights, fp32 state": 5.0, "fp32 weights, bf16 state": 5.25}


class FewTokens(Corpus):
    """Random tokens in place of text."""

    def __init__(self, settings: Training):
        self.training = settings
        self.updates: list[tuple[int, int]] = []

    @property
    def unigram_entropy(self) -> float:
        return 4.0

    def update(self, number: int, seed: int) -> list[MaskedBatch]:
        self.updates.append((number, seed))
        return [self._batch(number + 1000 * seed)]

    def validation(self) -> list[MaskedBatch]:
        return [self._batch(1), self._batch(2)]

    def _batch(self, seed: int) -> MaskedBatch:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(64, (self.training.batch, self.training.length), generator=generator)
        positions = torch.tensor([0, 5])
        return MaskedBatch(tokens, positions, tokens.reshape(-1)[positions])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stepped(variant: str, steps: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weights and state of a layer without ratio and decay."""
    weights = torch.nn.Parameter(torch.linspace(1, 2, 512))
    optimizer = LAMB([weights], 0.01, weight_decay=0.0, **VARIANTS[variant].options())
    for number in range(steps):
        weights.grad = torch.linspace(1, 3, 512) * (1 + number)
        optimizer.step()
    return weights.detach(), optimizer.state[weights]


def test_rounding_to_nearest_is_the_patched_place() -> None:
    name = "fp32 weights, bf16 state to nearest"
    exact, by_chance = stepped("fp32 weights, fp32 state")[1], stepped(name)[1]
    with rounding_to_nearest():
        (weights, first), (_, third) = stepped(name, 1), stepped(name)
    assert torch.equal(first["exp_avg_sq"], stepped("fp32 weights, fp32 state", 1)[1]["exp_avg_sq"].bfloat16())
    m, v = first["exp_avg"].float() / (1 - 0.9), first["exp_avg_sq"].float() / (1 - 0.999)
    # The step is made of what is kept.
    assert torch.allclose(weights, torch.linspace(1, 2, 512) - 0.01 * m / (v.sqrt() + 1e-6), atol=1e-6)
    assert not torch.equal(third["exp_avg_sq"], by_chance["exp_avg_sq"])
    assert (third["exp_avg_sq"].float() / exact["exp_avg_sq"] - 1).abs().max() < 2**-6


def test_variants_keep_what_they_say() -> None:
    for name, variant in VARIANTS.items():
        parameter = torch.nn.Parameter(torch.ones(4096, dtype=variant.weights))
        parameter.grad = torch.ones_like(parameter)
        optimizer = LAMB([parameter], **variant.options())
        optimizer.step()
        state = optimizer.state[parameter]
        assert (state["exp_avg"].dtype == torch.bfloat16) == ("bf16 state" in name), name
        assert (parameter.dtype == torch.bfloat16) == name.startswith("bf16 weights"), name
        assert ("compensation" in state) == ("kahan" in name), name
        bytes_each = (4 if "bf16 state" in name else 8) + (2 if "kahan" in name else 0)
        assert round(state_bytes(optimizer) / 4096) == bytes_each, name


def test_masters_of_16_bit_weights_differ() -> None:
    moved = {}
    for master in (None, "stochastic", "kahan"):
        parameter = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        parameter.grad = torch.ones_like(parameter)
        LAMB([parameter], 1e-3, **Variant(weights=torch.bfloat16, master=master).options()).step()
        moved[master] = (parameter != 1).sum().item()
    assert moved[None] == moved["kahan"] == 0  # the update is a quarter of the distance, and kept in the rest
    assert 0.2 < moved["stochastic"] / 4096 < 0.3


def test_bytes_inside_of_subclasses_count_once() -> None:
    parameter = torch.nn.Parameter(torch.ones(16))
    optimizer = torch.optim.SGD([parameter], 0.1)
    shared = torch.ones(10)
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(5)], layout=torch.jagged)
    optimizer.state[parameter] = {"a": shared, "b": {"c": shared[2:5], "d": torch.ones(3, dtype=torch.bfloat16)}}
    assert state_bytes(optimizer) == 40 + 6
    optimizer.state[parameter]["e"] = nested  # values and offsets lie inside
    assert state_bytes(optimizer) >= 40 + 6 + 8 * 4


def test_training_is_the_same_but_for_what_is_kept() -> None:
    corpus = FewTokens(TINY)
    found = {}
    for name in ("fp32 weights, fp32 state", "fp32 weights, bf16 state", "bf16 weights kahan, bf16 state"):
        found[name] = Run(TINY, "AdamW", name, 7).carry_out(corpus)
    assert corpus.updates == [(number, 7) for number in range(3)] * 3
    plain, half, all_half = found.values()
    assert plain == {**Run(TINY, "AdamW", "fp32 weights, fp32 state", 7).carry_out(corpus), **_times(plain)}
    assert 0 < abs(plain["loss"] - half["loss"]) < 0.01
    assert abs(plain["loss"] - all_half["loss"]) < 0.1
    assert [round(one["state_bytes_per_parameter"]) for one in found.values()] == [8, 4, 6]
    assert plain["second_moment_unmoved"] < half["second_moment_unmoved"]


def _times(run: dict[str, Any]) -> dict[str, Any]:
    return {"step_milliseconds": run["step_milliseconds"]}


def test_rate_follows_the_schedule_also_where_it_is_a_tensor() -> None:
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            rates.append(float(self.param_groups[0]["lr"]))
            super().step()

    corpus = FewTokens(Training("tiny", 10, {}, batch=2, length=8, vocabulary=64))
    for rate in (0.5, torch.tensor(0.5)):
        train(corpus, lambda groups, lr, rate=rate: Watched(groups, rate), 0.5, 1, VARIANTS["fp32 weights, fp32 state"])  # type: ignore[misc]
    assert rates[:10] == pytest.approx(rates[10:])
    assert rates[:3] == pytest.approx([0.5, 0.5, 0.5 * 8 / 9])
    assert rates[9] == pytest.approx(0.5 / 9)


def test_finished_runs_are_not_done_again() -> None:
    done: list[str] = []
    runs: dict[str, Any] = {}

    def once(name: str, settings: dict[str, Any]) -> None:
        def carry_out() -> dict[str, float]:
            done.append(name)
            return {"loss": 1.0}

        command._once(runs, name, settings, carry_out, lambda: None)

    for name, updates in (("a", 1), ("a", 1), ("b", 1), ("a", 2)):
        once(name, {"updates": updates})
    assert done == ["a", "b", "a"]
    assert runs["a"]["settings"] == {"updates": 2}


def test_parts_are_written_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "numbers.json"
    monkeypatch.setattr(training, "TRAININGS", {"tiny": TINY})
    monkeypatch.setattr(training, "SEEDS", (1,))
    monkeypatch.setattr(training, "Corpus", FewTokens)
    monkeypatch.setattr(training, "VARIANTS", dict(list(VARIANTS.items())[:2]))
    monkeypatch.setattr(training.runs, "__defaults__", ((1,),))
    command.main(["--parts", "training", "--out", str(out)])
    first = json.loads(out.read_text())["training"]
    assert len(first["runs"]) == 4
    assert capsys.readouterr().out.count("seed 1: ") == 4
    command.main(["--parts", "training", "--out", str(out)])
    assert json.loads(out.read_text())["training"]["runs"] == first["runs"]
    assert "seed 1: " not in capsys.readouterr().out
    command.main(["--parts", "training", "--again", "--out", str(out)])
    assert capsys.readouterr().out.count("seed 1: ") == 4


def test_steps_are_taken_in_turn() -> None:
    found = steps.measure_steps(SHAPES, "cpu", 2)
    assert set(found["rows"]) == {name for name in steps.MOVED if not name.startswith("VRLAMB")}
    reduced = steps.measure_variance_reduced([(16, 16), (16,)], "cpu", 2)
    assert [name for name in reduced["rows"] if name.startswith("VRLAMB")] == [
        "VRLAMB, fp32 state",
        "VRLAMB, bf16 state",
    ]
    assert all(row["moved"] == steps.MOVED[name] for part in (found, reduced) for name, row in part["rows"].items())


def test_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("torch AdamW", "fp32 weights, bf16 state", "bf16 weights kahan, bf16 state")
    monkeypatch.setattr(memory, "MEASURED", {name: memory.MEASURED[name] for name in chosen})
    rows = memory._measure([(512, 2048)] * 2, "cpu")["rows"]
    assert rows["torch AdamW"] == pytest.approx({"weights_and_gradients": 8, "state": 8}, abs=0.5)
    assert rows["LAMB, fp32 weights, bf16 state"] == pytest.approx({"weights_and_gradients": 8, "state": 4}, abs=0.5)
    assert rows["LARS, bf16 weights kahan, bf16 state"] == pytest.approx(
        {"weights_and_gradients": 4, "state": 4}, abs=0.5
    )


def test_second_moments_stand_still_to_nearest() -> None:
    slow = standstill.measure_standstill(256, 500, [0.999])["rows"]["0.999"]
    assert slow["fp32"]["unmoved"][1] < 0.01
    assert slow["bf16, to nearest"]["unmoved"][1] > 0.95
    assert slow["bf16, stochastic"]["unmoved"][1] < slow["bf16, to nearest"]["unmoved"][1]
    exact, by_chance, nearest = (found["second_moment"][1] for found in slow.values())
    assert by_chance == pytest.approx(exact, rel=0.02)
    assert nearest > 1.2 * exact


def test_peers_that_are_missing_say_why() -> None:
    class Absent(Exception):
        pass

    def fail(params: Any, lr: float) -> torch.optim.Optimizer:
        raise Absent("no compiler\nand more lines")

    names = {"torch AdamW fused": peers.PEERS["torch AdamW fused"], "absent": peers.Peer("AdamW", fail)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "PEERS", names)
        rows = peers.peer_steps(["absent"], SHAPES, 2)
        assert rows["absent"] == {"missing": "Absent: no compiler"}
        assert rows["torch AdamW fused"]["state_bytes_per_parameter"] == pytest.approx(8, abs=0.3)
        corpus = FewTokens(TINY)
        assert peers.measure_peer("absent", corpus, 1) == {"missing": "Absent: no compiler"}
        assert peers.measure_peer("torch AdamW fused", corpus, 1)["loss"] > 0


def test_losses_are_told_with_their_spread() -> None:
    runs = {
        f"tiny, LAMB, {variant}, seed {seed}": {"loss": loss + seed / 100}
        for variant, loss in LOSSES.items()
        for seed in training.SEEDS
    }
    text = training_table({"training": {"runs": runs, "unigram_entropy": {"tiny": 5.5}}})
    assert "| fp32 weights, fp32 state | 5.020 ± 0.010 |  | not measured | not measured |" in text
    assert "| fp32 weights, bf16 state | 5.270 ± 0.010 | +0.250 ± 0.000 | not measured | not measured |" in text
    del runs["tiny, LAMB, fp32 weights, bf16 state, seed 3"]
    text = training_table({"training": {"runs": runs, "unigram_entropy": {"tiny": 5.5}}})
    assert "| fp32 weights, bf16 state | 5.265 ± 0.005 (2 of 3 seeds) | +0.250 ± 0.000 |" in text


def test_page_keeps_what_has_no_new_numbers() -> None:
    text = "\n".join(f"{mark(name, 'begins')}\nold\n{mark(name, 'ends')}" for name in TABLES)
    assert filled(text, {}) == text
    results = {"standstill": standstill.measure_standstill(8, 8, [0.9])}
    assert filled(text, results).count("old") == len(TABLES) - 1


def test_committed_page_belongs_to_its_numbers() -> None:
    text = command.PAGE.read_text(encoding="utf-8")
    results = json.loads((command.RESULTS / "sixteen_bits.json").read_text())
    assert set(results) <= set(command.PARTS)
    assert filled(text, results) == text


def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--parts", "speed"], "invalid choice: 'speed'"), (["--threads", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert said in capsys.readouterr().err
