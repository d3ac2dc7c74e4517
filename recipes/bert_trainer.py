"""Pretrain BERT through the Hugging Face Trainer: `deepspeed --num_gpus 2 recipes/bert_trainer.py`.

Also `accelerate launch --config_file CONFIG recipes/bert_trainer.py` with one of recipes/configs, and `torchrun`, which
means DeepSpeed as for `bert.py`. The options are those of `bert.py`.
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
    from trustratio.recipes.trainer_pretraining import main

    raise SystemExit(main())
