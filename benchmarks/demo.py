"""Times `make demo` on a prepared environment, from the command to the printed result.

python benchmarks/demo.py --rounds 5
"""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]


def seconds_to_result() -> float:
    """Seconds until the line with the last result is there."""
    began = time.monotonic()
    with subprocess.Popen(
        ["make", "demo"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("critic.sub:"):
                taken = time.monotonic() - began
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    seconds_to_result()  # the first may set up the environment
    taken = [seconds_to_result() for _ in range(rounds)]
    print(f"make demo to its result: median {median(taken):.1f} s, worst {max(taken):.1f} s")


if __name__ == "__main__":
    main()
