// One CUDA source, two builds: under nvcc this includes the CUDA headers; under g++ it runs the
// kernels on the CPU (see README.md).
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <assert.h>
#include <stdint.h>
#include <string.h>
// T* name: the dynamic shared memory. (extern __shared__ itself has no meaning for the host compiler.)
#define DYN_SHARED(T, name)                                         \
  extern __shared__ __align__(128) unsigned char dynamic_shared[];  \
  T* const name = reinterpret_cast<T*>(dynamic_shared)
// kernel<<<grid, block, dynamic shared bytes, stream>>>(arguments...)
#define CUDA_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#else
#include <dlfcn.h>
#include <stddef.h>
#include <tuple>
#include "cuda_host_run.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define DYN_SHARED(T, name) T* const name = (T*)cuda_host::now->block->dynamic
#define CUDA_LAUNCH(kernel, grid, block, smem, stream, ...) cuda_host::launch(kernel, grid, block, smem, stream, ##__VA_ARGS__)
#define threadIdx (cuda_host::now->tid)
#define blockIdx (cuda_host::now->block->bid)
#define blockDim (cuda_host::M.block)
#define gridDim (cuda_host::M.grid)
constexpr int warpSize = 32;
#undef assert
#define assert(x) ((x) ? (void)0 : cuda_host::now ? cuda_host::fail(cuda_host::Where::here(), "assertion failed: %s", #x) : (void)(fprintf(stderr, "%s:%d: assertion failed: %s\n", __FILE__, __LINE__, #x), abort()))

#pragma GCC visibility push(hidden)
// ---------------------------------------------------------------- runtime calls
typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
static inline cudaError_t cudaPeekAtLastError() { return cuda_host::error_pending ? cudaErrorLaunchFailure : cudaSuccess; }
static inline cudaError_t cudaGetLastError() {
  const cudaError_t e = cudaPeekAtLastError();
  cuda_host::error_pending = false;
  return e;
}
static inline const char* cudaGetErrorString(cudaError_t e) {  // the text of the last launch's error
  return e == cudaSuccess ? "no error" : e == cudaErrorInvalidValue ? "invalid value" : cuda_host::message;
}
static inline cudaError_t cudaDeviceSynchronize() { return cudaPeekAtLastError(); }
static inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaPeekAtLastError(); }
static inline cudaError_t cudaMalloc(void** p, size_t n) { return posix_memalign(p, 256, n) ? cudaErrorInvalidValue : cudaSuccess; }
static inline cudaError_t cudaFree(void* p) { free(p); return cudaSuccess; }
static inline cudaError_t cudaMemset(void* p, int v, size_t n) { memset(p, v, n); return cudaSuccess; }
static inline cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t = nullptr) { return cudaMemset(p, v, n); }
static inline cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) { memcpy(d, s, n); return cudaSuccess; }
static inline cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t = nullptr) { return cudaMemcpy(d, s, n, k); }
template <class T> cudaError_t cudaMemcpyToSymbol(T& symbol, const void* s, size_t n) { return cudaMemcpy((void*)&symbol, s, n, cudaMemcpyDefault); }
template <class K> cudaError_t cudaFuncSetAttribute(K kernel, cudaFuncAttribute a, int value) {
  if (a != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > 227 << 10) return cudaErrorInvalidValue;
  cuda_host::dynamic_limit[(const void*)kernel] = value;
  return cudaSuccess;
}
namespace cuda_host {
// Is told of launches in place of running them: kernel symbol, grid, threads, shared bytes, first argument.
typedef void (*OnLaunch)(const char* kernel, const unsigned* grid, unsigned threads, size_t smem, const void* argument, size_t size);
inline OnLaunch on_launch = nullptr;
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t, A&&... a) {
  std::tuple<std::decay_t<P>...> args(std::forward<A>(a)...);
  if (on_launch) {
    Dl_info info;
    if (!dladdr((const void*)kernel, &info)) abort();
    on_launch(info.dli_sname, &grid.x, block.x * block.y * block.z, smem, &std::get<0>(args), sizeof(std::get<0>(args)));
    return;
  }
  launch_body((const void*)kernel, grid, block, smem, [&] { std::apply(kernel, args); });
}
}  // namespace cuda_host
extern "C" inline __attribute__((visibility("default"), used)) void cuda_host_on_launch(cuda_host::OnLaunch f) { cuda_host::on_launch = f; }
// Schedule of the launches to come; seed < 0 or resident <= 0: from CUDA_HOST_SEED, CUDA_HOST_RESIDENT.
extern "C" inline __attribute__((visibility("default"), used)) void cuda_host_schedule(long seed, int resident) {
  cuda_host::config.seed = seed;
  cuda_host::config.resident = resident;
}

