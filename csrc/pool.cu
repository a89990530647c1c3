// The stand-alone pool, and with the transposed table its backward.
#include "launch.cuh"
#include "pool.cuh"

namespace deco {

constexpr int WARPS = 4;
constexpr int ENOUGH = 4096;  // warps, to fill a large chip

template <class Out>
__global__ void __launch_bounds__(32 * WARPS, 8) pool_kernel(const Params params) {
  const int row = blockIdx.x * WARPS + threadIdx.x / 32;
  if (row < params.M) pool_row<Out, 2, true>(params, row, blockIdx.y, gridDim.y);
}

const char* pool(const Params& params, void* stream) {
  Params p = params;
  set_gate(&p);
  // A warp a row; where rows are few, more of them, with 512 channels at least.
  const int parts = min(cdiv(ENOUGH, p.M), cdiv(p.K, 512));
  const dim3 grid(cdiv(p.M, WARPS), min(parts, 65535));
  return with_type(params.type, [&](auto e) {
    return launch(pool_kernel<decltype(e)>, grid, 32 * WARPS, 0, stream, p);
  });
}

}  // namespace deco
