"""Reading the trace file of torch.profiler: JSON in Chrome's format, plain or gzipped."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .intervals import Interval
from .timeline import Activity, Annotation, Launch, Message, Trace, TraceError

DEVICE_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
LAUNCH_CATEGORIES = frozenset({"cuda_runtime", "cuda_driver"})
METADATA_KEY = "hf_fpdt"  # {"title": …, "conditions": …} beside the events, for the picture


def metadata(title: str, conditions: str) -> tuple[str, str]:
    """Key and JSON for the profiler's `add_metadata_json`, which `read_trace` finds again.

    The profiler writes a slash for every backslash, so nothing may need escaping: quotes become single ones.
    """
    plain = {"title": title, "conditions": conditions}
    plain = {key: text.replace("\\", "/").replace('"', "'") for key, text in plain.items()}
    return METADATA_KEY, json.dumps(plain, ensure_ascii=False)


def read_trace(path: str | Path) -> Trace:
    """The device's side of a trace that `torch.profiler`'s `export_chrome_trace` wrote, plain or gzipped.

    Raises:
        TraceError: the file cannot be read, is no such trace, or holds no kernel.
    """
    content = _load(Path(path))
    events = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(events, list):
        raise TraceError(f"{path} holds no list of trace events; a file of torch.profiler's export_chrome_trace is.")
    complete = [e for e in events if isinstance(e, dict) and e.get("ph") == "X"]
    device = [e for e in complete if e.get("cat") in DEVICE_CATEGORIES]
    if not any(e["cat"] == "kernel" for e in device):
        raise TraceError(
            f"{path} holds no device activity: record it on a machine with a GPU, with ProfilerActivity.CUDA."
        )
    origin = min(float(e["ts"]) for e in device)
    about = content.get(METADATA_KEY, {}) if isinstance(content, dict) else {}
    return Trace(
        activities=tuple(sorted((_activity(e, origin) for e in device), key=lambda a: a.start_ms)),
        annotations=tuple(_annotations(complete, origin)),
        launches=tuple(_launches(complete, origin)),
        title=str(about.get("title", "")),
        conditions=str(about.get("conditions", "")),
    )


def _load(path: Path) -> Any:
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except OSError as error:
        raise TraceError(f"the trace {path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, EOFError) as error:
        raise TraceError(f"{path} is no JSON ({error}); a file of torch.profiler's export_chrome_trace is.") from None


def _times(event: Mapping[str, Any], origin: float) -> Interval:
    start = float(event["ts"]) - origin
    return start / 1e3, (start + float(event.get("dur", 0))) / 1e3


def _activity(event: Mapping[str, Any], origin: float) -> Activity:
    args = event.get("args", {})
    kind = _kind(event["cat"], event["name"])
    return Activity(
        kind,
        event["name"],
        *_times(event, origin),
        stream=int(args.get("stream", event.get("tid", 0))),
        n_bytes=int(args.get("bytes", 0)),
        correlation=args.get("correlation"),
        message=_message(args) if kind == "peers" else None,
    )


def _message(args: Mapping[str, Any]) -> Message | None:
    size = args.get("In msg nelems")
    return None if size is None else (str(args.get("Collective name")), int(size))


def _kind(category: str, name: str) -> str:
    if category == "kernel":
        return "peers" if name.startswith("nccl") else "kernel"
    if category == "gpu_memset":
        return "memset"
    return "h2d" if "HtoD" in name else "d2h" if "DtoH" in name else "d2d"


def _annotations(events: Iterable[Mapping[str, Any]], origin: float) -> Iterator[Annotation]:
    for event in events:
        category = event.get("cat")
        if category in ("user_annotation", "gpu_user_annotation"):
            on_device = category == "gpu_user_annotation"
            lane = event.get("tid") if on_device else (event.get("pid"), event.get("tid"))
            yield Annotation(event["name"], *_times(event, origin), on_device, lane)


def _launches(events: Sequence[Mapping[str, Any]], origin: float) -> Iterator[Launch]:
    for event in events:
        correlation = event.get("args", {}).get("correlation")
        if event.get("cat") in LAUNCH_CATEGORIES and correlation is not None:
            yield Launch(_times(event, origin)[0], (event.get("pid"), event.get("tid")), correlation)
