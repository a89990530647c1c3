// How a kernel starts.
#pragma once
#include "element.cuh"

namespace deco {

// f(the element type that `type` names)
template <class F>
const char* with_type(int type, F f) {
  switch (type) {
    case FLOAT32:
      return f(Float());
    case FLOAT16:
      return f(Half());
    default:
      return f(Bfloat());
  }
}

inline const char* launch(void (*kernel)(Params), dim3 grid, int threads, int shared, void* stream,
                          const Params& params) {
  if (shared) {
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (e != cudaSuccess) return cudaGetErrorString(e);
  }
  CUDA_LAUNCH(kernel, grid, threads, shared, (cudaStream_t)stream, params);
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

}  // namespace deco
