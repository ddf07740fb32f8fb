// Ternary linear layer:  Y[M,N] = alpha * X[M,K] @ W[N,K]^T + bias[N],  W in {-1, 0, +1} at 2 bits a weight.
//
// X, Y and bias are bf16 or fp16, row by row; alpha is one fp32; sums are fp32. W is the checkpoint's bytes as they
// are, (N/4, K): with n = N/4, byte [r, k] holds column k of four weight rows, one in each quarter q of the matrix,
// each as weight + 1:
//
//      bits         7-6     5-4     3-2     1-0
//      weight row    r      n+r    2n+r    3n+r
//      quarter q     0       1       2       3
//
//   naive   one thread, one output: what the others must agree with
//   few     up to 16 tokens: bound by reading the weights
//   mma     tensor cores of sm_80 and later
//   wgmma   tensor cores of Hopper, sm_90a
//
// The last three compute Y^T = W X^T. That makes the weights the tensor cores' A operand, which lives in registers:
// widened weights never touch any memory. A warp takes 8 byte rows = 32 weight rows = two A fragments of 16 x 16:
//
//      A fragment (m16n8k16, PTX ISA): lane 4g + c holds rows g and g + 8, columns 2c, 2c+1, 2c+8 and 2c+9.
//      Put byte row g's quarter 0 on row g and its quarter 1 on row g + 8: all that the lane needs of fragment 0 is
//      4 bytes, and the same 4 bytes are its part of fragment 1 (quarters 2 and 3).
//
// Codes 0, 1, 2, inverted, are 11, 10, 01. As the top two bits of a float (sign, highest exponent bit) these read -2, -0,
// +2, in bf16, fp16 and fp32 alike. So weights are widened by a shift and a mask, and the 2 goes into alpha.
#include <stdint.h>
#ifdef CPU  // all that a CPU takes from this file: terdit.py compiles it with g++, and leaves the product to PyTorch

// n bytes of W -> out, the four quarters' weights one after the other, in words of a float's size.
template <typename Word> void widen(const uint8_t* W, Word* out, long n) {
  constexpr int TOP = 8 * sizeof(Word) - 8;
  constexpr Word MASK = (Word)3 << (TOP + 6);
#pragma omp parallel for simd if (parallel : n > 1 << 14)
  for (long i = 0; i < n; i++) {
    const Word w = (Word)((uint8_t)~W[i]) << TOP;
    out[i] = w & MASK, out[n + i] = w << 2 & MASK, out[2 * n + i] = w << 4 & MASK, out[3 * n + i] = w << 6 & MASK;
  }
}
extern "C" void dequantize(const uint8_t* W, void* out, long n, int size) {
  size == 2 ? widen(W, (uint16_t*)out, n) : widen(W, (uint32_t*)out, n);
}

#else
#ifdef CPU_EMULATION
#include "tests/cpu_emulation.h"  // plain C++ versions of everything up to #endif, to run this file without a GPU
#else
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SHARED_MEMORY(name) extern __shared__ __align__(1024) char name[]

__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void narrow(float v, __half* to) { *to = __float2half_rn(v); }
__device__ inline void narrow(float v, __nv_bfloat16* to) { *to = __float2bfloat16_rn(v); }
template <typename T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<__nv_bfloat16> = true;

// ------------------------------------------------------------------------------------------------- PTX of sm_80
__device__ inline uint32_t shared(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
// 16 bytes from global to shared memory in the background; zeros if not valid, without reading src.
__device__ inline void cp_async16(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared(dst)), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ inline void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
// d (16 x 8) += a (16 x 16) * b (16 x 8)
#define MMA(TYPE)                                                                                                   \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <typename T> __device__ inline void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (IS_BF16<T>) MMA("bf16"); else MMA("f16");
}

