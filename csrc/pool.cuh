// P = S X by gathering: what the pool kernel and the pool tasks of pool_linear share.
#pragma once
#include "element.cuh"

namespace deco {

template <int VALUE>
struct Int {
  static constexpr int value = VALUE;
};

template <class E>
constexpr int bytes = (int)sizeof(typename E::Storage);

// CHUNKS times N channels of one row of P, N * 32 apart: sums over its window, in float32. Tokens
// lie `stride` bytes apart.
template <class In, class Out, int N, int CHUNKS, bool RAGGED, class Stride>
static __device__ void pool_chunks(const char* x, Stride stride, const int* index,
                                   const float* weight, int T, typename Out::Storage* p) {
  constexpr int AHEAD = RAGGED ? 1 : 4 / CHUNKS;  // tokens; so many chunks are loaded at once
  float sum[CHUNKS][N] = {};
  const auto add = [&](auto tokens) {
    constexpr int TOKENS = decltype(tokens)::value;
    Chunk<In, N> chunk[TOKENS][CHUNKS];
    float s[TOKENS];
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
      s[i] = __ldg(weight + i);
      if (RAGGED && s[i] == 0.f) continue;  // padding: its token may hold an infinity
      const char* token = x + __ldg(index + i) * stride;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        chunk[i][c] = Chunk<In, N>::load((const typename In::Storage*)token + c * 32 * N);
      }
    }
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
      if (RAGGED && s[i] == 0.f) continue;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        float v[N];
        chunk[i][c].unpack(v);
#pragma unroll
        for (int n = 0; n < N; n++) sum[c][n] = fmaf(s[i], v[n], sum[c][n]);
      }
    }
    index += TOKENS, weight += TOKENS;
  };
  int t = T;
#pragma unroll 1
  for (; t >= AHEAD; t -= AHEAD) add(Int<AHEAD>());
  if constexpr (AHEAD > 1) {
#pragma unroll 1
    for (; t > 0; t--) add(Int<1>());
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) Chunk<Out, N>::pack(sum[c]).store(p + c * 32 * N);
}

// One row of P by one warp, or by `parts` of them; CHUNKS a lane at once.
template <class In, class Out, int CHUNKS>
static __device__ void pool_row_of(const Params& params, unsigned row, int part, int parts) {
  const unsigned MO = params.MO, b = row / MO, o = row - b * MO;
  const int T = params.T, K = params.K, lane = threadIdx.x % 32;
  const auto* x = (const char*)params.x + b * params.stride_xb * bytes<In>;
  const int64_t stride = params.stride_xn * bytes<In>;
  auto* p = (typename Out::Storage*)params.p + (int64_t)row * K;
  const int* index = params.index + (int64_t)o * T;
  const float* weight = params.weight + (int64_t)o * T;
  if (params.x_aligned) {
    constexpr int N = 16 / (bytes<In> > bytes<Out> ? bytes<In> : bytes<Out>);
    const auto pool = [&](int k, auto chunks) {
      constexpr int C = decltype(chunks)::value;
      const char* const xk = x + k * bytes<In>;
      if (params.ragged) {
        pool_chunks<In, Out, N, C, true>(xk, (unsigned)stride, index, weight, T, p + k);
      } else {
        pool_chunks<In, Out, N, C, false>(xk, (unsigned)stride, index, weight, T, p + k);
      }
    };
    int k = (part * CHUNKS * 32 + lane) * N;
#pragma unroll 1
    for (; k < K - (CHUNKS - 1) * 32 * N; k += parts * CHUNKS * 32 * N) pool(k, Int<CHUNKS>());
    if (CHUNKS > 1 && k < K) pool(k, Int<1>());
  } else {
    for (int k = part * 32 + lane; k < K; k += parts * 32) {
      const char* const xk = x + k * params.stride_xk * bytes<In>;
      pool_chunks<In, Out, 1, 1, true>(xk, stride, index, weight, T, p + k);
    }
  }
}

template <class Out, int CHUNKS>
static __device__ void pool_row(const Params& params, unsigned row, int part, int parts) {
  switch (params.x_type) {
    case FLOAT32:
      return pool_row_of<Float, Out, CHUNKS>(params, row, part, parts);
    case FLOAT16:
      return pool_row_of<Half, Out, CHUNKS>(params, row, part, parts);
    default:
      return pool_row_of<Bfloat, Out, CHUNKS>(params, row, part, parts);
  }
}

}  // namespace deco
