// The only door to the CUDA runtime headers: kernels include this file, so that the same source
// also compiles as plain C++ against tests/emulation (PETAL_EMULATION), where a launch runs the
// blocks one after the other on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#if defined(PETAL_EMULATION)
#define PETAL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::petal_emulation::launch(grid, block, shared_bytes, [&] { kernel(__VA_ARGS__); })
#define PETAL_SHARED(name) unsigned char* const name = ::petal_emulation::dynamic_shared()
#else
#define PETAL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define PETAL_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace petal {

constexpr int kThreads = 128;  // every kernel here runs four warps
constexpr int kWarp = 32;

// Launches with four warps and says what went wrong, or nullptr. Shared memory above the default 48
// KiB has to be asked for; the driver keeps that attribute per function and device, so asking again
// costs well under a microsecond and needs no cache of ours.
template <typename Params>
const char* launch(void (*kernel)(const Params), dim3 grid, size_t shared_bytes, void* stream,
                   const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  if (grid.y > 65535 || grid.z > 65535) return "the grid has more than 65535 blocks along y or z";
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  PETAL_LAUNCH(kernel, grid, dim3(kThreads), shared_bytes, stream, params);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

}  // namespace petal
