"""Which frames of a file are taken, what their pixels are, and what is said about bad files.

Frame n of a clip is grey of level 4 n, which tells from the pixels which frames were taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from examples.tinyllava_video import video
from examples.tinyllava_video.errors import InputError
from examples.tinyllava_video.video import Frames, preprocess, read_video, show

IDENTITY = (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)


def grey(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [np.full((height, width, 3), 4 * n, np.uint8) for n in range(count)]


def textured(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Of noise that takes bytes to store, of mean 4 n."""
    noise = np.random.default_rng(0).integers(0, 2, (height, width, 3))
    return [np.uint8(np.clip(4 * n, 8, 247) + 16 * noise - 8) for n in range(count)]


def silence(sound: Any, wave: np.ndarray, form: str) -> list[Any]:
    frame = av.AudioFrame.from_ndarray(wave, format=form, layout="mono")
    frame.rate = 16000
    return [*sound.encode(frame), *sound.encode()]


def write(
    path: Path,
    pictures: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int = 10,
    milliseconds: Sequence[int] | None = None,
    matrix: tuple[int, ...] = IDENTITY,
    gop: int = 12,
    fast_start: bool = False,
    audio: bool = False,
) -> Path:
    """A clip; pictures come at `rate` a second, or at the times given."""
    options = {"movflags": "+faststart"} if fast_start else {}
    with av.open(str(path), "w", options=options) as container:
        if audio:
            sound = container.add_stream("aac", rate=16000)
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, _ = pictures[0].shape
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        if matrix != IDENTITY:
            stream.set_display_matrix(matrix)
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
            stream.max_b_frames = 0  # the writer guesses how long frames out of order last
        if audio:
            container.mux(silence(sound, np.zeros((1, 1024 * 16), np.float32), "fltp"))
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[n], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(frames: Frames) -> list[int]:
    """The numbers that the pixels of grey frames stand for."""
    return [round(float(value)) for value in frames.pixels.mean((1, 2, 3)) / 4]


# Which frames.


@pytest.mark.parametrize(
    ("total", "count", "indices"),
    [
        (40, 4, [0, 13, 26, 39]),
        (41, 5, [0, 10, 20, 30, 40]),
        (7, 3, [0, 3, 6]),
        (8, 3, [0, 3, 7]),  # 3.5 is rounded down
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (6, 1, [0]),
    ],
)
def test_uniform(tmp_path: Path, total: int, count: int, indices: list[int]) -> None:
    frames = read_video(write(tmp_path / "a.mp4", grey(total)), num_frames=count)
    assert frames.indices.tolist() == levels(frames) == indices
    assert frames.pixels.dtype == np.uint8
    assert frames.pixels.shape == (count, 48, 64, 3)
    np.testing.assert_allclose(frames.seconds, np.array(indices) / 10, atol=1e-12)
    assert (frames.fps, frames.duration) == (10, total / 10)


def test_sixteen_by_default(tmp_path: Path) -> None:
    frames = read_video(write(tmp_path / "a.mp4", grey(33)))
    assert levels(frames) == np.linspace(0, 32, 16, dtype=int).tolist()


@pytest.mark.parametrize(
    ("total", "limit", "count"),
    [(29, 16, 2), (30, 16, 3), (31, 16, 3), (9, 16, 1), (60, 4, 4), (50, 5, 5)],
)
def test_one_a_second(tmp_path: Path, total: int, limit: int, count: int) -> None:
    path = write(tmp_path / "a.mp4", grey(total))
    frames = read_video(path, num_frames=-1, max_frames=limit)
    assert levels(frames) == np.linspace(0, total - 1, count, dtype=int).tolist()


@pytest.mark.parametrize("rate", [24, 30])
def test_containers_that_round_times_do_not_lose_a_second(tmp_path: Path, rate: int) -> None:
    """Matroska rounds to milliseconds: the last of 24 frames starts at 0.958 s, not 0.95833."""
    path = write(tmp_path / "a.mkv", grey(2 * rate), rate=rate)
    frames = read_video(path, num_frames=-1)
    assert (len(frames.indices), frames.duration, frames.fps) == (2, 2, rate)


