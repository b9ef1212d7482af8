"""Times of calls on a GPU: medians of events, plain and replayed from a graph; peak memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Below this, launches are also replayed from a CUDA graph, and the replay's time is the one judged.
SHORT_MS = 1.0

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, and the 20th and 80th percentile."""

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int


def timed(call: Call, device: torch.device) -> Callable[[], float]:
    """Run the call; the function that is returned waits for its end and says how many ms it took."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return lambda: 1e3 * seconds
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()

    def wait() -> float:
        end.synchronize()
        return begin.elapsed_time(end)

    return wait


def time_calls(calls: list[Call], device: torch.device, budget_ms: float = 250, least: int = 5) -> Timing:
    """Many timings after a warm-up, each call on the next set of buffers."""
    for call in calls:
        call()
    first = max(timed(calls[0], device)(), 1e-3)
    least = least if first < budget_ms else 3
    warm, repeats = (min(n, 300) for n in (int(50 / first), max(least, int(budget_ms / first))))
    for i in range(warm):
        calls[i % len(calls)]()
    waiting = [timed(calls[i % len(calls)], device) for i in range(repeats)]
    taken = sorted(wait() for wait in waiting)
    low, high = taken[repeats // 5], taken[-1 - repeats // 5]
    return Timing(statistics.median(taken), low, high, repeats)


def time_graph(calls: list[Call], device: torch.device, budget_ms: float = 250) -> Timing:
    """One call's share of a captured sequence of them."""
    sequence = calls * -(-8 // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in sequence:
            call()
    found = time_calls([graph.replay], device, budget_ms)
    n = len(sequence)
    return Timing(found.median_ms / n, found.low_ms / n, found.high_ms / n, found.repeats)


def time_both(
    calls: list[Call], device: torch.device, graph: bool = True, budget_ms: float = 250
) -> tuple[Timing, Timing | None]:
    """Plain launches, and replays where launching would cost as much as the work."""
    plain = time_calls(calls, device, budget_ms)
    if not graph or device.type != "cuda" or plain.median_ms >= SHORT_MS:
        return plain, None
    try:
        return plain, time_graph(calls, device, budget_ms)
    except RuntimeError as error:  # something that cannot be captured: the plain time is still true
        print(f"no graph: {error}"[:200], flush=True)
        return plain, None


def device_ms(calls: list[Call], device: torch.device, graph: bool = True, budget_ms: float = 250) -> float:
    """The median that is judged."""
    plain, replayed = time_both(calls, device, graph, budget_ms)
    return (replayed or plain).median_ms


def peak_bytes(call: Call, device: torch.device) -> int:
    """Bytes of device memory that one call adds at its peak, results included."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
