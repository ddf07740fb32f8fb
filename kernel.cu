// Ternary linear layer:  Y[M,N] = alpha * X[M,K] @ W[N,K]^T + bias[N],  W in {-1, 0, +1}
//
// M counts tokens (rows of X and Y), K input features, N output features (weight rows). X, Y and
// bias are bf16, alpha is one fp32 number, sums are fp32.
//
// W is stored in 2 bits a weight, as in the checkpoint: (N/4, K) bytes. Let n = N/4. Byte [r, k]
// holds column k of four weight rows, one from each quarter of W, as the codes weight + 1:
//
//      bits         7-6     5-4     3-2     1-0
//      weight row    r      n+r    2n+r    3n+r
//      quarter       0       1       2       3
//
//   Example: N = 32, so n = 8. Byte [3, 5] = 0b10010010 holds W[3,5] = 1, W[11,5] = 0,
//   W[19,5] = -1 and W[27,5] = 1.
// A "byte row" is a row of these bytes: four weight rows.
//
// The kernels, in the order of this file:
//   naive        one thread computes one output
//   small_batch  up to 16 tokens, where reading the weights takes most of the time
//   mma          tensor cores of sm_80 and later
//   wgmma        tensor cores of Hopper, sm_90a
// The host's part chooses (ternary_linear). A first evening ends with small_batch, a second with
// mma and the host's part. No GPU has timed them yet: "why fast" says what is expected.
#include <stdint.h>

#ifndef CPU  // With -DCPU only the last section is compiled, by g++.
#ifdef CPU_EMULATION
// To test without a GPU: C++ for CUDA's headers and for what is #ifndef CPU_EMULATION. (terdit.py
// runs the last section on a CPU.)
#include "tests/cpu_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#define SHARED_MEMORY(name) extern __shared__ __align__(1024) char name[]
#endif

using bf16 = __nv_bfloat16;

// For arrays in registers: these have no addresses, only names.
#define UNROLL _Pragma("unroll")

struct Args {
  const bf16* X;       // (M, K)
  const uint8_t* W;    // (N/4, K), four weights in a byte
  const float* alpha;  // (1,)
  const bf16* bias;    // (N,), or null for none
  bf16* Y;             // (M, N)
  int M;               // tokens
  int N;               // output features
  int K;               // input features
};

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// -------------------------------------------------------------------------------------------------
// naive
//
// One thread computes one output. It takes any size, and reads all of W for each token. AUTO
// chooses it only where the others cannot be used: N is not a multiple of 32, or K not of 16.
//
//   Example: N = 20, so n = 5. Thread 33 computes token 33 / 20 = 1, weight row 33 % 20 = 13. That
//   is byte row 13 % 5 = 3, quarter 13 / 5 = 2. Its codes are in bits 3-2: they are shifted down by
//   2.

__global__ void naive(Args p) {
  const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (size_t)p.M * p.N) return;
  const int n = p.N / 4;
  const int row = i % p.N;
  const int quarter = row / n;
  const int byte_row = row % n;
  const int shift = 6 - 2 * quarter;
  const bf16* x = p.X + (i / p.N) * p.K;
  const uint8_t* bytes = p.W + (size_t)byte_row * p.K;
  float sum = 0;
  for (int k = 0; k < p.K; k++) {
    const int weight = ((bytes[k] >> shift) & 3) - 1;
    sum += __bfloat162float(x[k]) * weight;
  }
  const float bias = p.bias ? __bfloat162float(p.bias[row]) : 0;
  p.Y[i] = __float2bfloat16_rn(sum * *p.alpha + bias);
}

// -------------------------------------------------------------------------------------------------
// What a lane holds of the tensor core instruction
//
// The fast kernels compute Y^T = W X^T. Then W is the first operand (A) of the tensor core
// instruction. A may lie in registers, so no dequantized weight is ever written to memory. X is the
// second operand (B), Y^T the result (D).
//
// The 32 lanes of a warp share the operands of D (16 x 8) += A (16 x 16) * B (16 x 8). Let
// g = lane / 4 and c = lane % 4 (the PTX manual: groupID, threadID_in_group). The manual's tables:
//
//      A, 16 rows x 16 columns     columns 2c, 2c+1    columns 2c+8, 2c+9
//          row g                      register 0           register 2         two weights each
//          row g + 8                  register 1           register 3
//      B, 16 columns x 8 tokens    columns 2c, 2c+1    columns 2c+8, 2c+9
//          token g                    register 0           register 1         two values of X each
//      D, 16 rows x 8 tokens          token 2c             token 2c+1
//          row g                      element 0            element 1          one fp32 sum each
//          row g + 8                  element 2            element 3
//
// How W becomes A: 8 byte rows are 32 weight rows, and A has 16, so they fill two matrices A,
// called fragments. For each 16 columns a lane reads 4 bytes of byte row g and uses them in both:
//
//      fragment 0:  row g is quarter 0 of byte row g, row g + 8 is quarter 1
//      fragment 1:  row g is quarter 2 of byte row g, row g + 8 is quarter 3
//
//   Example: lane 9 is g = 2, c = 1. Of A it holds rows 2 and 10, columns 2, 3, 10 and 11; of D
//   these rows' sums for tokens 2 and 3. In fragment 1 row 10 is quarter 3 of byte row 2, so
//   element 3 is Y[3, 3n + 2].