// ---------------------------------------------------------------- barriers, fences
#define CUDA_HOST_AT cuda_host::Where at = cuda_host::Where::here()
static inline void __syncthreads(CUDA_HOST_AT) { cuda_host::barrier("__syncthreads", 0, cuda_host::now->block->threads, true, at); }
static inline int __syncthreads_count(int p, CUDA_HOST_AT) {
  cuda_host::now->block->votes += p != 0;
  cuda_host::barrier("__syncthreads_count", 0, cuda_host::now->block->threads, true, at);
  return cuda_host::now->block->result;
}
static inline int __syncthreads_or(int p, CUDA_HOST_AT) { return __syncthreads_count(p, at) != 0; }
static inline int __syncthreads_and(int p, CUDA_HOST_AT) { return __syncthreads_count(p, at) == cuda_host::now->block->threads; }
static inline void __threadfence() { cuda_host::maybe_yield(); }
static inline void __threadfence_block() { cuda_host::maybe_yield(); }
static inline void __threadfence_system() { cuda_host::maybe_yield(); }
static inline void __nanosleep(unsigned) { cuda_host::leave(); }
[[noreturn]] static inline void __trap(CUDA_HOST_AT) { cuda_host::fail(at, "__trap()"); }

// ---------------------------------------------------------------- warp collectives
static inline void __syncwarp(unsigned mask = ~0u, CUDA_HOST_AT) {
  const int lanes = std::min(32, cuda_host::now->block->threads - (cuda_host::now->index & ~31));
  if (lanes < 32) mask &= (1u << lanes) - 1;
  cuda_host::collective("__syncwarp", mask, false, 0, at, nullptr, [](void**, unsigned) {});
}
namespace cuda_host {
template <class T> T shuffle(const char* op, unsigned mask, T v, int from, Where at) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "");
  struct Arg { T in, out; int from; } a{v, v, from};
  collective(op, mask, false, sizeof(T), at, &a, [=](void** s, unsigned m) {
    for (int l = 0; l < 32; l++) {
      if (!(m >> l & 1)) continue;
      Arg* x = (Arg*)s[l];
      if (!(m >> x->from & 1)) fail(at, "%s: lane %d reads lane %d, which mask %08x lacks", op, l, x->from, m);
      x->out = ((Arg*)s[x->from])->in;
    }
  });
  return a.out;
}
inline int segment(int width) { return now->lane & ~(width - 1); }
// Every lane gets f(its value, next value, ...) over the lanes of the mask.
template <class T, class F> T reduce(const char* op, unsigned mask, T v, Where at, F f) {
  collective(op, mask, false, sizeof(T), at, &v, [=](void** s, unsigned m) {
    T r = *(T*)s[__builtin_ctz(m)];
    for (int l = __builtin_ctz(m) + 1; l < 32; l++) if (m >> l & 1) r = f(r, *(T*)s[l]);
    for (int l = 0; l < 32; l++) if (m >> l & 1) *(T*)s[l] = r;
  });
  return v;
}
}  // namespace cuda_host
template <class T> T __shfl_sync(unsigned mask, T v, int from, int width = 32, CUDA_HOST_AT) {
  return cuda_host::shuffle("__shfl_sync", mask, v, cuda_host::segment(width) + (from & (width - 1)), at);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32, CUDA_HOST_AT) {
  const int l = cuda_host::now->lane, j = l - (int)d;
  return cuda_host::shuffle("__shfl_up_sync", mask, v, j < cuda_host::segment(width) ? l : j, at);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32, CUDA_HOST_AT) {
  const int l = cuda_host::now->lane, j = l + (int)d;
  return cuda_host::shuffle("__shfl_down_sync", mask, v, j >= cuda_host::segment(width) + width ? l : j, at);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, CUDA_HOST_AT) {
  const int l = cuda_host::now->lane, j = (l ^ x) & 31;
  return cuda_host::shuffle("__shfl_xor_sync", mask, v, j >= cuda_host::segment(width) + width ? l : j, at);
}
static inline unsigned __ballot_sync(unsigned mask, int p, CUDA_HOST_AT) {
  return cuda_host::reduce("__ballot_sync", mask, p ? 1u << cuda_host::now->lane : 0u, at, [](unsigned a, unsigned b) { return a | b; });
}
static inline int __any_sync(unsigned mask, int p, CUDA_HOST_AT) {
  return cuda_host::reduce("__any_sync", mask, p != 0, at, [](bool a, bool b) { return a || b; });
}
static inline int __all_sync(unsigned mask, int p, CUDA_HOST_AT) {
  return cuda_host::reduce("__all_sync", mask, p != 0, at, [](bool a, bool b) { return a && b; });
}
#define CUDA_HOST_REDUCE(name, expr)                                                                       \
  template <class T> T __reduce_##name##_sync(unsigned mask, T v, CUDA_HOST_AT) {                          \
    return cuda_host::reduce("__reduce_" #name "_sync", mask, v, at, [](T a, T b) -> T { return expr; });  \
  }
