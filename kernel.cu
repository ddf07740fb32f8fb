// Ternary linear layer:  Y[M,N] = alpha * X[M,K] @ W[N,K]^T + bias[N],  W in {-1, 0, +1} at 2 bits a weight.
//
// M is the number of tokens (rows of X), K of input features, N of output features (rows of W). X, Y and bias are
// bf16 or fp16, row by row. alpha is one fp32 number. Sums are kept in fp32.
//
// How W is stored: as (N/4, K) bytes, exactly as in the checkpoint. Let n = N/4. Byte [r, k] holds column k of four
// weight rows, one from each quarter of the matrix. Each weight is stored as a code of 2 bits: weight + 1.
//
//      bits         7-6     5-4     3-2     1-0
//      weight row    r      n+r    2n+r    3n+r
//      quarter       0       1       2       3
//
//   Example: N = 32, so n = 8. Byte [3, 5] = 0b10010010 holds W[3,5] = 1, W[11,5] = 0, W[19,5] = -1, W[27,5] = 1.
//   Below, a "byte row" is a row of this byte matrix. It holds four weight rows.
//
// The kernels, in the order of this file:
//   naive        one thread computes one output; the other kernels must agree with it
//   small_batch  up to 16 tokens, where reading the weights takes most of the time
//   mma          tensor cores of sm_80 and later
//   wgmma        tensor cores of Hopper, sm_90a
//
// Why the fast kernels compute Y^T = W X^T: it makes W the first operand (A) of the tensor core instruction, and A may
// lie in registers. So a weight goes from its packed byte straight into a register, and no dequantized weight is ever
// written to memory. X is the second operand (B), Y^T the result (D).
//
// What a lane holds: the 32 lanes of a warp share the operands of D (16 x 8) += A (16 x 16) * B (16 x 8). Let
// g = lane / 4 and c = lane % 4 (the PTX manual calls them groupID and threadID_in_group). The manual's tables say:
//
//      A, 16 rows x 16 columns     columns 2c, 2c+1    columns 2c+8, 2c+9
//          row g                      register 0           register 2         two 16-bit weights in a register
//          row g + 8                  register 1           register 3
//      B, 16 columns x 8 tokens    columns 2c, 2c+1    columns 2c+8, 2c+9
//          token g                    register 0           register 1         two 16-bit values of X in a register
//      D, 16 rows x 8 tokens          token 2c             token 2c+1
//          row g                      element 0            element 1          one fp32 sum in a register
//          row g + 8                  element 2            element 3
//
// How W becomes A: a warp takes 8 byte rows and makes two matrices A of them, called fragments. For each 16 columns a
// lane reads 4 bytes of byte row g and uses each of them in both fragments:
//
//      fragment 0:  row g is quarter 0 of byte row g, row g + 8 is quarter 1
//      fragment 1:  row g is quarter 2 of byte row g, row g + 8 is quarter 3
//
//   Example: lane 9 is g = 2, c = 1. It holds rows 2 and 10, columns 2, 3, 10 and 11. In fragment 1 its row 10 is
//   quarter 3 of byte row 2, and that is weight row 3n + 2 of W.
#include <stdint.h>

#ifndef CPU  // With -DCPU only the last section is compiled, by g++.
#ifdef CPU_EMULATION
// Runs this file without a GPU: it has plain C++ for CUDA's headers and for each block marked #ifndef CPU_EMULATION.
#include "tests/cpu_emulation.h"
#else
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <algorithm>
#define SHARED_MEMORY(name) extern __shared__ __align__(1024) char name[]

// One name for both 16-bit types, so that each kernel is written once.
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
template <typename T> __device__ inline T from_float(float value);
template <> __device__ inline __half from_float(float value) { return __float2half_rn(value); }
template <> __device__ inline __nv_bfloat16 from_float(float value) { return __float2bfloat16_rn(value); }
template <typename T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<__nv_bfloat16> = true;
#endif

#define UNROLL _Pragma("unroll")  // needed where arrays lie in registers: these have no addresses, only names

template <typename T> struct Args {
  const T* X;          // (M, K)
  const uint8_t* W;    // (N/4, K), four weights in a byte
  const float* alpha;  // (1,)
  const T* bias;       // (N,), or null for none
  T* Y;                // (M, N)
  int M;               // tokens
  int N;               // output features
  int K;               // input features
};

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------------------------------
// naive
//
// One thread computes one output: a row of X times a row of W. It takes any size, and reads all of W once for each
// token. AUTO chooses it only where the others cannot be used: N is not a multiple of 32, or K not of 16.
//
//   Example: N = 20, so n = 5. Thread 33 computes token 33 / 20 = 1, weight row 33 % 20 = 13. That row is in quarter
//   13 / 5 = 2, byte row 13 % 5 = 3. Its codes are in bits 3-2, so they are shifted down by 2.

template <typename T> __global__ void naive(Args<T> p) {
  const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (size_t)p.M * p.N) return;
  const int n = p.N / 4;
  const int row = i % p.N;
  const int quarter = row / n;
  const int byte_row = row % n;
  const int shift = 6 - 2 * quarter;
  const T* x = p.X + (i / p.N) * p.K;
  const uint8_t* bytes = p.W + (size_t)byte_row * p.K;
  float sum = 0;
  for (int k = 0; k < p.K; k++) {
    const int weight = ((bytes[k] >> shift) & 3) - 1;
    sum += to_float(x[k]) * weight;
  }
  const float bias = p.bias ? to_float(p.bias[row]) : 0;
  p.Y[i] = from_float<T>(sum * *p.alpha + bias);
}

// ---------------------------------------------------------------------------------------------------------------------
// dequantize: from packed bytes to bf16 or fp16
//
// No integer is converted: an inverted code is the top 2 bits (the sign and the highest exponent bit) of the float that
// is twice the weight, and all other bits of that float are 0.
//
//      weight   code   inverted   sign, exponent   16-bit float
//        -1      00       11         -, 10..0      0xC000 = -2
//         0      01       10         -, 00..0      0x8000 = -0
//        +1      10       01         +, 10..0      0x4000 = +2
//
// This is true of bf16, fp16 and fp32 alike. So a shift and a mask dequantize. Using alpha / 2 makes up for the 2.
//
//   Example: byte 0b10010010 holds weights +1, 0, -1, +1. Inverted it is 0b01101101 = 0x6D; atop 16 bits, 0x6D00.
//      quarter 0:  (0x6D00 << 0) & 0xC000 = 0x4000 = +2       quarter 2:  (0x6D00 << 4) & 0xC000 = 0xC000 = -2
//      quarter 1:  (0x6D00 << 2) & 0xC000 = 0x8000 = -0       quarter 3:  (0x6D00 << 6) & 0xC000 = 0x4000 = +2
//
// A register holds two weights, so two bytes are shifted together, one atop each half. Bits that cross from the lower
// half into the upper one do no harm: they stay below bit 22, and the mask keeps only bits 30 and 31 there.

