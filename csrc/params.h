// What a launch is told: plain data, the same for every kernel, so that the kernels need no torch.
#pragma once
#include <stdint.h>

#include <vector>

namespace deco {

enum Type : int { FLOAT32, FLOAT16, BFLOAT16 };
enum Act : int { NONE, GELU, GELU_TANH, SILU, QUICK_GELU };

// Rows are those of the flattened output, b * MO + o. Strides are in elements.
struct Params {
  const void* x;        // [B, n_in, K] of x_type, strided
  const int* index;     // [MO, T]
  const float* weight;  // [MO, T], 0 where the window is padded
  const void* pre;      // [B, MO, K], strided, or null: p is multiplied by act' there
  const void* w;        // [N, K], strided
  const void* bias;     // [N] or null
  void* p;              // [M, K]
  void* z;              // [M, N] or null
  void* g;              // [M, N] or null
  void* d;              // [M, N]: dG, which dgelu turns into dZ
  float* sums;          // [cdiv(M, SUM_ROWS), N] or null
  int* workspace;       // ticket, CTAs that have finished, a flag a panel; zero before and after
  int64_t stride_xb;
  int64_t stride_xn;
  int64_t stride_xk;
  int64_t stride_preb;
  int64_t stride_pren;
  int64_t stride_prek;
  int64_t stride_wn;
  int64_t stride_wk;
  int M;  // B * MO
  int MO;
  int N;
  int K;
  int T;
  int x_type;         // Type
  int type;           // Type of all else
  int act;            // Act: of the tokens x, unless `pre` is given
  int ragged;         // some weights are padding
  int x_aligned;      // so do 8 channels of x, p and pre, and an int counts the bytes of an image
  int w_aligned;      // the same for w and p, and for the elements of 64 rows of w
  int z_aligned;      // 8 features of z, g and d begin at 16 bytes
  int sms;            // streaming multiprocessors of the device
  float gate_linear;  // see activations.cuh; these and the rest: set by those that launch
  float gate_cubic;
  int panels;   // of M rows
  int columns;  // gemm tasks of a panel
  int lead;     // panels whose pool tasks come first
};

constexpr int PANEL_ROWS = 128;  // of P, which the tiles of one panel share
constexpr int SUM_ROWS = 64;     // of dZ, summed by one block
constexpr int HEADER = 2;        // of the workspace, before the flags

// They launch on `stream`, a cudaStream_t, and return null or what went wrong.
const char* pool(const Params& params, void* stream);         // p = S act(x) or (S x) act'(pre)
const char* pool_linear(const Params& params, void* stream);  // and z = p wT + bias, g = gelu(z)
const char* dgelu(const Params& params, void* stream);        // d *= gelu'(z), g = gelu(z), sums

std::vector<int> arch_list();  // with machine code in the library: 90 for 9.0
int cuda_version();            // 13000 for 13.0

}  // namespace deco
