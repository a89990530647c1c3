// The kernels as operators: every check, the device and the stream, before anything is launched.
#ifndef DECO_ON_HOST
#define USE_CUDA  // for the stream, in shim.h
#endif
#include <c10/core/DeviceGuard.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/library.h>
#include <torch/version.h>

#include "params.h"

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Act = std::optional<std::string>;  // the name of one

#ifdef DECO_ON_HOST  // in tests the kernels run on the CPU
constexpr auto DEVICE = at::DeviceType::CPU;
void* current_stream(at::Device) { return nullptr; }
#else
constexpr auto DEVICE = at::DeviceType::CUDA;
void* current_stream(at::Device device) {
  void* stream = nullptr;
  TORCH_CHECK(!aoti_torch_get_current_cuda_stream(device.index(), &stream), "no current stream");
  return stream;
}
#endif

constexpr int64_t MAX_INT = std::numeric_limits<int>::max();

int cdiv(int64_t a, int64_t b) { return (int)((a + b - 1) / b); }

// One launch: its parameters, and the device that its tensors must be on.
class Launch {
 public:
  explicit Launch(const Tensor& first) : device_(first.device()) {
    TORCH_CHECK(device_.type() == DEVICE, "tensors must be on a ", DEVICE, " device, got one on ",
                device_);
  }

  deco::Params params = {};

  int size(const char* name, int64_t n) const {
    TORCH_CHECK_VALUE(n >= 1 && n <= MAX_INT, name, " must be from 1 to ", MAX_INT, ", got ", n);
    return (int)n;
  }

  int type(const char* name, const Tensor& t) const {
    switch (t.scalar_type()) {
      case at::kFloat:
        return deco::FLOAT32;
      case at::kHalf:
        return deco::FLOAT16;
      case at::kBFloat16:
        return deco::BFLOAT16;
      default:
        TORCH_CHECK_TYPE(false, name, " must be float32, float16 or bfloat16, got ",
                         t.scalar_type());
    }
  }

  // A tensor of that dtype, shape and, unless `strided`, contiguous.
  void* tensor(const char* name, const Tensor& t, at::ScalarType dtype, at::IntArrayRef shape,
               bool strided = false) const {
    TORCH_CHECK(t.device() == device_, name, " must be on ", device_, ", got ", t.device());
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype, ", got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.sizes() == shape, name, " must be ", shape, ", got ", t.sizes());
    TORCH_CHECK_VALUE(strided || t.is_contiguous(), name, " must be contiguous, got strides ",
                      t.strides());
    return t.data_ptr();
  }
  void* tensor(const char* name, const Maybe& t, at::ScalarType dtype,
               at::IntArrayRef shape) const {
    return t ? tensor(name, *t, dtype, shape) : nullptr;
  }

  // Whether 8 elements along the last dimension lie together and begin at 16 bytes, everywhere.
  static bool aligned(const Tensor& t) {
    const int64_t last = t.dim() - 1;
    if (t.size(last) % 8 || t.stride(last) != 1 || (uintptr_t)t.data_ptr() % 16) return false;
    for (int64_t i = 0; i < last; i++) {
      if (t.size(i) > 1 && t.stride(i) % 8) return false;
    }
    return true;
  }
  static bool aligned(const Maybe& t) { return !t || aligned(*t); }

  static int act(const Act& name) {
    if (!name) return deco::NONE;
    if (*name == "gelu") return deco::GELU;
    if (*name == "gelu_tanh") return deco::GELU_TANH;
    if (*name == "silu") return deco::SILU;
    if (*name == "quick_gelu") return deco::QUICK_GELU;
    TORCH_CHECK_VALUE(false, "act must be None, gelu, gelu_tanh, silu or quick_gelu, got ", *name);
  }

  void run(const char* (*kernel)(const deco::Params&, void*)) const {
    const c10::DeviceGuard guard(device_);
    const char* error = kernel(params, current_stream(device_));
    TORCH_CHECK(!error, "the kernel could not be launched: ", error);
  }

 private:
  at::Device device_;
};

// x [B, n_in, K] strided and its table [MO, T]; p [B, MO, K], of activated tokens.
void set_pool(Launch& launch, const Tensor& x, const Tensor& index, const Tensor& weight,
              bool ragged, const Act& act, const Tensor& p) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x must be [B, n_in, K], got ", x.sizes());
  TORCH_CHECK_VALUE(index.dim() == 2, "index must be [MO, T], got ", index.sizes());
  const int64_t b = x.size(0), k = x.size(2), mo = index.size(0), t = index.size(1);
  deco::Params& params = launch.params;
  params.x_type = launch.type("x", x);
  params.type = launch.type("p", p);
  params.x = launch.tensor("x", x, x.scalar_type(), x.sizes(), true);
  params.index = (const int*)launch.tensor("index", index, at::kInt, {mo, t});
  params.weight = (const float*)launch.tensor("weight", weight, at::kFloat, {mo, t});
  params.p = launch.tensor("p", p, p.scalar_type(), {b, mo, k});
  params.M = launch.size("B * MO", b * mo);
  params.MO = launch.size("MO", mo);
  params.K = launch.size("K", k);
  params.T = launch.size("T", t);
  params.stride_xb = x.stride(0);
  params.stride_xn = x.stride(1);
  params.stride_xk = x.stride(2);
  params.ragged = ragged;
  params.act = Launch::act(act);
  params.x_aligned = Launch::aligned(x) && Launch::aligned(p) &&
                     x.size(1) * x.stride(1) * x.element_size() <= MAX_INT;
}

