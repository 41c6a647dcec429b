#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 256;
// Enough blocks to fill any GPU several times over; beyond that, a thread takes several
// elements.
constexpr int64_t kMaxBlocks = 1 << 14;

__device__ int64_t FirstElement() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ int64_t Stride() { return int64_t{gridDim.x} * blockDim.x; }

__global__ void GatherKernel(Pages pages, Packing packing, int32_t tokens, PackedColumns out) {
  for (int64_t token = FirstElement(); token < tokens; token += Stride()) {
    GatherToken(pages, packing, static_cast<int32_t>(token), out);
  }
}

__global__ void CastToBFloat16Kernel(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = FirstElement(); i < count; i += Stride()) to[i] = BFloat16Bits(from[i]);
}

__global__ void CastToHalfKernel(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = FirstElement(); i < count; i += Stride()) to[i] = HalfBits(from[i]);
}

template <typename... Parameters, typename... Arguments>
void Launch(void (*kernel)(Parameters...), int64_t count, void* stream, Arguments... arguments) {
  if (count == 0) return;  // A grid of no blocks is an error to CUDA.
  const auto blocks =
      static_cast<unsigned>(std::min(kMaxBlocks, (count + kThreads - 1) / kThreads));
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA launch: ") + cudaGetErrorString(status));
  }
}

}  // namespace

void GatherPages(const Pages& pages, const Packing& packing, int32_t tokens,
                 const PackedColumns& out, void* stream) {
  Launch(GatherKernel, tokens, stream, pages, packing, tokens, out);
}

void CastToBFloat16(const float* from, uint16_t* to, int64_t count, void* stream) {
  Launch(CastToBFloat16Kernel, count, stream, from, to, count);
}

void CastToHalf(const float* from, uint16_t* to, int64_t count, void* stream) {
  Launch(CastToHalfKernel, count, stream, from, to, count);
}

}  // namespace kimi::cuda