def test_one_a_second_of_a_slide_show(tmp_path: Path) -> None:
    """There are fewer frames than seconds: they are taken again and again."""
    times = [0, 4000, 8000, 12000]
    path = write(tmp_path / "a.mkv", grey(4), milliseconds=times)
    frames = read_video(path, num_frames=-1)
    assert levels(frames) == np.linspace(0, 3, int(frames.duration), dtype=int).tolist()
    assert len(frames.indices) > 10


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate(tmp_path: Path, suffix: str) -> None:
    """Frames are sampled by number; their times are those of the file."""
    times = [0, 40, 80, 120, 160, 1000, 2000, 3000, 3040, 3080, 5200]
    path = write(tmp_path / f"a.{suffix}", grey(11), milliseconds=times, rate=25)
    frames = read_video(path, num_frames=6)
    assert frames.indices.tolist() == levels(frames) == [0, 2, 4, 6, 8, 10]
    np.testing.assert_allclose(frames.seconds, [0, 0.08, 0.16, 2, 3.04, 5.2], atol=1e-3)
    assert 5.2 <= frames.duration < 6
    assert frames.fps == pytest.approx(11 / frames.duration)
    assert len(read_video(path, num_frames=-1).indices) == 5


def test_times_start_at_the_first_frame(tmp_path: Path) -> None:
    """Transport streams start later than at 0, raw streams have no times."""
    for suffix in ("ts", "h264"):
        path = write(tmp_path / f"a.{suffix}", grey(26), rate=25)
        frames = read_video(path, num_frames=2)
        assert levels(frames) == [0, 25]
        np.testing.assert_allclose(frames.seconds, [0, 1], atol=1e-9)
        assert frames.duration == pytest.approx(1.04)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "shape"),
    [
        ("a.mp4", "mpeg4", "yuv420p", (47, 63)),
        ("a.mp4", "libx264", "yuv444p", (47, 63)),
        ("a.mkv", "ffv1", "gray10le", (33, 48)),  # PyAV converts narrower ones badly
        ("a.mkv", "ffv1", "bgra", (33, 17)),
        ("a.webm", "libvpx-vp9", "yuv420p", (31, 45)),
        ("a.avi", "mjpeg", "yuvj422p", (31, 45)),
        ("a.gif", "gif", "rgb8", (31, 45)),
    ],
)
def test_formats(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, shape: tuple[int, int]
) -> None:
    """Odd sizes, other codecs and pixel formats; several say nothing about how many frames."""
    pictures = grey(19, *shape)
    path = write(tmp_path / name, pictures, codec=codec, pix_fmt=pix_fmt)
    frames = read_video(path, num_frames=4)
    assert frames.pixels.shape == (4, *shape, 3)
    assert frames.indices.tolist() == [0, 6, 12, 18]
    np.testing.assert_allclose(frames.pixels.mean((1, 2, 3)), [0, 24, 48, 72], atol=2)
    edges = frames.pixels[:, [0, 1, -2, -1]][:, :, [0, 1, -2, -1]]
    np.testing.assert_allclose(edges.mean((1, 2, 3)), [0, 24, 48, 72], atol=9)  # dithered


def test_colours(tmp_path: Path) -> None:
    """Red, green and blue in that order."""
    picture = np.tile(np.uint8([200, 100, 20]), (48, 64, 1))
    frames = read_video(write(tmp_path / "a.mp4", [picture] * 3), num_frames=2)
    assert abs(frames.pixels.astype(int) - [200, 100, 20]).max() <= 4


def test_sound_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", grey(20), audio=True)
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["audio", "video"]
    assert levels(read_video(path, num_frames=3)) == [0, 9, 19]


