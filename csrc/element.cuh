// The element types: how they lie in memory, how they convert, how tensor cores multiply them.
#pragma once
#include "params.h"
#include "ptx.h"

namespace deco {

static __host__ __device__ constexpr int cdiv(int a, int b) { return a / b + (a % b != 0); }

// Each has a Storage, conversions of one element, and of words: 4 bytes, one or two elements.

struct Float {
  using Storage = float;
  static constexpr int PER_WORD = 1;
  static __device__ float to_float(float v) { return v; }
  static __device__ float from_float(float v) { return v; }
  static __device__ void unpack(uint32_t word, float* v) { v[0] = __uint_as_float(word); }
  static __device__ uint32_t pack(const float* v) { return __float_as_uint(v[0]); }
};

struct Half {
  using Storage = uint16_t;
  static constexpr int PER_WORD = 2;
  static __device__ float to_float(uint16_t v) { return __half2float(__ushort_as_half(v)); }
  static __device__ uint16_t from_float(float v) { return __half_as_ushort(__float2half_rn(v)); }
  static __device__ void unpack(uint32_t word, float* v) {
    v[0] = to_float((uint16_t)word);
    v[1] = to_float((uint16_t)(word >> 16));
  }
  static __device__ uint32_t pack(const float* v) {
    const __half2 h = __floats2half2_rn(v[0], v[1]);
    uint32_t word;
    memcpy(&word, &h, 4);
    return word;
  }
};

struct Bfloat {
  using Storage = uint16_t;
  static constexpr int PER_WORD = 2;
  static __device__ float to_float(uint16_t v) { return __uint_as_float((uint32_t)v << 16); }
  static __device__ uint16_t from_float(float v) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(v));
  }
  static __device__ void unpack(uint32_t word, float* v) {
    v[0] = __uint_as_float(word << 16);
    v[1] = __uint_as_float(word & 0xffff0000);
  }
  static __device__ uint32_t pack(const float* v) {
    const __nv_bfloat162 h = __floats2bfloat162_rn(v[0], v[1]);
    uint32_t word;
    memcpy(&word, &h, 4);
    return word;
  }
};

// N elements that lie together, N * sizeof(Storage) a power of two up to 16 bytes.
template <class E, int N>
struct Chunk {
  static constexpr int WORDS = N / E::PER_WORD;
  uint32_t word[WORDS];

  static __device__ Chunk load(const typename E::Storage* p) {
    Chunk c;
    if constexpr (WORDS == 4) {
      const uint4 v = *(const uint4*)p;
      c.word[0] = v.x, c.word[1] = v.y, c.word[2] = v.z, c.word[3] = v.w;
    } else {
      static_assert(WORDS == 2, "8 or 16 bytes");
      const uint2 v = *(const uint2*)p;
      c.word[0] = v.x, c.word[1] = v.y;
    }
    return c;
  }
  __device__ void store(typename E::Storage* p) const {
    if constexpr (WORDS == 4) {
      *(uint4*)p = make_uint4(word[0], word[1], word[2], word[3]);
    } else {
      *(uint2*)p = make_uint2(word[0], word[1]);
    }
  }
  __device__ void unpack(float* v) const {
#pragma unroll
    for (int i = 0; i < WORDS; i++) E::unpack(word[i], v + i * E::PER_WORD);
  }
  static __device__ Chunk pack(const float* v) {
    Chunk c;
#pragma unroll
    for (int i = 0; i < WORDS; i++) c.word[i] = E::pack(v + i * E::PER_WORD);
    return c;
  }
};

template <class E>
struct Chunk<E, 1> {
  typename E::Storage v;
  static __device__ Chunk load(const typename E::Storage* p) { return {*p}; }
  __device__ void store(typename E::Storage* p) const { *p = v; }
  __device__ void unpack(float* f) const { *f = E::to_float(v); }
  static __device__ Chunk pack(const float* f) { return {E::from_float(*f)}; }
};

}  // namespace deco
