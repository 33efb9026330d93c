"""Hold the numbers of a quickstart, in the folder given, against those measured on three seeds; and
that no alarm was raised over a healthy run."""

import json
import sys
from pathlib import Path

# Mean less three deviations of seeds 0, 1 and 2: the teacher's k-NN top-1 in percent.
LEAST = {"digits": 93.3, "digits:moved": 69.5}

result = json.loads(Path(sys.argv[1], "quickstart.json").read_text(encoding="utf-8"))
print(json.dumps(result["top1_percent"]), f"{result['seconds']} s")
for data, least in LEAST.items():
    teacher = result["top1_percent"]["teacher"][data]
    if teacher < least:
        sys.exit(f"teacher on {data}: {teacher:.1f} %, and at least {least} % was expected")
lines = Path(sys.argv[1], "metrics.jsonl").read_text(encoding="utf-8").splitlines()
states = [json.loads(line)["state"] for line in lines]
if set(states) != {"warming up", "learning"}:
    sys.exit(f"a healthy run was called {', '.join(sorted(set(states)))}")
