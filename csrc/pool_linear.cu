// Pool and first linear layer in one launch: a persistent kernel whose tasks hand panels of P on.
//
// Blocks draw task numbers from a ticket counter. A pool task gathers POOL_ROWS rows of P = S X,
// writes them and raises its panel's flag. A gemm task waits for all pool tasks of its panel of
// PANEL_ROWS rows and multiplies it with COLUMNS rows of the weight. Tickets are ordered: the pool
// tasks of the first `lead` panels, then for every panel the pool tasks of the panel `lead` further
// on and its own gemm tasks. A task waits for lower tickets only, and those are held by blocks that
// run: it cannot deadlock, whatever the number of blocks.
#include "activations.cuh"
#include "launch.cuh"
#include "pool.cuh"

namespace deco {

constexpr int POOL_ROWS = 16;
constexpr int COLUMNS = 128;
constexpr int STAGES = 3;
constexpr int THREADS = 256;
constexpr int WARP_ROWS = 64;  // of the tile; 2 x 4 warps
constexpr int WARP_COLUMNS = 32;
constexpr int SLOTS = PANEL_ROWS / POOL_ROWS;  // pool tasks of a panel

// A stage of the pipeline holds LINE bytes of every row of P and W: two steps of the tensor cores.
constexpr int LINE = 64;
constexpr int STAGE_BYTES = (PANEL_ROWS + COLUMNS) * LINE;
constexpr int SHARED_BYTES = 49168;  // 16 for the ticket; two blocks fit into an SM of sm_86
static_assert(SHARED_BYTES == STAGES * STAGE_BYTES + 16, "");

// Where the 16 bytes number `chunk` of a row lie in a stage's tile: any 8 rows that ldmatrix or a
// quarter of a warp touches at once are in different banks.
static __device__ int place(int row, int chunk) {
  return row * LINE + ((chunk ^ (row >> 1 & 3)) << 4);
}

// Rows of a matrix, of which a gemm task copies LINE bytes a stage.
template <class E, bool ALIGNED, int ROWS>
struct Operand {
  using S = typename E::Storage;
  static constexpr int N = 16 / (int)sizeof(S);  // elements of a chunk; 4 chunks a line

  const S* next;  // the stage to copy: its first element or, aligned, this thread's first chunk
  int rows;       // left in the matrix from there on

  __device__ Operand(const void* matrix, int64_t stride, int row, int rows) : rows(rows - row) {
    next = (const S*)matrix + row * stride;
    if (ALIGNED) {
      const int tid = threadIdx.x;
      next += tid / 4 * stride + tid % 4 * N;
      this->rows -= tid / 4;
    }
  }

  // Copies the next stage into a tile; zeros outside the matrix, which has `columns` more.
  __device__ void copy(unsigned char* tile, int64_t stride, int64_t stride_k, int columns) {
    const int tid = threadIdx.x;
    if (ALIGNED) {
      tile += place(tid / 4, tid % 4);
#pragma unroll
      for (int r = 0; r < ROWS; r += THREADS / 4) {
        const bool inside = r < rows && tid % 4 * N < columns;
        cp_async16(tile + r * LINE, next + r * (int)stride, inside ? 16 : 0);
      }
      next += 4 * N;
    } else {
#pragma unroll 1
      for (int c = tid; c < ROWS * 4 * N; c += THREADS) {
        const int row = c / (4 * N), at = c % (4 * N);
        S* const to = (S*)(tile + place(row, at / N)) + at % N;
        *to = row < rows && at < columns ? next[row * stride + at * stride_k] : S(0);
      }
      next += 4 * N * stride_k;
    }
  }
};

static __device__ void mma(Bfloat, float* d, const uint32_t* a, const uint32_t* b) {
  mma_m16n8k16_bf16(d, a, b);
}
static __device__ void mma(Float, float* d, const uint32_t* a, const uint32_t* b) {
  mma_m16n8k8_tf32(d, a, b);
}
static __device__ void mma(Half, float* d, const uint32_t* a, const uint32_t* b) {
  mma_m16n8k16_f16(d, a, b);
}

// Tensor cores cut float32 to TF32; to round it first halves the error.
template <class E, int N>
static __device__ void round_operand(uint32_t (&v)[N]) {
  if constexpr (E::PER_WORD == 1) {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = to_tf32(v[i]);
  }
}

// acc[i][j] += the product of 16 rows of P, the i-th, and 8 of W, the j-th, over one stage.
template <class E>
static __device__ void multiply_stage(const unsigned char* stage, float (&acc)[4][4][4]) {
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  // Where the lane's row of the first fragment lies; 8 rows further on, chunks lie alike.
  const int a = warp % 2 * WARP_ROWS * LINE + place(lane % 16, lane / 16);
  const int b =
      (PANEL_ROWS + warp / 2 * WARP_COLUMNS) * LINE + place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int step = 0; step < 2; step++) {
    const unsigned char *rows = stage + (a ^ 32 * step), *columns = stage + (b ^ 32 * step);
    uint32_t fb[2][4];  // two of the 8 rows of W each
#pragma unroll
    for (int j = 0; j < 2; j++) {
      ldmatrix_x4(fb[j], columns + j * 16 * LINE);
      round_operand<E>(fb[j]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t fa[4];
      ldmatrix_x4(fa, rows + i * 16 * LINE);
      round_operand<E>(fa);
#pragma unroll
      for (int j = 0; j < 4; j++) mma(E(), acc[i][j], fa, &fb[j / 2][j % 2 * 2]);
    }
  }
}

// Transposes the 4 x 4 words of 4 neighbouring lanes.
static __device__ void transpose(uint32_t (&w)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int low = bit == 1 ? 2 * i : i, high = low + bit;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? w[low] : w[high], bit);
      (upper ? w[low] : w[high]) = got;
    }
  }
}

