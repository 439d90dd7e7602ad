"""Faults in the CUDA kernels and their registration, seen by executing them under the emulation."""

TESTS = [
    "tests/emulation/test_emulation.py",
    "tests/ops/lowrank_linear/test_cuda_exact.py",
    "tests/ops/lowrank_linear/test_cuda_own.py",
    "tests/ops/lowrank_linear/test_cuda.py",
    "tests/ops/mode_contract/test_cuda.py",
    "tests/ops/frozen_norm/test_cuda.py",
    "tests/ops/gated_bottleneck/test_cuda.py",
    "tests/ops/gated_mlp/test_cuda.py",
    "tests/ops/expert_dispatch/test_cuda.py",
    "tests/ops/expert_dispatch/test_cuda_sort.py",
    "-m",
    "not slow",
]

_COMMON = "csrc/common"
_BLOCK = "csrc/lowrank_linear/cuda/block.cuh"
_SHRINK = "csrc/lowrank_linear/cuda/shrink.cu"
_FWD = "csrc/lowrank_linear/cuda/forward.cu"
_BWD = "csrc/lowrank_linear/cuda/weights.cu"
_HOST = "csrc/lowrank_linear/cuda/call.cpp"
_MODE_FWD = "csrc/mode_contract/cuda/forward.cu"
_MODE_BWD = "csrc/mode_contract/cuda/backward.cu"
_LINEAR = "petal_kernels/ops/lowrank_linear/cuda_impl.py"
_NORM_ROW = "csrc/frozen_norm/cuda/row.cuh"
_NORM_FWD = "csrc/frozen_norm/cuda/forward.cu"
_NORM_BWD = "csrc/frozen_norm/cuda/backward.cu"
_NORM_HOST = "csrc/frozen_norm/cuda/call.cpp"
_GATED_BLOCK = "csrc/gated_bottleneck/cuda/block.cuh"
_GATED_FWD = "csrc/gated_bottleneck/cuda/forward.cu"
_GATED_ROWS = "csrc/gated_bottleneck/cuda/backward.cu"
_GATED_WEIGHTS = "csrc/gated_bottleneck/cuda/weights.cu"
_GATED_HOST = "csrc/gated_bottleneck/cuda/call.cpp"
_GATED_SETTINGS = "petal_kernels/ops/gated_bottleneck/settings.py"
_GATED = "petal_kernels/ops/gated_bottleneck/cuda_impl.py"
_MLP_BLOCK = "csrc/gated_mlp/cuda/block.cuh"
_MLP_FWD = "csrc/gated_mlp/cuda/forward.cu"
_MLP_BWD = "csrc/gated_mlp/cuda/backward.cu"
_MLP_HOST = "csrc/gated_mlp/cuda/call.cpp"
_MLP = "petal_kernels/ops/gated_mlp/cuda_impl.py"
_SORT = "csrc/expert_dispatch/cuda/sort.cu"
_EXPERT_BLOCK = "csrc/expert_dispatch/cuda/block.cuh"
_EXPERT_GATES = "csrc/expert_dispatch/cuda/gates.cuh"
_EXPERT_FWD = "csrc/expert_dispatch/cuda/forward.cu"
_EXPERT_ROWS = "csrc/expert_dispatch/cuda/backward.cu"
_EXPERT_WEIGHTS = "csrc/expert_dispatch/cuda/weights.cu"
_EXPERT_HOST = "csrc/expert_dispatch/cuda/call.cpp"
_EXPERTS = "petal_kernels/ops/expert_dispatch/cuda_impl.py"

