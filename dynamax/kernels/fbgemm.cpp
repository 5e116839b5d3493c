// Products with float16 weights as operators of torch, over FBGEMM's own, which is a part of torch.
//
// torch's functions for these take one matrix a call, and inductor cannot look into them. Here all matrices with the
// same input are multiplied at once: threads are called together once, and each takes a share of every matrix.

#include <ATen/Parallel.h>
#include <ATen/native/quantized/PackedParams.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace fbgemm {  // torch ships the function, but its header needs another that it does not ship

enum class matrix_op_t { NoTranspose, Transpose };
template <typename T>
struct TypeConverter;
template <typename T, typename C = TypeConverter<T>>
class PackedGemmMatrixB;
template <typename T>
void cblas_gemm_compute(
    matrix_op_t, int rows, const float* x, const PackedGemmMatrixB<T>&, float beta, float* y, int thread, int threads);

}  // namespace fbgemm

namespace {

using Matrix = fbgemm::PackedGemmMatrixB<uint16_t>;
using Packed = c10::intrusive_ptr<LinearPackedParamsBase>;

// What torch.fbgemm_pack_gemm_matrix_fp16 returns holds a pointer to an object whose first member is the matrix. Whoever
// loads this extension compares a product with torch's own before it is used.
const Matrix& matrix(const at::Tensor& packed) {
  const auto* held = static_cast<const Packed*>(packed.const_data_ptr())->get();
  const auto* first = reinterpret_cast<const char*>(held) + sizeof(LinearPackedParamsBase);
  return **reinterpret_cast<const Matrix* const*>(first);
}

std::vector<at::Tensor> products(const at::Tensor& x, at::TensorList packed, at::IntArrayRef sizes) {
  const auto rows = x.contiguous();
  auto shape = rows.sizes().vec();
  const auto count = static_cast<int>(rows.numel() / shape.back());
  std::vector<at::Tensor> results;
  for (const auto size : sizes) {
    shape.back() = size;
    results.push_back(at::empty(shape, rows.options()));
  }
  const auto threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (auto thread = static_cast<int>(begin); thread < end; ++thread) {
      for (size_t i = 0; i < packed.size(); ++i) {
        fbgemm::cblas_gemm_compute<uint16_t>(
            fbgemm::matrix_op_t::NoTranspose,
            count,
            rows.const_data_ptr<float>(),
            matrix(packed[i]),
            0.0f,
            results[i].mutable_data_ptr<float>(),
            thread,
            threads);
      }
    }
  });
  return results;
}

at::Tensor product(const at::Tensor& x, const at::Tensor& packed, int64_t size) {
  return products(x, packed, size)[0];
}

}  // namespace

TORCH_LIBRARY(dynamax, m) {
  m.def("product(Tensor x, Tensor packed, int size) -> Tensor");
  m.def("products(Tensor x, Tensor[] packed, int[] sizes) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(dynamax, CPU, m) {
  m.impl("product", &product);
  m.impl("products", &products);
}
