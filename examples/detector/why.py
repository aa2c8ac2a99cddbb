"""Print what a package's manifest says of the nodes that TensorRT refuses: python why.py DIR."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

manifest = json.loads((Path(sys.argv[1]) / "manifest.json").read_text())
for stage in manifest["stages"]:
    for node in stage["legalised"]:
        print(f"stage {stage['id']}, rewritten by {', '.join(node['passes'])}:")
        print(f"    {node['op']} {node['node']}, refused by {node['by']}: {node['text']}")
    # Nodes that share a reason stand side by side.
    for (by, text), reasons in itertools.groupby(stage["why"], lambda r: (r["by"], r["text"])):
        print(f"stage {stage['id']}, by {by}: {text}")
        for reason in reasons:
            print(f"    {reason['op']} {reason['node']}, of {', '.join(reason['origins'])}")