// ------------------------------------------------------------------------------------------------- PTX of sm_90a
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// An mbarrier completes a phase when `count` threads have arrived and all bytes announced to it have landed.
__device__ inline void barrier_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(bar)), "r"(count) : "memory");
}
__device__ inline void barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_expect_bytes(uint64_t* bar, int bytes) {  // arrives, too
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(bar)), "r"(bytes) : "memory");
}
// A predicate and not a branch: ptxas serializes wgmmas that have a branch between them.
__device__ inline void barrier_arrive_if(uint64_t* bar, bool really) {
  asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(shared(bar)), "r"((int)really) : "memory");
}
__device__ inline void barrier_wait(uint64_t* bar, int parity) {
  asm volatile("{.reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;}" ::"r"(shared(bar)), "r"(parity) : "memory");
}
// A box of 128 bytes x its map's rows into shared memory, 16-byte chunks XORed with the row; zeros outside the tensor.
__device__ inline void tma_load(void* dst, const CUtensorMap* map, int column, int row, uint64_t* bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(shared(dst)), "l"(map), "r"(column), "r"(row), "r"(shared(bar)) : "memory");
}
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
template <int R> __device__ inline void zero(float (&d)[R]) {  // volatile: must stay in front of the first wgmma
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[i]));
}
// What wgmma is told of B in shared memory: address / 16, 8 rows are 1024 bytes (in 16s), 128-byte swizzle.
__device__ inline uint64_t descriptor(const void* tile) { return shared(tile) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62; }
// d (64 x 2R) += a (64 x 16, 16 rows a warp, in registers) * b (16 x 2R tokens, in shared memory)
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define N24 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23"
#define N32 N24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA(TYPE, TOKENS, D, A, B, ...)                                                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" TOKENS "k16.f32." TYPE "." TYPE " {" D "}, {" A "}, " B ", 1, 1, 1, 0;" \
               : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA48(TYPE) WGMMA(TYPE, "48", N24, "%24,%25,%26,%27", "%28", D8(0), D8(8), D8(16))
#define WGMMA64(TYPE) WGMMA(TYPE, "64", N32, "%32,%33,%34,%35", "%36", D8(0), D8(8), D8(16), D8(24))
template <typename T, int R> __device__ inline void wgmma(float (&d)[R], const uint32_t* a, uint64_t b) {
  if constexpr (R == 24) { if constexpr (IS_BF16<T>) WGMMA48("bf16"); else WGMMA48("f16"); }
  else                   { if constexpr (IS_BF16<T>) WGMMA64("bf16"); else WGMMA64("f16"); }
}
#endif
#endif  // CPU_EMULATION

template <typename T> struct Args { const T* X; const uint8_t* W; const float* alpha; const T* bias; T* Y; int M, N, K; };

// ------------------------------------------------------------------------------------------------- naive
template <typename T> __global__ void naive(Args<T> p) {
  const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (size_t)p.M * p.N) return;
  const int n = p.N / 4, row = i % p.N, shift = 6 - 2 * (row / n);
  const T* x = p.X + i / p.N * p.K;
  const uint8_t* bytes = p.W + (size_t)(row % n) * p.K;
  float sum = 0;
  for (int k = 0; k < p.K; k++) sum += to_float(x[k]) * ((bytes[k] >> shift & 3) - 1);
  narrow(sum * *p.alpha + (p.bias ? to_float(p.bias[row]) : 0), &p.Y[i]);
}

// ------------------------------------------------------------------------------------------------- widening
// Two weights at a time, in the halves of a word. Bytes 0, 1 of `word` are the lane's first two columns, bytes 2, 3 the
// other two.
__device__ inline void widen(uint32_t word, uint32_t (&a)[2][4]) {
  const uint32_t pair[2] = {__byte_perm(~word, 0, 0x1404), __byte_perm(~word, 0, 0x3424)};  // to the halves' top bytes
#pragma unroll
  for (int q = 0; q < 4; q++)
#pragma unroll
    for (int i = 0; i < 2; i++) a[q / 2][2 * i + q % 2] = pair[i] << 2 * q & 0xC000C000u;
}
__device__ inline uint32_t word_of(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
__device__ inline uint4 load16(const void* p, bool valid) { return valid ? *(const uint4*)p : uint4{0, 0, 0, 0}; }

// -------------------------------------------------------------------------------------------------what few and mma share
// Which column of memory stands for which k of a product is free, as long as X and W agree. So lane c of each four
// takes 16 neighbouring columns: w, one 16-byte load of W, and load(j, h), 8 columns of tokens 8j to 8j + 7, four mmas.
template <typename T, int J, typename Load> __device__ inline void multiply(float (&acc)[2][J][4], uint4 w, Load load) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint32_t a[2][2][4];
    widen(word_of(w, 2 * h), a[0]), widen(word_of(w, 2 * h + 1), a[1]);
#pragma unroll
    for (int j = 0; j < J; j++) {
      const uint4 x = load(j, h);
#pragma unroll
      for (int f = 0; f < 2; f++) mma<T>(acc[f][j], a[0][f], x.x, x.y), mma<T>(acc[f][j], a[1][f], x.z, x.w);
    }
  }
}

