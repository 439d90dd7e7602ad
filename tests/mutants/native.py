"""Faults in the C++ CPU kernels."""

LOWRANK = "csrc/lowrank_linear/cpu/kernel.cpp"
LOWRANK_BACKWARD = "csrc/lowrank_linear/cpu/backward.h"
LOWRANK_PARTS = "csrc/lowrank_linear/cpu/parts.h"
HOST = "csrc/lowrank_linear/cpu/call.cpp"
MODES = "csrc/mode_contract/cpu/kernel.cpp"
GATED = "csrc/gated_bottleneck/cpu/kernel.cpp"
GATED_BACKWARD = "csrc/gated_bottleneck/cpu/backward.h"
GATED_PARTS = "csrc/gated_bottleneck/cpu/parts.h"
GATED_ROUTE = "csrc/gated_bottleneck/cpu/route.h"
GATED_HOST = "csrc/gated_bottleneck/cpu/call.cpp"
MLP = "csrc/gated_mlp/cpu/kernel.cpp"
NORM = "csrc/frozen_norm/cpu/kernel.cpp"
NORM_HOST = "csrc/frozen_norm/cpu/call.cpp"
MLP_HOST = "csrc/gated_mlp/cpu/call.cpp"
EXPERTS = "csrc/expert_dispatch/cpu/kernel.cpp"
EXPERTS_BACKWARD = "csrc/expert_dispatch/cpu/backward.h"
EXPERTS_PARTS = "csrc/expert_dispatch/cpu/parts.h"
EXPERTS_SUMS = "csrc/expert_dispatch/cpu/sums.h"
EXPERTS_HOST = "csrc/expert_dispatch/cpu/call.cpp"
GEMM = "csrc/common/cpu/gemm.h"
MATH = "csrc/common/cpu/activation.h"
DROPOUT = "csrc/common/cpu/dropout.h"
BLOCK = "csrc/common/cpu/block.h"

REBUILD = True
TESTS = [
    "tests/ops/lowrank_linear/test_native.py",
    "tests/ops/gated_bottleneck/test_native.py",
    "tests/ops/gated_mlp/test_native.py",
    "tests/ops/frozen_norm/test_native.py",
    "tests/ops/expert_dispatch/test_native.py",
    "tests/ops/test_native_precision.py",
    "tests/ops/test_ops.py",
    "tests/ops/test_scalars.py",
    "-k",
    "native",
]

