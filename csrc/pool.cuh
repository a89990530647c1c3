// P = S act(X) by gathering: what the pool kernel and the pool tasks of pool_linear share.
#pragma once
#include "activations.cuh"

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

// The same of activated tokens or, if SLOPE, of tokens as they are, times act' at `pre`. One chunk
// and one token at a time, the next one's on its way: there is arithmetic enough to hide it behind.
template <class In, class Out, int N, bool SLOPE>
static __device__ void act_chunk(const Params& params, const char* x, int64_t stride,
                                 const int* index, const float* weight,
                                 const typename Out::Storage* pre, typename Out::Storage* p) {
  Chunk<Out, N> at = {};
  if (SLOPE) at = Chunk<Out, N>::load(pre);
  float sum[N] = {}, next_s;
  Chunk<In, N> next = {};
  const auto load = [&](int t) {
    next_s = __ldg(weight + t);
    if (next_s != 0.f) {
      next = Chunk<In, N>::load((const typename In::Storage*)(x + __ldg(index + t) * stride));
    }
  };
  load(0);
#pragma unroll 1
  for (int t = 1; t <= params.T; t++) {
    const Chunk<In, N> chunk = next;
    const float s = next_s;
    if (t < params.T) load(t);
    if (s == 0.f) continue;  // padding: its token may hold an infinity
    float v[N];
    chunk.unpack(v);
    if (!SLOPE) activate<In>(params, v);
#pragma unroll
    for (int n = 0; n < N; n++) sum[n] = fmaf(s, v[n], sum[n]);
  }
  if (SLOPE) {
    float slope[N];
    at.unpack(slope);
    act_slope<Out>(params, slope);
#pragma unroll
    for (int n = 0; n < N; n++) sum[n] *= slope[n];
  }
  Chunk<Out, N>::pack(sum).store(p);
}

// Where one row of P comes from and goes to.
template <class In, class Out>
struct Row {
  unsigned b, o;  // image, output token
  const char* x;
  int64_t stride;
  const int* index;
  const float* weight;
  typename Out::Storage* p;

  __device__ Row(const Params& params, unsigned row) {
    b = row / params.MO, o = row - b * params.MO;
    x = (const char*)params.x + b * params.stride_xb * bytes<In>;
    stride = params.stride_xn * bytes<In>;
    index = params.index + (int64_t)o * params.T;
    weight = params.weight + (int64_t)o * params.T;
    p = (typename Out::Storage*)params.p + (int64_t)row * params.K;
  }
};

// Elements of a lane where 8 of either type lie aligned.
template <class In, class Out>
constexpr int VECTOR_OF = 16 / (bytes<In> > bytes<Out> ? bytes<In> : bytes<Out>);

// One row of P by one warp, or by `parts` of them; CHUNKS a lane at once.
template <class In, class Out, int CHUNKS>
static __device__ void plain_row(const Params& params, unsigned row, int part, int parts) {
  const Row<In, Out> r(params, row);
  const int T = params.T, K = params.K, lane = threadIdx.x % 32;
  if (params.x_aligned) {
    constexpr int N = VECTOR_OF<In, Out>;
    const auto pool = [&](int k, auto chunks) {
      constexpr int C = decltype(chunks)::value;
      const char* const xk = r.x + k * bytes<In>;
      const auto stride = (unsigned)r.stride;
      if (params.ragged) {
        pool_chunks<In, Out, N, C, true>(xk, stride, r.index, r.weight, T, r.p + k);
      } else {
        pool_chunks<In, Out, N, C, false>(xk, stride, r.index, r.weight, T, r.p + k);
      }
    };
    int k = (part * CHUNKS * 32 + lane) * N;
#pragma unroll 1
    for (; k < K - (CHUNKS - 1) * 32 * N; k += parts * CHUNKS * 32 * N) pool(k, Int<CHUNKS>());
    if (CHUNKS > 1 && k < K) pool(k, Int<1>());
  } else {
    for (int k = part * 32 + lane; k < K; k += parts * 32) {
      const char* const xk = r.x + k * params.stride_xk * bytes<In>;
      pool_chunks<In, Out, 1, 1, true>(xk, r.stride, r.index, r.weight, T, r.p + k);
    }
  }
}

// The same with an activation, or if SLOPE its derivative.
template <class In, class Out, bool SLOPE>
static __device__ void act_row(const Params& params, unsigned row, int part, int parts) {
  const Row<In, Out> r(params, row);
  const int first = part * 32 + threadIdx.x % 32, step = parts * 32;
  const auto* pre = (const typename Out::Storage*)params.pre;
  if (SLOPE) pre += r.b * params.stride_preb + r.o * params.stride_pren;
  const auto chunk = [&](auto elements, int k, int64_t x, int64_t at) {
    act_chunk<In, Out, decltype(elements)::value, SLOPE>(params, r.x + x * bytes<In>, r.stride,
                                                         r.index, r.weight,
                                                         SLOPE ? pre + at : nullptr, r.p + k);
  };
  if (params.x_aligned) {
    constexpr int N = VECTOR_OF<In, Out>;
#pragma unroll 1
    for (int k = first * N; k < params.K; k += step * N) chunk(Int<N>(), k, k, k);
  } else {
#pragma unroll 1
    for (int k = first; k < params.K; k += step) {
      chunk(Int<1>(), k, k * params.stride_xk, k * params.stride_prek);
    }
  }
}

template <class In, class Out, int CHUNKS, bool SLOPES>
static __device__ void pool_row_of(const Params& params, unsigned row, int part, int parts) {
  if (params.act == NONE) {
    plain_row<In, Out, CHUNKS>(params, row, part, parts);
  } else if (SLOPES && params.pre) {
    act_row<In, Out, true>(params, row, part, parts);
  } else {
    act_row<In, Out, false>(params, row, part, parts);
  }
}

// SLOPES: whether `pre` may be given.
template <class Out, int CHUNKS, bool SLOPES>
static __device__ void pool_row(const Params& params, unsigned row, int part, int parts) {
  switch (params.x_type) {
    case FLOAT32:
      return pool_row_of<Float, Out, CHUNKS, SLOPES>(params, row, part, parts);
    case FLOAT16:
      return pool_row_of<Half, Out, CHUNKS, SLOPES>(params, row, part, parts);
    default:
      return pool_row_of<Bfloat, Out, CHUNKS, SLOPES>(params, row, part, parts);
  }
}

}  // namespace deco
