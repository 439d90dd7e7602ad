"""Faults in the Triton kernels and their launch tables, seen without a GPU."""

TESTS = [
    "tests/ops/lowrank_linear/test_triton.py",
    "tests/ops/lowrank_linear/test_triton_own.py",
    "tests/ops/mode_contract/test_triton.py",
    "tests/ops/frozen_norm/test_triton.py",
    "tests/runtime/test_triton_lib.py",
    "tests/ops/gated_bottleneck/test_triton.py",
    "tests/ops/gated_mlp/test_triton.py",
    "tests/ops/expert_dispatch/test_triton.py",
    "tests/ops/test_triton_offsets.py",
    "tests/ops/test_triton_compile.py",
    "-m",
    "not cross_compile",
]

_LIB = "petal_kernels/_runtime/triton_lib.py"
_KERNELS = "petal_kernels/ops/lowrank_linear/triton_kernels.py"
_BWD = "petal_kernels/ops/lowrank_linear/triton_kernels_bwd.py"
_SUMS = "petal_kernels/ops/lowrank_linear/triton_kernels_weights.py"
_EXTENDED = "petal_kernels/ops/lowrank_linear/triton_gemm_ext.py"
_LAUNCH = "petal_kernels/ops/lowrank_linear/triton_launch.py"
_LAUNCH_SUMS = "petal_kernels/ops/lowrank_linear/triton_launch_weights.py"
_CONFIGS = "petal_kernels/ops/lowrank_linear/triton_configs.py"
_MODE = "petal_kernels/ops/mode_contract/triton_kernels.py"
_NORM = "petal_kernels/ops/frozen_norm/triton_kernels.py"
_GATED_TILES = "petal_kernels/ops/gated_bottleneck/triton_kernels_tiles.py"
_GATED_FWD = "petal_kernels/ops/gated_bottleneck/triton_kernels.py"
_GATED_ROWS = "petal_kernels/ops/gated_bottleneck/triton_kernels_bwd.py"
_GATED_WEIGHTS = "petal_kernels/ops/gated_bottleneck/triton_kernels_weights.py"
_GATED_LAUNCH = "petal_kernels/ops/gated_bottleneck/triton_launch.py"
_MLP = "petal_kernels/ops/gated_mlp/triton_kernels.py"
_MLP_CONFIGS = "petal_kernels/ops/gated_mlp/triton_configs.py"
_MLP_IMPL = "petal_kernels/ops/gated_mlp/triton_impl.py"
_DISPATCH_TILES = "petal_kernels/ops/expert_dispatch/triton_kernels_tiles.py"
_DISPATCH_FWD = "petal_kernels/ops/expert_dispatch/triton_kernels.py"
_DISPATCH_ROWS = "petal_kernels/ops/expert_dispatch/triton_kernels_bwd.py"
_DISPATCH_WEIGHTS = "petal_kernels/ops/expert_dispatch/triton_kernels_weights.py"
_DISPATCH_LAUNCH = "petal_kernels/ops/expert_dispatch/triton_launch.py"

