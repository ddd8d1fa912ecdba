"""Names of primitives that several parts of the library speak about."""

from __future__ import annotations

IDENTITIES = frozenset(
    "convert_element_type copy stop_gradient name reduce_precision sharding_constraint "
    "pvary".split()
)
"""Primitives of one operand whose output is that operand, up to rounding."""
IDENTITIES_OF_EACH = frozenset({"optimization_barrier", "device_put"})
"""Primitives whose outputs are their operands, one by one."""
LINEAR = frozenset("add sub neg add_any mul div select_n".split())
"""Elementwise primitives that may pass on a mean."""
NONLINEAR = frozenset(
    "abs acos acosh and asin asinh atan atan2 atanh cbrt ceil clamp cos cosh digamma eq erf "
    "erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic "
    "lt max min ne nextafter not or pow rem round rsqrt shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square tan tanh xor".split()
)
"""Elementwise primitives that are opaque to means and shifts."""
ELEMENTWISE = IDENTITIES | LINEAR | NONLINEAR
"""Primitives that compute every element of one output from those at its place."""
MOVES = frozenset({"broadcast_in_dim", "reshape", "squeeze", "transpose"})
"""Primitives that only move or repeat elements, along whole axes."""
OPAQUE = frozenset(
    "bitcast_convert_type cummax cummin cumprod cumlogsumexp iota observe quantize random_bits "
    "random_wrap random_unwrap random_seed random_split random_fold_in sort threefry2x32 "
    "top_k".split()
)
"""Primitives (and roles) known to pass on neither means nor shifts, and to stay without a rule."""
