"""Runs the Python examples of a Markdown page, in order, in one namespace and in a temporary folder: `run_examples.py README.md`."""

import os
import re
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    examples = [example for page in sys.argv[1:] for example in re.findall(r"^```python\n(.*?)^```", Path(page).read_text(), re.M | re.S)]
    if not examples:
        sys.exit("there are no examples to run.")
    namespace: dict[str, object] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number, example in enumerate(examples, 1):
            exec(compile(example, f"example {number}", "exec"), namespace)
    print(f"{len(examples)} examples ran.")
