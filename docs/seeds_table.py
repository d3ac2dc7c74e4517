"""Writes the tables in seeds.md from the registry and the catalogue below: python docs/seeds_table.py.

An optimizer is an entry of the registry, another system one of `SYSTEMS`, and one that is not here
one of `ELSEWHERE`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import NamedTuple

from trustratio.optimizers import OPTIMIZERS
from trustratio.optimizers.registry import OptimizerEntry

PAGE = Path(__file__).with_name("seeds.md")
COLUMNS = ("system", "what it is", "class or function", "verified", "exact under", "shown by")

SHARDINGS = ("DDP", "ZeRO-1 to 3", "FSDP1", "FSDP2", "HSDP", "Megatron")
"""What tests/distributed runs every optimizer under; those that take statistics of single gradients, all but two."""

WITHOUT_STATISTICS = ("FSDP1", "Megatron")
"""FSDP1 does not show single micro-batches' gradients; under Megatron some of those optimizers alone are tested."""

ANYWHERE = "any: made of the run's numbers alone"
RULES = "trustratio.recipes.rules"
STATISTICS = "DDP, ZeRO-1 to 3, FSDP2, HSDP"


def _test(file: str, chosen: str) -> str:
    return f"python -m pytest {file} -k {chosen}"


class System(NamedTuple):
    """A row: `names` are classes and functions, by their full names; `command` shows it."""

    name: str
    what: str
    names: tuple[str, ...]
    verified: str
    exact: str
    command: str