// -------------------------------------------------------------------------------------------------few
// One CTA: 8 byte rows, all tokens, as J tiles of 8. Its 8 warps take turns along K and are added up at the end.
template <typename T, int J> __global__ void __launch_bounds__(256) few(Args<T> p) {
  __shared__ float sums[8][2][J][4][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, n = p.N / 4, r0 = blockIdx.x * 8;
  const uint8_t* W = p.W + (size_t)(r0 + g) * p.K;
  float acc[2][J][4] = {};
  uint4 next = load16(W + warp * 64 + c * 16, warp * 64 + c * 16 < p.K);
  for (int k0 = warp * 64; k0 < p.K; k0 += 512) {
    const int k = k0 + c * 16;
    const uint4 w = next;
    next = load16(W + k + 512, k + 512 < p.K);
    multiply<T>(acc, w, [&](int j, int h) {
      const int token = 8 * j + g;
      return load16(p.X + (size_t)token * p.K + k + 8 * h, token < p.M && k < p.K);
    });
  }
  for (int i = 0; i < 8 * J; i++) sums[warp][i / (4 * J)][i / 4 % J][i % 4][lane] = acc[i / (4 * J)][i / 4 % J][i % 4];
  __syncthreads();
  for (int i = threadIdx.x; i < 256 * J; i += 256) {
    const int token = i / 32, q = i % 32 / 8, r = i % 8, row = q * n + r0 + r;
    float sum = 0;
    for (int w = 0; w < 8; w++) sum += sums[w][q / 2][token / 8][q % 2 * 2 + token % 2][r * 4 + token % 8 / 2];
    if (token < p.M) narrow(sum * *p.alpha / 2 + (p.bias ? to_float(p.bias[row]) : 0), &p.Y[(size_t)token * p.N + row]);
  }
}

// ------------------------------------------------------------------------------------------------- epilogue of mma and wgmma
// Results go through shared memory, as tile[token][quarter][byte row], so that 16 bytes can be stored at a time.
template <int ROWS> constexpr int PITCH = 4 * ROWS + 8;  // 8 more than needed keep lanes in different banks
template <typename T, int ROWS> struct Out {
  T* tile; float scale, bias[4]; int row;
  __device__ Out(void* smem, const Args<T>& p, int r0, int r) : tile((T*)smem), scale(*p.alpha / 2), row(r + threadIdx.x % 32 / 4) {
    const int n = p.N / 4;
    for (int q = 0; q < 4; q++) bias[q] = p.bias && r0 + row < n ? to_float(p.bias[q * n + r0 + row]) : 0;
  }
  // d: this lane's part of fragment f at tokens t to t + 7; lane 4g + c holds rows g and g + 8, tokens 2c and 2c + 1
  __device__ void put(const float* d, int f, int t) {
#pragma unroll
    for (int e = 0; e < 4; e++)
      narrow(d[e] * scale + bias[2 * f + e / 2], &tile[(t + threadIdx.x % 4 * 2 + e % 2) * PITCH<ROWS> + (2 * f + e / 2) * ROWS + row]);
  }
};
template <int ROWS, typename T> __device__ inline void store(const void* smem, const Args<T>& p, int r0, int token0, int tokens) {
  __syncthreads();
  for (int i = threadIdx.x; i < tokens * ROWS / 2; i += blockDim.x) {
    const int t = i / (ROWS / 2), q = i % (ROWS / 2) / (ROWS / 8), r = i % (ROWS / 8) * 8;
    if (token0 + t < p.M && r0 + r < p.N / 4)
      *(uint4*)(p.Y + (size_t)(token0 + t) * p.N + q * (p.N / 4) + r0 + r) = *(const uint4*)((const T*)smem + t * PITCH<ROWS> + q * ROWS + r);
  }
}

// ------------------------------------------------------------------------------------------------- mma
// One CTA: 32 byte rows (128 weight rows) x BT tokens; 8 warps as 4 x 2. X goes through a ring of 4 stages of 64
// columns in shared memory, W straight to registers, one stage ahead. Columns are dealt to lanes by multiply.
constexpr int X_PITCH = 144;  // bytes; 128 would put all 8 tokens of a tile into the same banks
template <int BT> constexpr int MMA_SMEM = BT * (4 * X_PITCH > 2 * PITCH<32> ? 4 * X_PITCH : 2 * PITCH<32>);
template <typename T, int BT> __global__ void __launch_bounds__(256, BT < 128 ? 2 : 1) mma_gemm(Args<T> p) {
  SHARED_MEMORY(smem);
  constexpr int STAGE = BT * X_PITCH, J = BT / 16;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const int token0 = blockIdx.x * BT, r0 = blockIdx.y * 32, r = warp % 4 * 8, t = warp / 4 * (BT / 2), stages = (p.K + 63) / 64;
  const uint8_t* W = p.W + (size_t)min(r0 + r + g, p.N / 4 - 1) * p.K;  // rows past the end are computed, not stored
  auto weights = [&](int s) { return load16(W + s * 64 + c * 16, s * 64 + c * 16 < p.K); };
  auto fetch = [&](int s) {
    for (int i = threadIdx.x; i < BT * 8 && s < stages; i += 256) {
      const int token = token0 + i / 8, k = s * 64 + i % 8 * 8;
      const bool valid = token < p.M && k < p.K;
      cp_async16(smem + s % 4 * STAGE + i / 8 * X_PITCH + i % 8 * 16, p.X + (valid ? (size_t)token * p.K + k : 0), valid);
    }
    cp_async_commit();  // also an empty group, so that their number stays in step
  };
  float acc[2][J][4] = {};
  for (int s = 0; s < 3; s++) fetch(s);
  uint4 next = weights(0);
  for (int s = 0; s < stages; s++) {
    const uint4 w = next;
    next = weights(s + 1);
    cp_async_wait<2>();
    __syncthreads();  // stage s has landed for all, and nobody reads stage s - 1 any more
    fetch(s + 3);
    const char* x = smem + s % 4 * STAGE + (t + g) * X_PITCH + c * 32;
    multiply<T>(acc, w, [&](int j, int h) { return *(const uint4*)(x + 8 * j * X_PITCH + 16 * h); });
  }
  __syncthreads();
  Out<T, 32> out(smem, p, r0, r);
#pragma unroll
  for (int i = 0; i < 2 * J; i++) out.put(acc[i / J][i % J], i / J, t + i % J * 8);
  store<32>(smem, p, r0, token0, BT);
}

// ------------------------------------------------------------------------------------------------- wgmma
// One CTA: WG warpgroups of 32 byte rows (128 weight rows) each x NT * TOK tokens, TOK (48 or 64) to a wgmma. A ring of
// stages of 128 columns, filled by TMA: X as two boxes of 64 columns, W as one. wgmma reads X by itself, in memory
// order, so here a lane picks its columns 2c, 2c+1, 2c+8, 2c+9 of W. Each step of 16 columns is widened while the tensor
// cores still work on the two before.
constexpr int STAGES = 4;
template <int WG, int BT> constexpr int WGMMA_STAGE = BT * 256 + WG * 4096;
template <int WG, int BT> constexpr int WGMMA_SMEM = 1024 + STAGES * (WGMMA_STAGE<WG, BT> + 16);
template <typename T, int WG, int TOK, int NT>
__global__ void __launch_bounds__(128 * WG)
wgmma_gemm(const __grid_constant__ CUtensorMap X, const __grid_constant__ CUtensorMap W, Args<T> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(CPU_EMULATION)
  constexpr int BT = TOK * NT, STAGE = WGMMA_STAGE<WG, BT>;
  SHARED_MEMORY(raw);
  char* smem = raw + (1024 - shared(raw) % 1024) % 1024;  // swizzled boxes start at multiples of 1024
  uint64_t *full = (uint64_t*)(smem + STAGES * STAGE), *empty = full + STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, blocks = (p.K + 127) / 128;
  const int token0 = blockIdx.x * BT, r0 = blockIdx.y * WG * 32, r = warp * 8;
  auto load = [&](int b) {
    char* stage = smem + b % STAGES * STAGE;
    barrier_wait(&empty[b % STAGES], (b / STAGES & 1) ^ 1);  // the first time round it does not wait
    barrier_expect_bytes(&full[b % STAGES], STAGE);
    for (int h = 0; h < 2; h++) tma_load(stage + h * BT * 128, &X, b * 128 + h * 64, token0, &full[b % STAGES]);
    tma_load(stage + BT * 256, &W, b * 128, r0, &full[b % STAGES]);
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) barrier_init(&full[s], 1), barrier_init(&empty[s], 4 * WG);
    barriers_visible();
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int b = 0; b < STAGES && b < blocks; b++) load(b);
  __syncwarp();

  float acc[2][NT][TOK / 2];
#pragma unroll
  for (int i = 0; i < 2 * NT; i++) zero(acc[i / NT][i % NT]);
  for (int b = 0; b < blocks; b++) {
    const char* stage = smem + b % STAGES * STAGE;
    const char* bytes = stage + BT * 256 + (r + g) * 128 + 2 * c;
    const uint64_t tokens = descriptor(stage);  // counts in 16 bytes: 2 to a step of 16 columns, 8 to a token
    uint32_t a[4][2][4];                        // of this step and of those still in flight
    barrier_wait(&full[b % STAGES], b / STAGES & 1);
#pragma unroll
    for (int s = 0; s < 8; s++) {
      const uint16_t* w = (const uint16_t*)(bytes + (s ^ g) * 16);  // the box's swizzle
      widen(w[0] | (uint32_t)w[4] << 16, a[s % 4]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 2 * NT; i++) wgmma<T>(acc[i / NT][i % NT], a[s % 4][i / NT], tokens + (s / 4 * BT + i % NT * TOK) * 8 + s % 4 * 2);
      wgmma_commit();
      wgmma_wait<2>();
      if (s == 1) barrier_arrive_if(&empty[(b + STAGES - 1) % STAGES], lane == 0 && b > 0);  // the stage before is done with
    }
    if (threadIdx.x == 0 && b > 0 && b - 1 + STAGES < blocks) load(b - 1 + STAGES);
    __syncwarp();
  }
  wgmma_wait<0>();
  __syncthreads();
  Out<T, WG * 32> out(smem, p, r0, r);
#pragma unroll
  for (int i = 0; i < BT / 4; i++) out.put(acc[i / (BT / 8)][i % (BT / 8) / (TOK / 8)] + i % (TOK / 8) * 4, i / (BT / 8), i % (BT / 8) * 8);
  store<WG * 32>(smem, p, r0, token0, BT);
#endif
}

