"""What all tests share: the modules of the repository's root can be imported, and every test starts from seed 0."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
