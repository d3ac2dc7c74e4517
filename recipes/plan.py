"""Print what a preset needs on given GPUs: `python recipes/plan.py --preset lamb-64k-32k --gpus 8 --memory 80`."""

from trustratio.recipes.common.script import run

if __name__ == "__main__":
    run("trustratio.recipes.planning.plan")
