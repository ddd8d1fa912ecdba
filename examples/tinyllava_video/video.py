"""From a video file to the pixels that the vision tower reads; PyAV decodes, Pillow resizes."""

from __future__ import annotations

import math
import operator
import os
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type
from av.stream import Disposition
from PIL import Image, ImageDraw, ImageFont

from .errors import InputError
from .sampling import Chooser, evenly

ONE_A_SECOND = -1
"""As a number of frames: as many as the video has seconds."""

MOST = 4096
"""More frames than a model reads; those asked for are held in memory."""

# Titles and the like come in any encoding; PyAV 19 knows that and has no such argument.
_TITLES = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

_Stamps = list[tuple[int | None, int]]  # when a frame is shown and for how long, in ticks


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of one video, in order.

    Attributes:
        pixels: uint8 (frames, height, width, 3), red, green and blue, upright.
        indices: int (frames,); among all frames of the video, from 0.
        seconds: float (frames,); when each is shown, counted from the first frame of the video.
        fps: frames a second, on average over the video.
        duration: of the whole video, in seconds.
    """

    pixels: np.ndarray
    indices: np.ndarray
    seconds: np.ndarray
    fps: float
    duration: float


def read_video(
    path: str | os.PathLike[str],
    *,
    num_frames: int = 16,
    max_frames: int = 64,
    choose: Chooser | None = None,
) -> Frames:
    """Sample frames uniformly from the first frame to the last, by index as the public model does.

    Where a video has fewer frames than are asked for, some are taken more than once.

    What decodes decides which frames there are, not what the file says about itself: damaged
    packets are passed over, and a file that is cut short is as long as what is left of it. Only
    the sampled frames are held in memory. The packets are counted first, without decoding them; in
    the rare file where they are not as many as its frames, the frames are decoded twice.

    Args:
        path: anything that FFmpeg decodes; a picture is a video of one frame.
        num_frames: how many; -1 takes one for each whole second, at least one.
        max_frames: at most as many of the latter.
        choose: which frames are taken, if not these.

    Raises:
        InputError: there is no such file, it is not a video, none of it decodes, or a number is not
            a positive one.
    """
    count, limit = checked_numbers(num_frames, max_frames)
    file, choose = Path(path), choose or evenly(count, limit)
    if not file.is_file():
        raise InputError(f"video: there is no file {file}")
    try:
        with _open(file) as container:
            stream = _video_stream(container, file)
            packets = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.size]
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)  # as FFmpeg has it
            timeline = _Timeline(packets, stream.time_base, rate)
        kept, stamps = _decode(file, set(timeline.sample(choose)))
        timeline = _Timeline(stamps, timeline.tick, rate)
        indices = timeline.sample(choose)
        if not kept.keys() >= set(indices):
            kept, _ = _decode(file, set(indices))
    except FFmpegError as error:
        raise InputError(f"video: {file} cannot be read as one: {error.strerror}") from error
    total = len(stamps)
    if not total:
        raise InputError(f"video: nothing in {file} decodes; it is damaged or cut short")
    return Frames(
        np.stack([kept[index] for index in indices]),
        np.array(indices),
        np.array([timeline.seconds(index) for index in indices]),
        fps=float(total / timeline.duration),
        duration=float(timeline.duration),
    )


def checked_numbers(num_frames: int, max_frames: int) -> tuple[int, int]:
    """Both, as `read_video` takes them.

    Raises:
        InputError: one of them is no such number.
    """
    count = _positive("num_frames", num_frames, allowed=(ONE_A_SECOND,))
    if count > MOST:
        raise InputError(f"num_frames: must be at most {MOST}, not {count}")
    return count, _positive("max_frames", max_frames)


def read_pictures(folder: Path, choose: Chooser, fps: float) -> Frames:
    """Frames of a video that is a folder of pictures: ``00001.jpg`` and so on.

    Raises:
        InputError: one of them is missing or damaged.
    """
    total = len(list(folder.iterdir()))
    indices = choose(total, total / fps)
    try:
        shown = [Image.open(folder / f"{n:05}.jpg").convert("RGB") for n in indices]
    except OSError as error:
        raise InputError(f"video: a picture in {folder} cannot be read ({error})") from error
    pixels = np.stack([np.asarray(picture.resize(shown[0].size)) for picture in shown])
    seconds = np.array([n / fps for n in indices])
    return Frames(pixels, np.array(indices), seconds, fps, total / fps)


@dataclass(frozen=True)
class _Timeline:
    """When the frames of a video are shown."""

    stamps: _Stamps
    tick: Fraction  # seconds
    rate: Fraction  # frames a second, as the file says

    @property
    def duration(self) -> Fraction:
        """In seconds; exact, since whole seconds are counted.

        Many containers round times, which the rate does not; but where frames come at other times
        than the rate says, they are right.
        """
        nominal = len(self.stamps) / self.rate
        times = [(time, length) for time, length in self.stamps if time is not None]
        if not times or len(times) < len(self.stamps):
            return nominal
        (first, _), (last, length) = min(times), max(times)
        spanned = (last - first + length) * self.tick
        return spanned if abs(spanned - nominal) > 1 / self.rate else nominal

    def seconds(self, index: int) -> float:
        """When a frame is shown, after the first one."""
        (first, _), (time, _) = self.stamps[0], self.stamps[index]
        ticks = None if first is None or time is None else time - first
        return float(index / self.rate if ticks is None else ticks * self.tick)

    def sample(self, choose: Chooser) -> list[int]:
        """Which frames are taken; none where there are none."""
        return choose(len(self.stamps), self.duration) if self.stamps else []


def _open(file: Path) -> av.container.InputContainer:
    return av.open(str(file.resolve()), **_TITLES)  # nothing absolute reads as a URL


def _video_stream(container: av.container.InputContainer, file: Path) -> av.VideoStream:
    if container.format.name == "tty":  # FFmpeg draws plain text as if on a terminal
        raise InputError(f"video: {file} is text")
    stream = container.streams.best("video")
    if stream is None or Disposition.attached_pic in stream.disposition:  # the cover of a song
        raise InputError(f"video: {file} has no video stream, or is cut short")
    if stream.codec_context is None:
        raise InputError(f"video: the codec of {file} is not known; convert it, to H.264 say")
    stream.thread_type = "AUTO"
    return stream


def _decode(file: Path, wanted: set[int]) -> tuple[dict[int, np.ndarray], _Stamps]:
    """The wanted frames by index, all of the size of the first, and the times of all frames."""
    kept: dict[int, np.ndarray] = {}
    stamps: _Stamps = []
    size: tuple[int, int] | None = None
    with _open(file) as container:
        for packet in container.demux(_video_stream(container, file)):
            frames: list[av.VideoFrame] = []
            with suppress(FFmpegError):  # damaged; later ones may not be
                frames = packet.decode()
            for frame in frames:
                if len(stamps) in wanted:
                    size = size or (frame.width, frame.height)
                    pixels = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
                    kept[len(stamps)] = _upright(frame, pixels)
                stamps.append((frame.pts, frame.duration or 0))
    return kept, stamps


def _upright(frame: av.VideoFrame, pixels: np.ndarray) -> np.ndarray:
    """Turned and mirrored as a player would, to the nearest quarter turn."""
    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return pixels
    # A point (x, y) is shown at (a x + c y, b x + d y).
    (a, b, _), (c, d, _), _ = np.frombuffer(data, np.int32).reshape(3, 3).tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: int(math.copysign(1, d)), :: int(math.copysign(1, a))]


def preprocess(frames: np.ndarray, size: int) -> np.ndarray:
    """What SigLIP's tower reads: frames resized, their aspect ratio ignored, from -1 to 1.

    Args:
        frames: uint8 (frames, height, width, 3).
        size: height and width of the result.

    Returns:
        float32 (frames, size, size, 3).

    Raises:
        InputError: the frames have another shape or dtype, or the size is not a positive number.
    """
    size = _positive("size", size)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise InputError(
            f"frames: must be uint8 (frames, height, width, 3), not {frames.dtype} {frames.shape}"
        )
    resized = np.stack([_resized(frame, (size, size)) for frame in frames])
    return (resized.astype(np.float32) / 255 - 0.5) / 0.5


def show(frames: Frames, *, columns: int = 4, width: int = 240) -> Image.Image:
    """A contact sheet: the frames in rows, each over its time and index.

    Args:
        frames: as `read_video` gives them.
        columns: frames in a row.
        width: of each frame, in pixels; the aspect ratio stays.

    Returns:
        An RGB picture; its method `save` writes it.

    Raises:
        InputError: a number is not a positive one.
    """
    columns, width = _positive("columns", columns), _positive("width", width)
    count, tall, wide, _ = frames.pixels.shape
    height, caption = max(1, round(width * tall / wide)), 18
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + caption)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for n, pixels in enumerate(frames.pixels):
        x, y = n % columns * width, n // columns * (height + caption)
        sheet.paste(Image.fromarray(_resized(pixels, (width, height))), (x, y))
        minutes, seconds = divmod(frames.seconds[n], 60)
        text = f"{minutes:.0f}:{seconds:05.2f}  #{frames.indices[n]}"
        draw.text((x + 3, y + height + 2), text, "black", font)
    return sheet


def check_picture(path: str | os.PathLike[str]) -> None:
    """Whether Pillow can write a picture of that name there.

    Raises:
        InputError: it cannot.
    """
    file = Path(path).absolute()
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise InputError(f"sheet: {file.name} should end in .png, .jpg or the like")
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise InputError(f"sheet: {file} cannot be written; give a file in a folder that is there")


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """To (width, height)."""
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _positive(name: str, value: int, allowed: tuple[int, ...] = ()) -> int:
    """The number, checked."""
    try:
        number = 0 if isinstance(value, bool | np.bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1 and number not in allowed:
        choices = "".join(f" or {choice}" for choice in allowed)
        raise InputError(f"{name}: must be a positive whole number{choices}, not {value!r}")
    return number