// -------------------------------------------------------------------------------------------------
// dequantize: from packed bytes to bf16
//
// No integer is converted: the inverted code becomes a float's top 2 bits, its sign and its highest
// exponent bit. All other bits are 0. The float is then twice the weight:
//
//      weight   code   inverted   sign, exponent   bf16
//        -1      00       11         -, 10..0      0xC000 = -2
//         0      01       10         -, 00..0      0x8000 = -0
//        +1      10       01         +, 10..0      0x4000 = +2
//
// So a shift and a mask dequantize, and alpha / 2 makes up for the 2.
//
//   Example: byte 0b10010010 holds +1, 0, -1, +1. Inverted it is 0x6D; atop 16 bits, 0x6D00.
//      quarter 0:  (0x6D00 << 0) & 0xC000 = 0x4000 = +2
//      quarter 1:  (0x6D00 << 2) & 0xC000 = 0x8000 = -0
//      quarter 2:  (0x6D00 << 4) & 0xC000 = 0xC000 = -2
//
// A register holds two weights, one in each half. So two bytes are shifted together, each from the
// top of its half; bits that cross into the upper half are masked away.

// Each hexadecimal digit of __byte_perm's selector chooses a byte of the result, the last digit the
// lowest: 0 to 3 is a byte of x (0 its lowest), 4 is zero.
//   Example: of x = 0xDDCCBBAA, selector 0x1404 makes 0xBB00AA00.
constexpr uint32_t BYTES_0_AND_1_ON_TOP = 0x1404;
constexpr uint32_t BYTES_2_AND_3_ON_TOP = 0x3424;
constexpr uint32_t TOP_2_BITS_OF_HALVES = 0xC000C000;

// One lane's 4 bytes -> its registers of both fragments, a[fragment][register]. Bytes 0 and 1 of
// `word` become columns 2c and 2c+1 of A, bytes 2 and 3 columns 2c+8 and 2c+9.
__device__ inline void dequantize(uint32_t word, uint32_t (&a)[2][4]) {
  const uint32_t pairs[2] = {__byte_perm(~word, 0, BYTES_0_AND_1_ON_TOP),
                             __byte_perm(~word, 0, BYTES_2_AND_3_ON_TOP)};
  UNROLL for (int quarter = 0; quarter < 4; quarter++) {
    const int fragment = quarter / 2;
    const int lower_row = quarter % 2;  // 0: row g, 1: row g + 8
    UNROLL for (int pair = 0; pair < 2; pair++)
      a[fragment][2 * pair + lower_row] = (pairs[pair] << (2 * quarter)) & TOP_2_BITS_OF_HALVES;
  }
}

// -------------------------------------------------------------------------------------------------
// What small_batch and mma share: a warp multiplies 8 byte rows by 64 columns of X

#ifndef CPU_EMULATION
// d (16 x 8) += a (16 x 16) * b (16 x 8), by a whole warp. In PTX, because CUDA's C++ interface
// (wmma) does not say which lane holds which element.
__device__ inline void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// 16 bytes in one load, or zeros outside of the matrix.
__device__ inline uint4 load16(const void* source, bool valid) {
  return valid ? *(const uint4*)source : uint4{0, 0, 0, 0};
}

// acc += (8 byte rows x 64 columns) * (64 columns x TOKEN_TILES tiles of 8 tokens). A lane hands in
//   w                16 bytes of byte row g, its columns 16c to 16c + 15
//   load_x(tile, h)  X at token 8 * tile + g: the first (h = 0) or last (h = 1) 8 of these columns
//
// The instruction wants pairs of columns that lie apart, but a load of 16 bytes brings neighbours.
// A sum may take its terms in any order, so a lane takes 16 neighbours, and we number the columns
// anew, in W and X alike:
//
//      instruction's column     2c       2c+1      2c+8      2c+9        from
//      real column, step 0      16c      16c+1     16c+2     16c+3       w.x; h = 0: x.x, x.y
//                   step 1      16c+4    16c+5     16c+6     16c+7       w.y;        x.z, x.w
//                   step 2      16c+8    16c+9     16c+10    16c+11      w.z; h = 1: x.x, x.y
//                   step 3      16c+12   16c+13    16c+14    16c+15      w.w;        x.z, x.w
//
//   Example: lane 9 (g = 2, c = 1). In step 0 its real columns 16, 17, 18 and 19 stand where the
//   instruction has 2, 3, 10 and 11.
template <int TOKEN_TILES, typename LoadX>
__device__ inline void multiply_64_columns(float (&acc)[2][TOKEN_TILES][4], uint4 w, LoadX load_x) {
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
  UNROLL for (int h = 0; h < 2; h++) {
    uint32_t a_first[2][4];
    uint32_t a_second[2][4];
    dequantize(words[2 * h], a_first);
    dequantize(words[2 * h + 1], a_second);
    UNROLL for (int tile = 0; tile < TOKEN_TILES; tile++) {
      const uint4 x = load_x(tile, h);
      UNROLL for (int fragment = 0; fragment < 2; fragment++) {
        mma(acc[fragment][tile], a_first[fragment], x.x, x.y);
        mma(acc[fragment][tile], a_second[fragment], x.z, x.w);
      }
    }
  }
}

// -------------------------------------------------------------------------------------------------
// What small_batch, mma and wgmma share: from the sums in registers to outputs
//
// acc holds this lane's sums, [fragment][tile of 8 tokens][element of D], for one byte row. Each
// becomes an output, and store(token, quarter, output) puts it where the kernel wants it.
//   Example: lane 9 (g = 2, c = 1), tile 2, right = 1 is token 8 * 2 + 2 * 1 + 1 = 19 of the tiles.
template <int TOKEN_TILES, typename Store>
__device__ inline void for_each_output(const float (&acc)[2][TOKEN_TILES][4], const Args& p,
                                       int byte_row, Store store) {
  const int n = p.N / 4;
  const int c = threadIdx.x % 4;
  const float scale = *p.alpha / 2;  // because dequantized weights are -2, 0 and 2
  float bias[4] = {};
  UNROLL for (int quarter = 0; quarter < 4; quarter++)
    if (p.bias && byte_row < n) bias[quarter] = __bfloat162float(p.bias[quarter * n + byte_row]);
  UNROLL for (int tile = 0; tile < TOKEN_TILES; tile++)
    UNROLL for (int right = 0; right < 2; right++)
      UNROLL for (int quarter = 0; quarter < 4; quarter++) {
        const float sum = acc[quarter / 2][tile][2 * (quarter % 2) + right];
        const bf16 y = __float2bfloat16_rn(sum * scale + bias[quarter]);
        store(8 * tile + 2 * c + right, quarter, y);
      }
}