// __byte_perm(x, 0, selector) builds a register of four bytes. Each hexadecimal digit of the selector chooses one byte,
// the last digit the lowest: 0 to 3 is a byte of x (0 is its lowest), 4 is a zero byte.
//   Example: of x = 0xDDCCBBAA, selector 0x1404 makes 0xBB00AA00, and selector 0x3424 makes 0xDD00CC00.
constexpr uint32_t BYTES_0_AND_1_ON_TOP = 0x1404;
constexpr uint32_t BYTES_2_AND_3_ON_TOP = 0x3424;
constexpr uint32_t TOP_2_BITS_OF_HALVES = 0xC000C000;

// One lane's 4 bytes -> its registers of both fragments, a[fragment][register]. Bytes 0 and 1 of `word` are columns 2c
// and 2c+1 of A, bytes 2 and 3 are columns 2c+8 and 2c+9.
__device__ inline void dequantize(uint32_t word, uint32_t (&a)[2][4]) {
  const uint32_t pairs[2] = {__byte_perm(~word, 0, BYTES_0_AND_1_ON_TOP), __byte_perm(~word, 0, BYTES_2_AND_3_ON_TOP)};
  UNROLL for (int quarter = 0; quarter < 4; quarter++) {
    const int fragment = quarter / 2;
    const int lower_row = quarter % 2;  // 0: row g, 1: row g + 8
    UNROLL for (int pair = 0; pair < 2; pair++)
      a[fragment][2 * pair + lower_row] = (pairs[pair] << (2 * quarter)) & TOP_2_BITS_OF_HALVES;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What small_batch and mma share: a warp multiplies 8 byte rows by 64 columns of X

#ifndef CPU_EMULATION
// d (16 x 8) += a (16 x 16) * b (16 x 8), by a whole warp. In PTX, because CUDA's C++ interface to tensor cores (wmma)
// does not say which lane holds which element, and dequantize has to know that.
#define MMA_PTX(TYPE)                                                                                     \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                             \
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                    \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <typename T> __device__ inline void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (IS_BF16<T>) {
    MMA_PTX("bf16");
  } else {
    MMA_PTX("f16");
  }
}
#endif

// 16 bytes in one load, or zeros where they would lie outside of the matrix.
__device__ inline uint4 load16(const void* source, bool valid) {
  return valid ? *(const uint4*)source : uint4{0, 0, 0, 0};
}

// Words 0 and 1 of v, or words 2 and 3.
__device__ inline uint2 half_of(uint4 v, int half) { return half == 0 ? uint2{v.x, v.y} : uint2{v.z, v.w}; }

// acc += (8 byte rows x 64 columns) * (64 columns x TOKEN_TILES tiles of 8 tokens). Each lane hands in
//   w                16 bytes of byte row g, its columns 16c to 16c + 15
//   load_x(tile, h)  X at token 8 * tile + g, half of these columns (16 bytes): h = 0 the first 8, h = 1 the last 8
//
// The instruction wants columns 2c, 2c+1, 2c+8 and 2c+9. But a sum may take its terms in any order, so we may number
// the columns as we like, if W and X agree. Here each lane takes neighbours, so that every load is 16 bytes wide.
//   Example: lane 9 (g = 2, c = 1) loads columns 16 to 31 of byte row 2. They make four steps. The first step's 4 bytes
//   are columns 16 to 19, which stand where the instruction has its columns 2, 3, 10 and 11.
template <typename T, int TOKEN_TILES, typename LoadX>
__device__ inline void multiply_64_columns(float (&acc)[2][TOKEN_TILES][4], uint4 w, LoadX load_x) {
  UNROLL for (int h = 0; h < 2; h++) {
    const uint2 words = half_of(w, h);  // 8 columns: two steps of 4
    uint32_t a_first[2][4];
    uint32_t a_second[2][4];
    dequantize(words.x, a_first);
    dequantize(words.y, a_second);
    UNROLL for (int tile = 0; tile < TOKEN_TILES; tile++) {
      const uint4 x = load_x(tile, h);
      UNROLL for (int fragment = 0; fragment < 2; fragment++) {
        mma<T>(acc[fragment][tile], a_first[fragment], x.x, x.y);
        mma<T>(acc[fragment][tile], a_second[fragment], x.z, x.w);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// small_batch
//
// A thread block computes 8 byte rows (32 weight rows) for all tokens, in 1 or 2 tiles of 8 tokens.
// A warp       takes 64 columns out of each 512; warp w starts at column 64w. At the end the 8 warps' sums are added.
// A lane       loads 16 bytes of byte row g at a time, as multiply_64_columns wants them.
// Why fast     With so few tokens the time is that of reading W, which is 1/8 of its size in bf16. Each warp asks for
//              its next bytes before it uses the present ones, so that many reads are on their way at once.
// When chosen  Up to 16 tokens. The adaLN projections are of this kind: they have one token an image.
//
//   Example: lane 9 (g = 2, c = 1) of warp 3 in thread block 5 works on byte row 5 * 8 + 2 = 42. It loads columns
//   3 * 64 + 1 * 16 = 208 to 223 first, then 720 to 735 and so on.

template <typename T, int TOKEN_TILES> __global__ void __launch_bounds__(256) small_batch(Args<T> p) {
  constexpr int WARPS = 8;
  constexpr int STEP = WARPS * 64;  // columns that the block covers at a time
  __shared__ float sums[WARPS][2][TOKEN_TILES][4][32];  // [warp][fragment][token tile][element of D][lane]
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int c = lane % 4;
  const int row0 = blockIdx.x * 8;  // first byte row of the block
  const int column0 = warp * 64;    // first column of the warp
  const uint8_t* w_row = p.W + (size_t)(row0 + g) * p.K;

  float acc[2][TOKEN_TILES][4] = {};
  uint4 w_next = load16(w_row + column0 + c * 16, column0 + c * 16 < p.K);
  for (int column = column0; column < p.K; column += STEP) {  // the same for all lanes: mma needs the whole warp
    const int k = column + c * 16;
    const uint4 w = w_next;
    w_next = load16(w_row + k + STEP, k + STEP < p.K);
    auto load_x = [&](int tile, int h) {
      const int token = 8 * tile + g;
      return load16(p.X + (size_t)token * p.K + k + 8 * h, token < p.M && k < p.K);
    };
    multiply_64_columns<T>(acc, w, load_x);
  }

  UNROLL for (int fragment = 0; fragment < 2; fragment++)
    UNROLL for (int tile = 0; tile < TOKEN_TILES; tile++)
      UNROLL for (int element = 0; element < 4; element++)
        sums[warp][fragment][tile][element][lane] = acc[fragment][tile][element];
  __syncthreads();

  for (int i = threadIdx.x; i < 256 * TOKEN_TILES; i += 256) {
    const int token = i / 32;
    const int quarter = (i % 32) / 8;
    const int byte_row = i % 8;
    // Which lane has this output, and where: the header's table of D, read backwards.
    //   Example: token 13, quarter 3, byte row 2. Quarter 3 is fragment 1, row g + 8. Token 13 is token 5 of tile 1,
    //   and 5 is 2c + 1 for c = 2. So it is element 3 of lane 4 * 2 + 2 = 10.
    const int fragment = quarter / 2;
    const int tile = token / 8;
    const int element = 2 * (quarter % 2) + token % 2;
    const int source_lane = 4 * byte_row + (token % 8) / 2;
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += sums[w][fragment][tile][element][source_lane];
    if (token < p.M) {
      const int row = quarter * (p.N / 4) + row0 + byte_row;
      const float bias = p.bias ? to_float(p.bias[row]) : 0;
      p.Y[(size_t)token * p.N + row] = from_float<T>(sum * *p.alpha / 2 + bias);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What mma and wgmma share: the way from the sums in registers to Y
//
// A lane's sums belong to places in Y that lie far apart: it could only store 2 bytes at a time. So the block collects
// its outputs in shared memory, as out[token][quarter][byte row], and copies them from there 16 bytes at a time.

// Elements from one token to the next: 4 * ROWS, and 8 more against bank conflicts. Shared memory has 32 banks, each a
// word of 4 bytes wide. Lanes that write different words of one bank wait for each other. At one time c = 0, 1, 2, 3
// write tokens 0, 2, 4, 6, and g = 0 to 7 write 8 byte rows of each, which are 4 words.
//   Example: ROWS = 32. A token takes 136 elements = 68 words. So tokens 0, 2, 4, 6 start at words 0, 136, 272, 408.
//   Modulo 32 these are banks 0, 8, 16, 24. With 64 words a token they would all start at bank 0.
template <int ROWS> constexpr int OUT_PITCH = 4 * ROWS + 8;

template <typename T, int ROWS> struct Output {  // ROWS: byte rows of the block
  T* out;         // in shared memory, [token][quarter][byte row]
  float scale;    // alpha / 2, because dequantized weights are -2, 0 and 2
  float bias[4];  // of this lane's four weight rows
  int byte_row;   // this lane's, counted from the block's first
  int c;          // lane % 4

  // row0: the block's first byte row; warp_row: the warp's first, counted from row0
  __device__ Output(void* shared_memory, const Args<T>& p, int row0, int warp_row) {
    const int n = p.N / 4;
    const int lane = threadIdx.x % 32;
    out = (T*)shared_memory;
    scale = *p.alpha / 2;
    byte_row = warp_row + lane / 4;
    c = lane % 4;
    for (int quarter = 0; quarter < 4; quarter++) {
      const bool valid = p.bias && row0 + byte_row < n;
      bias[quarter] = valid ? to_float(p.bias[quarter * n + row0 + byte_row]) : 0;
    }
  }

  // d: this lane's 4 elements of D of a fragment, for tokens token0 to token0 + 7.
  //   Example: fragment 1, token0 = 16, lane 9 (g = 2, c = 1). Element 3 is quarter 3 of byte row 2, token 16 + 3 = 19.
  __device__ void put(const float* d, int fragment, int token0) {
    UNROLL for (int element = 0; element < 4; element++) {
      const int quarter = 2 * fragment + element / 2;
      const int token = token0 + 2 * c + element % 2;
      out[token * OUT_PITCH<ROWS> + quarter * ROWS + byte_row] = from_float<T>(d[element] * scale + bias[quarter]);
    }
  }
};

// After every thread's put: shared memory -> Y, in pieces of 8 outputs.
//   Example: ROWS = 32, so a quarter is 4 pieces and a token 16. Piece 39 is piece 7 of token 39 / 16 = 2, which is in
//   quarter 7 / 4 = 1, and there it is piece 3, byte rows 24 to 31.
template <int ROWS, typename T>
__device__ inline void store(const void* shared_memory, const Args<T>& p, int row0, int token0, int tokens) {
  constexpr int QUARTER_PIECES = ROWS / 8;
  constexpr int TOKEN_PIECES = 4 * QUARTER_PIECES;
  const int n = p.N / 4;
  const T* out = (const T*)shared_memory;
  __syncthreads();
  for (int i = threadIdx.x; i < tokens * TOKEN_PIECES; i += blockDim.x) {
    const int token = i / TOKEN_PIECES;
    const int quarter = (i % TOKEN_PIECES) / QUARTER_PIECES;
    const int byte_row = (i % QUARTER_PIECES) * 8;
    if (token0 + token < p.M && row0 + byte_row < n) {
      const T* source = out + token * OUT_PITCH<ROWS> + quarter * ROWS + byte_row;
      T* y = p.Y + (size_t)(token0 + token) * p.N + quarter * n + row0 + byte_row;
      *(uint4*)y = *(const uint4*)source;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// mma
//
// A thread block computes 32 byte rows (128 weight rows) for 32, 64 or 128 tokens, in slices of 64 columns of K.
// A warp       computes 8 of the byte rows for half of the tokens: the 8 warps form a grid of 4 x 2.
// A lane       loads its 16 bytes of W straight into registers, one slice ahead. X comes from shared memory.
// Why fast     A value of X that was read from global memory serves 4 warps, and a dequantized weight serves half of
//              the tokens. X is copied in the background while the tensor cores work on earlier slices.
// When chosen  More than 16 tokens, on every GPU of sm_80 or later but Hopper.
//
//   Example: lane 9 (g = 2, c = 1) of warp 6. Warp 6 has byte rows 8 * (6 % 4) = 16 to 23 and, as 6 / 4 = 1, the second
//   half of the tokens. So this lane holds byte row 18 and, in slice 5, columns 5 * 64 + 1 * 16 = 336 to 351.
//
// The ring: shared memory has room for 4 slices of X, the stages. Slice s is in stage s % 4.
//   Example: while slice 5 (stage 1) is multiplied, slices 6 and 7 are on their way into stages 2 and 3, and slice 8 is
//   asked for. It goes into stage 0, where slice 4 was. That is safe, because all warps have finished slice 4.

#ifndef CPU_EMULATION
// Shared memory's own 32-bit addresses: the instructions below take no generic pointers.
__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Copies 16 bytes to shared memory in the background, so that no thread waits and no register is needed on the way. If
// not valid, it reads nothing and writes zeros, which add nothing to a sum.
__device__ inline void cp_async16(void* to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

// Makes a group of the copies since the last commit, because a thread waits for groups, not for single copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of the thread's groups are unfinished: the older ones can be used, the newer ones go on.
template <int PENDING> __device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif

constexpr int MMA_STAGES = 4;

// Bytes from one token to the next in a stage: 64 columns are 128, and 16 more prevent bank conflicts. Of loads of 16
// bytes, 8 lanes are served at a time, if they touch different banks: their addresses must differ modulo 128.
//   Example: lanes 0 to 7 are g = 0 and 1, c = 0 to 3, at addresses 144g + 32c: 0, 32, 64, 96 and 144, 176, 208, 240.
//   Modulo 128 the last four are 16, 48, 80, 112. With 128 bytes a token they would be 0, 32, 64, 96 again.
constexpr int X_PITCH = 144;

template <int BLOCK_TOKENS> constexpr int MMA_RING_BYTES = MMA_STAGES * BLOCK_TOKENS * X_PITCH;
template <int BLOCK_TOKENS> constexpr int MMA_OUT_BYTES = BLOCK_TOKENS * OUT_PITCH<32> * 2;
template <int BLOCK_TOKENS>  // one after the other: the outputs take the place of the ring
constexpr int MMA_SHARED_BYTES = std::max(MMA_RING_BYTES<BLOCK_TOKENS>, MMA_OUT_BYTES<BLOCK_TOKENS>);

template <typename T, int BLOCK_TOKENS>
__global__ void __launch_bounds__(256, BLOCK_TOKENS < 128 ? 2 : 1) mma_gemm(Args<T> p) {
  SHARED_MEMORY(smem);
  constexpr int STAGE_BYTES = BLOCK_TOKENS * X_PITCH;
  constexpr int TOKEN_TILES = BLOCK_TOKENS / 2 / 8;  // of a warp
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int c = lane % 4;
  const int token0 = blockIdx.x * BLOCK_TOKENS;
  const int row0 = blockIdx.y * 32;
  const int warp_row = (warp % 4) * 8;
  const int warp_token = (warp / 4) * (BLOCK_TOKENS / 2);
  const int slices = ceil_div(p.K, 64);

  const int byte_row = min(row0 + warp_row + g, p.N / 4 - 1);  // rows past the end are computed, but not stored
  const uint8_t* w_row = p.W + (size_t)byte_row * p.K;
  auto load_w = [&](int slice) {
    const int k = slice * 64 + c * 16;
    return load16(w_row + k, k < p.K);
  };

  auto copy_x = [&](int slice) {
    if (slice < slices) {
      char* stage = smem + (slice % MMA_STAGES) * STAGE_BYTES;
#pragma unroll 1  // the addresses of an unrolled loop would take up to 20 registers more
      for (int i = threadIdx.x; i < BLOCK_TOKENS * 8; i += 256) {
        const int token = i / 8;
        const int piece = i % 8;  // 8 columns, 16 bytes
        const int k = slice * 64 + piece * 8;
        const bool valid = token0 + token < p.M && k < p.K;
        const T* from = valid ? p.X + (size_t)(token0 + token) * p.K + k : p.X;
        cp_async16(stage + token * X_PITCH + piece * 16, from, valid);
      }
    }
    cp_async_commit();  // past the last slice, too, so that the wait below counts as many groups as before
  };

  float acc[2][TOKEN_TILES][4] = {};
  for (int slice = 0; slice < MMA_STAGES - 1; slice++) copy_x(slice);
  uint4 w_next = load_w(0);
  for (int slice = 0; slice < slices; slice++) {
    const uint4 w = w_next;
    w_next = load_w(slice + 1);
    // At most the newest 2 groups are unfinished, so this thread's copies for this slice have landed. The barrier makes
    // that true of all threads. It also says that all warps have finished the slice before.
    cp_async_wait<MMA_STAGES - 2>();
    __syncthreads();
    copy_x(slice + MMA_STAGES - 1);
    const char* x = smem + (slice % MMA_STAGES) * STAGE_BYTES + (warp_token + g) * X_PITCH + c * 32;
    auto load_x = [&](int tile, int h) { return *(const uint4*)(x + 8 * tile * X_PITCH + 16 * h); };
    multiply_64_columns<T>(acc, w, load_x);
  }

  __syncthreads();
  Output<T, 32> output(smem, p, row0, warp_row);
  UNROLL for (int fragment = 0; fragment < 2; fragment++)
    UNROLL for (int tile = 0; tile < TOKEN_TILES; tile++)
      output.put(acc[fragment][tile], fragment, warp_token + 8 * tile);
  store<32>(smem, p, row0, token0, BLOCK_TOKENS);
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma
//
// A thread block computes 32 * WARPGROUPS byte rows for TILES * TILE_TOKENS tokens, in slices of 128 columns of K.
// A warpgroup  is 4 warps, which share one wgmma: D (64 x TILE_TOKENS) += A (64 x 16) * B (16 x TILE_TOKENS).
// A warp       computes 8 byte rows for all of the block's tokens. The header's tables show its 16 rows of A and D;
//              elements 4j to 4j + 3 of D are tokens 8j to 8j + 7.
// A lane       dequantizes columns 2c, 2c+1, 2c+8 and 2c+9 of byte row g, in each step of 16 columns.
// Why fast     Only wgmma reaches the full rate of Hopper's tensor cores. It reads X from shared memory by itself, and
//              runs in the background: a step is dequantized while the two steps before are still multiplied. One
//              thread asks for whole boxes of X and W (by TMA), where mma needs all threads to ask for 16 bytes each.
// When chosen  More than 16 tokens, on Hopper.
//
//   Example: lane 9 (g = 2, c = 1) of warp 6 has byte row 6 * 8 + 2 = 50 of the block. In step 3 of a slice (columns 48
//   to 63) it holds columns 50 and 51, 58 and 59.
//
// The swizzle: every row of 128 bytes starts at bank 0. To prevent bank conflicts, TMA exchanges the 16-byte chunks
// within a row: chunk s of row i is stored as chunk s ^ (i % 8). wgmma undoes this by itself for X. For W we do it: row
// i is warp_row + g, and warp_row is a multiple of 8, so i % 8 is g.
//   Example: lane 9 reads row 50 in step 3. Chunk 3 is stored as chunk 3 ^ 2 = 1, so columns 50 and 51 (bytes 2 and 3
//   of the chunk) are at bytes 1 * 16 + 2 = 18 and 19 of the row, columns 58 and 59 at bytes 26 and 27.
//
// The ring: 4 stages, as in mma, but with two barriers a stage in place of __syncthreads. `full` completes a phase when
// a slice has landed, `empty` when all warps have finished with it. A barrier's phases are numbered 0, 1, 2, ... A wait
// names the parity (last bit) of a phase's number, and returns when that phase has completed. A new barrier is in phase
// 0, and behaves as if a phase of parity 1 had completed before. In round r of a stage
//      the reader waits for phase r of full       parity r & 1
//      the loader waits for phase r - 1 of empty  parity (r & 1) ^ 1; in round 0 that is 1, so it does not wait
//   Example: slice 9 is in stage 9 % 4 = 1, in round 9 / 4 = 2. To read it is to wait for phase 2 of full[1], parity 0.
//   To load it is to wait until slice 5, one round before, is finished: phase 1 of empty[1], parity (2 & 1) ^ 1 = 1.
//   Slices 0 to 3 are in round 0. Their parity is (0 & 1) ^ 1 = 1, so the new barriers let them pass at once.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // only nvcc's pass for sm_90a knows these instructions; the emulation has its own
// A phase completes when `count` threads have arrived and all the bytes that were announced have landed.
__device__ inline void barrier_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}

// Shows the new barriers to TMA, which would otherwise not be sure to see what this thread wrote.
__device__ inline void barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives and announces bytes: the phase must not complete before TMA has written them.
__device__ inline void barrier_expect_bytes(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}

// With a predicate instead of a branch, because ptxas serializes wgmmas that have a branch between them.
__device__ inline void barrier_arrive_if(uint64_t* bar, bool condition) {
  asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];}"
               ::"r"(shared_address(bar)), "r"((int)condition) : "memory");
}

// In a loop, because try_wait may give up early.
__device__ inline void barrier_wait(uint64_t* bar, int parity) {
  asm volatile("{.reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;}"
               ::"r"(shared_address(bar)), "r"(parity) : "memory");
}

// Copies a box of 128 bytes x the map's number of rows, swizzled, with zeros outside of the matrix. One thread asks for
// all of it, so that the other threads spend no instructions on addresses.
__device__ inline void tma_load(void* to, const CUtensorMap* map, int column, int row, uint64_t* bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3}], [%4];"
               ::"r"(shared_address(to)), "l"(map), "r"(column), "r"(row), "r"(shared_address(bar)) : "memory");
}

// Before wgmma: it runs in the background and must see the registers that were written up to here.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes a group of the wgmmas since the last commit, because waiting is for groups.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING groups are unfinished. What an unfinished wgmma reads must not be changed.
template <int PENDING> __device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Volatile, so that ptxas leaves it in front of the first wgmma; between wgmmas it would serialize them.
template <int SIZE> __device__ inline void zero(float (&d)[SIZE]) {
  UNROLL for (int i = 0; i < SIZE; i++) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[i]));
}

// How wgmma is told where B is: 64 bits with these fields, all addresses and distances in units of 16 bytes.
//      bits 0-13    address of the tile
//      bits 16-29   distance between tiles along K: not used with a swizzle, 1 by convention
//      bits 32-45   distance between groups of 8 tokens: 8 * 128 bytes = 64 units
//      bits 62-63   1: 128-byte swizzle
//   Example: a tile at address 4096 (256 = 0x100 units) has the descriptor 0x4000004000010100.
__device__ inline uint64_t descriptor(const void* tile) {
  constexpr uint64_t TILE_DISTANCE = 1ull << 16;
  constexpr uint64_t GROUP_DISTANCE = 64ull << 32;
  constexpr uint64_t SWIZZLE_128_BYTES = 1ull << 62;
  return (shared_address(tile) >> 4) | TILE_DISTANCE | GROUP_DISTANCE | SWIZZLE_128_BYTES;
}

// d (64 x TILE_TOKENS) += a (64 x 16, 16 rows a warp, in registers) * b (16 x TILE_TOKENS, in shared memory). PTX wants
// every register as an operand of its own: D_8 makes operands of eight, D_24 and D_32 are the operands' numbers. The
// last four operands mean: add to d, do not negate a, do not negate b, do not transpose b.
#define D_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D_8(i) D_4(i), D_4(i + 4)
#define D_24 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23"
#define D_32 D_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_48_PTX(TYPE)                                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32." TYPE "." TYPE                  \
               " {" D_24 "}, {%24,%25,%26,%27}, %28, 1, 1, 1, 0;"                           \
               : D_8(0), D_8(8), D_8(16)                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_64_PTX(TYPE)                                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                  \
               " {" D_32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"                           \
               : D_8(0), D_8(8), D_8(16), D_8(24)                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
template <typename T, int SIZE> __device__ inline void wgmma(float (&d)[SIZE], const uint32_t* a, uint64_t b) {
  constexpr int TILE_TOKENS = 2 * SIZE;  // 64 x TILE_TOKENS sums, shared by 128 lanes
  if constexpr (TILE_TOKENS == 48 && IS_BF16<T>) {
    WGMMA_48_PTX("bf16");
  } else if constexpr (TILE_TOKENS == 48) {
    WGMMA_48_PTX("f16");
  } else if constexpr (IS_BF16<T>) {
    WGMMA_64_PTX("bf16");
  } else {
    WGMMA_64_PTX("f16");
  }
}
#endif  // __CUDA_ARCH_FEAT_SM90_ALL

constexpr int WGMMA_STAGES = 4;

// A stage: two boxes of X, 64 columns (128 bytes) x the tokens; then one of W, 128 columns (128 bytes) x the byte rows.
template <int BLOCK_TOKENS> constexpr int X_BOX_BYTES = BLOCK_TOKENS * 128;
template <int WARPGROUPS> constexpr int W_BOX_BYTES = WARPGROUPS * 32 * 128;
template <int WARPGROUPS, int BLOCK_TOKENS>
constexpr int WGMMA_STAGE_BYTES = 2 * X_BOX_BYTES<BLOCK_TOKENS> + W_BOX_BYTES<WARPGROUPS>;
template <int WARPGROUPS, int BLOCK_TOKENS>  // 1024 for the alignment, 16 for a stage's two barriers
constexpr int WGMMA_SHARED_BYTES = 1024 + WGMMA_STAGES * (WGMMA_STAGE_BYTES<WARPGROUPS, BLOCK_TOKENS> + 16);

template <typename T, int WARPGROUPS, int TILE_TOKENS, int TILES>
__global__ void __launch_bounds__(128 * WARPGROUPS)
wgmma_gemm(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map, Args<T> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(CPU_EMULATION)
  constexpr int ROWS = 32 * WARPGROUPS;  // byte rows of the block
  constexpr int BLOCK_TOKENS = TILE_TOKENS * TILES;
  constexpr int STAGE_BYTES = WGMMA_STAGE_BYTES<WARPGROUPS, BLOCK_TOKENS>;
  constexpr int X_BOX = X_BOX_BYTES<BLOCK_TOKENS>;
  SHARED_MEMORY(raw);
  char* smem = raw + (1024 - shared_address(raw) % 1024) % 1024;  // swizzled boxes must start at multiples of 1024
  uint64_t* full = (uint64_t*)(smem + WGMMA_STAGES * STAGE_BYTES);
  uint64_t* empty = full + WGMMA_STAGES;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int c = lane % 4;
  const int token0 = blockIdx.x * BLOCK_TOKENS;
  const int row0 = blockIdx.y * ROWS;
  const int warp_row = warp * 8;
  const int slices = ceil_div(p.K, 128);

  auto load = [&](int slice) {
    const int stage = slice % WGMMA_STAGES;
    const int round = slice / WGMMA_STAGES;
    const int previous_parity = (round & 1) ^ 1;  // of the round before, in which the stage held another slice
    char* memory = smem + stage * STAGE_BYTES;
    barrier_wait(&empty[stage], previous_parity);
    barrier_expect_bytes(&full[stage], STAGE_BYTES);
    tma_load(memory, &x_map, slice * 128, token0, &full[stage]);
    tma_load(memory + X_BOX, &x_map, slice * 128 + 64, token0, &full[stage]);
    tma_load(memory + 2 * X_BOX, &w_map, slice * 128, row0, &full[stage]);
  };

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < WGMMA_STAGES; stage++) {
      barrier_init(&full[stage], 1);                // the thread that loads
      barrier_init(&empty[stage], 4 * WARPGROUPS);  // one lane of each warp
    }
    barriers_visible();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int slice = 0; slice < min(WGMMA_STAGES, slices); slice++) load(slice);
  }
  __syncwarp();

  float acc[2][TILES][TILE_TOKENS / 2];
  UNROLL for (int fragment = 0; fragment < 2; fragment++)
    UNROLL for (int tile = 0; tile < TILES; tile++) zero(acc[fragment][tile]);
  for (int slice = 0; slice < slices; slice++) {
    const int stage = slice % WGMMA_STAGES;
    const int parity = (slice / WGMMA_STAGES) & 1;
    const char* memory = smem + stage * STAGE_BYTES;
    const char* w_row = memory + 2 * X_BOX + (warp_row + g) * 128;
    const uint64_t x_descriptor = descriptor(memory);
    // [step % 4][fragment][register]. While a step is dequantized, the wgmmas of the two steps before may still read
    // theirs, so three sets are needed. There are four, because a slice has 8 steps: so the next slice goes on in turn.
    uint32_t a[4][2][4];
    barrier_wait(&full[stage], parity);
    UNROLL for (int step = 0; step < 8; step++) {  // of 16 columns
      const int chunk = step ^ g;  // the swizzle
      const uint16_t* columns = (const uint16_t*)(w_row + 16 * chunk + 2 * c);
      dequantize(columns[0] | ((uint32_t)columns[4] << 16), a[step % 4]);  // columns 2c, 2c+1 and 2c+8, 2c+9
      wgmma_fence();
      UNROLL for (int fragment = 0; fragment < 2; fragment++) {
        UNROLL for (int tile = 0; tile < TILES; tile++) {
          // Where this step's 16 columns of the tile's tokens are, in units of 16 bytes. A token's row is 8 units.
          //   Example: BLOCK_TOKENS = 128, TILE_TOKENS = 64, step 5, tile 1. Step 5 is step 1 of box 1, which starts
          //   after 128 * 8 units. So the offset is 1 * 1024 + 64 * 8 + 1 * 2 = 1538 units.
          const int box_offset = (step / 4) * (BLOCK_TOKENS * 8);
          const int token_offset = tile * TILE_TOKENS * 8;
          const int column_offset = (step % 4) * 2;
          const uint64_t b = x_descriptor + (box_offset + token_offset + column_offset);
          wgmma<T>(acc[fragment][tile], a[step % 4][fragment], b);
        }
      }
      wgmma_commit();
      wgmma_wait<2>();
      if (step == 1) {  // At most steps 0 and 1 are unfinished: nothing reads the slice before any more.
        const int previous_stage = (slice + WGMMA_STAGES - 1) % WGMMA_STAGES;
        barrier_arrive_if(&empty[previous_stage], lane == 0 && slice > 0);
      }
    }
    const int next = slice - 1 + WGMMA_STAGES;  // takes the stage of the slice before, once all warps gave it back
    if (threadIdx.x == 0 && slice > 0 && next < slices) load(next);
    __syncwarp();
  }

  wgmma_wait<0>();
  __syncthreads();
  Output<T, ROWS> output(smem, p, row0, warp_row);
  UNROLL for (int fragment = 0; fragment < 2; fragment++)
    UNROLL for (int tile = 0; tile < TILES; tile++)
      UNROLL for (int token = 0; token < TILE_TOKENS; token += 8)
        output.put(&acc[fragment][tile][token / 2], fragment, tile * TILE_TOKENS + token);
  store<ROWS>(smem, p, row0, token0, BLOCK_TOKENS);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Host: choose a kernel and a tile, and launch it

#ifndef CPU_EMULATION
template <typename... Parameters, typename... Values>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int smem, cudaStream_t stream, Values... values) {
  const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  if (!refused) kernel<<<grid, threads, smem, stream>>>(Parameters(values)...);
  const cudaError_t last = cudaGetLastError();  // in any case: an error left behind would fail torch's next kernel
  return refused ? refused : last;
}

// What TMA must know of a matrix. A box is 128 bytes x box_rows; size is an element's, 1 or 2 bytes.
inline bool make_map(CUtensorMap* map, const void* data, int rows, int columns, int box_rows, int size, bool bf16) {
  static decltype(&cuTensorMapEncodeTiled) encode = nullptr;  // from the driver, so that nothing links against libcuda
  if (!encode) {
#if CUDART_VERSION >= 12050
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", (void**)&encode, cudaEnableDefault);
#endif
  }
  if (!encode) return false;
  CUtensorMapDataType type = bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (size == 1) type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const cuuint64_t shape[2] = {(cuuint64_t)columns, (cuuint64_t)rows};
  const cuuint64_t row_bytes[1] = {(cuuint64_t)columns * size};
  const cuuint32_t box[2] = {(cuuint32_t)(128 / size), (cuuint32_t)box_rows};
  const cuuint32_t every_element[2] = {1, 1};
  const CUresult error = encode(map, type, 2, (void*)data, shape, row_bytes, box, every_element,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return !error;
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
#endif

enum Kernel { AUTO, NAIVE, SMALL_BATCH, MMA, WGMMA };  // terdit.py's KERNELS has the same order
constexpr int REFUSED = -1;

struct Tile {
  int kernel;  // MMA or WGMMA
  int rows;    // weight rows of a thread block
  int tokens;  // tokens of a thread block
};
constexpr Tile TILE_CHOICES[] = {
    {WGMMA, 256, 128}, {WGMMA, 256, 96}, {WGMMA, 256, 64}, {WGMMA, 128, 64}, {WGMMA, 128, 48},
    {MMA, 128, 128},   {MMA, 128, 64},   {MMA, 128, 32},
};

// The tile with which the GPU is done first: the number of blocks that an SM computes one after the other, times the
// cost of a block, is least. The cost of a block is rows * (tokens + 16): each weight row is multiplied by the tokens,
// and loading and dequantizing it takes as long as about 16 tokens more (an estimate; no one has measured it).
//   Example: N = 1536, M = 512 on 132 SMs.
//      128 x 48:   12 * 11 = 132 blocks, 1 an SM, cost 1 * 128 * (48 + 16)  =  8192, the least
//      128 x 64:   12 *  8 =  96 blocks, 1 an SM, cost 1 * 128 * (64 + 16)  = 10240
//      256 x 128:   6 *  4 =  24 blocks, 1 an SM, cost 1 * 256 * (128 + 16) = 36864
// `tokens` restricts the choice, unless it is 0. The result has 0 rows if there is no such tile.
inline Tile choose_tile(int kernel, int tokens, int M, int N, int sms) {
  constexpr int DEQUANTIZE_COST = 16;
  Tile best = {};
  long least = 1l << 60;
  for (Tile tile : TILE_CHOICES) {
    const bool wanted = tile.kernel == kernel && (tokens == 0 || tokens == tile.tokens);
    const int blocks = ceil_div(N, tile.rows) * ceil_div(M, tile.tokens);
    const long cost = (long)ceil_div(blocks, sms) * tile.rows * (tile.tokens + DEQUANTIZE_COST);
    if (wanted && cost < least) {
      best = tile;
      least = cost;
    }
  }
  return best;
}

template <typename T, int BLOCK_TOKENS> int launch_mma(const Args<T>& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.M, BLOCK_TOKENS), ceil_div(p.N, 128));
  return launch(mma_gemm<T, BLOCK_TOKENS>, grid, 256, MMA_SHARED_BYTES<BLOCK_TOKENS>, stream, p);
}

template <typename T, int WARPGROUPS, int TILE_TOKENS, int TILES>
int launch_wgmma(const Args<T>& p, cudaStream_t stream) {
  constexpr int TOKENS = TILE_TOKENS * TILES;
  const dim3 grid(ceil_div(p.M, TOKENS), ceil_div(p.N, 128 * WARPGROUPS));
  CUtensorMap x_map;
  CUtensorMap w_map;
  const bool x_works = make_map(&x_map, p.X, p.M, p.K, TOKENS, 2, IS_BF16<T>);
  const bool w_works = make_map(&w_map, p.W, p.N / 4, p.K, 32 * WARPGROUPS, 1, false);
  if (!x_works || !w_works) return cudaErrorNotSupported;
  const auto kernel = wgmma_gemm<T, WARPGROUPS, TILE_TOKENS, TILES>;
  return launch(kernel, grid, 128 * WARPGROUPS, WGMMA_SHARED_BYTES<WARPGROUPS, TOKENS>, stream, x_map, w_map, p);
}

inline int choose_kernel(int M, bool fits, int major) {
  if (!fits) return NAIVE;
  if (M <= 16) return SMALL_BATCH;
  return major == 9 ? WGMMA : MMA;
}

template <typename T> int run(const Args<T>& p, int kernel, int tokens, cudaStream_t stream) {
  const int sms = device_attribute(cudaDevAttrMultiProcessorCount);
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  if (sms == 0 || major < 8) return cudaErrorNoDevice;

  const bool fits = p.N % 32 == 0 && p.K % 16 == 0;  // the fast kernels take 8 byte rows and load 16 bytes
  if (kernel == AUTO) kernel = choose_kernel(p.M, fits, major);
  if (kernel == NAIVE) {
    const size_t outputs = (size_t)p.M * p.N;
    return launch(naive<T>, dim3((unsigned)((outputs + 255) / 256)), 256, 0, stream, p);
  }
  if (!fits) return REFUSED;
  if (kernel == SMALL_BATCH) {
    if (p.M <= 8) return launch(small_batch<T, 1>, dim3(p.N / 32), 256, 0, stream, p);
    if (p.M <= 16) return launch(small_batch<T, 2>, dim3(p.N / 32), 256, 0, stream, p);
    return REFUSED;
  }
  if (kernel == WGMMA && major != 9) return REFUSED;

  const Tile tile = choose_tile(kernel, tokens, p.M, p.N, sms);
  if (tile.kernel == MMA && tile.tokens == 128) return launch_mma<T, 128>(p, stream);
  if (tile.kernel == MMA && tile.tokens == 64) return launch_mma<T, 64>(p, stream);
  if (tile.kernel == MMA && tile.tokens == 32) return launch_mma<T, 32>(p, stream);
  if (tile.rows == 256 && tile.tokens == 128) return launch_wgmma<T, 2, 64, 2>(p, stream);
  if (tile.rows == 256 && tile.tokens == 96) return launch_wgmma<T, 2, 48, 2>(p, stream);
  if (tile.rows == 256 && tile.tokens == 64) return launch_wgmma<T, 2, 64, 1>(p, stream);
  if (tile.rows == 128 && tile.tokens == 64) return launch_wgmma<T, 1, 64, 1>(p, stream);
  if (tile.rows == 128 && tile.tokens == 48) return launch_wgmma<T, 1, 48, 1>(p, stream);
  return REFUSED;
}

template <typename T>
Args<T> make_args(const void* X, const void* W, const void* alpha, const void* bias, void* Y, int M, int N, int K) {
  return {(const T*)X, (const uint8_t*)W, (const float*)alpha, (const T*)bias, (T*)Y, M, N, K};
}

// The whole interface, called by terdit.py through ctypes. The pointers are the GPU's; bias may be null. kernel is one
// of the enum, tokens a tile's tokens or 0: AUTO and 0, unless the caller experiments. Returns 0, a cudaError_t, or
// REFUSED for what the kernel cannot compute.
extern "C" int ternary_linear(const void* X, const void* W, const void* alpha, const void* bias, void* Y, int M, int N,
                              int K, int bf16, int kernel, int tokens, void* stream) {
  const bool aligned = ((uintptr_t)X | (uintptr_t)W | (uintptr_t)Y) % 16 == 0;
  if (M < 1 || N < 4 || N % 4 != 0 || K < 1 || !aligned) return REFUSED;
  if (bf16) {
    return run(make_args<__nv_bfloat16>(X, W, alpha, bias, Y, M, N, K), kernel, tokens, (cudaStream_t)stream);
  }
  return run(make_args<__half>(X, W, alpha, bias, Y, M, N, K), kernel, tokens, (cudaStream_t)stream);
}
#endif  // not CPU

// ---------------------------------------------------------------------------------------------------------------------
// CPU: what stands around an int8 product
//
// terdit.py compiles this part with g++ -DCPU and calls it from int8_linear: quantize_rows, unpack, torch's integer
// matmul, then scale_rows. Each replaces several passes of PyTorch over memory by one; g++ vectorizes the loops.

#ifdef CPU
#include <math.h>
#include <string.h>

inline float to_float(float value) { return value; }
inline float to_float(uint16_t bf16) {  // the upper half of an fp32
  const uint32_t bits = (uint32_t)bf16 << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t to_bf16(float value) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits += 0x7FFF + ((bits >> 16) & 1);
  return bits >> 16;
}

// One row of x -> its levels and its scale. Returns false if x is not finite.
template <typename T> bool quantize_row(const T* x, int8_t* levels, float* scale, long K) {
  constexpr uint32_t INFINITE = 0x7F800000;  // the bits of +inf; those of NaN are greater
  // The greatest absolute value. As integers, the bits of positive floats are in the order of the floats, and those of
  // NaN are the greatest. A comparison of floats would pass over NaN.
  uint32_t greatest_bits = 0;
  for (long k = 0; k < K; k++) {
    const float value = to_float(x[k]);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits &= 0x7FFFFFFF;
    greatest_bits = bits > greatest_bits ? bits : greatest_bits;
  }
  if (greatest_bits >= INFINITE) return false;
  float greatest;
  memcpy(&greatest, &greatest_bits, 4);
  greatest = greatest > 1e-30f ? greatest : 1e-30f;
  const float inverse = 127 / greatest;
  *scale = greatest / 127;
  for (long k = 0; k < K; k++) levels[k] = (int8_t)(int)rintf(to_float(x[k]) * inverse);  // halves to even
  return true;
}

// x (M, K) fp32 or bf16 -> levels (M, K) int8 and scales (M,), so that x is about levels * scale.
// Returns 0 if x is not finite.
extern "C" int quantize_rows(const void* x, int is_bf16, int8_t* levels, float* scales, long M, long K) {
  int finite = 1;
#pragma omp parallel for reduction(&& : finite) if (M * K > (1 << 14))
  for (long m = 0; m < M; m++) {
    bool row_is_finite;
    if (is_bf16) {
      row_is_finite = quantize_row((const uint16_t*)x + m * K, levels + m * K, scales + m, K);
    } else {
      row_is_finite = quantize_row((const float*)x + m * K, levels + m * K, scales + m, K);
    }
    finite = finite && row_is_finite;
  }
  return finite;
}

// n bytes of W -> 4n weights of -1, 0 and 1: those of quarter 0, then those of quarters 1, 2 and 3.
extern "C" void unpack(const uint8_t* W, int8_t* codes, long n) {
#pragma omp parallel for simd if (parallel : n > (1 << 14))
  for (long i = 0; i < n; i++) {
    const uint8_t byte = W[i];
    codes[i] = (byte >> 6) - 1;
    codes[n + i] = ((byte >> 4) & 3) - 1;
    codes[2 * n + i] = ((byte >> 2) & 3) - 1;
    codes[3 * n + i] = (byte & 3) - 1;
  }
}

// sums (M, N) int32 -> y (M, N) bf16: sums * (scale of the row of x * alpha) + bias (N), which may be null
extern "C" void scale_rows(const int32_t* sums, const float* scales, float alpha, const float* bias, uint16_t* y,
                           long M, long N) {
#pragma omp parallel for if (M * N > (1 << 14))
  for (long m = 0; m < M; m++) {
    const float scale = scales[m] * alpha;
    const int32_t* from = sums + m * N;
    uint16_t* to = y + m * N;
    if (bias) {
      for (long i = 0; i < N; i++) to[i] = to_bf16(from[i] * scale + bias[i]);
    } else {
      for (long i = 0; i < N; i++) to[i] = to_bf16(from[i] * scale);
    }
  }
}

extern "C" void small_rows(const float* x, const uint8_t* W, float alpha, const float* bias, float* y, long M, long K, long n) {
  for (long m = 0; m < M; m++) for (long r = 0; r < n; r++) {
    float s[4] = {0,0,0,0};
    for (long k = 0; k < K; k++) { int b = W[r*K+k]; float v = x[m*K+k];
      s[0] += ((b>>6)-1)*v; s[1] += (((b>>4)&3)-1)*v; s[2] += (((b>>2)&3)-1)*v; s[3] += ((b&3)-1)*v; }
    for (int q = 0; q < 4; q++) y[m*4*n + q*n + r] = s[q]*alpha + (bias ? bias[q*n+r] : 0);
  }
}
#endif