// Stores one row of a warp's fragments, 32 columns: v[j] is a lane's pair in the j-th 8 of them.
template <class E>
static __device__ void store_row(const Params& p, void* matrix, int row, int column,
                                 const float (&v)[4][2]) {
  if constexpr (E::PER_WORD == 1) {
    column += threadIdx.x % 4 * 2;
    auto* to = (typename E::Storage*)matrix + (int64_t)row * p.N + column;
    const int left = row < p.M ? p.N - column : 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (p.z_aligned) {
        if (j * 8 < left) Chunk<E, 2>::pack(v[j]).store(to + j * 8);
      } else {
        if (j * 8 < left) to[j * 8] = v[j][0];
        if (j * 8 + 1 < left) to[j * 8 + 1] = v[j][1];
      }
    }
  } else {  // a fragment a lane: 16 bytes
    column += threadIdx.x % 4 * 8;
    auto* to = (typename E::Storage*)matrix + (int64_t)row * p.N + column;
    const int left = row < p.M ? p.N - column : 0;
    Chunk<E, 8> chunk;
#pragma unroll
    for (int j = 0; j < 4; j++) chunk.word[j] = E::pack(v[j]);
    transpose(chunk.word);
    if (p.z_aligned) {
      if (left > 0) chunk.store(to);
    } else {
#pragma unroll
      for (int e = 0; e < 8; e++) {
        if (e < left) to[e] = (typename E::Storage)(chunk.word[e / 2] >> e % 2 * 16);
      }
    }
  }
}

// acc = the bias, in every row.
template <class E>
static __device__ void set_bias(const Params& p, int n, float (&acc)[4][4][4]) {
  const int tid = threadIdx.x, column = n + tid / 64 * WARP_COLUMNS + tid % 4 * 2;
  const auto* bias = (const typename E::Storage*)p.bias + column;
  const int left = p.bias ? p.N - column : 0;
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float v = j * 8 + e < left ? E::to_float(bias[j * 8 + e]) : 0.f;
#pragma unroll
      for (int i = 0; i < 4; i++) acc[i][j][e] = acc[i][j][2 + e] = v;
    }
}

template <class E>
static __device__ void epilogue(const Params& p, int m, int n, const float (&acc)[4][4][4]) {
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int first = m + warp % 2 * WARP_ROWS + lane / 4, column = n + warp / 2 * WARP_COLUMNS;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = first + i * 16 + half * 8;
      float v[4][2];
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) v[j][e] = acc[i][j][half * 2 + e];
      if (p.z) store_row<E>(p, p.z, row, column, v);
      if (!p.g) continue;
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) v[j][e] = gelu<E>(v[j][e]);
      store_row<E>(p, p.g, row, column, v);
    }
}

// acc += the tile of P W^T whose first row and column are m and n.
template <class E, bool ALIGNED>
static __device__ void multiply(const Params& p, unsigned char* stages, int m, int n,
                                float (&acc)[4][4][4]) {
  constexpr int PER_STAGE = LINE / (int)sizeof(typename E::Storage);
  Operand<E, ALIGNED, PANEL_ROWS> a(p.p, p.K, m, p.M);
  Operand<E, ALIGNED, COLUMNS> b(p.w, p.stride_wn, n, p.N);
  const auto copy = [&](int stage, int k) {
    if (k < p.K) {
      a.copy(stages + stage * STAGE_BYTES, p.K, 1, p.K - k);
      b.copy(stages + stage * STAGE_BYTES + PANEL_ROWS * LINE, p.stride_wn, p.stride_wk, p.K - k);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++) copy(stage, stage * PER_STAGE);
  int stage = 0;
#pragma unroll 1
  for (int k = 0; k < p.K; k += PER_STAGE) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // this stage has come, and that of the step before is free
    copy(stage ? stage - 1 : STAGES - 1, k + (STAGES - 1) * PER_STAGE);
    multiply_stage<E>(stages + stage * STAGE_BYTES, acc);
    stage = stage < STAGES - 1 ? stage + 1 : 0;
  }
}

