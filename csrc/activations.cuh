// Activations and their derivatives in float32.
#pragma once
#include "element.cuh"

namespace deco {

// Density and distribution function of the standard normal at z.
//
// For 16-bit outputs the distribution is the rational form 7.1.26 of Abramowitz and Stegun:
// absolute error below 1.5e-7, half of erf's instructions.
template <class E>
static __device__ void normal(float z, float* pdf, float* cdf) {
  const float e = ex2(z * z * -0.7213475204444817f);  // exp(-z^2 / 2)
  if constexpr (E::PER_WORD == 1) {
    *cdf = 0.5f * (1.f + erff(z * 0.7071067811865476f));
  } else {
    const float t = rcp(fmaf(fabsf(z), 0.23164188814867655f, 1.f));
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

// GELU_TANH, SILU and QUICK_GELU are z * sigmoid(h(z)) with h(z) = linear * z + cubic * z^3, and
// 0.5 (1 + tanh(h / 2)) is sigmoid(h). A launch is told both coefficients times -log2(e).
inline void set_gate(Params* params) {
  constexpr float LOG2_E = 1.4426950408889634f;
  const float linear = params->act == GELU_TANH    ? 1.5957691216057308f  // 2 sqrt(2 / pi)
                       : params->act == QUICK_GELU ? 1.702f
                                                   : 1.f;
  params->gate_linear = -LOG2_E * linear;
  params->gate_cubic = params->act == GELU_TANH ? params->gate_linear * 0.044715f : 0.f;
}

struct Gate {
  float value, slope;  // sigmoid(h(z)), h'(z)

  __device__ Gate(const Params& params, float z) {
    constexpr float LN_2 = 0.6931471805599453f;
    const float square = fminf(z * z, 1e30f);  // finite, so that no cubic term is 0
    const float h = z * fmaf(params.gate_cubic, square, params.gate_linear);
    value = rcp(1.f + ex2(h));
    slope = -LN_2 * fmaf(3.f * params.gate_cubic, square, params.gate_linear);
  }
};

// v = act(v), of tokens of type E.
template <class E, int N>
static __device__ void activate(const Params& params, float (&v)[N]) {
  if (params.act == GELU) {
#pragma unroll
    for (int n = 0; n < N; n++) v[n] = gelu<E>(v[n]);
  } else {
#pragma unroll
    for (int n = 0; n < N; n++) v[n] *= Gate(params, v[n]).value;
  }
}

// v = act'(v)
template <class E, int N>
static __device__ void act_slope(const Params& params, float (&v)[N]) {
  if (params.act == GELU) {
#pragma unroll
    for (int n = 0; n < N; n++) {
      float y;
      gelu_and_slope<E>(v[n], &y, &v[n]);
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; n++) {
      const Gate s(params, v[n]);
      v[n] = fmaf(s.value * (1.f - s.value) * s.slope, v[n], s.value);
    }
  }
}

}  // namespace deco
