"""Reads what an A/B test of a served model says so far, as a job on a cluster.

ray job submit --working-dir . -- python jobs/ab.py jobs/configs/ab.yaml [dotted.key=value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This checkout, in the place of jobs/, where evaluate.py would stand in for the package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from raytune_ft.cli import run_verb

    sys.exit(run_verb("ab", sys.argv[1:]))