// ------------------------------------------------------------------------------------------------- host
#ifndef CPU_EMULATION
template <typename... P, typename... A>
int launch(void (*kernel)(P...), dim3 grid, int threads, int smem, cudaStream_t stream, A... args) {
  cudaError_t err = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  if (!err) kernel<<<grid, threads, smem, stream>>>(P(args)...);
  const cudaError_t last = cudaGetLastError();  // asked for in any case: an error left behind would fail torch's next kernel
  return err ? err : last;
}
inline bool box_map(CUtensorMap* map, const void* data, int rows, int columns, int box_rows, int size, bool bf16) {
  static decltype(&cuTensorMapEncodeTiled) encode = nullptr;  // from the driver: nothing links against libcuda
#if CUDART_VERSION >= 12050
  cudaDriverEntryPointQueryResult found;
  if (!encode) cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode, 12000, cudaEnableDefault, &found);
#else
  if (!encode) cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", (void**)&encode, cudaEnableDefault);
#endif
  if (!encode) return false;
  const cuuint64_t dims[2] = {(cuuint64_t)columns, (cuuint64_t)rows}, stride[1] = {(cuuint64_t)columns * size};
  const cuuint32_t box[2] = {(cuuint32_t)(128 / size), (cuuint32_t)box_rows}, step[2] = {1, 1};
  const auto type = size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return !encode(map, type, 2, (void*)data, dims, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}