MUTANTS = [
    # frozen_norm: one warp's sum for the block's, the sums of before, columns behind the last
    (_NORM_ROW, "(sums[0] + sums[1]) + (sums[2] + sums[3])", "sums[0]"),
    (_NORM_ROW, "    __syncthreads();  // nobody reads the last sums any more\n", ""),
    (_NORM_ROW, "first(threadIdx.x % kLanes * 8)", "first(threadIdx.x % kLanes * 4)"),
    (
        _NORM_FWD,
        "j < valid ? (v[j] - mean) * (v[j] - mean) : 0.0f",
        "(v[j] - mean) * (v[j] - mean)",
    ),
    (_NORM_FWD, "if (p.rounded) xhat = to_float(from_float<T>(xhat));", ""),
    (_NORM_FWD, "moments[p.centered ? 1 : 0] = rho", "moments[0] = rho"),
    (_NORM_BWD, "p.centered ? row.sum(sum_g) / width : 0.0f", "row.sum(sum_g) / width"),
    (_NORM_BWD, "g[j] * factor[j] : 0.0f", "g[j] : 0.0f"),
    (_NORM_HOST, "p.offset = kind == kRmsPlusOne", "p.offset = kind == kRms"),
    # masks
    (
        _SHRINK,
        "const uint32_t keep = mask.keep8(k, row, col);\n#pragma",
        "const uint32_t keep = mask.keep8(0, row, col);\n#pragma",
    ),
    (
        _FWD,
        "mask_tile<T, kBM, kD>(down_ring.a(tile), mask, stream, row0, tile * kD);",
        "down_ring.a(tile);",
    ),
    (
        _FWD,
        "const float hidden_scale = p.mask_x ? e.dropout.scale : 1.0f;",
        "const float hidden_scale = 1.0f;",
    ),
    (_HOST, "job.stream = static_cast<uint32_t>(streams[j]);", "job.stream = 0;"),
    (f"{_COMMON}/philox.h", "round < 7", "round < 6"),
    (
        f"{_COMMON}/cuda/tile.cuh",
        "mask.keep8(stream, row0 + r, col0 + c)",
        "mask.keep8(stream, row0 + r, c)",
    ),
    # tiles, splits, indices
    (_SHRINK, "if (!here.advance(p.widths, kD) ||", "if (here.advance(p.widths, kD), "),
    (
        _FWD,
        "while (static_cast<int64_t>(blockIdx.y) >= p.first_tile[k + 1]) ++k;",
        "while (static_cast<int64_t>(blockIdx.y) > p.first_tile[k + 1]) ++k;",
    ),
    (
        _FWD,
        "const bool writes_hidden = blockIdx.y == 0 &&",
        "const bool writes_hidden = blockIdx.y == 1 &&",
    ),
    (
        _BWD,
        "const int64_t row0 = blockIdx.z * p.rows_per_split;",
        "const int64_t row0 = blockIdx.z * (p.rows_per_split - 1);",
    ),
    (
        _BWD,
        "float* const partial = p.partial + blockIdx.z * p.partial_stride;",
        "float* const partial = p.partial + 0 * p.partial_stride;",
    ),
    (
        f"{_COMMON}/cuda/reduce.cuh",
        "for (int64_t s = 0; s < splits; ++s) sum +=",
        "for (int64_t s = 0; s < splits; ++s) sum =",
    ),
    (
        f"{_COMMON}/cuda/tile.cuh",
        "const int valid = row0 + r < rows ?",
        "const int valid = row0 + r <= rows ?",
    ),
    (
        f"{_COMMON}/cuda/vec.cuh",
        "void store8(T* p, const float (&v)[8], int valid, bool vec) {\n  if (vec && valid == 8) {",
        "void store8(T* p, const float (&v)[8], int valid, bool vec) {\n  if (vec) {",
    ),
    # barriers and fragments
    (
        f"{_COMMON}/cuda/pipeline.cuh",
        "cp_async_wait<kStages - 2>();",
        "cp_async_wait<kStages - 1>();",
    ),
    (
        f"{_COMMON}/cuda/pipeline.cuh",
        "    __syncthreads();  // the tile is there for all",
        "    // the tile is there for all",
    ),
    (
        f"{_COMMON}/cuda/tile.cuh",
        "mma_16816<T>(acc[m][n + 1], f, fb[2], fb[3]);",
        "mma_16816<T>(acc[m][n + 1], f, fb[0], fb[1]);",
    ),
    (
        f"{_COMMON}/cuda/tile.cuh",
        "a + (depth + even) * LDA + row + m * 16 + odd",
        "a + (depth + low) * LDA + row + m * 16 + high",
    ),
    # mode_contract
    (
        _MODE_FWD,
        "const T* const core = static_cast<const T*>(p.core.data) + slab * rank * p.core.stride;",
        "const T* const core = static_cast<const T*>(p.core.data) + slab * p.core.stride;",
    ),
    (f"{_COMMON}/cuda/parts.cuh", "? v[j] - hi : 0.0f;", "? 0.0f : 0.0f;"),
    (_MODE_BWD, "+ mode % kB * kPartLd<T>;", "+ mode % kB;"),
    (
        _MODE_BWD,
        "const int64_t first = blockIdx.z * slabs, last = first + slabs < rank",
        "const int64_t first = blockIdx.z * slabs, last = first + 1 < rank",
    ),
    # host side
    (_LINEAR, "core.to(dtype).transpose(1, 2)", "core.to(dtype)"),
    (_LINEAR, "mask = _MASK_BIG if at_input else _NO_MASK", "mask = _NO_MASK"),
    # lowrank_linear: a down-projection, a mask and a scale of every output's own
    (_BLOCK, "base + slot >= first[i + 1]", "base + slot > first[i + 1]"),
    (_BLOCK, "return (base + slot - first[item]) * kSlot;", "return (base + slot) * kSlot;"),
    (
        _BLOCK,
        "& 15u) * kPlane;\n      return [=](uint32_t",
        "& 0u) * kPlane;\n      return [=](uint32_t",
    ),
    (_BLOCK, "& 15u) * kPlane;\n      return [=](float", "& 0u) * kPlane;\n      return [=](float"),
    (
        f"{_COMMON}/cuda/tile.cuh",
        "pair(f, fa[m], row + m * 16, depth);",
        "pair(f, fa[m], row, depth);",
    ),
    (f"{_COMMON}/cuda/tile.cuh", "those(va[m][s], row(m), k + s);", "those(va[m][s], row(m), k);"),
    (
        f"{_COMMON}/cuda/tile.cuh",
        "const auto those = seen(col(run));",
        "const auto those = seen(0);",
    ),
    (
        _BLOCK,
        "f[half + 2] = keep_pair(a[half + 2], bits >> 8, bits >> 9);",
        "f[half + 2] = a[half + 2];",
    ),
    (_BLOCK, "high = two_bytes(p + kPlaneLd) >> across;", "high = low;"),
    (
        _BLOCK,
        "plane[i] = static_cast<unsigned char>(mask.keep8(stream,",
        "plane[i] = static_cast<unsigned char>(mask.keep8(0,",
    ),
    (_SHRINK, "mask, k, row0, here.col);", "mask, from, row0, here.col);"),
    (
        _SHRINK,
        "b.vec, slots.col(s, k),\n                                    p.ranks[k],",
        "b.vec, slots.col(s, k),\n                                    p.ranks[0],",
    ),
    (_SHRINK, "(OWN ? p.offsets[k] : 0)", "(OWN ? p.offsets[0] : 0)"),
    (_SHRINK, "OWN ? p.ranks[k] : rank, 8)", "OWN ? kSlot * p.first_slot[k + 1] : rank, 8)"),
    (_SHRINK, "v[j] *= p.scales[k];", "v[j] *= p.scales[0];"),
    (
        _SHRINK,
        "static_cast<T*>(p.out.data) + p.offsets[first];",
        "static_cast<T*>(p.out.data) + first * rank;",
    ),
    (_FWD, "const uint32_t stream = p.own ? k : 0;", "const uint32_t stream = 0;"),
    (_FWD, "blockIdx.y == 0 && (p.own || k == 0);", "blockIdx.y == 0 && k == 0;"),
    (
        _FWD,
        "keep_plane<kBM, kBN>(plane, mask, here.k, row0, col0);",
        "keep_plane<kBM, kBN>(plane, mask, k, row0, col0);",
    ),
    (
        _FWD,
        "        sum.add_kept(product, plane);\n        product.clear();",
        "        sum.add_kept(product, plane);",
    ),
    (_FWD, "const float scale = p.scales[k] *", "const float scale = p.scales[0] *"),
    (_BWD, "p.job[j].stream, row,", "stream, row,"),
    (_BWD, "return job.big.data == before.big.data && ", "return "),
    (
        _BWD,
        "partial + p.first_element[j] + col * ranks + rank",
        "partial + p.first_element[first] + col * ranks + rank",
    ),
    (_HOST, "columns += p.ranks[k];", "columns += p.ranks[0];"),
    (_HOST, "const Tensor& down = p.own ? downs[k] : downs[0];", "const Tensor& down = downs[0];"),
    (_HOST, "(p.mask_out || differ);", "p.mask_out;"),
    (_HOST, "aligned = aligned &&", "aligned = aligned ||"),
    (_LINEAR, "separate = core is not None or call.own_downs", "separate = core is not None"),
    (_LINEAR, "1.0, mask, stream))", "1.0, mask, 0))"),
    # gated_bottleneck
    (_GATED_BLOCK, "at<T>(left, row / length, c)", "at<T>(left, 0, c)"),
    (_GATED_BLOCK, "mask.keep8(0, at_.row, at_.col)", "mask.keep8(0, at_.local_row, at_.col)"),
    (_GATED_BLOCK, "g.dgate[j] *= gate[j] * (1.0f - gate[j]);", "g.dgate[j] *= gate[j];"),
    (
        _GATED_BLOCK,
        "row.mean_g - g.xhat[j] * row.mean_gx",
        "row.mean_g + g.xhat[j] * row.mean_gx",
    ),
    (_GATED_FWD, "p.pooled[row / p.length]", "p.pooled[0]"),
    (_GATED_FWD, "(v[j] - mean) * (v[j] - mean)", "v[j] * v[j]"),
    (_GATED_FWD, "  __syncthreads();  // the block's own rows, read back by other threads\n", ""),
    (_GATED_FWD, "if (p.sees_output) {", "if (false) {"),
    (_GATED_FWD, "*at<T>(p.left, sample[r], c)", "*at<T>(p.left, 0, c)"),
    (_GATED_FWD, "*at<T>(p.right, sample[r], c)", "*at<T>(p.left, sample[r], c)"),
    (_GATED_FWD, "sum[r] = warp_sum(sum[r]);", "sum[r] = sum[r];"),
    (_GATED_FWD, "    __syncthreads();  // rows of a warp, columns of all\n", ""),
    (_GATED_SETTINGS, "int(s.route_relu),", "0,"),
    (_GATED_ROWS, " - info.mean_gx * sums[i][4]", ""),
    (_GATED_ROWS, "if (f.sees_output) g.dy[j] = dh[j];", ""),
    (_GATED_ROWS, "* weight * slope;", "* slope;"),
    (_GATED_ROWS, "if (adds) load8<T>(base,", "if (!adds) load8<T>(base,"),
    (
        _GATED_ROWS,
        "__syncthreads();  // before the weights and vectors of the next tile",
        "// before the weights and vectors of the next tile",
    ),
    (_GATED_WEIGHTS, "const int piece0 = blockIdx.y * kMine;", "const int piece0 = 0;"),
    (
        _GATED_WEIGHTS,
        "first = split * p.rows_per_split,",
        "first = split * (p.rows_per_split - 1),",
    ),
    (_GATED_WEIGHTS, "t < kThreads; t += kGroups", "t < kThreads / 2; t += kGroups"),
    (_GATED_HOST, "grad.stride(sum || down ? 0 : 1)", "grad.stride(0)"),
    (_GATED, "rows(Work(dz=work.dz, dx=work.dx), False, False, True)", "pass"),
    # gated_mlp: factors, tiles, ranks written twice, another split's mask, rows and sums
    (_MLP_FWD, "activate(known, g[i][j]) * u[i][j];", "activate(known, g[i][j]);"),
    (_MLP_BLOCK, "d[j] = slope * (factor * dp);", "d[j] = slope * dp;"),
    (_MLP_BLOCK, "u[j] = a * dp;", "u[j] = factor * dp;"),
    (_MLP_BLOCK, "row < p.rows ?", "row <= p.rows ?"),
    (_MLP_BLOCK, "blockIdx.x / across * kTileRows", "blockIdx.x / across * (kTileRows - 1)"),
    (
        f"{_COMMON}/cuda/activation.cuh",
        "case Activation::kRelu: return fn(Activation::kRelu);",
        "case Activation::kRelu: return fn(Activation::kIdentity);",
    ),
    (_MLP_BWD, "p.dp.data != nullptr && blockIdx.y == 0;", "p.dp.data != nullptr;"),
    (_MLP_BWD, "mask.keep8(0, row, col);", "mask.keep8(0, row - row0, col);"),
    (_MLP_BWD, "mask.keep8(0, row, col);", "mask.keep8(0, row, col - col0);"),
    (_MLP_BWD, "rng != nullptr ? params.dropout.scale : 1.0f;", "rng != nullptr ? 1.0f : 1.0f;"),
    (_MLP_BWD, "if (writes && row < end) {", "if (writes && row <= end) {"),
    (_MLP_BWD, "        return true;\n", "        return false;\n"),
    (
        _MLP_BWD,
        "const int64_t row0 = blockIdx.z * p.rows_per_split;",
        "const int64_t row0 = blockIdx.z * (p.rows_per_split - 1);",
    ),
    (_MLP_BWD, "blockIdx.z * p.width * p.rank;", "0 * p.width * p.rank;"),
    (
        f"{_COMMON}/cuda/partials.cuh",
        "static_cast<int64_t>(blockIdx.y) * kReduceTile",
        "0 * kReduceTile",
    ),
    (_MLP_HOST, 'dtype_of(*ddown, "ddown");', "p.dtype;"),
    (
        _MLP,
        "gated_mlp_act_bwd(dp, g,",
        "gated_mlp_act_bwd(dp if dp is None else dp.clone(), g,",
    ),
    # expert_dispatch
    (_SORT, "(1u << threadIdx.x % kWarp) - 1u;", "(1u << threadIdx.x % kWarp);"),
    (_SORT, "slot += counts[warp * p.experts + e];", "slot += 0;"),
    (_SORT, "    if (slot >= end) p.order[slot] = -1;\n", ""),
    (_SORT, "p.counts[b * p.experts + e] = slot;\n    slot += count;", "slot += count;"),
    (_EXPERT_GATES, "l > m || (l != l && m == m)", "l >= m || (l != l && m == m)"),
    (_EXPERT_GATES, "|| (l != l && m == m)", ""),
    (_EXPERT_GATES, "p.renormalize ? chosen : all, chosen", "chosen, chosen"),
    (_EXPERT_BLOCK, "(63 - (end - 1) / rank)", "(63 - first / rank)"),
    (_EXPERT_BLOCK, "operand);\n          __syncthreads();", "operand);"),
    (_EXPERT_FWD, "? g[e] * activate(", "? activate("),
    (_EXPERT_FWD, "m.gates[row * f.experts + e]", "m.gates[e]"),
    (_EXPERT_ROWS, "e = first + i / kRows;", "e = i / kRows;"),
    (_EXPERT_ROWS, "d[e] = g[e] * (d[e] - inner);", "d[e] = g[e] * d[e];"),
    (_EXPERT_ROWS, "if (!f.renormalize) {", "if (false) {"),
    (_EXPERT_ROWS, "d[e] += p.dlogits[first + e];", "d[e] += 0.0f;"),
    (_EXPERT_WEIGHTS, "  if (end > first + share) end = first + share;\n", ""),
    (_EXPERT_HOST, "add ? splits * w.experts : splits;", "splits;"),
    (_EXPERTS, "per_sample.sum(1) if", "per_sample.mean(1) if"),
]
