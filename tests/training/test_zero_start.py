"""What DeepSpeed does to a model's weights when its engine starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
import torch
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.zero import deepspeed_engine

torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(sys.argv[1], 1), rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(7, 5, bias=False), torch.nn.Linear(5, 3, bias=False))
model[0].weight.requires_grad_(False)
before = model[0].weight.data_ptr()
config = FineTuningConfig(model_path="m", dataset_path="t", output_dir="o", zero_stage=2)
optimizer = torch.optim.AdamW(model[1].parameters())
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
    deepspeed_engine(model, optimizer, config, "cpu")
sent = [event.input_shapes[0] for event in seen.events() if event.name == "gloo:broadcast"]
print(json.dumps({"sent": sent, "moved": model[0].weight.data_ptr() != before, "marks": list(vars(model[0].weight))}))
"""


def test_frozen_weights_are_neither_sent_nor_moved_and_trained_ones_are_sent(tmp_path: Path):
    """One rank's engine sends as many's does. The trained matrix goes as its bytes: 3 rows of 5 weights of 4."""
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "store")]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(program, check=False, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"sent": [[3, 20]], "moved": False, "marks": []}