inline int attribute(cudaDeviceAttr a) {
  int device = 0, value = 0;
  cudaGetDevice(&device), cudaDeviceGetAttribute(&value, a, device);
  return value;
}
#endif

enum Kernel { AUTO, NAIVE, FEW, MMA, WGMMA };
struct Tile { int kernel, rows, tokens; };  // weight rows and tokens of a CTA
constexpr Tile TILES[] = {{WGMMA, 256, 128}, {WGMMA, 256, 96}, {WGMMA, 256, 64}, {WGMMA, 128, 64}, {WGMMA, 128, 48},
                          {MMA, 128, 128}, {MMA, 128, 64}, {MMA, 128, 32}};
constexpr int REFUSED = -1;
inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <typename T> int run(Args<T> p, int kernel, int tokens, cudaStream_t stream) {
  const int sms = attribute(cudaDevAttrMultiProcessorCount), major = attribute(cudaDevAttrComputeCapabilityMajor);
  if (sms == 0 || major < 8) return cudaErrorNoDevice;
  const bool fits = p.N % 32 == 0 && p.K % 16 == 0;  // 8 byte rows, 16-byte loads
  if (kernel == AUTO) kernel = !fits ? NAIVE : p.M <= 16 ? FEW : major == 9 ? WGMMA : MMA;
  if (kernel == NAIVE) return launch(naive<T>, dim3((unsigned)(((size_t)p.M * p.N + 255) / 256)), 256, 0, stream, p);
  if (!fits || (kernel == FEW && p.M > 16) || (kernel == WGMMA && major != 9)) return REFUSED;
  if (kernel == FEW) return p.M <= 8 ? launch(few<T, 1>, dim3(p.N / 32), 256, 0, stream, p) : launch(few<T, 2>, dim3(p.N / 32), 256, 0, stream, p);
  Tile best = {};  // the tile with which the last SM is done first; `tokens` narrows the choice
  long least = 1l << 60;
  for (Tile t : TILES) {
    const long cost = (long)ceil_div(ceil_div(p.N, t.rows) * ceil_div(p.M, t.tokens), sms) * (t.tokens + 16) * t.rows;
    if (t.kernel == kernel && (tokens == 0 || tokens == t.tokens) && cost < least) least = cost, best = t;
  }
  if (!best.rows) return REFUSED;
  const dim3 grid(ceil_div(p.M, best.tokens), ceil_div(p.N, best.rows));
#define MMA_TILE(BT) if (kernel == MMA && best.tokens == BT) return launch(mma_gemm<T, BT>, grid, 256, MMA_SMEM<BT>, stream, p);
#define WGMMA_TILE(WG, TOK, NT) if (kernel == WGMMA && best.rows == 128 * WG && best.tokens == TOK * NT) {              \
    CUtensorMap x, w;                                                                                                   \
    if (!box_map(&x, p.X, p.M, p.K, TOK * NT, 2, IS_BF16<T>) || !box_map(&w, p.W, p.N / 4, p.K, 32 * WG, 1, false))     \
      return cudaErrorNotSupported;                                                                                     \
    return launch(wgmma_gemm<T, WG, TOK, NT>, grid, 128 * WG, WGMMA_SMEM<WG, TOK * NT>, stream, x, w, p); }
  MMA_TILE(128) MMA_TILE(64) MMA_TILE(32)
  WGMMA_TILE(2, 64, 2) WGMMA_TILE(2, 48, 2) WGMMA_TILE(2, 64, 1) WGMMA_TILE(1, 64, 1) WGMMA_TILE(1, 48, 1)
  return REFUSED;
}

// The whole interface: device pointers in; out comes 0, a cudaError_t, or REFUSED for what no kernel takes. Python calls it through ctypes. bias may be null; kernel
// is one of the enum (the caller asks for AUTO unless it experiments), tokens a tile's or 0.
extern "C" int ternary_linear(const void* X, const void* W, const void* alpha, const void* bias, void* Y, int M, int N, int K,
                              int bf16, int kernel, int tokens, void* stream) {
  if (M < 1 || N < 4 || N % 4 || K < 1 || ((uintptr_t)X | (uintptr_t)W | (uintptr_t)Y) % 16) return REFUSED;
  const auto s = (cudaStream_t)stream;
  if (bf16) {
    typedef __nv_bfloat16 T;
    return run(Args<T>{(const T*)X, (const uint8_t*)W, (const float*)alpha, (const T*)bias, (T*)Y, M, N, K}, kernel, tokens, s);
  }
  typedef __half T;
  return run(Args<T>{(const T*)X, (const uint8_t*)W, (const float*)alpha, (const T*)bias, (T*)Y, M, N, K}, kernel, tokens, s);
}
#endif  // CPU
