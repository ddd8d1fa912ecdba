"""Which line of source a person would look for: the one that defines the model.

Equations know the frames of the call that made them, innermost first. Those of jax and of packages
of layers name no model; those of other packages may.
"""

from __future__ import annotations

import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .._compat import PACKAGE, JaxprEqn

Line = tuple[str, int]
"""A file and the number of a line in it."""
UNKNOWN: Line = ("", 0)

_PACKAGES = ("/site-packages/", "/dist-packages/")
_LAYERS = "einops equinox flax haiku jax jaxlib keras numpy".split()
_NO_MODEL = (
    "/jax/_src/",
    "/jaxlib/",
    "<",
    PACKAGE + "/",
    *(packages + name + "/" for packages in _PACKAGES for name in _LAYERS),
)
_LIBRARY = Path(sysconfig.get_path("stdlib")).as_posix() + "/"


def source_line(eqns: Iterable[JaxprEqn], caller: Line = UNKNOWN) -> Line:
    """File and line of the code that made the first equation, `UNKNOWN` if there is none.

    The user's own code is preferred to that of packages, unless all there is of it is the
    `caller`: then a package defines the model. Functions that jax has traced before know no
    caller: the calls around an equation follow it in `eqns`.
    """
    found = [line for eqn in eqns for line in _frames(eqn)]
    own = [line for line in found if not _is_installed(line)]
    return (found if not own or {*own} == {caller} else own)[0] if found else UNKNOWN


def calling_line(eqns: Sequence[JaxprEqn]) -> Line:
    """The user's only line in most equations of a program, `UNKNOWN` if there is none."""
    own = (tuple(line for line in _frames(eqn) if not _is_installed(line)) for eqn in eqns)
    ((lines, count),) = Counter(own).most_common(1) or [((), 0)]
    return lines[0] if len(lines) == 1 and 2 * count > len(eqns) else UNKNOWN


def _is_installed(line: Line) -> bool:
    return any(packages in line[0] for packages in _PACKAGES)


def _frames(eqn: JaxprEqn) -> Iterator[Line]:
    """The frames that may define a model."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        file = frame.file_name.replace("\\", "/")
        own_library = file.startswith(_LIBRARY) and not _is_installed((file, 0))
        if not (own_library or any(part in file for part in _NO_MODEL)):
            yield file, frame.line_num
