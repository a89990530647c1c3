// GELU and its derivative in float32.
#pragma once
#include "element.cuh"

namespace deco {

// Density and distribution function of the standard normal at z.
//
// For 16-bit outputs the distribution is the rational form 7.1.26 of Abramowitz and Stegun:
// absolute error below 1.5e-7, half of erf's instructions.
template <class E>
static __device__ void normal(float z, float* pdf, float* cdf) {
  const float e = exp2f(z * z * -0.7213475204444817f);  // exp(-z^2 / 2)
  if constexpr (E::PER_WORD == 1) {
    *cdf = 0.5f * (1.f + erff(z * 0.7071067811865476f));
  } else {
    const float t = __fdividef(1.f, fmaf(fabsf(z), 0.23164188814867655f, 1.f));
    float q = fmaf(0.5307027145f, t, -0.7265760135f);
    q = fmaf(q, t, 0.7107068705f);
    q = fmaf(q, t, -0.142248368f);
    q = fmaf(q, t, 0.127414796f);
    const float tail = q * t * e;
    *cdf = z < 0.f ? tail : 1.f - tail;
  }
  *pdf = 0.3989422804014327f * e;
}

template <class E>
static __device__ float gelu(float z) {
  float pdf, cdf;
  normal<E>(z, &pdf, &cdf);
  return z * cdf;
}

template <class E>
static __device__ void gelu_and_slope(float z, float* y, float* slope) {
  float pdf, cdf;
  normal<E>(z, &pdf, &cdf);
  *y = z * cdf;
  *slope = fmaf(z, pdf, cdf);
}

}  // namespace deco