CUDA_HOST_REDUCE(add, a + b)
CUDA_HOST_REDUCE(min, a < b ? a : b)
CUDA_HOST_REDUCE(max, a > b ? a : b)
CUDA_HOST_REDUCE(and, a & b)
CUDA_HOST_REDUCE(or, a | b)
CUDA_HOST_REDUCE(xor, a ^ b)
#undef CUDA_HOST_REDUCE

// ---------------------------------------------------------------- atomics
namespace cuda_host {
template <class T> struct Same { typedef T type; };
template <class T, class F> T atomic(const char* op, T* p, Where at, F f) {
  if ((uintptr_t)p % sizeof(T)) fail(at, "%s: address not aligned to %zu bytes", op, sizeof(T));
  maybe_yield();
  const T old = *p, v = f(old);
  *p = v;
  uint64_t u = 0;
  memcpy(&u, &old, sizeof(T));
  looked(op, p, u, memcmp(&old, &v, sizeof(T)) != 0, at);
  return old;
}
}  // namespace cuda_host
#define CUDA_HOST_ATOMIC(name, expr)                                                               \
  template <class T> T name(T* p, typename cuda_host::Same<T>::type v, CUDA_HOST_AT) {             \
    return cuda_host::atomic(#name, p, at, [v](T old) -> T { return expr; });                      \
  }
CUDA_HOST_ATOMIC(atomicAdd, old + v)
CUDA_HOST_ATOMIC(atomicSub, old - v)
CUDA_HOST_ATOMIC(atomicExch, ((void)old, v))
CUDA_HOST_ATOMIC(atomicMax, old > v ? old : v)
CUDA_HOST_ATOMIC(atomicMin, old < v ? old : v)
CUDA_HOST_ATOMIC(atomicAnd, old & v)
CUDA_HOST_ATOMIC(atomicOr, old | v)
CUDA_HOST_ATOMIC(atomicXor, old ^ v)
CUDA_HOST_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
#undef CUDA_HOST_ATOMIC
template <class T> T atomicCAS(T* p, typename cuda_host::Same<T>::type expected, typename cuda_host::Same<T>::type v, CUDA_HOST_AT) {
  return cuda_host::atomic("atomicCAS", p, at, [=](T old) { return old == expected ? v : old; });
}

// ---------------------------------------------------------------- scalars
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcg(T* p, typename cuda_host::Same<T>::type v) { *p = v; }
template <class T> void __stcs(T* p, typename cuda_host::Same<T>::type v) { *p = v; }
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) { return (std::common_type_t<A, B>)a < (std::common_type_t<A, B>)b ? a : b; }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) { return (std::common_type_t<A, B>)a > (std::common_type_t<A, B>)b ? a : b; }
static inline float rsqrtf(float x) { return (float)(1 / sqrt((double)x)); }
#define __expf expf
#define __logf logf
#define __log2f log2f
#define __sinf sinf
#define __cosf cosf
#define __powf powf
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __int_as_float(int v) { return cuda_host::bits<float>(v); }
static inline float __uint_as_float(unsigned v) { return cuda_host::bits<float>(v); }
static inline int __float_as_int(float v) { return cuda_host::bits<int>(v); }
static inline unsigned __float_as_uint(float v) { return cuda_host::bits<unsigned>(v); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
static inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
#pragma GCC visibility pop
#endif
