import os
import sys
from pathlib import Path

# DeepSpeed compiles extensions where a benchmark first needs them: with this environment's ninja, and into a folder of
# its own, lest the lock of a build that was interrupted elsewhere be waited for forever.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