SYSTEMS = (
    System(
        "Linear and square-root scaling: Goyal et al. 2017, arXiv 1706.02677; Krizhevsky 2014, arXiv 1404.5997",
        "The learning rate of a larger batch from that of a smaller one.",
        (f"{RULES}.large_batch.scale_learning_rate",),
        "both formulas; Hoffer et al.'s code has the square root",
        ANYWHERE,
        _test("tests/recipes/test_training_rules.py", "learning_rates_scale"),
    ),
    System(
        "Regime adaptation: Hoffer, Hubara, Soudry 2017, arXiv 1705.08741",
        "As many updates at a large batch as at a small one.",
        (f"{RULES}.large_batch.adapt_regime",),
        "the authors' code",
        ANYWHERE,
        _test("tests/recipes/test_training_rules.py", "regime_adaptation"),
    ),
    System(
        "Ghost batch norm: Hoffer, Hubara, Soudry 2017, arXiv 1705.08741",
        "Each part of a batch is normalised by its own statistics.",
        (f"{RULES}.large_batch.GhostBatchNorm",),
        "the authors' code; that the paper prints the closed form of the running statistics is from memory",
        "any: a ghost batch lies on one rank",
        _test("tests/recipes/test_training_rules.py", "ghost"),
    ),
    System(
        "Multiplicative gradient noise: Hoffer, Hubara, Soudry 2017, arXiv 1705.08741",
        "Weights of the samples' losses that give a large batch the covariance of a small one.",
        (f"{RULES}.large_batch.gradient_noise_weights", f"{RULES}.large_batch.gradient_noise_variance"),
        "nothing: the constant is derived, and the authors' code has no noise",
        "any: a weight per sample of the rank",
        _test("tests/recipes/test_training_rules.py", "noise_gives"),
    ),
    System(
        "Clipping by the norm of the model: Hoffer, Hubara, Soudry 2017, arXiv 1705.08741; LAMB's recipes",
        "The gradient of the whole model, of each layer or of rows cut to a norm.",
        ("trustratio.integrations.layer_norms.clip_grad_norm_",),
        "torch's results on one process",
        "DDP, ZeRO-1 to 3, FSDP1, FSDP2, HSDP, Megatron",
        _test("tests/distributed/test_clip_grad_norm.py", "norm"),
    ),
    System(
        "Batch schedule in place of a decay: Smith et al. 2017, arXiv 1711.00489",
        "The batch grows where the learning rate would fall; the accumulation that follows.",
        (f"{RULES}.large_batch.batch_instead_of_decay", f"{RULES}.large_batch.batch_plan_at"),
        "the paper's rule; its schedules were not compared",
        ANYWHERE,
        _test("tests/recipes/test_training_rules.py", "batch"),
    ),
    System(
        "Small-loss discarding: Gao, Zhong 2020, arXiv 2012.08795",
        "The mean over the samples with the larger losses alone, of all ranks or of each.",
        (f"{RULES}.large_batch.large_loss_mask", f"{RULES}.large_batch.smallest_kept_loss"),
        "nothing beyond the abstract",
        "any: the border is that of all ranks' losses, bit for bit",
        _test("tests/recipes/test_discarding.py", "rule_for_gathered_losses"),
    ),
    System(
        "Small-loss discarding in BERT's recipe, `data.discard_smallest`: Gao, Zhong 2020, arXiv 2012.08795",
        "The masked tokens that are predicted best already leave the loss of an update.",
        ("trustratio.recipes.training.discarding.without_smallest_losses",),
        "nothing beyond the abstract; that a sample is a masked token is a choice",
        "DDP, ZeRO-1 to 3, through DeepSpeed, Accelerate and the Trainer",
        "python recipes/bert.py --preset lamb-tiny --max_steps 20 data.discard_smallest=0.1",
    ),
    System(
        "Learning rate by staleness: Giladi et al. 2020, arXiv 1909.12340",
        "The learning rate of asynchronous updates, inversely proportional to their delay.",
        (f"{RULES}.large_batch.staleness_learning_rate",),
        "nothing: the rule is from memory",
        ANYWHERE,
        _test("tests/recipes/test_training_rules.py", "staleness"),
    ),
    System(
        "Gradient noise scale: McCandlish et al. 2018, arXiv 1812.06162",
        "Signal and noise of the gradient, per layer and of the model: what a larger batch would gain.",
        ("trustratio.optimizers.noise_scale.gradient_noise", "trustratio.optimizers.noise_scale.RunningNoise"),
        "GPT-NeoX's estimator",
        STATISTICS,
        "python recipes/bert.py --preset lamb-tiny --max_steps 20 run.noise_scale=true",
    ),
    System(
        "AdaScale's gain: Johnson et al. 2020, arXiv 2007.05105",
        "How many small steps one step with the groups' mean gradient is worth.",
        ("trustratio.optimizers.noise_scale.adascale",),
        "fairscale's formula; its running averages are left to the caller",
        STATISTICS,
        _test("tests/unit/test_gradient_statistics.py", "adascale"),
    ),
    System(
        "CowClip's row counts: Zheng et al. 2022, arXiv 2204.06240",
        "How often each row of an embedding is looked up in the global batch.",
        ("trustratio.optimizers.CowClip.count_lookups", "trustratio.optimizers.CowClip.count_ids"),
        "the authors' code counts within one replica; adding up over ranks is this package's",
        "DDP, ZeRO-1 to 3, FSDP2",
        _test("tests/distributed/test_cowclip.py", "cut_rows"),
    ),
    System(
        "CowClip's scaling: Zheng et al. 2022, arXiv 2204.06240",
        "Learning rates and L2 of embeddings and dense layers at a larger batch.",
        ("trustratio.optimizers.cowclip.scale_cowclip",),
        "the README of the authors' code",
        ANYWHERE,
        "python recipes/click_through.py --batches 512 8192 --seeds 1",
    ),
    System(
        "Warm-up and polynomial decay: BERT; NVIDIA's and MLPerf's LAMB; Nado et al. 2021, arXiv 2102.06356",
        "Linear warm-up, then a decay of any degree, from the warm-up's end (no jump) or from the first update.",
        (f"{RULES}.schedules.warmup_polynomial", f"{RULES}.schedules.WarmupPolynomial"),
        "NVIDIA's and MLPerf's code",
        ANYWHERE,
        _test("tests/recipes/test_schedules.py", "warmup"),
    ),
    System(
        "Warm-up, constant stretch and decay of LANS: Zheng et al. 2020, arXiv 2006.13484",
        "The same with a plateau.",
        (f"{RULES}.schedules.warmup_polynomial", f"{RULES}.schedules.WarmupPolynomial"),
        "GluonNLP's code, which warms up from 0 and not from 1; the paper's lengths are from memory",
        ANYWHERE,
        _test("tests/recipes/test_training_rules.py", "lans_plateau"),
    ),
    System(
        "DeepSpeed's EE schedule: DeepSpeedExamples, bing_bert",
        "Quadratic warm-up, then a factor every so many updates.",
        (f"{RULES}.schedules.warmup_exponential", f"{RULES}.schedules.WarmupExponential"),
        "DeepSpeed's code",
        ANYWHERE,
        _test("tests/recipes/test_training_rules.py", "deepspeeds_exponential"),
    ),
    System(
        "Warm-up, stable, decay",
        "A plateau whose end can be chosen late, then a short decay.",
        (f"{RULES}.schedules.warmup_stable_decay", f"{RULES}.schedules.WarmupStableDecay"),
        "ModernBERT's code",
        ANYWHERE,
        _test("tests/recipes/test_training_rules.py", "warmup_stable_decay"),
    ),
    System(
        "Mixed-batch training: You et al. 2019, arXiv 1904.00962",
        "Short sequences at a large batch, then long ones at a smaller, warmed up again.",
        ("trustratio.recipes.configuration.config.PhaseTwoConfig",),
        "NVIDIA's and DeepSpeed's recipes ([presets](presets.md))",
        "DDP, ZeRO-1 to 3, through DeepSpeed, Accelerate and the Trainer",
        "deepspeed --num_gpus 2 recipes/bert.py --preset lamb-64k-32k-tiny",
    ),
    System(
        "Baselines that are tuned as well: Nado et al. 2021, arXiv 2102.06356",
        "AdamW on the same data and schedule, several learning rates for every optimizer.",
        ("trustratio.recipes.comparison.compare.grids",),
        "its text; its hyper-parameters were not at hand",
        "DDP, ZeRO-1 to 3",
        "python recipes/compare.py --preset lamb-tiny --optimizers lamb,adamw --lrs 3",
    ),
    System(
        "Extrapolation: Lin et al. 2020, arXiv 2006.05720",
        "Gradients at weights that are moved by the last gradient, this rank's own part of it, or noise.",
        ("trustratio.optimizers.Extrapolation",),
        "nothing beyond the abstract: the equations are a reconstruction",
        "DDP, ZeRO-1 to 3, FSDP1, FSDP2, Megatron; a rank's own gradient under DDP, ZeRO-1 and BF16_Optimizer alone",
        _test("tests/distributed/test_extrapolation.py", "equals_its_reference"),
    ),
    System(
        "LAD, anomaly scores: Guggilam, Chandola, Patra 2023, arXiv 2303.00954",
        "How far each sample is from its class, by large deviations.",
        (f"{RULES}.anomalies.anomaly_scores",),
        "score, threshold, quarter of the authors' code (sreelekh/LAD), not its variances and counts",
        "any: the same scores however the rows are split over ranks",
        _test("tests/recipes/test_anomalies.py", "worked_example"),
    ),
    System(
        "LIIT, training samples by anomaly: Guggilam, Chandola, Patra 2023, arXiv 2303.00954",
        "Trains on a part of the data that has the most anomalous samples of each class, made anew now and then.",
        (f"{RULES}.anomaly_sampler.LadSampler",),
        "its idea is the abstract's; sizes, draws and intervals are readings",
        "any: every rank draws the same sample and takes its turn",
        "python recipes/tabular.py --optimizers lamb adamw --batches 1024 --seeds 1 --sampling uniform lad",
    ),
    System(
        "Arbiter: MacLellan, Dong 2022, arXiv 2205.08231",
        "A small network that learns the batch size from validation data while another one trains.",
        (f"{RULES}.arbiter.Arbiter",),
        "the author's unfinished code, at second hand",
        "DDP: logits and gradients are averaged over the ranks",
        _test("tests/recipes/test_arbiter.py", "what_one_process_does"),
    ),
    System(
        "A batch that follows the gradient noise scale: after McCandlish et al. 2018, arXiv 1812.06162",
        "The global batch doubles as long as the noise says that a larger one pays.",
        (f"{RULES}.noise_batch.BatchFromNoise", f"{RULES}.set_batch.set_global_batch"),
        "the estimator; that the batch starts small and only doubles is this package's choice",
        "any: all ranks see the same estimates; in BERT's recipe DDP and ZeRO-1 to 3",
        "python recipes/bert.py --preset lamb-tiny run.batch_from_noise=true run.largest_batch=1024",
    ),
    System(
        "A batch that warms up: ModernBERT, Warner et al. 2024, arXiv 2412.13663",
        "The global batch grows to its full size in equal steps of as many updates each.",
        (f"{RULES}.batch_warmup.BatchWarmup",),
        "the authors' code",
        "any: made of the run's numbers alone; in BERT's recipe DDP and ZeRO-1 to 3",
        "python recipes/bert.py --preset lamb-tiny run.batch_warmup=0.2 run.smallest_batch=32",
    ),
)

