"""Small runs of the recipes as users start them, each with the one command line that begins and continues it."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RANKS = 2
LAST = 16
"""Updates of a run: twelve, and four of a second phase with longer sequences."""

CHECKPOINTS = LAST // 4
MARK = "TRUSTRATIO_KILLS"
"""Variable in the environment of every process of a run, by which they are found whoever their parent is."""

_SETTINGS = (
    *("--steps", "12", "--sequence_length", "16", "--global_batch", "16", "--micro_batch", "4"),
    *("data.validation_fraction=0.2", "data.validation_sequences=10", "model.dropout=0.1", "model.max_positions=32"),
    *("model.hidden=32", "model.intermediate=64", "run.validate_every=8", "run.checkpoint_every=4"),
    *("run.log_every=3", "run.print_every=1", "run.keep_checkpoints=2", "run.noise_scale=true"),
    *("phase_two.steps=4", "phase_two.sequence_length=32", "phase_two.global_batch=8", "phase_two.micro_batch=1"),
)
_SHARED_MEMORY = Path("/dev/shm")
_IN_PRIVATE = ("sh", "-c", f'mount --bind "$0" {_SHARED_MEMORY} && exec "$@"')
_POLL = 0.002  # seconds
_MOST_SECONDS = 600.0  # of a life on a busy machine; afterwards it hangs


@dataclass(frozen=True)
class Configuration:
    """A launcher, a sharding and a loop.

    Attributes:
        launcher: "deepspeed", "torchrun" or "accelerate".
        sharding: "ddp", "zero1" or "zero3".
        trainer: whether the Hugging Face Trainer's loop trains.
    """

    launcher: str
    sharding: str
    trainer: bool = False

    @property
    def name(self) -> str:
        """E.g. "torchrun-zero3" or "accelerate-ddp-trainer"."""
        return "-".join([self.launcher, self.sharding, *(["trainer"] if self.trainer else [])])

    def command(self, port: int, data: Path, output: Path) -> list[str]:
        """Return the line that begins the run in `output`, continues it, and ends at once when it is finished."""
        script = "bert_trainer.py" if self.trainer else "bert.py"
        stage = ["--zero_stage", self.sharding.removeprefix("zero") if self.sharding != "ddp" else "0"]
        if self.launcher == "accelerate":
            script, stage = script if self.trainer else "bert_accelerate.py", []
        return [
            *self._launcher(str(port)),
            str(RECIPES / script),
            *("--data", str(data / "text.txt"), "--tokenizer", str(data / "tokenizer.json")),
            *_SETTINGS,
            *stage,
            *("--output", str(output), "--resume", "auto"),
        ]

    def _launcher(self, port: str) -> list[str]:
        beside = Path(sys.executable).parent
        if self.launcher == "deepspeed":
            return [sys.executable, str(beside / "deepspeed"), "--num_gpus", str(RANKS), "--master_port", port]
        if self.launcher == "torchrun":
            return [sys.executable, str(beside / "torchrun"), "--nproc_per_node", str(RANKS), "--master_port", port]
        # `accelerate launch` is this module; the `accelerate` command also imports every model library it finds.
        settings = ["--config_file", str(RECIPES / "configs" / f"{self.sharding}.yaml"), "--num_processes", str(RANKS)]
        return [sys.executable, "-m", "accelerate.commands.launch", *settings, "--main_process_port", port]


CONFIGURATIONS = {
    configuration.name: configuration
    for configuration in (
        *(Configuration(launcher, "zero1") for launcher in ("deepspeed", "torchrun", "accelerate")),
        *(Configuration(launcher, "zero3") for launcher in ("deepspeed", "torchrun", "accelerate")),
        *(Configuration(launcher, "ddp") for launcher in ("deepspeed", "torchrun", "accelerate")),
        Configuration("deepspeed", "zero3", trainer=True),
        Configuration("torchrun", "zero1", trainer=True),
        Configuration("accelerate", "ddp", trainer=True),
    )
}
"""Every launcher with every sharding, and the Trainer's loop once with each."""


