// Runs CUDA C++ on the CPU: enough of the language and the runtime for the kernels of csrc/.
//
//   * blocks run one after the other, in a permutable order; the threads of a block are fibers,
//     resumed in a permutable order, that switch only at barriers and warp-collective
//     instructions: a missing barrier reads what another thread has not yet written;
//   * dynamic shared memory is allocated per block with exactly the requested size and filled with
//     NaN bits;
//   * cp.async copies happen as late as allowed, at the wait of their group: a missing wait reads
//     NaNs;
//   * a barrier that some threads never reach is an error, not a hang.
//
// What it cannot show: timing, memory ordering between blocks, bank conflicts, the rounding order
// inside a tensor core.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};

namespace petal_emulation {

struct Settings {
  uint64_t block_seed = 0,
           thread_seed = 0;  // 0: natural order; otherwise a permutation drawn from the seed
  int multiprocessors = 4;
};
Settings& settings();

struct ThreadIndex {
  unsigned x, y = 0, z = 0;
};
extern ThreadIndex thread_index;  // of the running fiber
extern dim3 block_index, block_size, grid_size;

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
unsigned char* dynamic_shared();
void block_barrier();
void warp_barrier();
const char* last_error();  // of the launches since the previous call, or nullptr

// Scratch that the 32 lanes of the running warp share for one collective: deposit, warp_barrier,
// read. Two of them alternate, so one barrier suffices.
void* warp_scratch();
constexpr size_t kScratchBytes = 4096;

void async_copy(void* shared, const void* global, int bytes);
void async_commit();
void async_wait(int pending);

}  // namespace petal_emulation

#define threadIdx (::petal_emulation::thread_index)
#define blockIdx (::petal_emulation::block_index)
#define blockDim (::petal_emulation::block_size)
#define gridDim (::petal_emulation::grid_size)
#define __syncthreads ::petal_emulation::block_barrier

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  T* const scratch = static_cast<T*>(::petal_emulation::warp_scratch());
  const unsigned lane = threadIdx.x % 32;
  scratch[lane] = value;
  ::petal_emulation::warp_barrier();
  return scratch[lane ^ static_cast<unsigned>(lane_mask)];
}

inline unsigned __ballot_sync(unsigned, bool hit) {
  bool* const scratch = static_cast<bool*>(::petal_emulation::warp_scratch());
  scratch[threadIdx.x % 32] = hit;
  ::petal_emulation::warp_barrier();
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(scratch[lane]) << lane;
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= 163 * 1024
             ? cudaSuccess
             : cudaErrorLaunchFailure;  // what the smallest supported device (sm_80) grants
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = ::petal_emulation::settings().multiprocessors;
  return cudaSuccess;
}
namespace petal_emulation {
extern const char* reported_error;
}
inline cudaError_t cudaGetLastError() {
  ::petal_emulation::reported_error = ::petal_emulation::last_error();
  return ::petal_emulation::reported_error == nullptr ? cudaSuccess : cudaErrorLaunchFailure;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return ::petal_emulation::reported_error == nullptr ? "more shared memory than a device has"
                                                      : ::petal_emulation::reported_error;
}