MUTANTS = [
    # frozen_norm: columns behind the last one count in the deviation, a moment in another's place,
    # a mean of the last tile alone, 1 + w
    (_NORM, "x = tl.where((offs_k < D)[None, :], x - mean[:, None], 0.0)", "x = x - mean[:, None]"),
    (_NORM, "moments_ptr + 2 * offs_m + 1, rho", "moments_ptr + 2 * offs_m, rho"),
    (_NORM, "xhat = tl.where((offs_k < D)[None, :], (x", "xhat = tl.where(True, (x"),
    (_NORM, "sum_gx += g", "sum_gx = g"),
    (_NORM, "load_vector(weight_ptr, offs_k, D) + OFFSET", "load_vector(weight_ptr, offs_k, D)"),
    (_NORM, "* mean_gx - mean_g", "* mean_gx"),
    (_NORM, "xhat = xhat.to(x_ptr.dtype.element_ty).to(tl.float32)", "pass"),
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
    (_SUMS, "tl.where(keep | is_x, s, 0.0)", "tl.where(keep, s, 0.0)"),
    # sums: only the last output, splits that overlap, only the first split
    (_BWD, "total += acc * pick(", "total = acc * pick("),
    (_SUMS, "split.to(tl.int64) * rows_per_split", "split.to(tl.int64) * (rows_per_split - 1)"),
    (_SUMS, "part += stride_part", "part += 0"),
    # scale, layout, bias, keep scale
    (_KERNELS, "y = acc * pick(k, alpha0, alpha1, alpha2, alpha3)", "y = acc * alpha0"),
    (_SUMS, "offs = r * O + o if P_TRANSPOSED else o * rank + r", "offs = o * rank + r"),
    (_EXTENDED, "acc *= pick(k, alpha0, alpha1,", "acc *= pick(k, alpha1, alpha0,"),
    (
        _EXTENDED,
        "stride_w = pick(k, stride_w0, stride_w1",
        "stride_w = pick(k, stride_w1, stride_w0",
    ),
    (_EXTENDED, "tl.where(keep, acc * keep_scale, 0.0)", "tl.where(keep, acc, 0.0)"),
    # stores beyond the row's end, and addresses in 32 bits
    (
        _KERNELS,
        "tl.arange(0, BLOCK_R), mask_m, R, acc)",
        "tl.arange(0, BLOCK_R), mask_m, R + 1, acc)",
    ),
    (
        _EXTENDED,
        "offs_m = pid_m.to(tl.int64) * BLOCK_M",
        "offs_m = pid_m * BLOCK_M",
    ),
    # every output reduced against the first one's bottleneck columns
    (_SUMS, "small_ptr + pick(k, start0, start1, start2, start3)", "small_ptr + start0"),
    # down-projections of their own: the first one's mask, columns, rank; the next one's matrix
    (_KERNELS, "acc1, x, u1_ptr, seed, stream + 1,", "acc1, x, u1_ptr, seed, stream,"),
    (_KERNELS, "acc2, x, u2_ptr, seed, stream + 2,", "acc2, x, u1_ptr, seed, stream + 2,"),
    (_KERNELS, "h_ptr += rank1", "h_ptr += rank0"),
    (
        _KERNELS,
        "offs_m[:, None] * stride_hm + pick(k, start0, start1, start2, start3)",
        "offs_m[:, None] * stride_hm",
    ),
    (_EXTENDED, "h_ptr + pick(k, start0, start1,", "h_ptr + pick(k, start1, start0,"),
    (
        _BWD,
        "g_ptr += pick(first, start0, start1, start2,",
        "g_ptr += pick(first, start0, start1, start1,",
    ),
    (_BWD, "R = pick(first, rank0, rank1, rank2, rank3)", "R = rank0"),
    (_BWD, "total += acc * pick(k, alpha0, alpha1, alpha2, alpha3)", "total += acc * alpha0"),
    # the way to dx: one mask for all, the first one's rank, the last one alone, no keep scale
    (_BWD, "stream + k, offs_m, pid_o * BLOCK_O", "stream, offs_m, pid_o * BLOCK_O"),
    (_BWD, "dh = dh_ptr + pick(k, start0, start1, start2, start3)", "dh = dh_ptr"),
    (_BWD, "total += tl.where(keep, acc, 0.0)", "total = tl.where(keep, acc, 0.0)"),
    (_BWD, "total *= keep_scale", "total *= 1.0"),
    # sums over x: another mask, another dh_k, ragged ranks, scales, a second launch like the first
    (_SUMS, "acc2, x, dh2_ptr, seed, stream + 2,", "acc2, x, dh2_ptr, seed, stream + 1,"),
    (_SUMS, "dh2_ptr = dh1_ptr + rank1", "dh2_ptr = dh1_ptr + rank0"),
    (_SUMS, "acc3, row + 3 * D, offs_o", "acc3, row + 2 * D, offs_o"),
    (_SUMS, "rank = tl.where(is_x, R, pick(k, rank0, rank1, rank2, rank3))", "rank = R"),
    (_SUMS, "(acc * pick(k, alpha0, alpha1, alpha2, alpha3))", "(acc * alpha0)"),
    (_LAUNCH, "DOWNS=count, DROPOUT=drop.on_input, SWAP", "DOWNS=1, DROPOUT=drop.on_input, SWAP"),
    (_LAUNCH, "yield first, Parts(", "yield 0, Parts("),
    (_LAUNCH_SUMS, "dh[:, some.starts[0] :]", "dh"),
    # a configuration that spills
    (
        _CONFIGS,
        '_EXPAND_90 = {**_EXPAND_80, "large": tile(8, 2,',
        '_EXPAND_90 = {**_EXPAND_80, "large": tile(2, 2,',
    ),
    # mode_contract: scale, a slab left out, lambda left out, a share in another tile's place
    (_MODE, "dm *= scale", "dm *= 1.0"),
    (_MODE, "range(group * slabs, ", "range(group * slabs + 1, "),
    (_MODE, "(t * core).to(", "t.to("),
    (_MODE, "part_rows = (a * tiles + tile_b) * K", "part_rows = a * tiles * K"),
    (_MODE, "out = (acc * scale)", "out = acc"),
    # gated_bottleneck: the derivative's other half, another sample's factor, the next sample's rows
    (_LIB, "q * tl.sigmoid(-t) * slope", "q * tl.sigmoid(t) * slope"),
    (_GATED_TILES, "left_ptr, R, offs_m // length", "left_ptr, R, offs_m // (length + 1)"),
    (_GATED_TILES, "part * rows + offs, offs < rows", "part * rows + offs, offs < rows - 1"),
    # the norm: the tiles' means not merged, padding counted, a mean of the gradient left out
    (_GATED_FWD, " + delta * delta * (o0 * share)", ""),
    (
        _GATED_FWD,
        "tl.where(mask_o[None, :], u - tile_mean[:, None], 0.0)",
        "u - tile_mean[:, None]",
    ),
    (
        _GATED_ROWS,
        "rstd * (dgate - mean_g * sum_kept - mean_gx * sum_kept_x)",
        "rstd * (dgate - mean_g * sum_kept)",
    ),
    (_GATED_WEIGHTS, "(du - mean_g - xhat * mean_gx)", "(du - mean_g + xhat * mean_gx)"),
    # masks and gates: the first columns' mask, the token's weight, the logit's gradient, its sign
    (
        _GATED_FWD,
        "dropout_keep(seed, stream, offs_m, o0,",
        "dropout_keep(seed, stream, offs_m, 0,",
    ),
    (
        _GATED_ROWS,
        "dgate = tl.sum(total, 0) * load_row(",
        "dgate = tl.sum(total, 0) + 0 * load_row(",
    ),
    (_GATED_ROWS, "dh += through", "dh -= through"),
    (_GATED_ROWS, "if ADD:", "if not ADD:"),
    (_GATED_WEIGHTS, "_store_sum(p_gate_weight_ptr + W,", "_store_sum(p_gate_weight_ptr,"),
    # splits that overlap, only the first split, rows of many samples, addresses in 32 bits
    (_GATED_WEIGHTS, "split * rows_per_split + step", "split * (rows_per_split - 1) + step"),
    (_LIB, "part += stride_part", "part += 0"),
    (_GATED_LAUNCH, "self.s.samples if per_sample else 1", "1"),
    (_GATED_WEIGHTS, "tl.program_id(1).to(tl.int64)", "tl.program_id(1)"),
    # gated_mlp: factors, ranks written twice, another split's mask, rows and sums, a spill
    (_MLP, "p *= load_tile(u_ptr", "p = load_tile(u_ptr"),
    (_MLP, "first, F, a * dp)", "first, F, p * dp)"),
    (_MLP, "d = u * dp", "d = dp"),
    (_MLP, "first = mask_m & (tl.program_id(1) == 0)", "first = mask_m"),
    (_MLP, "stream, offs_m, col0, BLOCK_F", "stream, offs_m, 0, BLOCK_F"),
    (_MLP, "acc * keep_scale", "acc"),
    (_MLP, "split * rows_per_split + step", "split * (rows_per_split - 1) + step"),
    (_MLP, "(split * R + offs_r.to(tl.int64))", "offs_r.to(tl.int64)"),
    (_MLP, "offs_r = tl.program_id(1) * BLOCK_R", "offs_r = 0 * BLOCK_R"),
    (_MLP_IMPL, "rng if drops else None", "None"),
    (_MLP_IMPL, "part, ddown, ddown.numel(), part", "part, ddown, ddown.numel() - 1, part"),
    (_MLP_CONFIGS, "tile(8, 3, BLOCK_M=32, BLOCK_F=64)", "tile(8, 3, BLOCK_M=32, BLOCK_F=128)"),
    # expert_dispatch: a NaN below everything, negative numbers in the wrong order
    (_DISPATCH_TILES, "tl.where(logits != logits, _HIGHEST, key)", "key"),
    (_DISPATCH_TILES, "tl.where(bits < 0, bits ^ _HIGHEST, bits)", "bits"),
    # a ragged tile of slots lost, too few programs for them, another expert's slot, gate
    (_DISPATCH_TILES, "tl.cdiv(end - begin, BLOCK_M)", "(end - begin) // BLOCK_M"),
    (
        _DISPATCH_LAUNCH,
        "triton.cdiv(self.slots, block) + self.experts,",
        "triton.cdiv(self.slots, block),",
    ),
    (_DISPATCH_TILES, "slot_of_ptr + e * N + offs_m", "slot_of_ptr + offs_m"),
    (_DISPATCH_FWD, "e, column(g, e), mask_e", "e, column(g, 0), mask_e"),
    # an expert passed by that some row chose
    (_DISPATCH_FWD, "if SHARED or not CHOICE or tl.max(", "if SHARED or not CHOICE or tl.min("),
    # the softmax: of the chosen in place of all; the losses' gradient; a shared bottleneck's sum
    (_DISPATCH_ROWS, "dl = p * (dg", "dl = g * (dg"),
    (_DISPATCH_ROWS, "dl += load_tile(dlogits_ptr", "dl -= load_tile(dlogits_ptr"),
    (_DISPATCH_ROWS, "total += tl.where(", "total = tl.where("),
    (_DISPATCH_ROWS, "dg += mix * column(through, e)", "dg += column(through, e)"),
    # sums: memory that nobody wrote, one expert's slots for all, splits that overlap, a shared
    # bottleneck of the tokens of expert 0 alone
    (_DISPATCH_WEIGHTS, "mask = mask & (chosen != 0)", "mask = mask & (chosen == chosen)"),
    (_DISPATCH_WEIGHTS, "tl.where(experts == 1, E, e + 1)", "e + 1"),
    (
        _DISPATCH_WEIGHTS,
        "start = begin + split * per_split",
        "start = begin + split * (per_split - 1)",
    ),
    (_DISPATCH_LAUNCH, "if not up and (p.sorted or p.shared)", "if not up and p.sorted"),
]
