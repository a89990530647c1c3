// The backward of GELU: dZ = dG * gelu'(Z) in place, G = gelu(Z) once more, sums of dZ over rows.
#include "activations.cuh"
#include "launch.cuh"

namespace deco {

constexpr int WARPS = 8;

// SUM_ROWS rows of 32 * N columns: N columns a lane, rows dealt out to the warps.
template <class E, int N>
static __device__ void dgelu_block(const Params& params, float* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = (blockIdx.y * 32 + lane) * N;
  const int first = blockIdx.x * SUM_ROWS, end = min(first + SUM_ROWS, params.M);
  float sum[N] = {};
  if (column < params.N) {
    for (int row = first + warp; row < end; row += WARPS) {
      const int64_t at = (int64_t)row * params.N + column;
      auto* d = (typename E::Storage*)params.d + at;
      float dz[N], z[N], g[N];
      Chunk<E, N>::load(d).unpack(dz);
      Chunk<E, N>::load((const typename E::Storage*)params.z + at).unpack(z);
#pragma unroll
      for (int n = 0; n < N; n++) {
        float slope;
        gelu_and_slope<E>(z[n], &g[n], &slope);
        dz[n] *= slope;
        sum[n] += dz[n];
      }
      Chunk<E, N>::pack(dz).store(d);
      if (params.g) Chunk<E, N>::pack(g).store((typename E::Storage*)params.g + at);
    }
  }
  if (!params.sums) return;
#pragma unroll
  for (int n = 0; n < N; n++) sums[(warp * N + n) * 32 + lane] = sum[n];
  __syncthreads();
  for (int n = warp; n < N; n += WARPS) {
    float total = 0.f;
    for (int w = 0; w < WARPS; w++) total += sums[(w * N + n) * 32 + lane];
    if (column < params.N) params.sums[(int64_t)blockIdx.x * params.N + column + n] = total;
  }
}

template <class E>
constexpr int VECTOR = 16 / (int)sizeof(typename E::Storage);

template <class E>
__global__ void __launch_bounds__(32 * WARPS) dgelu_kernel(const Params params) {
  __shared__ float sums[WARPS * VECTOR<E> * 32];
  if (params.z_aligned) {
    dgelu_block<E, VECTOR<E>>(params, sums);
  } else {
    dgelu_block<E, 1>(params, sums);
  }
}

const char* dgelu(const Params& params, void* stream) {
  return with_type(params.type, [&](auto e) {
    using E = decltype(e);
    const int columns = 32 * (params.z_aligned ? VECTOR<E> : 1);
    const dim3 grid(cdiv(params.M, SUM_ROWS), cdiv(params.N, columns));
    if (grid.y > 65535) return "too many features for one launch";
    return launch(dgelu_kernel<E>, grid, 32 * WARPS, 0, stream, params);
  });
}

}  // namespace deco
