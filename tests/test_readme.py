"""The README's count of the tests that inject faults is that of the tests."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SECTION = re.search(
    r"### When something fails\n(.*?)\n### ", (TESTS.parent / "README.md").read_text("utf-8"), re.DOTALL
)[1]
# In the last column of each row: files, each with the number of its tests of that fault.
CELLS = [row.rsplit("|", 2)[1] for row in SECTION.splitlines() if "`test_" in row]
COUNTED = [(name, int(count or 0)) for cell in CELLS for name, count in
           re.findall(r"`(test_\w+)`(?: (\d+))?", cell)]  # fmt: skip
PARTLY = {"test_shards", "test_train", "test_launch", "test_slurm"}  # most of theirs inject no fault


def test_the_sum_is_that_of_the_rows():
    assert len(CELLS) > 10 and all(count for _, count in COUNTED)
    assert int(re.search(r"injected by tests, (\d+)", SECTION)[1]) == sum(n for _, n in COUNTED)


@pytest.mark.slow
def test_each_file_has_as_many_tests():
    told = Counter()
    for name, count in COUNTED:
        told[name] += count
    paths = [str(next(TESTS.rglob(f"{name}.py"))) for name in told]
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", "-m", "",
         *paths], capture_output=True, text=True, check=True, cwd=TESTS.parent,
    )  # fmt: skip
    found = Counter(re.findall(r"(test_\w+)\.py::", listed.stdout))
    for name, count in told.items():
        assert count < found[name] if name in PARTLY else count == found[name], name
