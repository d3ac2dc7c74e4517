"""Pretrain BERT with a layer-wise optimizer under DeepSpeed: `deepspeed --num_gpus 2 recipes/bert.py`.

Without arguments: a tiny BERT on the documentation of the installed Python packages, in minutes on two CPU cores.
`--help` lists the options; everything else is in `trustratio.recipes.bert_pretraining`.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Python puts a script's folder first on its search path, where this file would stand in for any package `bert`.
    if sys.path and os.path.realpath(sys.path[0] or ".") == os.path.dirname(os.path.realpath(__file__)):
        del sys.path[0]
    from trustratio.recipes.bert_pretraining import main

    raise SystemExit(main())
