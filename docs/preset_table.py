"""Writes the tables in presets.md from the recipe's presets: python docs/preset_table.py."""

from __future__ import annotations

from pathlib import Path

from trustratio.recipes.configuration.batch_growth import updates_of
from trustratio.recipes.configuration.config import RecipeConfig, ScheduleConfig
from trustratio.recipes.configuration.phases import phases_of
from trustratio.recipes.configuration.presets import PRESETS, PUBLISHED
from trustratio.recipes.configuration.twins import Preset

PAGE = Path(__file__).with_name("presets.md")
TABLES = {}


def _table(name: str, *columns: str):
    """Register a function that yields rows as the table `name`."""

    def register(rows):
        head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
        TABLES[name] = lambda: head + "".join(f"| {' | '.join(row)} |\n" for row in rows())
        return rows

    return register


def _batches(config: RecipeConfig) -> str:
    texts = [f"{p.global_batch:,} x {p.sequence_length}, {p.steps:,} updates" for p in phases_of(config)]
    if config.run.batch_warmup:
        first, updates = phases_of(config)[0], updates_of(config)[0][0]
        texts[0] = (
            f"{first.global_batch:,} x {first.sequence_length}, from {config.run.smallest_batch:,} over the first "
            f"{_share(config.run.batch_warmup)}, {updates:,} updates"
        )
    return "; then ".join(texts)


def _schedule(preset: Preset) -> str:
    config, second = preset.config, preset.config.phase_two
    schedule = config.schedule
    texts = [_shape(schedule, config.optimizer.lr)]
    if second.steps and second.reset_schedule:
        texts.append(f"then {second.lr:g}, warm-up {_share(second.warmup)}")
        if schedule.shape == "wsd":
            texts[-1] += _cooldown(second.cooldown, schedule)
        if second.constant:
            texts[-1] += f", constant {_share(second.constant)}"
    elif second.steps:
        texts.append("over both phases")
    return "; ".join(texts)


def _shape(schedule: ScheduleConfig, peak: float) -> str:
    text = f"{peak:g}, warm-up {_share(schedule.warmup)}"
    if schedule.warmup_start:
        text += f" from {schedule.warmup_start}"
    if schedule.constant:
        text += f", constant {_share(schedule.constant)}"
    if schedule.shape == "exponential":
        return f"{text}, offset {schedule.offset:g}, x{schedule.decay_rate:g} every {schedule.decay_steps:g} updates"
    if schedule.shape == "wsd":
        return text + _cooldown(schedule.cooldown, schedule)
    if schedule.final:
        return f"{text}, (1 - p)^{schedule.degree:g} to {schedule.final:g} of it"
    return f"{text}, (1 - p)^{schedule.degree:g}" + (", p from the start" if schedule.decay_from_start else "")


def _cooldown(cooldown: float, schedule: ScheduleConfig) -> str:
    if not cooldown:
        return ", then constant"
    return f", constant, {schedule.cooldown_form} over the last {_share(cooldown)} to {schedule.final:g} of it"


def _share(value: float) -> str:
    return f"{value:.4g} updates" if value >= 1 else f"{100 * value:.4g} %"


def _optimizer(preset: Preset) -> str:
    optimizer = preset.config.optimizer
    options = {"weight_decay": optimizer.weight_decay, **optimizer.options}
    return f"`{optimizer.name}`, " + ", ".join(f"{key} {value}" for key, value in options.items())


@_table("published", "preset", "batch x tokens", "learning rate", "optimizer", "clipping", "source")
def published():
    for name, preset in PUBLISHED.items():
        clipping = f"{preset.config.training.gradient_clipping:g}"
        yield (
            f"`{name}`",
            _batches(preset.config),
            _schedule(preset),
            _optimizer(preset),
            clipping,
            preset.source,
        )


@_table("unverified", "preset", "field", "value", "why it is unverified")
def unverified():
    for name, preset in PUBLISHED.items():
        for key, why in preset.unverified.items():
            section, field = key.split(".")
            part = getattr(preset.config, section)
            value = part.options[field] if not hasattr(part, field) else getattr(part, field)
            shown = float(f"{value:.4g}") if isinstance(value, float) else value
            yield f"`{name}`", f"`{key}`", str(shown), why


@_table("twins", "preset", "batch x tokens", "learning rate")
def twins():
    for name, preset in PRESETS.items():
        if preset.twin_of is not None:
            yield f"`{name}`", _batches(preset.config), _schedule(preset)


def written(page: str) -> str:
    """Return the page with its tables replaced by the presets'."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: written by preset_table.py -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = f"{before}{begin}{table()}{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
