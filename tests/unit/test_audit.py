"""The audit from outside: its command, what it refuses before anything starts, its files, and `assert_exact`."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trustratio.integrations.audit import CannotAudit, assert_exact, audit
from trustratio.integrations.audits.command import run_command
from trustratio.integrations.audits.configurations import Configuration
from trustratio.integrations.audits.errors import Failure
from trustratio.integrations.audits.examination import check_ranks, examine, with_few_micro_batches
from trustratio.integrations.audits.injection import Injection, seeded_weights
from trustratio.integrations.audits.models import SmallModel
from trustratio.integrations.audits.page import page_of
from trustratio.integrations.audits.printing import described
from trustratio.integrations.audits.ranks import Ranks, end_started_ranks
from trustratio.integrations.audits.reading import configuration_of
from trustratio.integrations.audits.subject import Subject
from trustratio.integrations.audits.verdict import AuditedLayer, Finding, Report

from ..distributed import audited

AUDITED = "tests.distributed.audited"
DDP = ["--ddp", "--ranks", "1"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence of a command that could not be run."""
    assert run_command(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Could not be run: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("Could not be run: ").strip()


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        ("torch.nn.Linear", [], "torch.nn.Linear is a class, but no torch.optim.Optimizer"),
        ("torch.optim.Lamp", [], "cannot be imported: AttributeError"),
        ("nowhere.at:all", [], "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("lamp", [], "written package.module:name or package.module.Class, or one of lars, lamb"),
        ("math.pi", [], "is a float, which cannot be called"),
        ("torch.optim.AdamW", ["lr=0.01", "beta=0.9"], "could not be made: TypeError"),
        ("torch.optim.SGD", ["lr=1e-3x"], "lr=1e-3x was read as a text"),
        (f"{AUDITED}:two_layers", [], "could not be made: TypeError"),
        ("mine.py:Normed", [], "the path of a file, where a module is named: write mine:Normed"),
        ("./mine.py", [], "write mine:NAME"),
        ("package/mine.py:Normed", [], "write package.mine:Normed"),
        ("package.mine:", [], "written package.module:name"),
        (f"{AUDITED}:no_optimizer", [], "made a NoneType, not a torch.optim.Optimizer"),
        (f"{AUDITED}:exits", [], "could not be made: SystemExit"),
        ("torch.optim.AdamW", ["lr"], "options are written name=value"),
        ("torch.optim.AdamW", ["amsgrad=false"], "options are Python literals"),
        ("lamb", ["lr=-1.0"], "could not be made: ValueError"),
        (f"{AUDITED}:not_a_model", [], "could not be made: TypeError"),
        (f"{AUDITED}.NeedsClosure", [], "NeedsClosure.step needs a closure"),
        ("torch.optim.LBFGS", [], "LBFGS.step needs a closure"),
        ("torch.optim.SparseAdam", [], "SparseAdam cannot step this model in one process either"),
        (f"{AUDITED}.Chance", [], "not deterministic"),
        ("torch.optim.SGD", ["lr=0.0"], "moves no layer in one process"),
        ("torch.optim.SGD", ["lr=1e38"], "become NaN or infinite in one process already"),
    ],
)
def test_optimizers_that_cannot_be_audited(
    capsys: pytest.CaptureFixture[str], optimizer: str, options: list[str], message: str
) -> None:
    assert message in said(capsys, "--optimizer", optimizer, *(["--options", *options] if options else []), *DDP)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("empty_model", "ReLU has no parameter that requires a gradient"),
        ("on_meta", "weight of Linear is on the meta device"),
        ("lazy", "0.weight of Sequential has no shape before the model is called, as in LazyLinear"),
        ("not_a_model", "returned a int, not a torch.nn.Module"),
        ("missing", "cannot be imported: AttributeError"),
        ("Plain", "the model could not be made: TypeError"),
    ],
)
def test_models_that_cannot_be_audited(capsys: pytest.CaptureFixture[str], model: str, message: str) -> None:
    assert message in said(capsys, "--optimizer", "lamb", "--model", f"{AUDITED}:{model}", *DDP)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "cannot be read: No such file"),
        ("broken.json", "{", "is not JSON"),
        ("list.json", "[1]", "holds a list"),
        ("optimizer.json", '{"optimizer": {"type": "Adam"}}', 'has an "optimizer" section (Adam)'),
        ("tensor_parallel.json", '{"tensor_parallel": {"autotp_size": 2}}', 'not the section "tensor_parallel"'),
        ("accumulation.json", '{"gradient_accumulation_steps": 0}', "a whole number of at least 1, not 0"),
        ("config.toml", "", "does not end in .json"),
        ("section.json", '{"zero_optimization": true}', "zero_optimization must be a section of settings"),
        ("precision.json", '{"bf16": true}', "bf16 must be a section of settings"),
        ("offload.json", '{"zero_optimization": {"offload_optimizer": "cpu"}}', "offload_optimizer must be a section"),
        ("clipping.json", '{"gradient_clipping": "x"}', "gradient_clipping must be a number of at least 0"),
        ("stage.json", '{"stage": 3}', "stage belongs into the section zero_optimization"),
        ("fsdp2.json", '{"fsdp2": true}', "fsdp2 is no setting of DeepSpeed"),
        ("typo.json", '{"zero_optimisation": {"stage": 2}}', "zero_optimisation is no setting of DeepSpeed"),
        ("one.json", '{"fsdp": true}', "there are FSDP 1"),
    ],
)
def test_bad_deepspeed_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert message in said(capsys, "--optimizer", "lamb", "--deepspeed", str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "holds a list"),
        ("distributed_type: MEGATRON_LM", "has distributed_type MEGATRON_LM"),
        ("{distributed_type: DEEPSPEED, deepspeed_config: {deepspeed_config_file: gone.json}}", "cannot be read"),
    ],
)
def test_bad_accelerate_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert message in said(capsys, "--optimizer", "lamb", "--accelerate", str(tmp_path / "config.yaml"))


