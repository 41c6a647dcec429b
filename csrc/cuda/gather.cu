#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/gather.h"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 256;
// Enough blocks to fill any GPU several times. With more tokens, a thread copies several of them.
constexpr int64_t kMaxBlocks = 1 << 14;

__global__ void GatherKernel(PagedSequences from, int32_t tokens, PackedColumns to) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t token = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; token < tokens;
       token += stride) {
    GatherToken(from, static_cast<int32_t>(token), to);
  }
}

}  // namespace

void Gather(const PagedSequences& from, int32_t tokens, const PackedColumns& to, void* stream) {
  if (tokens == 0) return;  // CUDA refuses a grid of no blocks.
  const auto blocks = std::min(kMaxBlocks, (int64_t{tokens} + kThreads - 1) / kThreads);
  GatherKernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      from, tokens, to);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("Cannot launch the gather kernel: ") +
                             cudaGetErrorString(status));
  }
}

}  // namespace kimi::cuda
