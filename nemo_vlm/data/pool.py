"""Work on many items over several processes: results in the order of the items, of which few wait to be taken.

Megatron is not imported here, nor in a process unless the work does so.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4  # items for each process that may be begun before the first is taken


def mapped(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """What `work` makes of each item; in this process where one is enough.

    Args:
        work: pickled once for each process, with what it holds.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(work, items)
        return
    # spawned, not forked: tokenizers and torch have threads by now
    with ProcessPoolExecutor(workers, get_context("spawn"), get_ready, (work,)) as pool:
        left = iter(items)
        begun = deque(pool.submit(do, item) for item in islice(left, AHEAD * workers))
        while begun:
            yield begun.popleft().result()
            begun.extend(pool.submit(do, item) for item in islice(left, 1))


given: Callable[[Any], Any]  # in a process of the pool: its work


def get_ready(work: Callable[[Any], Any]) -> None:
    global given
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are processes enough
    given = work


def do(item: Any) -> Any:
    return given(item)