template <class E>
static __device__ void gemm_task(const Params& p, unsigned char* stages, int m, int n) {
  float acc[4][4][4];
  set_bias<E>(p, n, acc);
  if (p.w_aligned) {
    multiply<E, true>(p, stages, m, n, acc);
  } else {
    multiply<E, false>(p, stages, m, n, acc);
  }
  epilogue<E>(p, m, n, acc);
}

template <class E>
static __device__ void pool_task(const Params& p, int first) {
#pragma unroll 1
  for (int r = threadIdx.x / 32; r < POOL_ROWS; r += THREADS / 32) {
    if (first + r < p.M) pool_row<E, 1, false>(p, first + r, 0, 1);
  }
}

// Which panel a task belongs to, and which of its tasks it is: the pool tasks, then the gemm tasks.
static __device__ bool place_of(const Params& p, unsigned task, int* panel, int* slot) {
  const unsigned before = p.lead * SLOTS, group = SLOTS + p.columns;
  const unsigned groups = p.panels - p.lead;  // in the last panels' turns nothing is left to pool
  if (task < before) {
    *panel = task / SLOTS, *slot = task % SLOTS;
  } else if (task - before < groups * group) {
    *panel = (task - before) / group, *slot = (task - before) % group;
    if (*slot < SLOTS) *panel += p.lead;
  } else {
    const unsigned turn = task - before - groups * group;
    *panel = groups + turn / p.columns, *slot = SLOTS + turn % p.columns;
  }
  return *panel < p.panels;
}

template <class E>
__global__ void __launch_bounds__(THREADS, DECO_SM80 ? 2 : 1) pool_linear_kernel(const Params p) {
  DYN_SHARED(unsigned char, shared);
  int* const drawn = (int*)(shared + STAGES * STAGE_BYTES);
  int* const flags = p.workspace + HEADER;
  for (;;) {  // every task has a barrier: all have read `drawn` before it is drawn again
    if (threadIdx.x == 0) *drawn = atomicAdd(p.workspace, 1);
    __syncthreads();
    const int task = *drawn;
    int panel, slot;
    if (!place_of(p, task, &panel, &slot)) break;
    if (slot >= SLOTS) {
      if (threadIdx.x == 0) {
        while (ld_acquire(flags + panel) < SLOTS) __nanosleep(20);
      }
      __syncthreads();  // the panel is pooled, and the stages are free
      gemm_task<E>(p, shared, panel * PANEL_ROWS, (slot - SLOTS) * COLUMNS);
    } else {
      pool_task<E>(p, panel * PANEL_ROWS + slot * POOL_ROWS);
      __syncthreads();  // all rows are written before one thread raises the flag
      if (threadIdx.x == 0) red_release_add(flags + panel, 1);
    }
  }
  // The last block to get here leaves the workspace as it found it, for the next launch.
  int* const finished = drawn + 1;  // some may still be reading `drawn`
  if (threadIdx.x == 0) *finished = atom_acq_rel_add(p.workspace + 1, 1);
  __syncthreads();
  if (*finished == (int)gridDim.x - 1) {
    for (int i = threadIdx.x; i < HEADER + p.panels; i += THREADS) p.workspace[i] = 0;
  }
}

const char* pool_linear(const Params& params, void* stream) {
  Params p = params;
  set_gate(&p);
  p.panels = cdiv(p.M, PANEL_ROWS);
  p.columns = cdiv(p.N, COLUMNS);
  const int64_t tasks = (int64_t)p.panels * (SLOTS + p.columns);
  if (tasks > INT32_MAX / 2) return "too many tiles for one launch";
  // Two blocks an SM; where one fits, the others find no ticket left and exit at once.
  const int blocks = min((int)tasks, 2 * p.sms);
  p.lead = min(p.panels, cdiv(blocks, SLOTS));  // every block's first task is a pool task
  return with_type(p.type, [&](auto e) {
    return launch(pool_linear_kernel<decltype(e)>, blocks, THREADS, SHARED_BYTES, stream, p);
  });
}

}  // namespace deco