// -------------------------------------------------------------------------------------------------
// small_batch
//
// A block      computes 8 byte rows (32 weight rows) for all tokens, in 1 or 2 tiles of 8 tokens.
// A warp       takes 64 columns out of each 512; warp w starts at column 64w. At the end the sums
//              of the 8 warps are added.
// A lane       loads 16 bytes of byte row g at a time.
// Why fast     Expected: the time is that of reading W, 1/8 of its size in bf16. Each warp asks for
//              its next bytes before it uses the present ones, so many reads are on their way.
// When chosen  Up to 16 tokens: adaLN's projections have one token an image.
//
//   Example: lane 9 (g = 2, c = 1) of warp 3 in block 5 works on byte row 5 * 8 + 2 = 42. It loads
//   columns 3 * 64 + 1 * 16 = 208 to 223, then 720 to 735 and so on.

template <int TOKEN_TILES> __global__ void __launch_bounds__(256) small_batch(Args p) {
  constexpr int WARPS = 8;
  constexpr int STEP = WARPS * 64;  // columns that the block covers at a time
  __shared__ float sums[WARPS][2][TOKEN_TILES][4][32];  // [warp][fragment][tile][element][lane]
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int c = lane % 4;
  const int row0 = blockIdx.x * 8;  // first byte row of the block
  const int column0 = warp * 64;    // first column of the warp
  const uint8_t* w_row = p.W + (size_t)(row0 + g) * p.K;

  float acc[2][TOKEN_TILES][4] = {};
  uint4 w_next = load16(w_row + column0 + c * 16, column0 + c * 16 < p.K);
  for (int column = column0; column < p.K; column += STEP) {  // mma needs all lanes
    const int k = column + c * 16;
    const uint4 w = w_next;
    w_next = load16(w_row + k + STEP, k + STEP < p.K);
    auto load_x = [&](int tile, int h) {
      const int token = 8 * tile + g;
      return load16(p.X + (size_t)token * p.K + k + 8 * h, token < p.M && k < p.K);
    };
    multiply_64_columns(acc, w, load_x);
  }

  UNROLL for (int fragment = 0; fragment < 2; fragment++)
    UNROLL for (int tile = 0; tile < TOKEN_TILES; tile++)
      UNROLL for (int element = 0; element < 4; element++)
        sums[warp][fragment][tile][element][lane] = acc[fragment][tile][element];
  __syncthreads();

  if (warp >= TOKEN_TILES) return;
  const int tile = warp;  // one warp adds all sums of a tile
  float total[2][1][4] = {};
  for (int w = 0; w < WARPS; w++)
    UNROLL for (int fragment = 0; fragment < 2; fragment++)
      UNROLL for (int element = 0; element < 4; element++)
        total[fragment][0][element] += sums[w][fragment][tile][element][lane];
  for_each_output(total, p, row0 + g, [&](int tile_token, int quarter, bf16 y) {
    const int token = 8 * tile + tile_token;
    if (token < p.M) p.Y[(size_t)token * p.N + quarter * (p.N / 4) + row0 + g] = y;
  });
}

// -------------------------------------------------------------------------------------------------
// What mma and wgmma share: boxes in shared memory
//
// A box has 128 bytes (64 columns of X, or 128 of W) of some tokens or byte rows, its lines. Shared
// memory has 32 banks, each a word of 4 bytes wide. Lanes that read different words of one bank
// wait for each other. A line is all banks once, so a column is in the same banks in every line.
// The swizzle moves it: chunk s (16 bytes) of line i is stored as chunk s ^ (i % 8).
//
// Loads of 16 bytes serve 8 lanes at a time. mma's lanes 0 to 7 have tokens g = 0 and 1, and read
// their chunks 2c + h:
//
//      h = 0, lane               0    1    2    3    4    5    6    7
//      token g                   0    0    0    0    1    1    1    1
//      chunk without swizzle     0    2    4    6    0    2    4    6    twice the time
//      chunk with swizzle        0    2    4    6    1    3    5    7    each bank once

