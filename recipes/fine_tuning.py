"""Fine-tune a pretrained checkpoint and, to compare, the same model from random weights.

    python recipes/fine_tuning.py --checkpoint runs/lamb-tiny-1 --data rotten-tomatoes

`--help` lists the options. Under `torchrun` or `accelerate launch` it trains data-parallel.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # As in bert.py: this folder first on the search path would stand in for packages.
    if sys.path and os.path.realpath(sys.path[0] or ".") == os.path.dirname(os.path.realpath(__file__)):
        del sys.path[0]
    from trustratio.recipes.fine_tuning_runs import main

    raise SystemExit(main())
