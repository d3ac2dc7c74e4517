"""Pretrain BERT through Accelerate: `accelerate launch --config_file CONFIG recipes/bert_accelerate.py`.

CONFIG is one of recipes/configs: ZeRO-1, 2, 3 through DeepSpeed, or plain DDP. The options are those of `bert.py`.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # As in bert.py: this folder first on the search path would stand in for packages.
    if sys.path and os.path.realpath(sys.path[0] or ".") == os.path.dirname(os.path.realpath(__file__)):
        del sys.path[0]
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    from trustratio.recipes.bert_pretraining import main
    from trustratio.recipes.front_ends import AccelerateFrontEnd

    raise SystemExit(main(front_end=AccelerateFrontEnd()))
