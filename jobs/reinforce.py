"""Trains a model on rewards for its own answers, as a job on a cluster.

ray job submit --working-dir . -- python jobs/reinforce.py jobs/configs/reinforce.yaml [dotted.key=value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This checkout, in the place of jobs/, where evaluate.py would stand in for the package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from raytune_ft.cli import run_verb

    sys.exit(run_verb("reinforce", sys.argv[1:]))