@pytest.mark.parametrize(
    ("matrix", "corners"),
    [
        ((1, 0, 0, 1), [[40, 100], [160, 220]]),
        ((0, -1, 1, 0), [[100, 220], [40, 160]]),  # to the left
        ((-1, 0, 0, -1), [[220, 160], [100, 40]]),
        ((0, 1, -1, 0), [[160, 40], [220, 100]]),  # to the right
        ((-1, 0, 0, 1), [[100, 40], [220, 160]]),  # mirrored
        ((1, 0, 0, -1), [[160, 220], [40, 100]]),
        ((0, 1, 1, 0), [[40, 160], [100, 220]]),
    ],
)
def test_upright(tmp_path: Path, matrix: tuple[int, ...], corners: list[list[int]]) -> None:
    """As telephones film: the file says how its frames are to be turned and mirrored."""
    picture = np.kron([[40, 100], [160, 220]], np.ones((24, 32)))[..., None].repeat(3, -1)
    a, b, c, d = (65536 * value for value in matrix)
    path = write(
        tmp_path / "a.mp4", [np.uint8(picture)] * 3, matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30)
    )
    pixels = read_video(path, num_frames=2).pixels
    assert pixels.shape == ((2, 48, 64, 3) if matrix[0] else (2, 64, 48, 3))
    found = pixels[:, 5::38, 5::38] if matrix[0] else pixels[:, 5::50, 5::35]
    assert abs(found[..., 0].astype(int) - corners).max() <= 3


def test_a_size_that_changes(tmp_path: Path) -> None:
    """Broadcasts do; all frames take the size of the first."""
    first = write(tmp_path / "a.ts", grey(10)).read_bytes()
    second = write(tmp_path / "b.ts", grey(10, 96, 80)).read_bytes()
    (both := tmp_path / "both.ts").write_bytes(first + second)
    frames = read_video(both, num_frames=20)
    assert frames.pixels.shape == (20, 48, 64, 3)
    expected = [4 * n for n in (*range(10), *range(10))]
    np.testing.assert_allclose(frames.pixels.mean((1, 2, 3)), expected, atol=2.5)


def test_a_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    Image.fromarray(grey(6)[5]).save(path := tmp_path / "a.png")
    assert levels(read_video(path, num_frames=1)) == [5]
    assert levels(read_video(path, num_frames=-1)) == [5]
    assert levels(read_video(path, num_frames=2)) == [5, 5]


def test_names_that_look_like_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.mp4", grey(5)).rename("http:a b.mp4")
    assert levels(read_video("http:a b.mp4", num_frames=2)) == [0, 4]


def test_titles_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    data = write(path, grey(5)).read_bytes()
    assert data.count(b"Lavf") == 1, "the name of the writer"
    path.write_bytes(data.replace(b"Lavf", b"Lav\xe9"))
    assert levels(read_video(path, num_frames=2)) == [0, 4]


def test_only_sampled_frames_are_held(tmp_path: Path) -> None:
    kept, stamps = video._decode(write(tmp_path / "a.mp4", grey(60) * 3), {3, 177})
    assert sorted(kept) == [3, 177]
    assert len(stamps) == 180


# Damage.


def test_a_damaged_packet_is_passed_over(tmp_path: Path) -> None:
    """Then there is one frame less than packets, and frames are taken from those there are."""
    path = write(tmp_path / "a.avi", grey(20), codec="mjpeg", pix_fmt="yuvj420p")
    whole = read_video(path, num_frames=5)
    assert (whole.indices.tolist(), levels(whole)) == ([0, 4, 9, 14, 19], [0, 4, 9, 14, 19])
    with av.open(str(path)) as container:
        packet = list(container.demux(video=0))[4]
        start, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[start : start + size] = bytes(size)
    path.write_bytes(data)
    frames = read_video(path, num_frames=5)
    assert (frames.indices.tolist(), levels(frames)) == ([0, 4, 9, 13, 18], [0, 5, 10, 14, 19])


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.mkv"])
def test_cut_short(tmp_path: Path, name: str) -> None:
    """What is left is the video; the packets in front say how much that is."""
    path = write(tmp_path / name, textured(50), gop=5, fast_start=name == "a.mp4")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 5])
    frames = read_video(path, num_frames=4)
    last = int(frames.indices[-1])
    assert 20 < last < 40
    assert frames.indices.tolist() == np.linspace(0, last, 4, dtype=int).tolist()
    np.testing.assert_allclose(levels(frames)[1:3], frames.indices[1:3], atol=0.5)
    assert last / 10 < frames.duration < (last + 3) / 10


