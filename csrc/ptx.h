// The instructions that C++ has no name for. Compiled for a CPU, in tests, each has a twin.
#pragma once

#ifndef __CUDACC__
#include "ptx_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

// T* name: the dynamic shared memory. The CPU has its own way to it, and to launch.
#define DYN_SHARED(T, name)                                        \
  extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared)
#define CUDA_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define DECO_SM80 1
#else
#define DECO_SM80 0
#endif
#define DECO_PTX static __device__ __forceinline__

DECO_PTX uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// One instruction each: C++ has them with a few more, for subnormal numbers.
DECO_PTX float ex2(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
DECO_PTX float rcp(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// Flags between blocks, at gpu scope.
DECO_PTX int ld_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DECO_PTX void red_release_add(int* p, int v) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DECO_PTX int atom_acq_rel_add(int* p, int v) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(p), "r"(v)
               : "memory");
  return old;
}

// Asynchronous copies to shared memory: the first `bytes` of 16, then zeros. Plain ones on sm_75.
DECO_PTX void cp_async16(void* s, const void* g, int bytes) {
#if DECO_SM80
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(s)), "l"(g),
               "r"(bytes)
               : "memory");
#else
  *(uint4*)s = bytes ? *(const uint4*)g : make_uint4(0, 0, 0, 0);
#endif
}
DECO_PTX void cp_async_commit() {
#if DECO_SM80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
DECO_PTX void cp_async_wait() {
#if DECO_SM80
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Lane 8 i + j holds the address of row j of the i-th matrix of 8 rows of 16 bytes.
DECO_PTX void ldmatrix_x4(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b with d in float32: 16 x 8 of a product over 32 bytes of k.
#define DECO_MMA(name, shape)                                                         \
  DECO_PTX void name(float* d, const uint32_t* a, const uint32_t* b) {                \
    asm volatile("mma.sync.aligned." shape                                            \
                 " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"             \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
#if DECO_SM80
DECO_MMA(mma_m16n8k16_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
DECO_MMA(mma_m16n8k16_f16, "m16n8k16.row.col.f32.f16.f16.f32")
DECO_MMA(mma_m16n8k8_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
DECO_PTX uint32_t to_tf32(uint32_t v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(__uint_as_float(v)));
  return r;
}
#else  // the backend never asks sm_75 for bfloat16 or TF32
DECO_PTX void mma_m16n8k16_bf16(float*, const uint32_t*, const uint32_t*) { __trap(); }
DECO_PTX void mma_m16n8k8_tf32(float*, const uint32_t*, const uint32_t*) { __trap(); }
DECO_PTX uint32_t to_tf32(uint32_t v) { return v; }
DECO_PTX void mma_m16n8k8_f16(float* d, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
DECO_PTX void mma_m16n8k16_f16(float* d, const uint32_t* a, const uint32_t* b) {
  mma_m16n8k8_f16(d, a, b);
  mma_m16n8k8_f16(d, a + 2, b + 1);
}
#endif
#undef DECO_MMA

#endif
