"""Data for the tasks that every installation has: scikit-learn's digits and Python's own sources.

Everything is a function of the installed versions alone: fixed lists of modules, and splits by a
checksum of the example itself. `digest` says which data a result was measured with.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import zlib
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Arrays: TypeAlias = dict[str, np.ndarray]

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
OTHER = ALPHABET.index("?")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAD, START, END = 0, 1, 2  # of words: letters follow
WORD = (4, 12)  # letters
LINE = 20  # characters of the shortest line
TOKENS = 24  # of a line; what is longer is cut
BUCKETS = 2048  # of which words get one by their checksum

AREAS = {
    "asyncio": """asyncio.base_events asyncio.events asyncio.futures asyncio.locks asyncio.queues
        asyncio.selector_events asyncio.sslproto asyncio.streams asyncio.tasks
        asyncio.unix_events asyncio.proactor_events""",
    "email": """email._header_value_parser email._parseaddr email.charset email.feedparser
        email.generator email.header email.headerregistry email.message email.policy email.utils""",
    "web": """http.client http.cookiejar http.cookies http.server urllib.parse urllib.request
        urllib.robotparser wsgiref.handlers wsgiref.validate""",
    "xml": """xml.dom.expatbuilder xml.dom.minidom xml.dom.pulldom xml.dom.xmlbuilder
        xml.etree.ElementPath xml.etree.ElementTree xml.sax.expatreader xml.sax.handler
        xml.sax.saxutils xml.sax.xmlreader""",
    "multiprocessing": """multiprocessing.connection multiprocessing.context multiprocessing.heap
        multiprocessing.managers multiprocessing.pool multiprocessing.process
        multiprocessing.queues multiprocessing.shared_memory multiprocessing.synchronize
        multiprocessing.util""",
    "unittest": """unittest.case unittest.loader unittest.main unittest.mock unittest.result
        unittest.runner unittest.suite doctest""",
    "numbers": "_pydecimal fractions statistics random numbers",
    "tools": "ast dis inspect pdb pickletools pyclbr tokenize trace traceback",
}
# Language models read these, and everything above.
OTHERS = """_pyio _strptime bdb bisect calendar cmd code collections configparser
    contextlib copy dataclasses difflib enum filecmp fileinput ftplib functools getopt gettext
    glob gzip heapq hmac imaplib ipaddress linecache locale logging.config logging.handlers
    mailbox mimetypes netrc operator optparse pickle pkgutil platform plistlib
    poplib pprint profile pstats py_compile queue quopri sched selectors shlex shutil
    smtplib socket socketserver ssl string subprocess symtable tarfile threading timeit
    types typing uuid warnings wave weakref webbrowser zipapp"""
HELD_OUT = "argparse cProfile compileall csv fnmatch json.decoder json.encoder nturl2path shelve"
HELD_OUT += " tempfile textwrap"


class Data(NamedTuple):
    """Arrays whose first axis is the example; of characters, the text itself."""

    train: Arrays
    test: Arrays
    classes: int


def sources(names: str) -> list[str]:
    """Sources of modules, as Python's own loader reads them."""
    found = []
    for name in names.split():
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        source: Any = getattr(spec.loader, "get_source")(name)  # noqa: B009  (frozen ones lack it)
        assert source, name
        found.append(source)
    return found


def encode(text: str) -> np.ndarray:
    """Characters as numbers; what is not ASCII becomes a question mark."""
    table = {c: i for i, c in enumerate(ALPHABET)}
    return np.array([table.get(c, OTHER) for c in text], np.int32)


def digits() -> Data:
    """8x8 grey images in [-1, 1]; every fifth image is held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
    labels = labels.astype(np.int32)
    held = np.arange(len(labels)) % 5 == 0
    parts = ({"images": images[k], "labels": labels[k]} for k in (~held, held))
    return Data(*parts, classes=10)


@cache
def characters(length: int = 64, windows: int = 256) -> Data:
    """Sources as characters; windows at equal distances of the modules that are held out."""
    train = encode("\n".join(sources(" ".join([*AREAS.values(), OTHERS]))))
    test = encode("\n".join(sources(HELD_OUT)))
    starts = np.linspace(0, len(test) - length - 1, windows).astype(int)
    return Data(
        {"text": train},
        {"text": test[starts[:, None] + np.arange(length + 1)]},
        classes=len(ALPHABET),
    )


@cache
def words() -> Data:
    """Words of the sources and the same words backwards; a tenth of the words is held out."""
    text = "\n".join(sources(" ".join([*AREAS.values(), OTHERS, HELD_OUT]))).lower()
    low, high = WORD
    found = sorted({w for w in re.findall("[a-z]+", text) if low <= len(w) <= high})
    ids = np.full((len(found), high), PAD, np.int32)
    backwards = np.full((len(found), high + 2), PAD, np.int32)
    for i, word in enumerate(found):
        letters = [LETTERS.index(c) + 3 for c in word]
        ids[i, : len(word)] = letters
        backwards[i, : len(word) + 2] = [START, *reversed(letters), END]
    held = _held_out(found)
    parts = ({"source": ids[k], "target": backwards[k]} for k in (~held, held))
    return Data(*parts, classes=len(LETTERS) + 3)


@cache
def lines() -> Data:
    """Lines of source and the area of the library they are from; one of 30 is held out.

    Of equal lines one is kept, and none that stands in two areas.
    """
    area: dict[str, set[int]] = {}
    for i, names in enumerate(AREAS.values()):
        for line in "\n".join(sources(names)).splitlines():
            if len(line.strip()) >= LINE:
                area.setdefault(line.strip(), set()).add(i)
    found = sorted(line for line, areas in area.items() if len(areas) == 1)
    text = np.full((len(found), TOKENS), PAD, np.int32)
    for i, line in enumerate(found):
        tokens = re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", line.lower())[:TOKENS]
        text[i, : len(tokens)] = [1 + zlib.crc32(t.encode()) % (BUCKETS - 1) for t in tokens]
    labels = np.array([next(iter(area[line])) for line in found], np.int32)
    held = _held_out(found, 30)
    parts = ({"text": text[k], "labels": labels[k]} for k in (~held, held))
    return Data(*parts, classes=len(AREAS))


def digest(data: Data) -> str:
    """A checksum of the examples, the same on every machine."""
    sha = hashlib.sha256()
    for part in data[:2]:
        for name, array in sorted(part.items()):
            sha.update(f"{name} {array.shape} {array.dtype.name} ".encode())
            sha.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()[:16]


def _held_out(examples: Iterable[str], one_of: int = 10) -> np.ndarray:
    return np.array([zlib.crc32(text.encode()) % one_of == 0 for text in examples])
