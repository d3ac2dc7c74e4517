"""Fine-tune a pretrained checkpoint and, to compare, the same model from random weights.

    python recipes/fine_tune.py --checkpoint runs/lamb-tiny-1 --data rotten-tomatoes

`--help` lists the options. Under `torchrun` or `accelerate launch` it trains data-parallel.
"""

from trustratio.recipes.common.script import run

if __name__ == "__main__":
    run("trustratio.recipes.fine_tuning.fine_tune")