def test_ranks_and_files_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "ranks must be a whole number of at least 1" in said(capsys, "--optimizer", "lamb", "--ddp", "--ranks", "0")
    assert "would take all memory" in said(capsys, "--optimizer", "lamb", "--ddp", "--ranks", "100000")
    assert "steps must be a whole number of at least 3, not 2" in said(
        capsys, "--optimizer", "lamb", *DDP, "--steps", "2"
    )
    away = str(tmp_path / "gone" / "report.json")
    assert "there is no folder" in said(capsys, "--optimizer", "lamb", *DDP, "--json", away)
    assert "it is a folder" in said(capsys, "--optimizer", "lamb", *DDP, "--html", str(tmp_path))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.warns(UserWarning, match="2 ranks on 1 cores"):
        check_ranks(2, configuration_of("ddp"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CannotAudit, match="ZeRO-1 needs deepspeed, which is not installed"):
        check_ranks(1, configuration_of({"zero_optimization": {"stage": 1}}))


@pytest.mark.parametrize("given", ["zero", 3, {"fsdp": 3}, "config.toml"])
def test_configurations_that_are_none(given: Any) -> None:
    with pytest.raises(CannotAudit, match=r"a configuration is|there are FSDP 1"):
        configuration_of(given)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--optimizer", "lamb"],
        ["--optimizer", "lamb", "--ddp", "--fsdp", "2"],
        ["--optimizer", "lamb", "--fsdp", "3"],
        ["--optimizer", "lamb", "--ddp", "--options"],
    ],
)
def test_the_parser_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_command(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.nn.Linear(3, 3), "lamb", "ddp"), "the model is a Linear itself: give a function"),
        ((None, torch.optim.SGD([torch.ones(1)]), "ddp"), "the optimizer is a SGD itself: give a function"),
        ((3, "lamb", "ddp"), "the model is a function, or its name in a text, not 3"),
        ((audited.not_a_model, "lamb", "ddp"), "not_a_model returned a int"),
        ((None, None, "ddp"), "no optimizer is given"),
        ((None, "lamb", {1: 2}), "the names of settings are texts"),
        ((None, "lamb", "ddp", "2"), "ranks must be a whole number of at least 1, not '2'"),
        ((None, "lamb", "ddp", True), "ranks must be a whole number of at least 1, not True"),
        ((None, "lamb", "ddp", 1, 0), "timeout must be seconds above 0"),
        ((None, "lamb", "ddp", 1, math.nan), "timeout must be seconds above 0, and at most a million, not nan"),
        ((None, "lamb", "ddp", 1, math.inf), "timeout must be seconds above 0"),
        ((None, "lamb", "ddp", 1, "x"), "timeout must be seconds above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_library_refuses(arguments: tuple[Any, ...], message: str) -> None:
    for function in (audit, assert_exact):
        with pytest.raises(CannotAudit, match=message):
            function(*arguments)


def test_what_nobody_thought_of_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> None:
        raise KeyError("gone")

    monkeypatch.setattr("trustratio.integrations.audit.examine", breaks)
    with pytest.raises(CannotAudit, match="KeyError: 'gone'"):
        audit(None, "lamb", "ddp", ranks=1)


# Configurations -----------------------------------------------------------------------------------------------------


def test_auto_is_resolved_or_named() -> None:
    given = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 64,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
    }
    configuration = configuration_of(given)
    assert "auto" not in json.dumps(configuration.options)
    assert configuration.options["train_micro_batch_size_per_gpu"] == 1
    assert "train_batch_size" not in configuration.options
    assert configuration.options["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert "scheduler" not in configuration.options
    assert (configuration.accumulation, configuration.clipping, configuration.dtype) == (1, 1.0, "fp32")
    notes = " ".join(configuration.notes)
    for name in ("gradient_accumulation_steps", "gradient_clipping", "bf16.enabled", "reduce_bucket_size", "scheduler"):
        assert name in notes
    assert "train_batch_size" in given  # the user's own is left alone


def test_deepspeeds_defaults() -> None:
    assert configuration_of({}).clipping == 1.0  # DeepSpeed's
    assert configuration_of({"gradient_clipping": 0.0}).clipping == 0.0
    assert "zero_allow_untested_optimizer" in " ".join(configuration_of({"zero_optimization": {"stage": 1}}).notes)


def test_accelerate_files(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text("{distributed_type: FSDP, fsdp_config: {fsdp_version: 2}}")
    assert configuration_of(path).wrapper == "fsdp2"
    path.write_text("{distributed_type: FSDP, fsdp_config: {fsdp_use_orig_params: false}}")
    assert configuration_of(path).options["use_orig_params"] is False
    path.write_text("distributed_type: MULTI_GPU")
    assert configuration_of(path).wrapper == "ddp"
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    path.write_text("{distributed_type: DEEPSPEED, deepspeed_config: {deepspeed_config_file: ds.json}}")
    assert configuration_of(path).title == "accelerate DeepSpeed ZeRO-3"
    path.write_text("{distributed_type: DEEPSPEED, mixed_precision: bf16, deepspeed_config: {zero_stage: 1}}")
    assert configuration_of(path).dtype == "bf16"


# Gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 9])
def test_gradients_and_their_means_are_exact_in_16_bits(groups: int) -> None:
    model = SmallModel()
    injection = Injection(model, groups)
    with torch.no_grad():
        for name, weights in seeded_weights(injection.shapes, 1).items():
            assert torch.equal(weights, weights.bfloat16().float())
            assert bool((weights != 0).all())
            model.get_parameter(name).copy_(weights)
    means: dict[str, torch.Tensor] = {}
    for group in range(groups):
        injection.group = group
        model.zero_grad()
        model().backward()
        for name in injection.shapes:
            gradient = model.get_parameter(name).grad
            if name in injection.without_gradient:
                assert gradient is None
                continue
            assert gradient is not None
            assert torch.equal(gradient, injection.gradient(name))  # of a tied layer the sum over its modules
            assert torch.equal(gradient, gradient.bfloat16().float())
            share = gradient.bfloat16() / groups
            assert torch.equal(share.double() * groups, gradient.double())
            means[name] = means.get(name, 0) + share
    assert {name: mean.dtype for name, mean in means.items()} == dict.fromkeys(means, torch.bfloat16)
    sizes = [float(mean.float().norm()) / math.sqrt(mean.numel()) for mean in means.values()]
    assert max(sizes) > 10 * min(sizes)
    if groups > 1:
        injection.group = 0
        first = injection.gradient("norm.weight")
        injection.group = 1
        assert not torch.equal(first, injection.gradient("norm.weight"))


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 16), (2, 16), (3, 13), (4, 8), (5, 7)])
def test_no_sum_of_micro_batches_is_rounded_in_16_bits(ranks: int, accumulation: int) -> None:
    accumulation = with_few_micro_batches(Configuration("ddp", "", accumulation=accumulation), ranks).accumulation
    injection = Injection(SmallModel(), ranks * accumulation)
    for name in injection.shapes:
        sums = []
        for rank in range(ranks):
            of_rank = torch.zeros(injection.shapes[name], dtype=torch.bfloat16)
            exact = torch.zeros(injection.shapes[name], dtype=torch.float64)
            for micro in range(accumulation):
                injection.group = micro * ranks + rank
                part = (injection.gradient(name).double() / accumulation).bfloat16()
                of_rank, exact = of_rank + part, exact + injection.gradient(name).double() / accumulation
                assert torch.allclose(of_rank.double(), exact, rtol=1e-12)
            sums.append((of_rank / ranks, exact / ranks))
        total, expected = sum(part for part, _ in sums), sum(part for _, part in sums)
        assert torch.allclose(total.double(), expected, rtol=1e-12)