ELSEWHERE = (
    ("AGVM (NeurIPS 2022)", "needs gradients of two halves of the ranks, reduced apart; made for detectors' modules"),
    ("Adasum (Horovod)", "takes the place of the gradient's reduction, which ZeRO and FSDP do themselves"),
    ("1-bit LAMB (arXiv 2104.06069)", "compresses the momentum that is sent; DeepSpeed has it, without ZeRO"),
    ("ConAdv (arXiv 2106.00221)", "adversarial examples for images: data, which go with any optimizer here"),
    ("LALC (ICLR 2023 submission)", "only its first page was found"),
    ("Lipschitz-bandit tuning of learning rates", "a search over whole runs; `compare.py` tries grids"),
    ("Simmering", "a thermostat over the weights that samples models, which is not training with large batches"),
)
"""Systems that the sources name and that are not here, and why."""


def exact_under(entry: OptimizerEntry) -> str:
    """Return the shardings under which tests compare an optimizer with one process."""
    left_out = (*entry.not_under, *(WITHOUT_STATISTICS if entry.group_statistics else ()))
    shardings = ", ".join(sharding for sharding in SHARDINGS if sharding not in left_out)
    return "; not ".join((shardings, *(part for part in entry.not_under if part not in SHARDINGS)))


TESTED = {
    "curvature_sgd": _test("tests/distributed/test_curvature.py", "samples_equal_one_process"),
    "curvature_adamw": _test("tests/distributed/test_curvature.py", "samples_equal_one_process"),
}
"""Commands of those that need more of a loop than the audit's has."""

