"""Where the parts find this package, and what the machine lacks: wheels, installed without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .processes import run_until

__all__ = ["prepare"]

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("optimizers", "integrations", "recipes")
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}
"""Variables of a rehearsal."""

_TARGET = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check")
Say = Callable[[str], None]
Environment = dict[str, str]


def prepare(
    scratch: Path, log: Path, say: Say, *, seconds: float, wheels: Path | None = None, rehearse: bool = False
) -> Environment:
    """Return the environment of the parts, once what they import is there.

    Args:
        scratch: Folder for what is installed, and for caches.
        log: File that gets what pip says.
        say: Told of what did not work; nothing here raises an error.
        seconds: For everything that is installed.
        wheels: Folder of wheels to install beforehand, and this package with them.
        rehearse: Whether the parts run on the CPU.
    """
    environment = _variables(scratch, rehearse=rehearse)
    pip = Pip(scratch, log, environment, time.monotonic() + seconds)
    if wheels is not None:
        _install_wheels(sorted(wheels.resolve().glob("*.whl")), pip, say)
        pip.install("--no-index", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    if not _is_importable(environment):
        say("trustratio is not installed: its folders are linked, without compiled sweeps on the CPU")
        _link(pip.site)
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
    given = dict(os.environ)
    path = [str(scratch / "site"), *filter(None, [given.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    caches = {"TRUSTRATIO_CACHE": str(scratch / "cache"), "TRITON_CACHE_DIR": str(scratch / "triton")}
    if rehearse:
        return {**caches, **given, **fixed, **ON_CPU}
    # Left in a shell by a test or a rehearsal, one of these would have a part measure the CPU.
    left = {name for name, value in ON_CPU.items() if given.get(name) == value}
    return {**caches, **{name: value for name, value in given.items() if name not in left}, **fixed}


def _install_wheels(wheels: list[Path], pip: Pip, say: Say) -> None:
    """All together, which is quicker; each by itself if that fails, so that one bad wheel costs no other."""
    if not wheels:
        say("wheels: there are none")
    elif not pip.install_wheels(wheels):
        for wheel in wheels:
            if not pip.install_wheels([wheel]):
                say(f"wheels: {wheel.name} could not be installed, see {pip.log.name}")


def _is_importable(environment: Environment) -> bool:
    look = "import sys; from importlib.util import find_spec; sys.exit(find_spec('trustratio.optimizers') is None)"
    try:
        return subprocess.run([sys.executable, "-c", look], env=environment, cwd=ROOT, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _link(site: Path) -> None:
    package = site / "trustratio"
    package.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        if not (package / name).is_symlink():
            (package / name).symlink_to(ROOT / name)