def test_more_micro_batches_than_16_are_not_made() -> None:
    given = configuration_of({"gradient_accumulation_steps": 1000})
    few = with_few_micro_batches(given, 2)
    assert (few.accumulation, few.options["gradient_accumulation_steps"]) == (15, 15)
    assert few.notes[-1].startswith("gradient_accumulation_steps is 1000, of which 15 are made")
    assert with_few_micro_batches(few, 2) is few


def test_some_gradients_are_zero() -> None:
    injection = Injection(SmallModel(), 2)
    for step in range(5):
        injection.step = step
        rows = injection.gradient("embedding.weight").any(dim=1)
        assert [bool(row) for row in rows] == [(row + step) % 3 != 0 for row in range(len(rows))]
        silent = [name for name in injection.shapes if not injection.gradient(name).any()]
        assert silent == (["layers.0.down.weight"] if step == 2 else [])
    injection.zeros = False
    assert bool(injection.gradient("embedding.weight").any(dim=1).all())
    alone = Injection(torch.nn.Linear(4, 5, bias=False), 1)
    alone.step = 2
    assert bool(alone.gradient("weight").any())  # a step without any gradient is another matter


def test_a_frozen_layer_and_a_shared_module() -> None:
    shared = torch.nn.Linear(3, 3)
    model = torch.nn.Sequential(shared, torch.nn.Linear(3, 2), shared)
    model[1].bias.requires_grad_(False)
    injection = Injection(model, 1)
    model().backward()
    assert list(injection.shapes) == ["0.weight", "0.bias", "1.weight"]
    assert torch.equal(shared.weight.grad, injection.gradient("0.weight"))
    assert model[1].bias.grad is None


