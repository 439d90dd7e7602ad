// Host side of the CUDA kernels: views of tensors, the device guard and stream, error texts, the
// names to register under. No kernel and no CUDA header here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/dispatch.h"
#include "common/philox.h"
#include "common/torch_boundary.h"

// The emulation (tests/emulation) registers the same functions for CPU tensors under a name of its
// own.
#if defined(PETAL_EMULATION)
#define PETAL_CUDA_LIBRARY petal_cuda_emulated
#define PETAL_CUDA_KEY CPU
#else
#define PETAL_CUDA_LIBRARY petal_cuda
#define PETAL_CUDA_KEY CUDA
#endif
#define PETAL_LIBRARY_FRAGMENT(name, m) \
  STABLE_TORCH_LIBRARY_FRAGMENT(name, m)  // expands the two names above first
#define PETAL_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

#if !defined(PETAL_EMULATION) && !defined(USE_CUDA)
// shim.h declares it only under USE_CUDA; the symbol is part of the stable ABI and libtorch_cuda
// defines it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream);
#endif

namespace petal {

using MaybeTensor = std::optional<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

inline void want(bool given, const char* name) {
  STD_TORCH_CHECK(given, name, ": want a tensor, got none");
}

// A 2-D tensor with unit column stride, of the given size.
inline MatrixView matrix(const Tensor& tensor, int64_t rows, int64_t cols, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": want 2 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.size(0) == rows && tensor.size(1) == cols, name, ": want [", rows, ", ",
                  cols, "], got [", tensor.size(0), ", ", tensor.size(1), "]");
  STD_TORCH_CHECK(cols <= 1 || tensor.stride(1) == 1, name,
                  ": want unit stride in the last dimension, got ", tensor.stride(1));
  MatrixView view;
  view.data = tensor.data_ptr();
  view.stride = tensor.stride(0);
  view.vec = can_vectorise(view.data, view.stride, static_cast<int64_t>(tensor.element_size()));
  return view;
}

// The same, or no address; of the activations' dtype.
inline MatrixView view(const MaybeTensor& tensor, DType dtype, int64_t rows, int64_t cols,
                       const char* name) {
  if (!tensor.has_value()) return {};
  STD_TORCH_CHECK(dtype_of(*tensor, name) == dtype, name, ": want the dtype of the activations");
  return matrix(*tensor, rows, cols, name);
}

// A contiguous tensor of `count` elements, or no address.
template <typename T>
T* elements(const MaybeTensor& tensor, ScalarType type, int64_t count, const char* name) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(
      tensor->scalar_type() == type && tensor->is_contiguous() && tensor->numel() == count, name,
      ": want ", count, " contiguous elements of its dtype");
  return static_cast<T*>(tensor->data_ptr());
}
inline float* floats(const MaybeTensor& tensor, int64_t count, const char* name) {
  return elements<float>(tensor, ScalarType::Float, count, name);
}
inline int32_t* ints(const MaybeTensor& tensor, int64_t count, const char* name) {
  return elements<int32_t>(tensor, ScalarType::Int, count, name);
}

inline Dropout dropout_of(const MaybeTensor& rng, double p) {
  Dropout dropout;
  if (!rng.has_value() || p <= 0.0) return dropout;
  STD_TORCH_CHECK(p < 1.0, "dropout: want 0 <= dropout < 1, got ", p);
  STD_TORCH_CHECK(rng->dim() == 1 && rng->size(0) == 2 && rng->scalar_type() == ScalarType::Long &&
                      rng->is_contiguous(),
                  "rng: want a contiguous int64 tensor of two elements");
  dropout.rng = static_cast<const int64_t*>(rng->data_ptr());
  dropout.threshold = dropout_threshold(p);
  dropout.scale = dropout_scale(dropout.threshold);
  return dropout;
}

// The tensor's device is current and its stream is ours while this lives.
class Device {
 public:
#if defined(PETAL_EMULATION)
  explicit Device(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_) == 0,
                    "no current CUDA stream on device ", tensor.get_device_index());
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

inline void check_launch(const char* error, const char* name) {
  STD_TORCH_CHECK(error == nullptr, name, ": ", error == nullptr ? "" : error);
}

}  // namespace petal
