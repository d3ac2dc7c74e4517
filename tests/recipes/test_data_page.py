"""docs/data.md says what the code does: its formats are those that are read, and its commands run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.data.documents import _KINDS
from trustratio.recipes.data.prepare import _config, _parser
from trustratio.recipes.data.prepared import open_prepared
from trustratio.recipes.sources.compressed import COMPRESSIONS
from trustratio.recipes.sources.hub import _CHARACTERS_BETWEEN_SAVES, _WAITS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
HERE = [block for block in BLOCKS if not re.search(r"# needs|^pip ", block, re.MULTILINE)]
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line for line in LINES if re.search(r"prepare |bert\.py", line)]


def test_the_page_names_every_suffix_that_is_read():
    table = PAGE.split("## Formats")[1].split("\n- ")[0]
    assert set(re.findall(r"`(\.\w+)`", table)) == {*_KINDS, ".txt", ".md"}
    assert all(f"`{suffix}`" in PAGE for suffix in COMPRESSIONS)


def test_the_page_says_when_a_stream_is_taken_up_and_what_a_kill_loses():
    assert "after 1, 2, 5, 15 and 30 seconds" in PAGE
    assert _WAITS == (1, 2, 5, 15, 30)
    assert f"at\n  most {_CHARACTERS_BETWEEN_SAVES // 10**6} million characters after a kill" in PAGE


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_the_options_of_every_command_exist(number):
    words = shlex.split(COMMANDS[number])
    if "recipes/bert.py" in words:
        config = parse_command_line(words[words.index("recipes/bert.py") + 1 :]).config.data
    else:
        assert words[:3] == ["python", "-m", "trustratio.recipes.prepare"]
        config = _config(_parser().parse_args(words[3:]))
    assert config.sources


@pytest.mark.slow
def test_the_commands_that_need_nothing_run_as_they_stand(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "TRUSTRATIO_CACHE": str(tmp_path / "cache")}
    assert len(HERE) == 4
    for block in HERE:
        done = subprocess.run(
            ["bash", "-ec", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
    folders = [open_prepared(tmp_path / name, 16) for name in ("tokens", "tokens-of-csv", "tokens-of-saved")]
    assert {(data.documents, data.characters) for data in folders} == {(400, folders[0].characters)}
    assert (tmp_path / "runs" / "posts" / "config.json").exists()