#ifndef CPU_EMULATION
// Shared memory's own 32-bit address, which the instructions below take.
__device__ inline uint32_t shared_address(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

// Copies 16 bytes to shared memory in the background: no thread waits, and no register is needed.
// If not valid, it reads nothing and writes zeros, which add nothing to a sum.
__device__ inline void cp_async16(void* to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

// Makes a group of the copies since the last commit: a thread waits for groups, not for copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of the thread's groups are unfinished, the newest ones.
template <int PENDING> __device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif

// Copies a box in the background, by all threads of the block: from line line0 and byte byte0 of a
// matrix of lines x line_bytes. What is outside becomes 0. The template makes the loop unrolled.
template <int THREADS, int BOX_LINES>
__device__ inline void copy_box(char* to, const void* matrix, int lines, int line_bytes, int line0,
                                int byte0) {
  const int chunk = threadIdx.x % 8;
  const int byte = byte0 + 16 * chunk;
  UNROLL for (int first = 0; first < BOX_LINES; first += THREADS / 8) {
    const int line = first + threadIdx.x / 8;
    const bool valid = line0 + line < lines && byte < line_bytes;
    const size_t offset = valid ? (size_t)(line0 + line) * line_bytes + byte : 0;
    cp_async16(to + 128 * line + 16 * (chunk ^ (line % 8)), (const char*)matrix + offset, valid);
  }
}

// -------------------------------------------------------------------------------------------------
// What mma and wgmma share: from the sums to Y in whole sectors
//
// Memory is written in sectors of 32 bytes. A lane has single outputs of 2 bytes, a warp 16 bytes
// of a token's quarter. So all warps first put their outputs into the ring, which is free now. Then
// a lane stores 16 bytes, a chunk, and the next lane the next chunk.
//
// A token has CHUNKS chunks in the ring, swizzled as in a box.
//   Example: 32 byte rows in the block, so 16 chunks. The warp of byte rows 16 to 23 puts quarter 1
//   of token 3 into chunk 1 * 4 + 16 / 8 = 6, stored as chunk 6 ^ 3 = 5.
template <int THREADS, int TOKENS, int ROWS, int TOKEN_TILES>
__device__ inline void write_outputs(const float (&acc)[2][TOKEN_TILES][4], const Args& p,
                                     char* smem, int row0, int token0, int warp_row,
                                     int warp_token) {
  constexpr int QUARTER_CHUNKS = ROWS / 8;
  constexpr int CHUNKS = 4 * QUARTER_CHUNKS;
  const int n = p.N / 4;
  const int g = threadIdx.x % 32 / 4;
  auto chunk_address = [&](int token, int chunk) {
    return smem + 16 * (token * CHUNKS + (chunk ^ (token % 8)));
  };

  __syncthreads();  // all warps have read their last slice
  for_each_output(acc, p, row0 + warp_row + g, [&](int tile_token, int quarter, bf16 y) {
    const int chunk = quarter * QUARTER_CHUNKS + warp_row / 8;
    ((bf16*)chunk_address(warp_token + tile_token, chunk))[g] = y;
  });
  __syncthreads();
  for (int i = threadIdx.x; i < TOKENS * CHUNKS; i += THREADS) {
    const int token = token0 + i / CHUNKS;
    const int chunk = i % CHUNKS;
    const int quarter = chunk / QUARTER_CHUNKS;
    const int byte_row = row0 + 8 * (chunk % QUARTER_CHUNKS);
    if (token >= p.M || byte_row >= n) continue;
    bf16* y = p.Y + (size_t)token * p.N + quarter * n + byte_row;
    *(uint4*)y = *(uint4*)chunk_address(i / CHUNKS, chunk);
  }
}

// -------------------------------------------------------------------------------------------------
// mma
//
// A block      computes 32 byte rows (128 weight rows) for 32, 64 or 128 tokens, in slices of 64
//              columns.
// A warp       computes 8 byte rows for half of the tokens: 8 warps are a grid of 4 x 2.
// A lane       loads its 16 bytes of W straight into registers, one slice ahead. X comes from
//              shared memory.
// Why fast     Expected: a value of X that was read from global memory serves 4 warps, and a
//              dequantized weight half of the tokens.
// When chosen  More than 16 tokens, on every GPU from sm_80 on but Hopper.
//
//   Example: lane 9 (g = 2, c = 1) of warp 6 has byte row 8 * (6 % 4) + 2 = 18, the second half of
//   the tokens (6 / 4 = 1) and, in slice 5, columns 5 * 64 + 1 * 16 = 336 to 351.
//
// The ring: shared memory has room for 4 slices of X, the stages. Slice s is in stage s % 4. Below,
// [1] is multiplied, >4 is asked for at that time, other slices are on their way or have landed.
//
//      time       stage 0   stage 1   stage 2   stage 3
//      slice 0      [0]        1         2        >3
//      slice 1      >4        [1]        2         3        slice 4 takes the place of slice 0
//      slice 2       4        >5        [2]        3
//      slice 3       4         5        >6        [3]
//
// Stage 0 is reloaded in slice 1, not at the end of slice 0: only the barrier of slice 1 tells a
// warp that all others have finished slice 0.

constexpr int STAGES = 4;

// Blocks of 128 tokens that an SM must hold at once, so that one multiplies while another waits.
// With 2, ptxas keeps a thread within 128 registers. From sm_90 on it would spill some.
#if __CUDA_ARCH__ < 900
constexpr int BLOCKS_OF_128 = 2;
#else
constexpr int BLOCKS_OF_128 = 1;
#endif

template <int BLOCK_TOKENS>
__global__ void __launch_bounds__(256, BLOCK_TOKENS < 128 ? 2 : BLOCKS_OF_128) mma_gemm(Args p) {
  SHARED_MEMORY(smem);
  constexpr int STAGE_BYTES = BLOCK_TOKENS * 128;
  constexpr int AHEAD = STAGES - 1;  // while slice s is multiplied, slice s + AHEAD is asked for
  constexpr int TOKEN_TILES = BLOCK_TOKENS / 2 / 8;  // of a warp
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int c = threadIdx.x % 4;
  const int token0 = blockIdx.x * BLOCK_TOKENS;
  const int row0 = blockIdx.y * 32;
  const int warp_row = (warp % 4) * 8;
  const int warp_token = (warp / 4) * (BLOCK_TOKENS / 2);
  const int slices = ceil_div(p.K, 64);

  // Rows past the end are computed, but not stored.
  const int byte_row = min(row0 + warp_row + g, p.N / 4 - 1);
  const uint8_t* w_row = p.W + (size_t)byte_row * p.K;
  auto load_w = [&](int slice) {
    const int k = slice * 64 + c * 16;
    return load16(w_row + k, k < p.K);
  };

  auto copy_x = [&](int slice) {
    char* stage = smem + (slice % STAGES) * STAGE_BYTES;
    if (slice < slices)
      copy_box<256, BLOCK_TOKENS>(stage, p.X, p.M, 2 * p.K, token0, slice * 128);
    cp_async_commit();  // past the last slice, too: the wait below counts groups
  };

  float acc[2][TOKEN_TILES][4] = {};
  for (int slice = 0; slice < AHEAD; slice++) copy_x(slice);
  uint4 w_next = load_w(0);
  for (int slice = 0; slice < slices; slice++) {
    const uint4 w = w_next;
    w_next = load_w(slice + 1);
    // At most the newest 2 groups are unfinished: this thread's copies for this slice have landed.
    // The barrier says so of all threads, and that all warps have finished the slice before.
    cp_async_wait<AHEAD - 1>();
    __syncthreads();
    copy_x(slice + AHEAD);
    const char* x = smem + (slice % STAGES) * STAGE_BYTES + (warp_token + g) * 128;
    auto load_x = [&](int tile, int h) {
      const int chunk = (2 * c + h) ^ g;  // the swizzle: the token's number modulo 8 is g
      return *(const uint4*)(x + 8 * tile * 128 + 16 * chunk);
    };
    multiply_64_columns(acc, w, load_x);
  }

  write_outputs<256, BLOCK_TOKENS, 32>(acc, p, smem, row0, token0, warp_row, warp_token);
}

// =================================================================================================
// wgmma: for a third evening
//
// It computes what mma computes, and may be skipped: the host's part comes next. What is new: the
// tensor cores read X from shared memory by themselves, and they multiply in the background.
//
// A block      computes 32 * WARPGROUPS byte rows for 64 * TILES tokens, in slices of 128 columns.
// A warpgroup  is 4 warps, which share one wgmma: D (64 x 64) += A (64 x 16) * B (16 x 64).
// A warp       computes 8 byte rows for all tokens of the block. The tables of lanes show its 16
//              rows of A and D; elements 4j to 4j + 3 of D are tokens 8j to 8j + 7.
// A lane       dequantizes columns 2c, 2c+1, 2c+8 and 2c+9 of byte row g, in steps of 16 columns.
// Why fast     Expected: only wgmma reaches the full rate of Hopper's tensor cores.
// When chosen  More than 16 tokens, on Hopper.
//
//   Example: lane 9 (g = 2, c = 1) of warp 6 has byte row 6 * 8 + 2 = 50 of the block. In step 3 of
//   a slice (columns 48 to 63) it holds columns 50 and 51, 58 and 59.
//
// The swizzle: wgmma undoes it by itself for X. For W we do it.
//   Example: lane 9 reads byte row 50 in step 3. Chunk 3 is stored as chunk 3 ^ (50 % 8) = 1, so
//   columns 50 and 51 are bytes 16 + 2 = 18 and 19 of the line.
//
// What is late: when a step is dequantized, the wgmmas of the two steps before may be unfinished.
// If a warp waited for them, the tensor cores would run out of work. What they read must stay as it
// is:
//   - their registers. Three sets are needed; there are four, because a slice has 8 steps and so
//     begins with the same set.
//   - their slice of X. At the barrier of slice 2 all warps have waited for slice 0's wgmmas, but
//     the last two steps of slice 1 may be unfinished, (1) below. So stage 0 is reloaded, not
//     stage 1, a slice later than in mma. A stage has X and W here.
//
//      time       stage 0   stage 1   stage 2   stage 3
//      slice 2      >4        (1)       [2]        3
//      slice 3       4        >5        (2)       [3]

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // only sm_90a knows these instructions; the emulation has its own
// Makes what this thread has copied visible to wgmma, which might read what was there before.
__device__ inline void show_copies_to_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Before wgmma, so that it sees the registers that were written up to here.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Commit and wait make and await groups, as for copies.
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> __device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Volatile, so that ptxas leaves it before the first wgmma. Between wgmmas it would serialize them.
__device__ inline void set_zero(float& sum) { asm volatile("mov.f32 %0, 0f00000000;" : "=f"(sum)); }

// Where B is: 64 bits with these fields, addresses and distances in units of 16 bytes.
//      bits 0-13    address of the tile
//      bits 16-29   distance between tiles along K: not used with a swizzle, 1 by convention
//      bits 32-45   distance between groups of 8 tokens: 8 * 128 bytes = 64 units
//      bits 62-63   1: 128-byte swizzle
__device__ inline uint64_t descriptor(const void* tile) {
  return (shared_address(tile) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// d (64 x 64) += a (64 x 16, in registers) * b (16 x 64, in shared memory). PTX wants every
// register as an operand of its own: d is 8 tiles of 8 tokens, 4 elements each. The last four
// operands: add to d, negate neither a nor b, do not transpose b.
#define D_TILE(tile) "+f"(d[tile][0]), "+f"(d[tile][1]), "+f"(d[tile][2]), "+f"(d[tile][3])
__device__ inline void wgmma(float (*d)[4], const uint32_t* a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
               "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
               "{%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
               : D_TILE(0), D_TILE(1), D_TILE(2), D_TILE(3),
                 D_TILE(4), D_TILE(5), D_TILE(6), D_TILE(7)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif  // __CUDA_ARCH_FEAT_SM90_ALL

constexpr int TILE_TOKENS = 64;  // of one wgmma

template <int WARPGROUPS, int TILES> struct WgmmaBlock {
  static constexpr int ROWS = 32 * WARPGROUPS;  // byte rows
  static constexpr int TOKENS = TILE_TOKENS * TILES;
  // A stage: two boxes of X, each 64 columns; then one of W, 128 columns.
  static constexpr int X_BOX_BYTES = 128 * TOKENS;
  static constexpr int STAGE_BYTES = 2 * X_BOX_BYTES + 128 * ROWS;
  static constexpr int SHARED_BYTES = 1024 + STAGES * STAGE_BYTES;  // 1024 for the alignment
};

template <int WARPGROUPS, int TILES>
__global__ void __launch_bounds__(128 * WARPGROUPS) wgmma_gemm(Args p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(CPU_EMULATION)
  using Block = WgmmaBlock<WARPGROUPS, TILES>;
  constexpr int THREADS = 128 * WARPGROUPS;
  constexpr int AHEAD = STAGES - 2;  // while slice s is multiplied, slice s + AHEAD is asked for
  SHARED_MEMORY(raw);
  // Swizzled boxes must start at multiples of 1024.
  char* smem = raw + (1024 - shared_address(raw) % 1024) % 1024;
  const int g = threadIdx.x % 32 / 4;
  const int c = threadIdx.x % 4;
  const int token0 = blockIdx.x * Block::TOKENS;
  const int row0 = blockIdx.y * Block::ROWS;
  const int warp_row = threadIdx.x / 32 * 8;
  const int slices = ceil_div(p.K, 128);

  auto load = [&](int slice) {
    char* stage = smem + (slice % STAGES) * Block::STAGE_BYTES;
    if (slice < slices) {
      char* x_box_1 = stage + Block::X_BOX_BYTES;
      char* w_box = x_box_1 + Block::X_BOX_BYTES;
      copy_box<THREADS, Block::TOKENS>(stage, p.X, p.M, 2 * p.K, token0, 256 * slice);
      copy_box<THREADS, Block::TOKENS>(x_box_1, p.X, p.M, 2 * p.K, token0, 256 * slice + 128);
      copy_box<THREADS, Block::ROWS>(w_box, p.W, p.N / 4, p.K, row0, 128 * slice);
    }
    cp_async_commit();  // past the last slice, too
  };

  float acc[2][Block::TOKENS / 8][4];
  UNROLL for (int fragment = 0; fragment < 2; fragment++)
    UNROLL for (int tile = 0; tile < Block::TOKENS / 8; tile++)
      UNROLL for (int element = 0; element < 4; element++) set_zero(acc[fragment][tile][element]);
  for (int slice = 0; slice < AHEAD; slice++) load(slice);
  uint32_t a[4][2][4];  // [step % 4][fragment][register]
  for (int slice = 0; slice < slices; slice++) {
    // This thread's copies for this slice have landed. The barrier says so of all threads, and that
    // the wgmmas of slice - 2 have finished in all warps.
    cp_async_wait<AHEAD - 1>();
    show_copies_to_wgmma();
    __syncthreads();
    load(slice + AHEAD);
    const char* stage = smem + (slice % STAGES) * Block::STAGE_BYTES;
    const char* w_row = stage + 2 * Block::X_BOX_BYTES + (warp_row + g) * 128;
    const uint64_t x_descriptor = descriptor(stage);
    UNROLL for (int step = 0; step < 8; step++) {  // of 16 columns
      const int chunk = step ^ g;  // the swizzle
      const uint16_t* columns = (const uint16_t*)(w_row + 16 * chunk + 2 * c);
      const uint32_t word = columns[0] | ((uint32_t)columns[4] << 16);  // 2c, 2c+1 and 2c+8, 2c+9
      dequantize(word, a[step % 4]);
      wgmma_fence();
      UNROLL for (int fragment = 0; fragment < 2; fragment++) {
        UNROLL for (int tile = 0; tile < TILES; tile++) {
          // Where this step's 16 columns of X are, in units of 16 bytes. A line has 8.
          //   Example: 128 tokens, step 5, tile 1: 1 * 1024 + 64 * 8 + 1 * 2 = 1538 units.
          const int box_offset = (step / 4) * (Block::TOKENS * 8);
          const int token_offset = tile * TILE_TOKENS * 8;
          const int column_offset = (step % 4) * 2;
          const uint64_t b = x_descriptor + (box_offset + token_offset + column_offset);
          wgmma(&acc[fragment][8 * tile], a[step % 4][fragment], b);
        }
      }
      wgmma_commit();
      wgmma_wait<2>();
    }
  }

  wgmma_wait<0>();
  write_outputs<THREADS, Block::TOKENS, Block::ROWS>(acc, p, smem, row0, token0, warp_row, 0);
#endif
}

// -------------------------------------------------------------------------------------------------
// Host: check, choose, launch

#ifndef CPU_EMULATION
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int launch(void (*kernel)(Args), dim3 grid, int threads, int smem, cudaStream_t stream,
                  const Args& p) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  kernel<<<grid, threads, smem, stream>>>(p);
  return cudaGetLastError();  // if the attribute was refused, so is the launch
}
#endif

enum Kernel { AUTO, NAIVE, SMALL_BATCH, MMA, WGMMA };  // terdit.py's KERNELS has the same order
constexpr int REFUSED = -1;

struct Tile {
  int kernel;
  int rows;        // weight rows of a thread block
  int tokens;      // tokens of a thread block
  int efficiency;  // percent of the largest tile's speed, while all SMs are busy
  void (*function)(Args);
  int threads;
  int shared_bytes;
};
// The efficiencies are guesses: no GPU has timed them. wgmma's small tile reads twice the bytes for
// a product. mma's tiles execute 3.5, 5.4 and 8.7 instructions for each mma (sm_80's SASS).
constexpr Tile TILE_CHOICES[] = {
    {WGMMA, 256, 128, 100, wgmma_gemm<2, 2>, 256, WgmmaBlock<2, 2>::SHARED_BYTES},
    {WGMMA, 128, 64, 70, wgmma_gemm<1, 1>, 128, WgmmaBlock<1, 1>::SHARED_BYTES},
    {MMA, 128, 128, 100, mma_gemm<128>, 256, STAGES * 128 * 128},
    {MMA, 128, 64, 90, mma_gemm<64>, 256, STAGES * 64 * 128},
    {MMA, 128, 32, 70, mma_gemm<32>, 256, STAGES * 32 * 128},
};

// The tile that should finish first. The SMs take one block each, then the next ones: such a round
// lasts as long as a block, even if few blocks are left for it. `tokens` restricts the choice,
// unless it is 0. Without such a tile, the result's function is null.
//   Example: N = 4096, M = 512 on 132 SMs, with wgmma.
//      tiles of 256 x 128    16 * 4 =  64 blocks   1 round    1 * 256 * 128 / 100 = 328
//      tiles of 128 x 64     32 * 8 = 256 blocks   2 rounds   2 * 128 * 64 / 70   = 234, the choice
inline Tile choose_tile(int kernel, int tokens, int M, int N, int sms) {
  Tile chosen = {};
  float least_time = 0;
  for (Tile tile : TILE_CHOICES) {
    if (tile.kernel != kernel) continue;
    if (tokens != 0 && tile.tokens != tokens) continue;
    const int rounds = ceil_div(ceil_div(N, tile.rows) * ceil_div(M, tile.tokens), sms);
    const float time = (float)rounds * tile.rows * tile.tokens / tile.efficiency;
    if (chosen.function && time >= least_time) continue;
    chosen = tile;
    least_time = time;
  }
  return chosen;
}

// Called by terdit.py through ctypes, with pointers of the GPU; bias may be null. kernel is one of
// the enum, tokens a tile's tokens: AUTO and 0, unless the caller experiments. Returns 0, a
// cudaError_t, or REFUSED for what the kernel cannot compute.
extern "C" int ternary_linear(const bf16* X, const uint8_t* W, const float* alpha, const bf16* bias,
                              bf16* Y, int M, int N, int K, int kernel, int tokens,
                              cudaStream_t stream) {
  // Check
  const int sms = device_attribute(cudaDevAttrMultiProcessorCount);
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  if (sms == 0 || major < 8) return cudaErrorNoDevice;
  if (M < 0 || N < 4 || N % 4 != 0 || K < 1) return REFUSED;
  if (M == 0) return cudaSuccess;  // CUDA refuses an empty grid

  // Choose
  // The fast kernels take 8 byte rows at a time, load 16 bytes and store 16.
  const bool aligned = ((uintptr_t)X | (uintptr_t)W | (uintptr_t)Y) % 16 == 0;
  const bool fits = N % 32 == 0 && K % 16 == 0 && aligned;
  if (kernel == AUTO && !fits) kernel = NAIVE;
  if (kernel == AUTO && M <= 16) kernel = SMALL_BATCH;
  if (kernel == AUTO) kernel = major == 9 ? WGMMA : MMA;
  if (kernel != NAIVE && !fits) return REFUSED;
  if (kernel == SMALL_BATCH && M > 16) return REFUSED;
  if (kernel == WGMMA && major != 9) return REFUSED;

  // Launch
  const Args p = {X, W, alpha, bias, Y, M, N, K};
  const dim3 naive_grid(((size_t)M * N + 255) / 256);
  if (kernel == NAIVE) return launch(naive, naive_grid, 256, 0, stream, p);
  auto small = M <= 8 ? small_batch<1> : small_batch<2>;
  if (kernel == SMALL_BATCH) return launch(small, dim3(N / 32), 256, 0, stream, p);
  const Tile tile = choose_tile(kernel, tokens, M, N, sms);
  if (!tile.function) return REFUSED;
  const dim3 grid(ceil_div(M, tile.tokens), ceil_div(N, tile.rows));
  return launch(tile.function, grid, tile.threads, tile.shared_bytes, stream, p);
}
#endif  // not CPU

// -------------------------------------------------------------------------------------------------
// CPU (skip on first reading): terdit.py compiles it with g++ -DCPU and calls it through ctypes
//
// Many rows of x are multiplied in int8: quantize_rows, unpack, torch's integer matmul, scale_rows.
// Few rows are multiplied in fp32, by small_rows.

#ifdef CPU
#include <string.h>
#include <algorithm>
#include <cmath>
#include <vector>

// Element i of x, which is fp32 or bf16. A bf16 is the upper half of an fp32.
inline float element(const void* x, int is_bf16, long i) {
  if (!is_bf16) return ((const float*)x)[i];
  return __builtin_bit_cast(float, (uint32_t)((const uint16_t*)x)[i] << 16);
}

inline uint16_t to_bf16(float value) {  // to nearest, ties to even
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

// x (M, K) fp32 or bf16 -> levels (M, K) int8 and scales (M,), so that x is about levels * scale.
// Returns 0 if x is not finite.
extern "C" int quantize_rows(const void* x, int is_bf16, int8_t* levels, float* scales, long M,
                             long K) {
  int finite = 1;
#pragma omp parallel for reduction(& : finite) if (M * K > (1 << 14))
  for (long m = 0; m < M; m++) {
    // The bits of positive floats are ordered as the floats are; NaN's are the greatest.
    uint32_t greatest_bits = 0;
    for (long k = 0; k < K; k++) {
      const float magnitude = std::fabs(element(x, is_bf16, m * K + k));
      greatest_bits = std::max(greatest_bits, __builtin_bit_cast(uint32_t, magnitude));
    }
    float greatest = __builtin_bit_cast(float, greatest_bits);
    finite &= std::isfinite(greatest);
    greatest = std::max(greatest, 1e-30f);
    scales[m] = greatest / 127;
    const float inverse = 127 / greatest;
    for (long k = 0; k < K; k++) {
      const float level = std::rint(element(x, is_bf16, m * K + k) * inverse);  // halves to even
      levels[m * K + k] = (int8_t)(int)level;
    }
  }
  return finite;
}

// n bytes of W -> 4n weights of -1, 0 and 1: those of quarter 0, then those of quarters 1, 2 and 3.
extern "C" void unpack(const uint8_t* W, int8_t* codes, long n) {
#pragma omp parallel for simd if (parallel : n > (1 << 14))
  for (long i = 0; i < n; i++) {
    const uint8_t byte = W[i];
    for (long quarter = 0; quarter < 4; quarter++)
      codes[quarter * n + i] = ((byte >> (6 - 2 * quarter)) & 3) - 1;
  }
}

// sums (M, N) int32 -> y (M, N) bf16: sums * (scale of the row of x * alpha (1,)) + bias (N,),
// which may be null
extern "C" void scale_rows(const int32_t* sums, const float* scales, const float* alpha,
                           const float* bias, uint16_t* y, long M, long N) {
#pragma omp parallel for if (M * N > (1 << 14))
  for (long m = 0; m < M; m++) {
    const float scale = scales[m] * *alpha;
    for (long i = 0; i < N; i++) {
      const float b = bias ? bias[i] : 0;
      y[m * N + i] = to_bf16(sums[m * N + i] * scale + b);
    }
  }
}

// small_rows: for few rows of x (adaLN has one an image), where reading W takes most of the time
//
// A vector register holds LANES words of W, and word i has columns 4i to 4i + 3. A shift and a mask
// make floats of -2, 0 and 2, as in dequantize, of one byte of all words at a time. So the columns
// come in this order, and x is put into the same order first:
//
//      byte 0 of all words   columns 0, 4, 8, ...
//      byte 1                columns 1, 5, 9, ...
//      byte 2                columns 2, 6, 10, ...
//      byte 3                columns 3, 7, 11, ...
//
// Vectors are written by hand: the compiler may not reorder float sums. The order is the same for
// any number of rows and threads, so an image does not depend on the others in its batch.
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int COLUMNS = 4 * LANES;
constexpr int ROWS = 2;  // of x at a time: 2 * 4 sums take 8 of 16 registers; 4 were no faster
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

// ROWS rows of x, ordered, times a byte row of W -> sums[row][quarter]. fp-contract multiplies and
// adds in one instruction: no bit changes, because a product by -2, 0 or 2 is exact. In the rest of
// the file it would change scale_rows' rounding.
__attribute__((optimize("fp-contract=fast")))
inline void multiply_rows(const Floats* x, const uint8_t* w, long K, float (&sums)[ROWS][4]) {
  const long blocks = (K + COLUMNS - 1) / COLUMNS;
  const long whole_blocks = K / COLUMNS;
  uint8_t rest[COLUMNS] = {};
  memcpy(rest, w + whole_blocks * COLUMNS, K % COLUMNS);
  Floats vectors[ROWS][4] = {};
  for (long block = 0; block < blocks; block++) {
    Words words;
    memcpy(&words, block < whole_blocks ? w + block * COLUMNS : rest, COLUMNS);
    for (int byte = 0; byte < 4; byte++) {
      Floats weights[4];
      for (int quarter = 0; quarter < 4; quarter++) {
        const int shift = 24 - 8 * byte + 2 * quarter;
        weights[quarter] = (Floats)((~words << shift) & 0xC0000000);
      }
      for (int row = 0; row < ROWS; row++) {
        const Floats values = x[(row * blocks + block) * 4 + byte];
        for (int quarter = 0; quarter < 4; quarter++)
          vectors[row][quarter] += weights[quarter] * values;
      }
    }
  }
  for (int row = 0; row < ROWS; row++)
    for (int quarter = 0; quarter < 4; quarter++)
      for (int lane = 0; lane < LANES; lane++) sums[row][quarter] += vectors[row][quarter][lane];
}

// x (M, K), W (n, K) bytes, alpha (1,), bias (4, n) or null -> y (M, 4, n)
extern "C" void small_rows(const float* x, const uint8_t* W, const float* alpha, const float* bias,
                           float* y, long M, long K, long n) {
  const long blocks = (K + COLUMNS - 1) / COLUMNS;
  std::vector<Floats> ordered((M + ROWS - 1) * blocks * 4);  // zeros past x's last row and column
  for (long m = 0; m < M; m++) {
    for (long k = 0; k < K; k++) {
      const long vector = (m * blocks + k / COLUMNS) * 4 + k % 4;
      ordered[vector][k % COLUMNS / 4] = x[m * K + k];
    }
  }
#pragma omp parallel for if (n * K > (1 << 14))
  for (long r = 0; r < n; r++) {
    for (long m = 0; m < M; m += ROWS) {
      float sums[ROWS][4] = {};
      multiply_rows(&ordered[m * blocks * 4], W + r * K, K, sums);
      for (long row = m; row < std::min(m + ROWS, M); row++) {
        for (long quarter = 0; quarter < 4; quarter++) {
          const float b = bias ? bias[quarter * n + r] : 0;
          y[(row * 4 + quarter) * n + r] = sums[row - m][quarter] * *alpha / 2 + b;
        }
      }
    }
  }
}
#endif
