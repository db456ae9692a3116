"""Teaches a smaller model what a larger one says, as a job on a cluster.

ray job submit --working-dir . -- python jobs/distill.py jobs/configs/distill.yaml [dotted.key=value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This checkout, in the place of jobs/, where evaluate.py would stand in for the package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from raytune_ft.cli import run_verb

    sys.exit(run_verb("distill", sys.argv[1:]))
