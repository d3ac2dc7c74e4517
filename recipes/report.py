"""Make the report of a run, finished or not: `python recipes/report.py runs/lamb-tiny-1`."""

from trustratio.recipes.common.script import run

if __name__ == "__main__":
    run("trustratio.recipes.runs.report")