void pool(const Tensor& x, const Tensor& index, const Tensor& weight, bool ragged, const Act& act,
          const Maybe& z, Tensor p) {
  Launch launch(x);
  set_pool(launch, x, index, weight, ragged, act, p);
  if (z) {
    TORCH_CHECK_VALUE(act, "act must be given with z, got None");
    deco::Params& params = launch.params;
    params.pre = launch.tensor("z", *z, p.scalar_type(), p.sizes(), true);
    params.stride_preb = z->stride(0);
    params.stride_pren = z->stride(1);
    params.stride_prek = z->stride(2);
    params.x_aligned = params.x_aligned && Launch::aligned(*z);
  }
  launch.run(deco::pool);
}

int64_t workspace_size(int64_t rows) { return deco::HEADER + cdiv(rows, deco::PANEL_ROWS); }

void pool_linear(const Tensor& x, const Tensor& index, const Tensor& weight, bool ragged,
                 const Act& act, const Tensor& w, const Maybe& bias, Tensor p, Maybe z, Maybe g,
                 Tensor workspace, int64_t sms) {
  Launch launch(x);
  set_pool(launch, x, index, weight, ragged, act, p);
  TORCH_CHECK_VALUE(w.dim() == 2, "w must be [N, K], got ", w.sizes());
  deco::Params& params = launch.params;
  const at::ScalarType dtype = p.scalar_type();
  const int64_t n = w.size(0), b = p.size(0), mo = p.size(1);
  params.w = launch.tensor("w", w, dtype, {n, p.size(2)}, true);
  params.bias = launch.tensor("bias", bias, dtype, {n});
  params.z = launch.tensor("z", z, dtype, {b, mo, n});
  params.g = launch.tensor("g", g, dtype, {b, mo, n});
  params.workspace = (int*)launch.tensor("workspace", workspace, at::kInt, workspace.sizes());
  TORCH_CHECK_VALUE(workspace.numel() >= workspace_size(params.M), "workspace must hold ",
                    workspace_size(params.M), " integers, got ", workspace.numel());
  params.N = launch.size("N", n);
  params.sms = launch.size("sms", sms);
  params.stride_wn = n > 1 ? w.stride(0) : 0;  // of a single row it may be anything
  params.stride_wk = w.stride(1);
  params.w_aligned = Launch::aligned(w) && Launch::aligned(p) && w.stride(0) <= MAX_INT / 64;
  params.z_aligned = Launch::aligned(z) && Launch::aligned(g);
  launch.run(deco::pool_linear);
}

int64_t sum_blocks(int64_t rows) { return cdiv(rows, deco::SUM_ROWS); }

void dgelu(Tensor d, const Tensor& z, Maybe g, Maybe sums) {
  Launch launch(d);
  TORCH_CHECK_VALUE(d.dim() == 2, "d must be [M, N], got ", d.sizes());
  deco::Params& params = launch.params;
  params.type = launch.type("d", d);
  params.d = launch.tensor("d", d, d.scalar_type(), d.sizes());
  params.z = launch.tensor("z", z, d.scalar_type(), d.sizes());
  params.g = launch.tensor("g", g, d.scalar_type(), d.sizes());
  params.M = launch.size("M", d.size(0));
  params.N = launch.size("N", d.size(1));
  params.sums = (float*)launch.tensor("sums", sums, at::kFloat, {sum_blocks(params.M), params.N});
  params.z_aligned = Launch::aligned(d) && Launch::aligned(z) && Launch::aligned(g);
  launch.run(deco::dgelu);
}

}  // namespace

#define DECO_LIBRARY(name, m) TORCH_LIBRARY(name, m)  // expands the name first

DECO_LIBRARY(TORCH_EXTENSION_NAME, m) {
  m.def(
      "pool(Tensor x, Tensor index, Tensor weight, bool ragged, str? act, Tensor? z, Tensor(a!) p)"
      " -> ()",
      &pool);
  m.def("workspace_size(int rows) -> int", &workspace_size);
  m.def(
      "pool_linear(Tensor x, Tensor index, Tensor weight, bool ragged, str? act, Tensor w,"
      " Tensor? bias, Tensor(a!) p, Tensor(b!)? z, Tensor(c!)? g, Tensor(d!) workspace, int sms) "
      "-> ()",
      &pool_linear);
  m.def("sum_blocks(int rows) -> int", &sum_blocks);
  m.def("dgelu(Tensor(a!) d, Tensor z, Tensor(b!)? g, Tensor(c!)? sums) -> ()", &dgelu);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("arch_list") = deco::arch_list();
  m.attr("cuda_version") = deco::cuda_version();
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("ptx_arch") = DECO_PTX_ARCH;  // 0: no PTX
  m.attr("sources") = DECO_SOURCES;    // a digest
}
