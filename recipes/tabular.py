"""LAMB, LARS and others at 1,024 to 131,072 rows per update on a table: `python recipes/tabular.py --help`."""

from trustratio.recipes.common.script import run

if __name__ == "__main__":
    run("trustratio.recipes.studies.tabular")
