// The twins of csrc/ptx.h for the host build: what each instruction does, and what it may do late.
#pragma once
#include "cuda_host.h"

#define DECO_SM80 1

#pragma GCC visibility push(hidden)
static inline float ex2(float v) { return exp2f(v); }
static inline float rcp(float v) { return 1 / v; }
static inline int ld_acquire(const int* p, CUDA_HOST_AT) {
  cuda_host::maybe_yield();
  const int v = *p;
  cuda_host::looked("ld_acquire", p, v, false, at);
  return v;
}
static inline void red_release_add(int* p, int v, CUDA_HOST_AT) { cuda_host::atomic("red_release_add", p, at, [v](int old) { return old + v; }); }
static inline int atom_acq_rel_add(int* p, int v, CUDA_HOST_AT) { return cuda_host::atomic("atom_acq_rel_add", p, at, [v](int old) { return old + v; }); }


// A copy is made at its wait or, under a seed, perhaps at once: a GPU may do either.
namespace cuda_host {
inline void land(const Copy& c) {
  memcpy(c.dst, c.src, c.bytes);
  memset((char*)c.dst + c.bytes, 0, c.size - c.bytes);
}
inline void cp_async(const char* op, void* s, const void* g, int size, int bytes, Where at) {
  if (((uintptr_t)s | (uintptr_t)g) % size) fail(at, "%s: address not aligned to %d bytes", op, size);
  if (bytes < 0 || bytes > size) fail(at, "%s of %d bytes", op, bytes);
  const Copy c{s, g, size, bytes, now->commits};
  if (M.rng && rnd(4) == 0) land(c); else now->copies.push_back(c);
}
}  // namespace cuda_host
static inline void cp_async16(void* s, const void* g, int bytes, CUDA_HOST_AT) { cuda_host::cp_async("cp_async16", s, g, 16, bytes, at); }
static inline void cp_async_commit() { cuda_host::now->commits++; }
template <int N> static inline void cp_async_wait() {
  auto& c = cuda_host::now->copies;
  size_t n = 0;
  while (n < c.size() && c[n].group + N < cuda_host::now->commits) cuda_host::land(c[n++]);
  c.erase(c.begin(), c.begin() + n);
}

namespace cuda_host {
template <int N, bool TRANS> void ldmatrix(const char* op, uint32_t* r, const void* row, Where at) {
  struct Arg { const uint16_t* row; uint32_t* r; } a{(const uint16_t*)row, r};
  if ((uintptr_t)row & 15 && now->lane < 8 * N) fail(at, "%s: row address not aligned to 16 bytes", op);
  collective(op, ~0u, true, 0, at, &a, [](void** s, unsigned) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < N; i++) {
        const int j = l >> 2, k = (l & 3) * 2;
        const auto at = [&](int row, int col) { return (uint32_t)((Arg*)s[8 * i + row])->row[col]; };
        ((Arg*)s[l])->r[i] = TRANS ? at(k, j) | at(k + 1, j) << 16 : at(j, k) | at(j, k + 1) << 16;
      }
  });
}
// d(16,8) += a(16,K) b(K,8); operands of T, or tf32 if T is float. Products are exact in fp32; their sum
// runs over k in order and is added to d last (a GPU sums in an order and precision of its own).
template <class T, int K> void mma(const char* op, float* d, const uint32_t* a, const uint32_t* b, Where at) {
  struct Arg { float* d; const uint32_t *a, *b; } arg{d, a, b};
  collective(op, ~0u, true, 0, at, &arg, [](void** s, unsigned) {
    constexpr int E = 4 / sizeof(T), HALF = 4 * E;  // values in a register; columns covered by one register of each lane
    float A[16][K], B[K][8];
    const auto get = [](uint32_t r, int e) -> float {
      if (E == 1) return bits<float>(r & 0xffffe000);
      return std::conditional_t<E == 2, T, __half>::raw(r >> 16 * e);
    };
    for (int l = 0; l < 32; l++) {
      const Arg& x = *(Arg*)s[l];
      const int g = l >> 2;
      for (int e = 0; e < E; e++) {
        const int t = (l & 3) * E + e;
        for (int i = 0; i < 2 * K / HALF; i++) A[g + 8 * (i & 1)][t + HALF * (i >> 1)] = get(x.a[i], e);
        for (int i = 0; i < K / HALF; i++) B[t + HALF * i][g] = get(x.b[i], e);
      }
    }
    for (int m = 0; m < 16; m++) {
      float sum[8] = {};
      for (int k = 0; k < K; k++)
        for (int n = 0; n < 8; n++) sum[n] += A[m][k] * B[k][n];
      for (int n = 0; n < 8; n++) ((Arg*)s[(m & 7) * 4 + n / 2])->d[(m >> 3) * 2 + (n & 1)] += sum[n];
    }
  });
}
}  // namespace cuda_host
static inline void ldmatrix_x4(uint32_t* r, const void* row, CUDA_HOST_AT) { cuda_host::ldmatrix<4, false>("ldmatrix_x4", r, row, at); }
static inline void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, CUDA_HOST_AT) { cuda_host::mma<__nv_bfloat16, 16>("mma_m16n8k16_bf16", d, a, b, at); }
static inline void mma_m16n8k16_f16(float* d, const uint32_t* a, const uint32_t* b, CUDA_HOST_AT) { cuda_host::mma<__half, 16>("mma_m16n8k16_f16", d, a, b, at); }
static inline void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, CUDA_HOST_AT) { cuda_host::mma<float, 8>("mma_m16n8k8_tf32", d, a, b, at); }
static inline uint32_t to_tf32(uint32_t u) { return ((u & 0x7f800000) == 0x7f800000 ? u : u + 0x1000) & 0xffffe000; }
#pragma GCC visibility pop
