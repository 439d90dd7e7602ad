// Entry points that let Python look at what the kernels are made of: the 16-bit conversions, the
// generator, and the emulation's own alarms (kernels with a planted fault).
#include "cuda_emulation.h"

#include "common/cuda/mma.cuh"
#include "common/cuda/vec.cuh"
#include "common/philox.h"

#define PETAL_PROBE extern "C" __attribute__((visibility("default")))

PETAL_PROBE void probe_widen(const uint16_t* bits, float* out, int64_t count, int bfloat) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = bfloat ? __bfloat162float(__nv_bfloat16{bits[i]}) : __half2float(__half{bits[i]});
}

PETAL_PROBE void probe_narrow(const float* in, uint16_t* bits, int64_t count, int bfloat) {
  for (int64_t i = 0; i < count; ++i)
    bits[i] = bfloat ? __float2bfloat16_rn(in[i]).bits : __float2half_rn(in[i]).bits;
}

PETAL_PROBE void probe_keep(int64_t seed, int64_t offset, uint32_t stream, int64_t row0,
                            int64_t rows, int64_t groups, double p, uint8_t* keep) {
  const uint32_t threshold = petal::dropout_threshold(p);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t group = 0; group < groups; ++group)
      keep[row * groups + group] =
          petal::dropout_keep8(seed, offset, stream, row0 + row, group, threshold);
}

PETAL_PROBE float probe_scale(double p) {
  return petal::dropout_scale(petal::dropout_threshold(p));
}

namespace {

struct ProbeParams {
  const float* in;
  float* out;
  int fault;
};

// Reverses 128 numbers through shared memory. fault 1: no barrier; 2: a barrier in one warp only;
// 3: no wait for the copies.
void reverse_kernel(const ProbeParams p) {
  PETAL_SHARED(shared);
  float* const tile = reinterpret_cast<float*>(shared);
  const unsigned thread = threadIdx.x;
  if (p.fault == 3) {
    if (thread < 32) petal::cp_async_16(tile + thread * 4, p.in + thread * 4, 16);
    petal::cp_async_commit();
  } else {
    tile[thread] = p.in[thread];
  }
  if (p.fault == 2) {
    if (thread < 32) __syncthreads();
  } else if (p.fault != 1) {
    __syncthreads();
  }
  p.out[127 - thread] = tile[thread ^ 1u];
}

}  // namespace

PETAL_PROBE const char* probe_reverse(const float* in, float* out, int fault) {
  return petal::launch(&reverse_kernel, dim3(1), 128 * sizeof(float), nullptr,
                       ProbeParams{in, out, fault});
}
