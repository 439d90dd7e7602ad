"""Faults in the Triton kernels and their launch tables, seen without a GPU."""

TESTS = [
    "tests/test_triton_interpreter.py",
    "tests/test_triton_offsets.py",
    "tests/test_triton_compile.py",
    "-m",
    "not cross_compile",
]

_LIB = "petal_kernels/_runtime/triton_lib.py"
_KERNELS = "petal_kernels/ops/lowrank_linear/triton_kernels.py"
_EXTENDED = "petal_kernels/ops/lowrank_linear/triton_gemm_ext.py"
_LAUNCH = "petal_kernels/ops/lowrank_linear/triton_launch.py"
_CONFIGS = "petal_kernels/ops/lowrank_linear/triton_configs.py"
_MODE = "petal_kernels/ops/mode_contract/triton_kernels.py"

MUTANTS = [
    # the generator's tile: words in another order, the row's high word lost
    (
        _LIB,
        "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
        "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
    ),
    (_LIB, "(offs_m >> 32)", "(offs_m >> 63)"),
    # masks: one for all outputs, the input's always that of the first columns, dU's operand masked
    (
        _KERNELS,
        "dropout_keep(seed, stream + k, offs_m, r0, BLOCK_R",
        "dropout_keep(seed, stream, offs_m, r0, BLOCK_R",
    ),
    (
        _KERNELS,
        "dropout_keep(seed, stream, offs_m, k0, BLOCK_K",
        "dropout_keep(seed, stream, offs_m, 0, BLOCK_K",
    ),
    (_KERNELS, "tl.where(keep | is_x, s, 0.0)", "tl.where(keep, s, 0.0)"),
    # sums: only the last output, splits that overlap, only the first split
    (_KERNELS, "total += acc", "total = acc"),
    (_KERNELS, "split.to(tl.int64) * rows_per_split", "split.to(tl.int64) * (rows_per_split - 1)"),
    (_KERNELS, "part += stride_part", "part += 0"),
    # scale, layout, bias, keep scale
    (_KERNELS, "y = acc * alpha", "y = acc"),
    (_KERNELS, "offs = r * O + o if P_TRANSPOSED else o * R + r", "offs = o * R + r"),
    (_EXTENDED, "acc *= alpha", "acc *= 1.0"),
    (
        _EXTENDED,
        "stride_w = pick(k, stride_w0, stride_w1",
        "stride_w = pick(k, stride_w1, stride_w0",
    ),
    (_EXTENDED, "tl.where(keep, acc * keep_scale, 0.0)", "tl.where(keep, acc, 0.0)"),
    # stores beyond the row's end, and addresses in 32 bits
    (
        _KERNELS,
        "h, mask=mask_m & (offs_r < R)[None, :])",
        "h, mask=mask_m)",
    ),
    (
        _EXTENDED,
        "offs_m = pid_m.to(tl.int64) * BLOCK_M",
        "offs_m = pid_m * BLOCK_M",
    ),
    # every output reduced against the first one's bottleneck columns
    (_LAUNCH, "small.stride(0), self.offset, per_split", "small.stride(0), 0, per_split"),
    # a configuration that spills
    (
        _CONFIGS,
        '("expand", 90): {**_EXPAND_80, "large": tile(8, 2,',
        '("expand", 90): {**_EXPAND_80, "large": tile(2, 2,',
    ),
    # mode_contract: scale, a slab left out, lambda left out, a share in another tile's place
    (_MODE, "dm *= scale", "dm *= 1.0"),
    (_MODE, "range(group * slabs, ", "range(group * slabs + 1, "),
    (_MODE, "(t * core).to(", "t.to("),
    (_MODE, "part_rows = (a * tiles + tile_b) * K", "part_rows = a * tiles * K"),
    (_MODE, "out = (acc * scale)", "out = acc"),
]
