"""BERT at 65,536 and 131,072 sequences per update on one GPU: `python recipes/gpu_evidence.py --help`."""

from trustratio.recipes.common.script import run

if __name__ == "__main__":
    run("trustratio.recipes.comparison.gpu_evidence")
