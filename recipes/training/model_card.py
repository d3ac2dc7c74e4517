"""The model card of a trained model: a README.md with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..common.files import read_sealed, write_text
from ..common.marks import CARD
from ..configuration.batch_growth import growths_of
from ..configuration.config import ARCHITECTURES, RecipeConfig
from ..configuration.overrides import load_config
from ..configuration.phases import Phase
from ..configuration.presets import PRESETS
from ..data.documents import HUB_PREFIX
from ..data.given_masks import AS_GIVEN
from ..runs.folder import CONFIG, ENVIRONMENT
from ..runs.metrics import read_metrics
from .trained import describe_end, describe_rates, reached_by, reached_phases

_PATHS = ("data.sources", "data.tokenizer", "model.initial_weights")
"""Fields that say where something lies on a machine; a card has the last parts of their values."""

_SHOWN = ("model", "data", "optimizer", "schedule", "training", "phase_two", "run")

_TRAINING_OF_RUN = (
    *("batch_warmup", "batch_from_noise", "smallest_batch", "largest_batch", "batch_every", "noise_per_batch"),
)
"""Fields of `run` that decide what is trained."""

_LOADING = """```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForMaskedLM.from_pretrained("FOLDER")
```"""


def write_card(run: Path, step: int, output: Path) -> None:
    """Write the card of a run's model beside its weights. What the run's folder does not say is left out.

    Args:
        run: folder of the run, finished or not, of this release or an earlier one.
        step: updates after which the model was saved; measurements after them are not its own.
        output: folder with the model.

    Raises:
        RecipeError: the run's configuration cannot be read.
        OSError: the card cannot be written.
    """
    write_text(output / CARD, model_card(run, step))


def model_card(run: Path, step: int) -> str:
    """Return the card's text; see `write_card`."""
    config = load_config(run / CONFIG)
    records = [record for record in _records(run) if record["step"] <= step]
    validation = _last(records, "validation")
    sections = (
        ("", _summary(config)),
        ("Use", [_LOADING]),
        ("Data", _data(config)),
        ("Training", _training(config, step, _last(records, "train"))),
        ("Results", _results(validation, step)),
        ("Machine and versions", _machine(run)),
        ("Configuration", _configuration(config)),
        ("Not known to the run", _open_ends()),
    )
    body = "\n\n".join(_section(title, list(lines)) for title, lines in sections)
    return str(ModelCard(f"---\n{_metadata(config, validation, step).to_yaml()}\n---\n\n{body}\n"))


def _section(title: str, lines: list[str]) -> str:
    text = "\n".join(lines)
    return f"## {title}\n\n{text}" if title else text


def _last(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next((record for record in reversed(records) if record["kind"] == kind), {})


def _metadata(config: RecipeConfig, validation: dict[str, Any], step: int) -> ModelCardData:
    hub = list(dict.fromkeys(name for source in config.data.sources if (name := _hub_name(source))))
    tags = [config.model.architecture, "masked-lm", "trustratio", config.optimizer.name.lower()]
    # Numbers of other weights have no place in what a program reads.
    results = list(_evaluations(config, hub, validation)) if validation.get("step") == step else []
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=list(dict.fromkeys(tags)),
        datasets=hub or None,
        model_name=config.preset if results else None,
        eval_results=results or None,
    )


def _evaluations(config: RecipeConfig, hub: list[str], validation: dict[str, Any]) -> Iterator[EvalResult]:
    for kind, name, value in _measurements(validation):
        yield EvalResult(
            task_type="fill-mask",
            task_name="Masked language modelling",
            dataset_type=hub[0] if len(hub) == 1 else "text",
            dataset_name=f"held-out documents of {_names(config)}".replace("`", ""),
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )


