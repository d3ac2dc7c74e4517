"""Compare optimizers on the BERT recipe: same seed, same data order, several learning rates each.

python recipes/compare.py --preset lamb-tiny --optimizers lamb,lans,vrlamb,adamw --lrs 3 --output runs/comparison
"""

from trustratio.recipes.common.script import run

if __name__ == "__main__":
    run("trustratio.recipes.comparison.compare")
