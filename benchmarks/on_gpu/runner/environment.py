"""Where the parts find this package, and what the machine lacks: wheels, installed without a network."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .processes import ask, run_until

__all__ = ["Unusable", "missing_device", "prepare"]

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("optimizers", "integrations", "recipes")
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}
"""Variables of a rehearsal."""

LEFT_OUT = (
    *("PYTHONOPTIMIZE", "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD"),
    *("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"),
)
"""Variables that would take asserts, tests or the compiler from the parts."""

ASKING = 60.0
"""Seconds that a short program may take, whose torch may be the first to be read from the disk."""

ORIGINS = """
from importlib.util import find_spec
for name in {folders}:
    found = find_spec("trustratio." + name)
    print(found.origin if found else "none")
"""
DEVICES = """
try:
    import torch
except BaseException as error:
    print(f"torch cannot be imported ({type(error).__name__}: {error})".replace(chr(10), " "))
    raise SystemExit(3)
try:
    torch.cuda.init()
    torch.ones(1, device="cuda").item()
except Exception as error:
    print(f"no CUDA device (torch says: {error})".replace(chr(10), " "))
    raise SystemExit(4)
"""

_TARGET = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check")
Say = Callable[[str], None]
Environment = dict[str, str]


class Unusable(Exception):
    """What was asked cannot be done here; the text is a sentence that says why."""


def prepare(
    scratch: Path, log: Path, say: Say, *, seconds: float, wheels: Path | None = None, rehearse: bool = False
) -> Environment:
    """Return the environment of the parts, once what they import is there.

    Args:
        scratch: Folder for what is installed, and for caches.
        log: File that gets what pip says.
        say: Told of what did not work.
        seconds: For everything that is installed.
        wheels: Folder of wheels to install beforehand, and this package with them.
        rehearse: Whether the parts run on the CPU.

    Raises:
        Unusable: The parts would import the package from elsewhere, and measure what is not in this checkout.
    """
    environment = _variables(scratch, rehearse=rehearse)
    pip = Pip(scratch, log, environment, time.monotonic() + seconds)
    if wheels is not None:
        _install_wheels(sorted(wheels.resolve().glob("*.whl")), pip, say)
        pip.install("--no-index", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    origins = _origins(environment)
    if not _are_here(origins):
        found = next((origin for origin in origins if origin != "none"), None)
        why = f"trustratio is installed from elsewhere ({found})" if found else "trustratio is not installed"
        say(f"{why}: its folders are linked, without compiled sweeps on the CPU")
        _link(pip.site)
        if not _are_here(linked := _origins(environment)):
            raise Unusable(
                f"The parts would not import trustratio from {ROOT}, but from {', '.join(linked) or 'nowhere'}. "
                "Uninstall it, or install this checkout."
            )
    return environment


@dataclass
class Pip:
    """Installs without a network.

    Attributes:
        scratch: Its subfolder `site` gets the wheels.
        log: File that gets what pip says.
        environment: Of its processes.
        ends: When everything has to be over, by `time.monotonic()`.
    """

    scratch: Path
    log: Path
    environment: Environment
    ends: float

    @property
    def site(self) -> Path:
        return self.scratch / "site"

    def install_wheels(self, wheels: list[Path]) -> bool:
        return self.install(*_TARGET, "--upgrade", "--target", str(self.site), *map(str, wheels))

    def install(self, *arguments: str) -> bool:
        """Whether it worked in time."""
        left = self.ends - time.monotonic()
        if left <= 0:
            return False
        command = [sys.executable, "-m", "pip", "install", "-q", *arguments]
        said = self.scratch / "pip.log"
        end = run_until(command, said, left, self.environment, ROOT)
        with self.log.open("ab") as log:
            log.write(said.read_bytes())
        return end.status == 0


def _variables(scratch: Path, *, rehearse: bool) -> Environment:
    given = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    path = [str(scratch / "site"), *filter(None, [given.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    caches = {"TRUSTRATIO_CACHE": str(scratch / "cache"), "TRITON_CACHE_DIR": str(scratch / "triton")}
    if rehearse:
        return {**caches, **given, **fixed, **ON_CPU}
    # Left in a shell by a test or a rehearsal, one of these would have a part measure the CPU. Triton interprets for
    # several values of its variable.
    left = {"TRITON_INTERPRET", *(name for name, value in ON_CPU.items() if given.get(name) == value)}
    return {**caches, **{name: value for name, value in given.items() if name not in left}, **fixed}


def _install_wheels(wheels: list[Path], pip: Pip, say: Say) -> None:
    """All together, which is quicker; each by itself if that fails, so that one bad wheel costs no other."""
    if not wheels:
        say("wheels: there are none")
    elif not pip.install_wheels(wheels):
        for wheel in wheels:
            if not pip.install_wheels([wheel]):
                say(f"wheels: {wheel.name} could not be installed, see {pip.log.name}")


def missing_device(scratch: Path) -> str | None:
    """Why there is no CUDA device, in words; None if there is one, or torch did not answer in time."""
    status, lines = ask([sys.executable, "-c", DEVICES], ASKING, _variables(scratch, rehearse=False), ROOT)
    return None if status in (0, None) else (lines or [f"torch ended with status {status}"])[-1]


def _origins(environment: Environment) -> list[str]:
    """The files that the package's folders are imported from, "none" for one that is not found."""
    look = ORIGINS.format(folders=FOLDERS)
    status, lines = ask([sys.executable, "-c", look], ASKING, environment, ROOT)
    return lines[-len(FOLDERS) :] if status == 0 else []


def _are_here(origins: list[str]) -> bool:
    """Whether they are those of this checkout, an editable install or links."""
    wanted = [(ROOT / name).resolve() for name in FOLDERS]
    return [Path(origin).resolve().parent for origin in origins] == wanted


def _link(site: Path) -> None:
    package = site / "trustratio"
    package.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        if not (package / name).is_symlink():
            (package / name).symlink_to(ROOT / name)
