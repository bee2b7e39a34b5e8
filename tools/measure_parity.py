"""Measures the worst differences to transformers and writes docs/results/parity.json.

    python -m tools.measure_parity

Runs the model tests, which compare every configuration with the pinned transformers in float32,
and keeps the worst difference of the claims in the README.
"""

import re
import subprocess
import sys

import transformers
from benchmarks.harness import ROOT, write_result

HEADLINES = {
    "full forward": ("Logits, full forward", "2e-4"),
    "token by token": ("Logits, token by token with the cache", "2e-4"),
    "every split": ("Logits, prompt split at every position", "2e-4"),
    "packed ragged batch": ("Logits, packed ragged batch", "2e-4"),
    "left padding": ("Logits, left padding", "2e-4"),
    "right padding": ("Logits, right padding", "2e-4"),
    "gradient, relative": ("Gradients of all parameters, relative", "1e-3"),
    "packed gradient, relative": ("Packed gradient to the sum of separate ones, relative", "1e-5"),
    "MTP: equations and generic classes": ("MTP, two references to each other", "2e-4"),
    "MTP: model and equations": ("MTP, model to reference", "2e-4"),
    "logits after a draft": ("Logits after dropped drafts, to never having drafted", "2e-4"),
}
"""Claims of the table: what they are called there, and the bound the tests hold them to."""
LINE = re.compile(r"^\s*([0-9.]+e[+-]\d+)\s{2}(.+?)\s{2}\[(.+)\]$")


def main() -> int:
    """Run the tests and record; returns the exit status."""
    command = [sys.executable, "-m", "pytest", "-v", "tests/model"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    if run.returncode:
        print("\n".join(lines[-40:]))
        print("the tests failed: nothing is recorded")
        return 1
    start = next(i for i, line in enumerate(lines) if "worst differences" in line)
    worst = {match[2]: match[1] for line in lines[start + 1 :] if (match := LINE.match(line))}
    rows = [
        {"what": name, "value": worst[claim], "conditions": f"float32, bound {bound}"}
        for claim, (name, bound) in HEADLINES.items()
    ]
    title = f"Largest difference to transformers {transformers.__version__}"
    write_result("parity", title, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
