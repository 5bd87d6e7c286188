"""Checks that a finished main job reached its figures: held-out greedy accuracy >= 97 %, sampled >= 95 %.

python scripts/check_main_job.py runs/arithmetic
"""

import json
import sys
from pathlib import Path

rows = [json.loads(line) for line in (Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines()]
first, last = (row for row in (rows[0], rows[-1]) if "eval/greedy_accuracy" in row)
sampled = next(name for name in last if name.startswith("eval/mean@"))
for name, wanted in (("eval/greedy_accuracy", 0.97), (sampled, 0.95)):
    print(f"{name}: {first[name]:.3f} -> {last[name]:.3f}, wanted {wanted}")
    if last[name] < wanted:
        sys.exit(f"{name} {last[name]:.3f} is below {wanted}")
if not 0.30 <= first[sampled] <= 0.55:
    sys.exit(f"the packaged model starts at {first[sampled]:.3f} sampled, not between 0.30 and 0.55")
