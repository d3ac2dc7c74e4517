"""Where the parts find this package, and what the machine lacks: wheels, installed without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["prepare"]

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("optimizers", "integrations", "recipes")

_TARGET = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check")
_LONGEST = 90.0  # seconds of one installation

Say = Callable[[str], None]
Environment = dict[str, str]


def prepare(scratch: Path, log: Path, say: Say, *, wheels: Path | None = None, rehearse: bool = False) -> Environment:
    """Return the environment of the parts, once what they import is there.

    Args:
        scratch: Folder for what is installed, and for caches.
        log: File that gets what pip says.
        say: Told of what did not work; nothing here raises an error.
        wheels: Folder of wheels to install beforehand, and this package with them.
        rehearse: Whether the parts run on the CPU.
    """
    environment = _variables(scratch, rehearse=rehearse)
    if wheels is not None:
        _install_wheels(sorted(wheels.resolve().glob("*.whl")), scratch / "site", log, say, environment)
        _install(["--no-index", "--no-deps", "--no-build-isolation", "-e", str(ROOT)], log, environment)
    if not _is_importable(environment):
        say("trustratio is not installed: its folders are linked, without compiled sweeps on the CPU")
        _link(scratch / "site")
    return environment


def _variables(scratch: Path, *, rehearse: bool) -> Environment:
    given = dict(os.environ)
    path = [str(scratch / "site"), *filter(None, [given.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    caches = {"TRUSTRATIO_CACHE": str(scratch / "cache"), "TRITON_CACHE_DIR": str(scratch / "triton")}
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}
    return {**caches, **given, **fixed, **(on_cpu if rehearse else {})}


def _install_wheels(wheels: list[Path], site: Path, log: Path, say: Say, environment: Environment) -> None:
    """All together, which is quicker; each by itself if that fails, so that one bad wheel costs no other."""
    if not wheels:
        say("wheels: there are none")
    elif not _install([*_TARGET, "--upgrade", "--target", str(site), *map(str, wheels)], log, environment):
        for wheel in wheels:
            if not _install([*_TARGET, "--upgrade", "--target", str(site), str(wheel)], log, environment):
                say(f"wheels: {wheel.name} could not be installed, see {log.name}")


def _install(arguments: list[str], log: Path, environment: Environment) -> bool:
    return _succeeds([sys.executable, "-m", "pip", "install", "-q", *arguments], log, environment)


def _is_importable(environment: Environment) -> bool:
    look = "import sys; from importlib.util import find_spec; sys.exit(find_spec('trustratio.optimizers') is None)"
    return _succeeds([sys.executable, "-c", look], Path(os.devnull), environment)


def _succeeds(command: list[str], log: Path, environment: Mapping[str, str]) -> bool:
    with log.open("a") as output:
        try:
            done = subprocess.run(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=ROOT,
                timeout=_LONGEST,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            print(error, file=output)
            return False
    return done.returncode == 0


def _link(site: Path) -> None:
    package = site / "trustratio"
    package.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        if not (package / name).is_symlink():
            (package / name).symlink_to(ROOT / name)
