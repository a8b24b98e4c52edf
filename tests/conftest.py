"""Rules for every test: no process group, no variable and no place of a rank is left behind.

Later tests fork this process. A fork inherits a process group without its threads and waits for ever in its
first collective, in another file than the one that is to blame.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, which have a limit of their own: else one process ends alone with them."""
    long = {item.path for item in items if item.get_closest_marker("timeout")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({k: v for k, v in before.items() if k != "PYTEST_CURRENT_TEST"})
    launching = sys.modules.get("seft_ds.launching")
    if launching is not None:
        launching._settled = None
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("this test made a process group in the test process; run it in a fork")
