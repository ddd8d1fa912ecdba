"""Names of primitives that several parts of the library speak about."""

from __future__ import annotations

IDENTITIES = frozenset(
    "convert_element_type copy layout_constraint name pvary reduce_precision reshard "
    "sharding_constraint".split()
)
"""Primitives of one operand whose output is that operand, up to rounding, derivatives included."""
STOP = "stop_gradient"
"""The identity of which all derivatives are zero."""
IDENTITIES_OF_EACH = frozenset({"optimization_barrier", "device_put"})
"""Primitives whose outputs are their operands, one by one."""
MUL, DIV, TRANSPOSE = "mul", "div", "transpose"
RESHAPE, SLICE, SPLIT, SQUEEZE = "reshape", "slice", "split", "squeeze"
CONCATENATE = "concatenate"
SCALINGS = frozenset({MUL, DIV})
"""Elementwise products and quotients."""
LINEAR = SCALINGS | frozenset("add sub neg add_any select_n".split())
"""Elementwise primitives that may pass on a mean."""
COMPLEX = frozenset("complex conj imag real".split())
"""Elementwise primitives that are linear over the real numbers, to and from the complex ones."""
NONLINEAR = frozenset(
    "abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz cos "
    "cosh digamma eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a "
    "igammac integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mulhi "
    "ne nextafter not one_minus_square or polygamma polynomial population_count pow "
    "regularized_incomplete_beta rem round rsqrt shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square tan tanh xor zeta".split()
)
"""Elementwise primitives that are opaque to means and shifts."""
ELEMENTWISE = IDENTITIES | {STOP} | LINEAR | COMPLEX | NONLINEAR
"""Primitives that compute every element of one output from those at its place."""
COMMUTATIVE = {MUL} | frozenset("add add_any and max min or xor".split())
"""Elementwise primitives whose two operands can be exchanged."""
MOVES = frozenset({"broadcast_in_dim", "reshape", "squeeze", TRANSPOSE})
"""Primitives that only move or repeat elements, along whole axes."""
PURE = ELEMENTWISE | MOVES | frozenset("dot_general reduce_max reduce_min reduce_sum slice".split())
"""Primitives that a norm may be written with, and that make the same of the same operands."""
PRODUCTS = frozenset("conv_general_dilated dot_general ragged_dot_general".split())
"""Primitives that multiply and sum: linear layers where one operand is a parameter."""
POOLS = frozenset("reduce_window_max reduce_window_min".split())
"""Nonlinear primitives that compute each element from a window."""


def _with_reasons(names_by_reason: dict[str, str]) -> dict[str, str]:
    """Name -> reason."""
    return {name: why for why, names in names_by_reason.items() for name in names.split()}


NOT_CARRYING = _with_reasons(
    {
        "makes numbers from none": (
            "axis_index create_token dim_as_value dimension_size empty empty2 iota "
            "iota_2x32_shape platform_index zeros_like"
        ),
        "makes random bits or keys": (
            "philox2x32 philox4x32 random_bits random_clone random_fold_in random_gamma "
            "random_seed random_split random_unwrap random_wrap rng_bit_generator rng_uniform "
            "threefry2x32 threefry4x32"
        ),
        "reads the bits of its operand": "bitcast_convert_type from_edtype to_edtype",
        "puts in an order": "approx_top_k sort top_k",
        "multiplies or compares what it scatters": "scatter-max scatter-min scatter-mul",
        "combines by a function of the caller": "reduce reduce_window",
        "is of the derivative of pooling": (
            "select_and_gather_add select_and_scatter select_and_scatter_add"
        ),
        "decomposes matrices, or solves with more than a triangle": (
            "cholesky cholesky_update eig eigh geqp3 geqrf hessenberg householder_product lu "
            "lu_pivots_to_permutation ormqr qr schur svd symmetric_product tridiagonal "
            "tridiagonal_solve"
        ),
        "rounds to a few digits": "quantize",
        "scales and rounds blocks of its operands": (
            "scaled_dot scaled_matmul scaled_matmul_wrapper"
        ),
        "is what a declared LayerNorm does behind its norm, which nobody said": (
            "after_declared_norm"
        ),
        "watches, and computes nothing": (
            "after_all check inspect_sharding observe shape_assertion"
        ),
        "is in no program that was traced": (
            "custom_jvp_call_jaxpr custom_lin dce_sink remat_opt stage tie unreachable"
        ),
    }
)
"""Primitives known to pass on neither means nor shifts: why."""
EXCHANGES = frozenset(
    "all_gather all_gather_invariant all_gather_reduced all_to_all pbroadcast pmax pmin ppermute "
    "psum psum_invariant ragged_all_to_all reduce_scatter".split()
)
"""Collectives: inside of a `shard_map` they are what `devices` says, elsewhere they are opaque."""
UNSEEN = _with_reasons(
    {
        "has a derivative, a batching or a partitioning of its own": (
            "call_hi_primitive call_hi_primitive_linearized composite custom_linear_solve "
            "custom_partitioning custom_vmap_call linear_call"
        ),
        "runs a program that is no jaxpr, or not here": (
            "buffer_callback call_exported cudnn_fusion debug_callback debug_print "
            "dot_product_attention_bwd dot_product_attention_bwd_wrapper "
            "dot_product_attention_fp8_bwd dot_product_attention_fp8_bwd_wrapper "
            "dot_product_attention_fp8_fwd "
            "dot_product_attention_fp8_fwd_wrapper dot_product_attention_fwd "
            "dot_product_attention_fwd_wrapper ffi_call io_callback pallas_call pure_callback "
            "tpu_custom_call"
        ),
        "reads or writes a mutable array": (
            "accum_grad_in_ref addupdate box_get box_set broadcast_to core_map create_linear "
            "empty_ref free_ref freeze get log_extend log_read new_box new_log new_ref pin "
            "run_state swap unpin"
        ),
        "is one half of an exchange, or leaves a sum undone": (
            "all_gather_done all_gather_reduced_start all_gather_start all_to_all_done "
            "all_to_all_start pbroadcast_done pbroadcast_dynamic pbroadcast_start ppermute_done "
            "ppermute_start precv preduced psend psum_done psum_invariant_start psum_start "
            "reduce_scatter_done reduce_scatter_start reduced_vary_cast reduced_vary_cast_p "
            "unreduced_pmax unreduced_pmin unreduced_psum unreduced_psum_start "
            "unreduced_reduce_scatter unreduced_reduce_scatter_start vary_unreduced_cast "
            "vary_unreduced_cast_p"
        ),
        "asks something of the compiler": (
            "compute_on program_order relayout shard_alike with_memory_space_constraint "
            "xla_metadata_call xla_metadata_value"
        ),
    }
)
"""Primitives that are not looked into: why. Reports count them, as they do unknown ones."""


def why_without_rule(name: str) -> str:
    """What is said of a primitive that has no rule; a clause."""
    if name in NOT_CARRYING:
        return f"passes on neither means nor shifts, as it {NOT_CARRYING[name]}"
    if name in UNSEEN:
        return f"is not looked into, as it {UNSEEN[name]}"
    return "has no rule: what it does to means and shifts is not known"
