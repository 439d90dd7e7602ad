"""Faults in the C++ CPU kernels."""

LOWRANK = "csrc/lowrank_linear_cpu_kernel.h"
HOST = "csrc/lowrank_linear_cpu.cpp"
MODES = "csrc/mode_contract_cpu_kernel.h"
GEMM = "csrc/common/cpu_gemm.h"
DROPOUT = "csrc/common/cpu_dropout.h"
BLOCK = "csrc/common/cpu_block.h"

REBUILD = True
TESTS = ["tests/test_build.py", "tests/test_ops.py", "-k", "native or many_splits"]

MUTANTS = [
    # A weight gradient that forgets the blocks before the last one of its split.
    (
        LOWRANK,
        "{dup + c * a.R, kNR, a.R * kNR}, !first_block",
        "{dup + c * a.R, kNR, a.R * kNR}, false",
    ),
    # dh without the first output.
    (LOWRANK, "store(b.dh + i, k > 0 ? load(b.dh + i) + g : g)", "store(b.dh + i, g)"),
    # Backward draws every output's mask from stream 0.
    (
        LOWRANK,
        "mask_rows(b.g, b.g, width, rows, a.scale, d, static_cast<uint32_t>(k), row0)",
        "mask_rows(b.g, b.g, width, rows, a.scale, d, 0u, row0)",
    ),
    # g accumulates over the chunks of the outputs before.
    (
        LOWRANK,
        "gemm({b.g, width, kNR}, c > 0, chunk",
        "gemm({b.g, width, kNR}, k > 0 || c > 0, chunk",
    ),
    # dU from the undropped input.
    (
        LOWRANK,
        "mask_panels(b.chunk, a.block, rows, padded(n), a.dropout, 0, row0, c)",
        "(void)padded(n)",
    ),
    # The core's gradient with the core's transpose.
    (LOWRANK, "rows, a.R, o.core_t, a.R * kNR", "rows, a.R, o.core, a.R * kNR"),
    # The bias is added to whole panels only.
    (BLOCK, "store(rest[r], v0 + bias0)", "store(rest[r], v0)"),
    # Masks that start anew with every block of rows.
    (DROPOUT, "draw_bits(bits, d, stream, row0 + i, 1, g)", "draw_bits(bits, d, stream, i, 1, g)"),
    # Six rounds are not seven.
    (DROPOUT, "round < 7", "round < 6"),
    # The rows below the last full tile are left out.
    (GEMM, "if (i < rows) body(Height<1>(), i);", ""),
    # The transposed operand's packing loses its last columns' depth.
    (
        GEMM,
        "for (; k < K; ++k) {\n    for (int64_t c = 0; c < n; ++c) dst",
        "for (; k + 1 < K; ++k) {\n    for (int64_t c = 0; c < n; ++c) dst",
    ),
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
]