# Reports ------------------------------------------------------------------------------------------------------------


def layer(name: str, moved: float, error: float, **changes: Any) -> AuditedLayer:
    numbers = {"weight_norm": 1.0, "weight_norm_alone": 1.0, "change": moved, "change_alone": 1.0}
    return AuditedLayer(name, (2, 3), moved, error, 2e-6, **{**numbers, "has_gradient": True, **changes})


WRONG_REPORT = Report(
    optimizer="<b>Lamb</b>",
    configuration="DeepSpeed ZeRO-1",
    ranks=2,
    verdict="wrong",
    sentence="Wrong & sorry.",
    layers=(layer("a", 0.25, 0.8), layer("b", math.nan, math.nan), layer("c", 1.0, 1e-7)),
    findings=(Finding("padding read", "reads <padding>"), Finding("idle", "rests", is_wrong=False)),
    collectives=3,
    state_bytes_per_parameter=8.0,
    state_bytes_per_parameter_alone=8.0,
    versions={"torch": "2"},
)


def test_a_report_in_every_form() -> None:
    text = described(WRONG_REPORT)
    assert text.splitlines()[-1] == "Wrong & sorry."
    assert "WRONG: padding read" in text
    assert "note: idle" in text
    assert sum("WRONG" in line for line in text.splitlines()) == 3
    page = page_of(WRONG_REPORT)
    assert "&lt;b&gt;Lamb&lt;/b&gt;" in page
    assert "<b>Lamb</b>" not in page
    assert page.count('<tr class="wrong">') == 2
    assert "prefers-color-scheme: dark" in page
    assert "/*" not in page
    assert "://" not in page  # one file, nothing else is fetched
    record = json.loads(json.dumps(WRONG_REPORT.record(), allow_nan=False))
    assert record["layers"][1]["error"] is None
    assert record["status"] == 1
    assert WRONG_REPORT.worst is not None
    assert WRONG_REPORT.worst.name == "b"
    assert [one.factor for one in WRONG_REPORT.layers[::2]] == [4.0, 1.0]
    assert layer("still", 0.0, 1.0).factor == math.inf