AUDITED = {
    "adashift": "lr=0.03 keep=2",  # five steps must be more than it keeps
    "mclr": "lr=0.01",
    "cblr": "lr=0.01",  # at 1e-4 five steps are rounded too coarsely to be compared
}
"""Options of the audit's command, where the starting rate alone does not do."""


def of_optimizer(name: str, entry: OptimizerEntry) -> System:
    """Return the row of an optimizer; its class's first line says what it is."""
    title = entry.optimizer_class.__name__
    options = AUDITED.get(name, f"lr={entry.starting_rate:g}")
    audit = (
        f"python -m trustratio.integrations.audit --optimizer {name} --options {options} "
        "--accelerate recipes/configs/zero2.yaml"
    )
    return System(
        f"{title}: {entry.paper}",
        (inspect.getdoc(entry.optimizer_class) or "").partition("\n")[0].replace("``", "`"),
        (f"trustratio.optimizers.{title}",),
        entry.verified,
        exact_under(entry),
        TESTED.get(name, audit),
    )


def optimizers() -> list[System]:
    """Return the rows of the registry."""
    return [of_optimizer(name, entry) for name, entry in OPTIMIZERS.items()]


def cells(system: System) -> tuple[str, ...]:
    """Return a row's cells in the order of `COLUMNS`."""
    names = ", ".join(f"`{name}`" for name in system.names)
    return system.name, system.what, names, system.verified, system.exact, f"`{system.command}`"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *(tuple(c.replace("|", "\\|") for c in row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- ", "|---").replace("---| |", "---|")


def tables() -> dict[str, str]:
    """Return the page's tables by name."""
    return {
        "optimizers": _table(COLUMNS, [cells(system) for system in optimizers()]),
        "rules": _table(COLUMNS, [cells(system) for system in SYSTEMS]),
        "elsewhere": _table(("system", "why it is not here"), list(ELSEWHERE)),
    }


def written(page: str) -> str:
    """Return the page with its tables replaced."""
    for name, table in tables().items():
        begin, end = f"<!-- {name}: written by seeds_table.py -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = f"{before}{begin}{table}{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