def _measurements(validation: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield (kind, name, value) of what a validation has measured, as far as it is finite."""
    loss, accuracy = (validation.get(f"validation_{name}", math.nan) for name in ("loss", "accuracy"))
    perplexity = math.exp(loss) if loss < 700 else math.inf
    named = (
        ("loss", "cross-entropy of the masked tokens in nats", loss),
        ("perplexity", "perplexity of the masked tokens", perplexity),
        ("accuracy", "share of the masked tokens that are predicted", accuracy),
    )
    yield from ((kind, name, float(f"{value:.6g}")) for kind, name, value in named if math.isfinite(value))


def _summary(config: RecipeConfig) -> Iterator[str]:
    model, known = config.model, PRESETS.get(config.preset)
    yield f"# {_plain(config.preset)}"
    yield ""
    yield (
        f"{ARCHITECTURES[model.architecture]}, {model.layers} layers x {model.hidden}, pretrained by masked language "
        f"modelling with trustratio's recipe, preset {_code(config.preset)}."
    )
    if known:
        yield f"The preset: {known.description}. Its source: {known.source}."
        if changed := [_code(text) for text in _differences(config, known.config)]:
            yield f"This run has besides, which the preset has otherwise: {', '.join(changed)}."


def _data(config: RecipeConfig) -> Iterator[str]:
    data = config.data
    yield f"- Text: {_names(config)}."
    if data.tokenizer is None:
        yield f"- Tokenizer: WordPiece of at most {data.vocabulary:,} tokens, trained on it."
    else:
        yield f"- Tokenizer: {_code(_without_folders('data.tokenizer', data.tokenizer))}."
    yield f"- {data.validation_fraction:.3g} of the documents were held out for validation."
    if data.masks == AS_GIVEN:
        yield "- Masks are those that came with the data."
    else:
        yield f"- {data.mask_probability:.3g} of the tokens were masked, anew in every epoch."


def _training(config: RecipeConfig, step: int, last: dict[str, Any]) -> Iterator[str]:
    optimizer = config.optimizer
    options = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay, **optimizer.options}
    yield f"- Optimizer: {_code(optimizer.name)}, {', '.join(f'{name} {value}' for name, value in options.items())}."
    reached = reached_by(config, step, last)
    yield f"- Learning rate: {describe_rates(config, reached)}{_at_last(step, last, 'lr')}."
    phases = reached_phases(config, reached)
    for phase in phases:
        at_last = _at_last(step, last, "batch") if phase is phases[-1] else ""
        yield f"- Phase {phase.number}: {_batch(config, phase, at_last)}."
    yield from describe_end(config, reached)
    read = f", {last['sequences']:,.0f} sequences read" if "sequences" in last else ""
    yield f"- Updates: {step:,}{read}."
    yield f"- Precision: {config.training.precision}."


def _at_last(step: int, last: dict[str, Any], name: str) -> str:
    """Say what the model's last update had, if that was recorded."""
    return f"; {last[name]:.4g} at the last update" if last.get("step") == step and name in last else ""


def _batch(config: RecipeConfig, phase: Phase, at_last: str) -> str:
    growth = next((growth for growth in growths_of(config) if growth.phase == phase), None)
    each = f"sequences of {phase.sequence_length:,} tokens per update"
    if growth is None or growth.smallest == growth.largest:
        return f"{phase.global_batch:,} {each}"
    if growth.warmup is None:
        return f"{growth.smallest:,} to at most {growth.largest:,} {each}, growing by the gradient noise{at_last}"
    over = f"the first {growth.warmup:,} sequences"
    return f"{growth.smallest:,} to {growth.largest:,} {each}, growing over {over}{at_last}"


def _results(validation: dict[str, Any], step: int) -> Iterator[str]:
    measured = list(_measurements(validation))
    if not measured:
        yield "No validation of this model was recorded."
        return
    when = validation["step"]
    dated = "" if when == step else f"; this model is of update {step:,}"
    yield f"On the held-out documents, after update {when:,}{dated}:"
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield from (f"| {name} | {value:g} |" for _, name, value in measured)
    if math.isfinite(entropy := validation.get("unigram_entropy", math.nan)):
        yield f"| of guessing by the tokens' frequencies, in nats | {entropy:.6g} |"


def _machine(run: Path) -> Iterator[str]:
    try:
        environment = read_sealed(run / ENVIRONMENT)
    except (OSError, ValueError):
        environment = {}
    if "device" in environment:
        yield f"- {environment.get('ranks', 1)} x {_plain(environment['device'])}"
    versions = ("python", "torch", "deepspeed", "transformers", "accelerate", "tokenizers", "trustratio")
    shown = [f"{name} {_plain(environment[name])}" for name in versions if name in environment]
    yield f"- {', '.join(shown)}" if shown else "- The run does not say with which versions it was made."


def _configuration(config: RecipeConfig) -> Iterator[str]:
    """Yield the fields that differ from the recipe's defaults, as overrides, without paths of a machine."""
    yield "What differs from the recipe's defaults:"
    yield ""
    yield "```"
    yield from _differences(config, RecipeConfig())
    yield "```"


def _differences(config: RecipeConfig, usual: RecipeConfig) -> Iterator[str]:
    """Yield what decides the training and differs from another configuration, as overrides."""
    others = usual.to_dict()
    for section, fields in config.to_dict().items():
        if section not in _SHOWN or (section == "phase_two" and not config.phase_two.steps + usual.phase_two.steps):
            continue
        for name, value in fields.items():
            if value != others[section][name] and (section != "run" or name in _TRAINING_OF_RUN):
                yield f"{section}.{name}={_without_folders(f'{section}.{name}', value)}"


def _open_ends() -> Iterator[str]:
    yield "Language and licence of the text, what the model is for, and what it should not be used for. Add `language:`"
    yield "and `license:` to the metadata above before you publish it."


def _names(config: RecipeConfig) -> str:
    """Return what the text is called, without the folders that it lies in."""
    if not config.data.sources:
        return "the documentation of the installed Python packages"
    return ", ".join(_code(_last_part(source)) for source in config.data.sources)


def _hub_name(source: str) -> str:
    """Return the data set's name on the hub, without configuration and split, or "" of a file."""
    return re.split("[:@]", source.removeprefix(HUB_PREFIX))[0] if source.startswith(HUB_PREFIX) else ""


def _last_part(path: str) -> str:
    if path.startswith(HUB_PREFIX):
        return path
    if "://" in path:  # what follows may be a key
        path = re.split("[?#]", path)[0]
    return PurePath(path).name or "text"


def _without_folders(field: str, value: Any) -> Any:
    if field not in _PATHS or value is None or (field == "data.tokenizer" and _is_hub_name(value)):
        return value
    return _last_part(value) if isinstance(value, str) else [_last_part(path) for path in value]


def _is_hub_name(tokenizer: str) -> bool:
    """Tell a name of the hub, OWNER/NAME, from a path: no folder of that name is here, and it is no file of one."""
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", tokenizer) and PurePath(tokenizer).suffix not in (".txt", ".json")
    return bool(named) and not Path(tokenizer).exists()


def _plain(text: Any) -> str:
    """Return text in one line that Markdown leaves as it is, but for harmless marks."""
    return re.sub(r"[\s`|<>]+", " ", str(text)).strip()


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


def _records(run: Path) -> Iterable[dict[str, Any]]:
    """Return what the run measured; nothing where it cannot be read."""
    try:
        return read_metrics(run)
    except (OSError, ValueError):
        return []