def test_layers_by_the_thousand_are_cut_short() -> None:
    many = tuple(layer(f"layer {i}", 2.0 if i == 900 else 1.0, 1.0 if i == 900 else 0.0) for i in range(1000))
    text = described(Report("o", "c", 2, "wrong", "s", many, (), 0, 8.0, 8.0))
    assert "layer 900" in text
    assert "and 940 more" in text


# Whole runs, on one rank --------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    options = ["--options", "lr=0.01", "--options", "betas=(0.9, 0.95)"]
    assert run_command(["--optimizer", "torch.optim.AdamW", *options, *DDP, *files]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert "lr=0.01 betas=(0.9, 0.95)" in lines[0]
    assert "one rank shards nothing" in lines[1]
    assert lines[-1].startswith("Exact: under DDP on 1 rank every layer")
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["verdict"], record["ranks"], record["status"]) == ("exact", 1, 0)
    assert record["versions"]["torch"] == torch.__version__
    assert "Exact: under DDP" in (tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def _one_rank() -> Iterator[None]:
    yield
    end_started_ranks()


@pytest.mark.usefixtures("_one_rank")
def test_assert_exact() -> None:
    assert_exact(audited.two_layers, audited.adamw, "ddp", ranks=1)
    with pytest.raises(AssertionError, match="goes on from a checkpoint goes elsewhere"):
        assert_exact(audited.two_layers, audited.ForgetsMomentum, "ddp", ranks=1)
    for right in (audited.with_a_rule, audited.without_rate):
        assert_exact(audited.ListsOfParameters, right, "ddp", ranks=1)
    report = audit(None, "lamb", "ddp", ranks=1)  # by the same process
    assert report.verdict == "exact", report.sentence


@pytest.mark.parametrize(
    ("maker", "seconds", "message"),
    [
        ("dies", 60.0, "rank 0 died .exit status 7"),
        ("hangs", 2.0, r"rank 0 in \d\S* seconds: it needs more .timeout., or waits for another"),
    ],
)
def test_a_rank_that_dies_or_hangs_leaves_no_process(maker: str, seconds: float, message: str) -> None:
    ranks = Ranks(1, timeout=60.0)
    ranks.run(time.time)
    processes = list(ranks._processes)
    ranks.timeout = seconds
    with pytest.raises(CannotAudit, match=message):
        examine(Subject(getattr(audited, maker)), configuration_of("ddp"), ranks)
    assert not any(process.is_alive() for process in processes)


class Fake:
    """A process that waits for another one."""

    ended = False

    def kill(self) -> None:
        self.ended = True

    def join(self) -> None:
        assert self.ended


def test_a_rank_that_fails_alone_is_heard_and_the_others_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trustratio.integrations.audits.ranks.AFTER_A_FAILURE", 0.01)
    ranks = Ranks(2, timeout=10_000.0)
    ours, theirs = zip(*(multiprocessing.Pipe() for _ in range(2)), strict=True)
    waiting = [Fake(), Fake()]
    ranks._pipes, ranks._processes = list(ours), list(waiting)
    failure = Failure("the reason", "training")
    theirs[1].send((True, failure))
    assert ranks._collect() == [None, failure]
    assert all(process.ended for process in waiting)
    assert not ranks._processes


def test_functions_within_functions_are_refused() -> None:
    ranks = Ranks(1, timeout=60.0)
    with pytest.raises(CannotAudit, match="functions at the top of a module"):
        ranks.run(lambda: 1)
    assert not ranks._processes