MUTANTS = [
    # A row's tail counts what lies behind it, or does not count; three of the four sums alone.
    (NORM, "    for (int64_t i = n; i < kVL; ++i) v[i] = 0.0f;\n", ""),
    (
        NORM,
        "for (; c < width; c += kVL) {\n    const int64_t n",
        "for (; c + kVL <= width; c += kVL) {\n    const int64_t n",
    ),
    (NORM, "(sums[2] + sums[3])", "sums[2]"),
    (NORM, "const vf v = take(x + c, n) - mean;", "const vf v = take(x + c, n);"),
    (NORM, "if (a.rounded) v = rounded<T>(v);", ""),
    (NORM, "c, n) + a.offset : splat", "c, n) : splat"),
    (NORM, "moments[a.centered ? 1 : 0];", "moments[0];"),
    (NORM, "g - xhat * mean_gx - mean_g", "g - xhat * mean_gx"),
    (NORM_HOST, "(a.N + each - 1) / each", "a.N / each"),
    (MLP, "at.slope * (factor * d)", "at.slope * d"),
    (MLP, "{q * s.value, s.value + q * s.slope};", "{q * s.value, s.value + s.slope};"),
    (MLP, "* kNR + c % kNR, at.value * factor);", "* kNR + c % kNR, at.value);"),
    # Every strip draws the first one's masks, every block that of the first rows.
    (MLP, "a.dropout, 0, row0, col0)", "a.dropout, 0, row0, 0)"),
    (MLP, "a.dropout, 0, row0, col0)", "a.dropout, 0, row0 - begin, col0)"),
    # dA of the last block of a split alone.
    (MLP, "row0 > begin, dh", "false, dh"),
    (MLP_HOST, "strips = ceil_div(a.F, kernel.strip)", "strips = a.F / kernel.strip"),
    (MODES, "    t *= a.scale;\n", ""),
    (
        MODES,
        "const float factor = a.scale * lambda(a, index);",
        "const float factor = lambda(a, index);",
    ),
    (
        MODES,
        "const float m = a.scale * core * mode(a, k, index);",
        "const float m = core * mode(a, k, index);",
    ),
    # One chain of additions however long, and runs that lose what was summed before them.
    (GEMM, "constexpr int64_t kRun = 256;", "constexpr int64_t kRun = 1 << 20;"),
    (GEMM, "    add(t, done, kNR);\n    lay_down();", "    lay_down();"),
    # A weight gradient that forgets the blocks before the last one of its split.
    (
        LOWRANK_BACKWARD,
        "{dup + c * o.R, kNR, o.R * kNR}, !at.first",
        "{dup + c * o.R, kNR, o.R * kNR}, false",
    ),
    # dh without the first output.
    (LOWRANK_BACKWARD, "store(dh, k > 0 ? load(dh) + g : g)", "store(dh, g)"),
    # Backward draws every output's mask from stream 0.
    (
        LOWRANK_BACKWARD,
        "o.scale, m_dropout(a), static_cast<uint32_t>(k), s.row0)",
        "o.scale, m_dropout(a), 0u, s.row0)",
    ),
    # g accumulates over the chunks of the outputs before.
    (
        LOWRANK_BACKWARD,
        "gemm({b.g, width, kNR}, c > 0, chunk",
        "gemm({b.g, width, kNR}, k > 0 || c > 0, chunk",
    ),
    # dU from the undropped input.
    (LOWRANK_BACKWARD, "a.block, mask_of(a, b, k, c));", "a.block);"),
    # The masks of x begin anew with every chunk of its columns: in backward, in forward.
    (LOWRANK_BACKWARD, "b.bits + k * a.block * ld + col / 8", "b.bits + k * a.block * ld"),
    (LOWRANK, "s.row0 + i, rows, c / 8,", "s.row0 + i, rows, 0,"),
    # One mask of x for every down-projection: in backward, in forward.
    (LOWRANK_BACKWARD, "b.bits + k * a.block * ld", "b.bits"),
    (
        LOWRANK,
        "draw_bits(bits, kBytes, a.dropout, static_cast<uint32_t>(k)",
        "draw_bits(bits, kBytes, a.dropout, 0u",
    ),
    # Every output reads the first one's part of h; dx takes dh_0 for all of them.
    (LOWRANK_PARTS, "{m, width, h + o.at, h_ld(a), cols}", "{m, width, h, h_ld(a), cols}"),
    (LOWRANK_BACKWARD, "row_major(b.dh + first, h_ld(a))", "row_major(b.dh, h_ld(a))"),
    # All outputs have the first one's scale.
    (HOST, "static_cast<float>(numbers.scales[k])", "static_cast<float>(numbers.scales[0])"),
    (LOWRANK_PARTS, " && a.outs[k].scale == a.outs[k - 1].scale", ""),
    # The core's gradient with the core's transpose.
    (
        LOWRANK_BACKWARD,
        "s.rows, o.R, o.core_t, o.R * kNR",
        "s.rows, o.R, o.core, o.R * kNR",
    ),
    # The bias is added to whole panels only.
    (BLOCK, "store(rest[r], v0 + bias0)", "store(rest[r], v0)"),
    # Masks that start anew with every block of rows, or with every 64 of them.
    (
        DROPOUT,
        "draw_bits(bits, kBytes, d, stream, row0 + i0, n",
        "draw_bits(bits, kBytes, d, stream, i0, n",
    ),
    (DROPOUT, "rows -= n, row0 += n, bits", "rows -= n, bits"),
    # Six rounds are not seven.
    (DROPOUT, "round < 6", "round < 5"),
    # The rows below the last full tile are left out.
    (GEMM, "if (i < rows) body(Height<1>(), i);", ""),
    # The transposed operand's packing loses its last columns' depth.
    (
        GEMM,
        "for (; k < K; ++k) {\n    for (int64_t c = 0; c < n; ++c) dst",
        "for (; k + 1 < K; ++k) {\n    for (int64_t c = 0; c < n; ++c) dst",
    ),
    # A gradient that shares its partials with another is that one.
    ("csrc/common/cpu/pack.h", "          from += m.rows * panel_;\n", ""),
    # A panel's second half is taken for padding where it is not.
    (GEMM, "if (cols - j * kNR > kVL) {", "if (cols - j * kNR > kVL + 4) {"),
    # Only the first split reaches the gradient.
    (BLOCK, "for (int64_t s = 1; s < splits; ++s)", "for (int64_t s = 1; s < splits - 1; ++s)"),
    # A split that ends one row early.
    (
        HOST,
        "std::min(a.N, row + split_rows)",
        "std::min(a.N - 1, row + split_rows)",
    ),
    # dV of every slab but the first is dropped.
    (MODES, "gemm({dup, kNR, a.R * kNR}, !first,", "gemm({dup, kNR, a.R * kNR}, false,"),
    # The scale is missing from the modes' gradient.
    (MODES, "store(dm + i, load(dm + i) * a.scale)", "store(dm + i, load(dm + i))"),
    # CP: lambda's gradient forgets the mode.
    (MODES, "dcore += mode(a, k, index) * t", "dcore += t"),
    # A gated bottleneck's weight gradient forgets the blocks before the last one of its split.
    (GATED_PARTS, "gemm_columns(c, !at.first, narrow_a", "gemm_columns(c, false, narrow_a"),
    # Its column sums forget them.
    (GATED_PARTS, "if (!at.first) total = ", "if (false) total = "),
    # The mask of every block is that of the first rows.
    (GATED_PARTS, "a.dropout, 0, s.row0, s.rows", "a.dropout, 0, 0, s.rows"),
    # The variance counts the padding of the last panel.
    (GATED, "for (int64_t c = most(a.O - col, 0); c < kVL; ++c) d[c] = 0.0f;", ""),
    # The logit that reads Y reads H alone.
    (GATED, "if (a.weight_a) logit += dot(", "if (false) logit += dot("),
    # The gate of a channel is left out of backward's norm.
    (GATED_BACKWARD, "if (a.channel) u *= load(a.channel + col);", ""),
    # The norm's gradient without its second sum.
    (GATED_BACKWARD, "g - mean_g[i] - load(b.other + k) * mean_gx[i]", "g - total[i]"),
    # Padding weighs as much as a token.
    (GATED_BACKWARD, "a.token_weights ? a.token_weights[s.row0 + i] : even", "even"),
    # A sample longer than a block: only its last block's sum reaches the logits.
    (GATED_BACKWARD, "total += sum_of(b.dlogit, s.rows)", "total = sum_of(b.dlogit, s.rows)"),
    # dX without what comes through the logit.
    (GATED_BACKWARD, "add_rank_one(b.du, a, b.dlogit, a.weight_x, s.rows);", ""),
    # The gradient of a sample's matrices begins anew with every block.
    (GATED_ROUTE, "first = row % a.L == 0", "first = true"),
    # The matrices of the first sample serve all.
    (GATED_ROUTE, "if (s.sample == sample) return;", "if (s.sample >= 0) return;"),
    # relu's derivative is missing from the route.
    (GATED_ROUTE, "load(z + k) <= vf{} ? vf{} : load(dq + k)", "load(dq + k)"),
    # Splits that cut samples.
    (GATED_HOST, "ceil_div(a.N / unit, std::min(wish, most)) * unit", "ceil_div(a.N, wish)"),
    # H is weighed with X's half.
    (GATED_HOST, "a.gate == Gate::kSmall ? a.O : 0", "0"),
    # erf is odd.
    (MATH, "| (reinterpret_cast<vu>(x) & 0x80000000u)", ""),
    # An expert multiplies the block's first rows, not its own.
    (EXPERTS_PARTS, "wide + j * panel + g.tokens[i] * kNR", "wide + j * panel + i * kNR"),
    # Its results are added to the block's first rows.
    (EXPERTS_PARTS, "(tokens ? tokens[i + r] : i + r)", "(i + r)"),
    # NaN is below every logit.
    (EXPERTS_PARTS, " || (a != a && b == b)", ""),
    # The gates of the chosen are a share of all.
    (EXPERTS_PARTS, "if (chosen && !chosen[e]) g[e] = 0.0f;", ""),
    # The slots behind the last keep what memory held.
    (EXPERTS_HOST, "std::fill(order + n, order + c.slots(), -1);", ""),
    # mix is left out of an expert that was chosen.
    (
        EXPERTS,
        "rounded<T>(activation(name, load(z + c)) * gates[e]) * a.mix;",
        "rounded<T>(activation(name, load(z + c)) * gates[e]);",
    ),
    # A block's runs of slots are all taken from its beginning.
    (EXPERTS_HOST, "        from += count;\n", ""),
    # A block's first row is left to the block before.
    (EXPERTS_BACKWARD, "order[middle] < row ?", "order[middle] <= row ?"),
    # The gates' gradient counts what hangs over a segment's end.
    (EXPERTS_BACKWARD, "along += first_lanes(d * value, a.R - c)", "along += d * value"),
    # Softmax over all experts: the gradient of one over the chosen.
    (EXPERTS_BACKWARD, "if (choice_of(a, row) && !a.renormalize) {", "if (false) {"),
    # z that nobody wrote, times zero.
    (
        EXPERTS_BACKWARD,
        "in ? d * derivative(name, q) * factor : vf{}",
        "d * derivative(name, q) * factor",
    ),
    # A shared z keeps the last expert's gradient alone.
    (EXPERTS_BACKWARD, "add ? load(dz + e * own + c) + through : through", "through"),
    # A weight gradient is its last 128 slots'.
    (EXPERTS_SUMS, "store(at + r * kNR, load(at + r * kNR) + v0)", "store(at + r * kNR, v0)"),
    # Its rows are taken in the order of the tokens.
    (EXPERTS_SUMS, "w.order ? w.order[slot + i] : slot + i", "slot + i"),
    # an infinite number in a vector's padding
    (
        GATED,
        "if (large) clear_padding({b.gate, kNR, 0}, rows, a.O % kNR);",
        "",
    ),
    (
        GATED_BACKWARD,
        "    clear_padding(wide(a, b.dy), s.rows, a.O);\n",
        "",
    ),
]