def test_nothing_left(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", textured(20), fast_start=True)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 40])
    with pytest.raises(InputError, match=r"^video: nothing in .*a\.mp4 decodes; it is damaged"):
        read_video(path, num_frames=1)


def cut_before_the_index(path: Path) -> None:
    data = write(path, textured(20)).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def song(path: Path) -> None:
    """Audio, and a picture of its cover."""
    with av.open(str(path), "w", format="mp3") as container:
        sound = container.add_stream("libmp3lame", rate=16000)
        cover = container.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 64, "rgb24"
        cover.disposition = Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(grey(1)[0], format="rgb24")
        container.mux([*cover.encode(picture), *cover.encode()])
        container.mux(silence(sound, np.zeros((1, 1152 * 8), np.float32), "fltp"))


def sound_only(path: Path) -> None:
    with av.open(str(path), "w", format="wav") as container:
        sound = container.add_stream("pcm_s16le", rate=16000)
        container.mux(silence(sound, np.zeros((1, 1600), np.int16), "s16"))


def unknown_codec(path: Path) -> None:
    data = write(path, grey(5), codec="mpeg4").read_bytes()
    assert data.count(b"FMP4") == 2
    path.write_bytes(data.replace(b"FMP4", b"ZZZZ"))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none.mp4", lambda path: None, r"there is no file .*none\.mp4"),
        ("folder.mp4", Path.mkdir, r"there is no file .*folder\.mp4"),
        ("empty.mp4", Path.touch, r".*empty\.mp4 cannot be read as one: Invalid data"),
        ("a.mp4", lambda path: path.write_text("a\n" * 999), r".*a\.mp4 cannot be read as one"),
        ("a.txt", lambda path: path.write_text("a\n" * 999), r".*a\.txt is text"),
        ("a.mp4", cut_before_the_index, r".*a\.mp4 (has no video|cannot be read)"),
        ("a.wav", sound_only, r".*a\.wav has no video stream"),
        ("a.mp3", song, r".*a\.mp3 has no video stream"),
        ("a.avi", unknown_codec, r"the codec of .*a\.avi is not known; convert it"),
    ],
)
def test_not_a_video(
    tmp_path: Path, name: str, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(InputError, match=f"^video: {message}") as caught:
        read_video(path, num_frames=1)
    assert "Errno" not in str(caught.value)


def test_fewer_frames_than_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", grey(5))
    assert levels(read_video(path, num_frames=5)) == [0, 1, 2, 3, 4]
    assert levels(read_video(path, num_frames=8)) == np.linspace(0, 4, 8, dtype=int).tolist()
    with pytest.raises(InputError, match=r"^num_frames: must be at most 4096, not 1000000000000$"):
        read_video(path, num_frames=10**12)  # without the memory for so many


@pytest.mark.parametrize("value", [0, -2, 2.0, "2", None, True, np.True_])
def test_numbers(tmp_path: Path, value: object) -> None:
    path = write(tmp_path / "a.mp4", grey(5))
    assert levels(read_video(path, num_frames=np.int64(2), max_frames=np.int32(1))) == [0, 4]
    said = re.escape(repr(value))
    with pytest.raises(
        InputError, match=f"^num_frames: must be a positive whole number or -1, not {said}$"
    ):
        read_video(path, num_frames=value)
    with pytest.raises(InputError, match=f"^max_frames: must be .* number, not {said}$"):
        read_video(path, num_frames=-1, max_frames=value)
    with pytest.raises(InputError, match=f"^size: must be a positive whole number, not {said}"):
        preprocess(np.zeros((1, 2, 2, 3), np.uint8), value)


def test_minus_one_is_a_number_of_frames_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", grey(5))
    assert len(read_video(path, num_frames=-1).indices) == 1
    with pytest.raises(InputError, match=r"^max_frames: .*, not -1$"):
        read_video(path, num_frames=-1, max_frames=-1)


# Pixels for the tower.


def test_preprocess_as_pillow_resizes() -> None:
    frames = np.random.default_rng(1).integers(0, 256, (3, 37, 53, 3)).astype(np.uint8)
    found = preprocess(frames, 30)
    assert (found.dtype, found.shape) == (np.float32, (3, 30, 30, 3))

    def resized(kind: Image.Resampling) -> np.ndarray:
        pictures = [Image.fromarray(frame).resize((30, 30), kind) for frame in frames]
        return np.stack([np.asarray(picture, float) for picture in pictures]) / 127.5 - 1

    np.testing.assert_allclose(found, resized(Image.Resampling.BICUBIC), atol=1e-6)
    assert abs(found - resized(Image.Resampling.BILINEAR)).max() > 0.05


@pytest.mark.parametrize(("level", "value"), [(0, -1.0), (51, -0.6), (204, 0.6), (255, 1.0)])
def test_preprocess_constant(level: int, value: float) -> None:
    found = preprocess(np.full((2, 20, 9, 3), level, np.uint8), 14)
    np.testing.assert_allclose(found, np.full((2, 14, 14, 3), value), atol=1e-6)


def test_preprocess_ignores_the_aspect_ratio() -> None:
    """Nothing is cropped or padded; the channels stay where they are."""
    frames = np.zeros((1, 10, 80, 3), np.uint8)
    frames[:, :, 40:, 1] = 255
    found = preprocess(frames, 20)
    assert (found[..., [0, 2]] == -1).all()
    assert (found[:, :, :9, 1] == -1).all()
    assert (found[:, :, 11:, 1] == 1).all()


def test_preprocess_of_turned_frames(tmp_path: Path) -> None:
    """What `read_video` gives need not be contiguous."""
    turn = (0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30)
    path = write(tmp_path / "a.mp4", textured(5), matrix=turn)
    frames = read_video(path, num_frames=2)
    found = preprocess(frames.pixels, 12)
    np.testing.assert_array_equal(found, preprocess(frames.pixels.copy(), 12))
    np.testing.assert_array_equal(found[:1], preprocess(frames.pixels[:1], 12))


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, 4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((1, 3, 4, 4), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((1, 0, 4, 3), np.uint8),
    ],
)
def test_preprocess_bad_frames(frames: np.ndarray) -> None:
    with pytest.raises(
        InputError,
        match=rf"^frames: must be uint8 \(frames, height, width, 3\), not {frames.dtype} \(",
    ):
        preprocess(frames, 4)


# The contact sheet.


def test_contact_sheet(tmp_path: Path) -> None:
    frames = read_video(write(tmp_path / "a.mp4", grey(41)), num_frames=5)
    show(frames, columns=3, width=96).save(path := tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(path))
    height = 72 + 18
    assert sheet.shape == (2 * height, 3 * 96, 3)
    cells = [sheet[y : y + height, x : x + 96] for y in (0, height) for x in (0, 96, 192)]
    for cell, level in zip(cells, (0, 40, 80, 120, 160), strict=False):
        assert abs(cell[:72].astype(int) - level).max() <= 3
        assert cell[72:].min() < 128, "no caption"
        assert cell[72:].max() == 255
    assert (cells[-1] == 255).all(), "there is no sixth frame"
    assert (cells[0][72:] != cells[1][72:]).any(), "captions say when"
    assert show(frames, columns=9, width=96).size == (5 * 96, height)
    with pytest.raises(InputError, match=r"^columns: must be a positive whole number, not 0$"):
        show(frames, columns=0)
