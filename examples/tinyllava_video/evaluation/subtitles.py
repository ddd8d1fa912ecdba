"""Subtitles between frames, as LongVideoBench shows them to models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FRAME = "[image]"
"""Stands where a frame was shown."""


def with_subtitles(
    subtitles: list[dict[str, Any]], start: float, duration: float
) -> Callable[[list[float]], str]:
    """A function from the times of frames to the text with the subtitles spoken around them.

    A subtitle comes after the frames until its middle, if some frame is shown while it is spoken
    (at least a second); times are counted from `start`.
    """
    spoken = [_spoken(subtitle, start, duration) for subtitle in subtitles]

    def told(times: list[float]) -> str:
        shown, said = 0, ""
        for begin, end, text in spoken:
            middle = (begin + end) / 2
            while shown < len(times) and times[shown] <= middle:
                said, shown = said + FRAME, shown + 1
            if end - begin < 1:
                begin, end = middle - 0.5, middle + 0.5
            if any(begin < time < end for time in times):
                said += text
        return f"subtitles:{said}{FRAME * (len(times) - shown)}\nquestion: \n"

    return told


def _spoken(subtitle: dict[str, Any], start: float, duration: float) -> tuple[float, float, str]:
    """From when to when, and what."""
    if "timestamp" in subtitle:
        begin, end = subtitle["timestamp"]
        return (
            begin - start,
            (end if isinstance(end, float) else duration) - start,
            subtitle["text"],
        )
    begin, end = (_seconds(subtitle[name]) for name in ("start", "end"))
    return begin - start, end - start, subtitle["line"]


def _seconds(stamp: str) -> float:
    """Of hours, minutes and seconds."""
    hours, minutes, seconds = stamp.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
