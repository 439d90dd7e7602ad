// mode_contract on CUDA: what a launcher needs to know. Everything is contiguous; matrices are
// given as views with their row stride. Legend: K modes, R rank, O rows of the up-projection V.
// Launchers return nullptr or the text of what went wrong.
#pragma once

#include "common/dispatch.h"

namespace petal {

constexpr int kModeTile = 64;  // modes, ranks and columns are tiled by 64
// ceil(K / 64) * ceil(R / 64): the mode matrices of one slab stay in shared memory.
constexpr int kMaxModeTiles = 4;
constexpr int kMaxDiagonalModes = 1024;

struct ModeParams {
  DType dtype;                         // of core, modes, up and, in backward, dout
  int64_t modes_count, rank, columns;  // K, R, O
  MatrixView core;                     // Tucker: [R R, R], row a R + b; CP: one row [R]
  MatrixView modes;                    // [K, R]
  MatrixView up;                       // [O, R]; data nullptr: no fold
  float scale;
  void* out;  // forward: [K, R, O] (or [K, R, R]) in out_dtype
  DType out_dtype;
  bool out_vec;
  MatrixView dout;             // backward: [K R, O], row k R + a
  void *dcore, *dmodes, *dup;  // backward: nullptr where not needed; in dtype
  bool dcore_vec;
  float* modes_partial;  // [R, K, R]: dp before the sum over slabs
  float* up_partial;     // [up_splits, O, R]: dV before the sum over groups of slabs
  int64_t up_splits;
  int64_t columns_per_block;  // forward: column tiles of one block (filled by the launcher)
};

const char* launch_mode_contract_fwd(ModeParams params, void* stream);
const char* launch_mode_contract_bwd(const ModeParams& params, void* stream);
const char* launch_mode_diagonal_fwd(const ModeParams& params, void* stream);
const char* launch_mode_diagonal_bwd(const ModeParams& params, void* stream);

// Groups of slabs for dV: about one block per multiprocessor of the current device, at most one
// group per slab.
int64_t mode_up_splits(int64_t rank, int64_t columns, DType dtype);

}  // namespace petal
