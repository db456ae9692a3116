"""``python -m raytune_ft``: the command ``raytune-ft``, also where the environment's scripts are not on the path."""

from raytune_ft.cli import main

if __name__ == "__main__":
    main()