def write_data(folder: Path) -> None:
    """Write the text that all runs read and a tokenizer for it.

    The tokenizer is given since `tokenizers` breaks ties at random: runs that train their own would differ.
    """
    generator = random.Random(0)
    words = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(2, 9))) for _ in range(400)]
    lines = [" ".join(generator.choices(words, k=generator.randint(4, 12))) for _ in range(4_000)]
    text = "\n".join(line + "\n" * (generator.random() < 0.2) for line in lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(text)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.train_from_iterator(lines, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    tokenizer.save(str(folder / "tokenizer.json"))


@dataclass
class Run:
    """A run's folders, and the port that all its lives are started with.

    Attributes:
        folder: `output`, `cache`, temporary files and what was printed, nothing else.
        mark: value of `MARK` in the environment of its processes.
        lives: how often it was started.
        shared_memory: what its processes have for /dev/shm, to see what they leave; None where that is not allowed.
    """

    configuration: Configuration
    data: Path
    folder: Path
    mark: str = ""
    port: int = 0
    lives: int = 0
    shared_memory: Path | None = None

    def __post_init__(self) -> None:
        self.mark = f"{os.getpid()}/{self.folder.name}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        for folder in (self.cache, self.folder / "temporary"):
            folder.mkdir(parents=True)
        if _in_private():
            self.shared_memory = Path(tempfile.mkdtemp(prefix="kills-", dir=_SHARED_MEMORY))

    @property
    def output(self) -> Path:
        """The run's output folder."""
        return self.folder / "output"

    @property
    def cache(self) -> Path:
        """Where its data are prepared."""
        return self.folder / "cache"

    def start(self) -> Life:
        """Start the command line once more."""
        self.lives += 1
        environment = {
            **os.environ,
            MARK: self.mark,
            "TRUSTRATIO_CACHE": str(self.cache),
            "TMPDIR": str(self.folder / "temporary"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        apart = [*_in_private(), str(self.shared_memory)] if self.shared_memory is not None else []
        log = self.folder / f"life-{self.lives}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*apart, *self.configuration.command(self.port, self.data, self.output)],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        return Life(process, log)

    def left_in_shared_memory(self) -> list[str]:
        """Return the names of the files there once all processes have ended, and remove them."""
        if self.shared_memory is None:
            return []
        names = sorted(os.listdir(self.shared_memory))
        shutil.rmtree(self.shared_memory)
        return names

    def processes(self) -> list[int]:
        """Return the ids of all living processes of all lives."""
        return list(_with_variable(MARK, self.mark))


@dataclass
class Life:
    """A run from one start to its end.

    Attributes:
        process: the launcher.
        log: what launcher and ranks print.
        lines: of the log, with the seconds since the start at which they were seen.
    """

    process: subprocess.Popen[bytes]
    log: Path
    began: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, str]] = field(default_factory=list)
    _read: int = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def wait(self, happened: Callable[[], bool]) -> bool:
        """Wait until something has happened; return False if the launcher ended first.

        Raises:
            TimeoutError: neither came.
        """
        while True:
            ended = self.process.poll() is not None
            self._read_log()
            if happened():
                return True
            if ended:
                return False
            if self.seconds > _MOST_SECONDS:
                raise TimeoutError(f"after {_MOST_SECONDS:g} seconds the run goes on; its last line: {self.last_line}")
            time.sleep(_POLL)

    def seen(self, text: str) -> float | None:
        """Return when the first line with `text` in it was seen."""
        return next((seconds for seconds, line in self.lines if text in line), None)

    @property
    def last_line(self) -> str:
        """The newest line."""
        self._read_log()
        return self.lines[-1][1] if self.lines else "nothing was printed"

    def _read_log(self) -> None:
        if self.log.stat().st_size == self._read:
            return
        with self.log.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        self.lines += [(self.seconds, line) for line in whole.decode(errors="replace").splitlines() if line.strip()]


@functools.cache
def _in_private() -> tuple[str, ...]:
    """Return what starts a command, as the same process, with another folder for /dev/shm; () if not allowed."""
    for own in ((), ("--user", "--map-root-user")):
        line = ("unshare", *own, "--mount", *_IN_PRIVATE)
        with contextlib.suppress(OSError):
            if subprocess.run([*line, str(_SHARED_MEMORY), "true"], capture_output=True).returncode == 0:
                return line
    return ()


def variables(process: int) -> dict[str, str]:
    """Return the environment that a process was started with; {} if it is gone or another user's."""
    try:
        entries = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _with_variable(name: str, value: str) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and variables(int(entry.name)).get(name) == value:
            yield int(entry.name)
