// Runs kernel.cu on a CPU. Every CUDA thread of a block is a fiber, blocks run one after another, and kernel.cu's PTX
// wrappers are written out in plain C++ after the tables of the PTX manual.
//
// This checks indices, layouts, waits, barrier phases, tails, and the choice of kernels. It cannot check the PTX text
// itself, the hardware's memory ordering, or speed.
//
// Environment variables:
//   EMULATION      when background work is done: at once (empty), or as late as the kernel's waits allow, which finds
//                  missing waits. "copies" makes copies late, "math" makes wgmma late.
//   EMULATION_CC   the major compute capability to pretend, default 9
#pragma once
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <vector>
using std::min;

// ---------------------------------------------------------------------------------------------------------------------
// What kernel.cu takes from CUDA's headers: keywords, types, number formats

#define __host__
#define __device__
#define __global__
#define __shared__ static  // one copy for all threads; blocks run one at a time
#define __launch_bounds__(...)
#define __grid_constant__

enum {
  cudaSuccess = 0,
  cudaErrorNoDevice = 100,
  cudaErrorLaunchTimeout = 702,
  cudaErrorNotSupported = 801,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
typedef void* cudaStream_t;

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y;
  dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};
struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;  // the upper half of a float's
};

inline float to_float(__half h) { return h.value; }
inline float to_float(__nv_bfloat16 b) {
  const uint32_t bits = (uint32_t)b.bits << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <typename T> T from_float(float value);
template <> inline __half from_float(float value) { return {(_Float16)value}; }
template <> inline __nv_bfloat16 from_float(float value) {
  if (value != value) return {0x7FFF};  // NaN
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t last_kept_bit = (bits >> 16) & 1;
  return {(uint16_t)((bits + 0x7FFF + last_kept_bit) >> 16)};  // to nearest, ties to even
}
template <typename T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<__nv_bfloat16> = true;

// Byte i of the result is the byte of (y, x) that digit i of the selector names; x has bytes 0 to 3, y has 4 to 7.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t source = ((uint64_t)y << 32) | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const int digit = (selector >> (4 * i)) & 7;
    const uint32_t byte = (source >> (8 * digit)) & 255;
    result |= byte << (8 * i);
  }
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Fibers: the threads of a block, and how they wait for each other
//
// A fiber runs until it has to wait. Then the scheduler in `launch` goes on with the next fiber that can run. So no two
// fibers run at the same time, and none of this needs locks.

namespace emu {
typedef std::function<void()> Work;
typedef std::vector<Work> Group;

// Background work as CUDA groups it: what was issued is open until a commit makes it a group; waits are for groups.
struct Queue {
  std::deque<Group> groups;
  Group open;

  static void run(Group& group) {
    for (Work& work : group) work();
    group.clear();
  }
  void commit(bool late) {
    groups.push_back(std::move(open));
    open.clear();
    if (!late) run(groups.back());
  }
  void wait(size_t pending) {
    while (groups.size() > pending) {
      run(groups.front());
      groups.pop_front();
    }
  }
};

struct Warp {
  int arrived = 0;      // lanes that wait in `together`
  long generation = 0;  // how often all 32 have met there
  void* in[32];         // what each lane has handed in
  Queue wgmma;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  std::function<bool()> ready;  // what it waits for; empty if nothing
  bool done;
  int thread;  // threadIdx.x
  Queue copies;
};

inline ucontext_t scheduler;
inline Fiber* current;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Work body;                 // the kernel with its arguments
inline int threads;               // of a block
inline int block_x;
inline int block_y;
inline int arrived;               // threads that wait in __syncthreads
inline long generation;           // how often all have met there
inline std::vector<char> memory;  // shared memory is within it,
inline char* base;                // from here, a multiple of 1024
inline std::deque<Work> tma;      // boxes on their way
inline bool late_copies;
inline bool late_math;

inline void wait(std::function<bool()> ready) {
  if (ready()) return;
  current->ready = std::move(ready);
  swapcontext(&current->context, &scheduler);
}

inline void entry() {
  body();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

inline int lane() { return current->thread % 32; }

// An instruction of a whole warp: each lane hands in a pointer, and the last lane to come does the work for all.
template <typename F> void together(void* in, F work) {
  Warp& warp = warps[current->thread / 32];
  warp.in[lane()] = in;
  warp.arrived++;
  const long before = warp.generation;
  if (warp.arrived == 32) {
    work(warp);
    warp.arrived = 0;
    warp.generation++;
  } else {
    wait([&warp, before] { return warp.generation != before; });
  }
}

struct ThreadX {
  operator unsigned() const { return current->thread; }
};
struct BlockX {
  operator unsigned() const { return block_x; }
};
struct BlockY {
  operator unsigned() const { return block_y; }
};
struct BlockSize {
  operator unsigned() const { return threads; }
};
struct ThreadIdx {
  ThreadX x;
};
struct BlockIdx {
  BlockX x;
  BlockY y;
};
struct BlockDim {
  BlockSize x;
};
}  // namespace emu

inline emu::ThreadIdx threadIdx;
inline emu::BlockIdx blockIdx;
inline emu::BlockDim blockDim;

#define SHARED_MEMORY(name) char* name = emu::base
inline uint32_t shared_address(const void* p) { return 1024 + ((const char*)p - emu::base); }
inline void __syncwarp() {
  emu::together(nullptr, [](emu::Warp&) {});
}
inline void __syncthreads() {
  const long before = emu::generation;
  emu::arrived++;
  if (emu::arrived == emu::threads) {
    emu::arrived = 0;
    emu::generation++;
  } else {
    emu::wait([before] { return emu::generation != before; });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Which lane holds which element: the tables of the PTX manual for m16n8k16 (see kernel.cu's header)

namespace emu {
// The row and column of A, then of B, that the 16-bit value number e of a lane's registers belongs to.
inline int a_row(int lane, int e) {
  const int odd_register = (e / 2) % 2;
  return lane / 4 + 8 * odd_register;
}
inline int a_column(int lane, int e) {
  const int upper_registers = e / 4;
  return 2 * (lane % 4) + e % 2 + 8 * upper_registers;
}
inline int b_row(int lane, int e) {
  const int second_register = e / 2;
  return 2 * (lane % 4) + e % 2 + 8 * second_register;
}
inline int b_column(int lane) { return lane / 4; }
//   Example: lane 9, e = 6 is in register 3 of A, row 9 / 4 + 8 = 10, column 2 * (9 % 4) + 8 = 10.

// The row and column of D that element i of a lane belongs to; wgmma's D has four elements for each 8 columns.
inline int d_row(int lane, int i) {
  const int lower_half = (i / 2) % 2;
  return lane / 4 + 8 * lower_half;
}
inline int d_column(int lane, int i) {
  const int tile = i / 4;
  return 8 * tile + 2 * (lane % 4) + i % 2;
}

// The 16-bit value number e of registers r.
template <typename T> float value_of(const uint32_t* r, int e) {
  T value;
  memcpy(&value, (const char*)r + 2 * e, 2);
  return to_float(value);
}

// What one lane hands in to mma or wgmma.
struct Operands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T> void gather_a(float (&A)[16][16], const Operands (&lanes)[32]) {
  for (int l = 0; l < 32; l++) {
    for (int e = 0; e < 8; e++) A[a_row(l, e)][a_column(l, e)] = value_of<T>(lanes[l].a, e);
  }
}

// D += A * B, each lane's `size` elements of D.
template <int COLUMNS>
void multiply(const Operands (&lanes)[32], int size, const float (&A)[16][16], const float (&B)[16][COLUMNS]) {
  for (int l = 0; l < 32; l++) {
    for (int i = 0; i < size; i++) {
      for (int k = 0; k < 16; k++) lanes[l].d[i] += A[d_row(l, i)][k] * B[k][d_column(l, i)];
    }
  }
}
}  // namespace emu

// ---------------------------------------------------------------------------------------------------------------------
// sm_80: mma and cp.async

template <typename T> void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  emu::Operands operands{d, a, {b0, b1}};
  emu::together(&operands, [](emu::Warp& warp) {
    emu::Operands lanes[32];
    for (int l = 0; l < 32; l++) lanes[l] = *(emu::Operands*)warp.in[l];
    float A[16][16];
    float B[16][8];
    emu::gather_a<T>(A, lanes);
    for (int l = 0; l < 32; l++) {
      for (int e = 0; e < 4; e++) B[emu::b_row(l, e)][emu::b_column(l)] = emu::value_of<T>(lanes[l].b, e);
    }
    emu::multiply(lanes, 4, A, B);
  });
}

inline void cp_async16(void* to, const void* from, bool valid) {
  emu::current->copies.open.push_back([=] {
    if (valid) {
      memcpy(to, from, 16);
    } else {
      memset(to, 0, 16);
    }
  });
}
inline void cp_async_commit() { emu::current->copies.commit(emu::late_copies); }
template <int PENDING> void cp_async_wait() { emu::current->copies.wait(PENDING); }

// ---------------------------------------------------------------------------------------------------------------------
// sm_90a: barriers, TMA and wgmma

namespace emu {
struct Barrier {  // in the 8 bytes of an mbarrier
  int16_t count;
  int16_t pending;  // arrivals
  int32_t bytes : 31;
  uint32_t phase : 1;  // the parity of the phase that is not yet complete
};

inline void settle(void* bar, int arrivals, int bytes) {
  Barrier* barrier = (Barrier*)bar;
  barrier->pending -= arrivals;
  barrier->bytes += bytes;
  if (barrier->pending == 0 && barrier->bytes == 0) {
    barrier->phase ^= 1;
    barrier->pending = barrier->count;
  }
}

// The 128-byte swizzle: within each 1024 bytes, the number of the 16-byte chunk is XORed with the number of the row.
inline char* swizzled(uint32_t address) {
  const uint32_t row = (address >> 7) & 7;
  return base + (address ^ (row << 4)) - 1024;
}
}  // namespace emu

inline void barrier_init(uint64_t* bar, int count) {
  *(emu::Barrier*)bar = {(int16_t)count, (int16_t)count, 0, 0};
}
inline void barriers_visible() {}
inline void barrier_expect_bytes(uint64_t* bar, int bytes) { emu::settle(bar, 1, bytes); }
inline void barrier_arrive_if(uint64_t* bar, bool condition) {
  if (condition) emu::settle(bar, 1, 0);
}
inline void barrier_wait(uint64_t* bar, int parity) {
  emu::wait([=] { return (int)((emu::Barrier*)bar)->phase != parity; });
}

struct CUtensorMap {
  const char* data;
  int rows;
  int columns;
  int box_rows;
  int size;  // bytes of an element
};
inline bool make_map(CUtensorMap* map, const void* data, int rows, int columns, int box_rows, int size, bool) {
  *map = {(const char*)data, rows, columns, box_rows, size};
  return true;
}
inline void tma_load(void* to, const CUtensorMap* map, int column, int row, uint64_t* bar) {
  const CUtensorMap m = *map;
  const uint32_t address = shared_address(to);
  auto copy = [=] {
    for (int r = 0; r < m.box_rows; r++) {
      for (int byte = 0; byte < 128; byte += 16) {
        char* chunk = emu::swizzled(address + 128 * r + byte);
        const int c = column + byte / m.size;
        if (row + r < m.rows && c < m.columns) {
          memcpy(chunk, m.data + ((size_t)(row + r) * m.columns + c) * m.size, 16);
        } else {
          memset(chunk, 0, 16);
        }
      }
    }
    emu::settle(bar, 0, -m.box_rows * 128);
  };
  if (emu::late_copies) {
    emu::tma.push_back(copy);
  } else {
    copy();
  }
}

template <int SIZE> void zero(float (&d)[SIZE]) { memset(d, 0, sizeof d); }
inline void wgmma_fence() {}
inline void wgmma_commit() {
  emu::together(nullptr, [](emu::Warp& warp) { warp.wgmma.commit(emu::late_math); });
}
template <int PENDING> void wgmma_wait() {
  emu::together(nullptr, [](emu::Warp& warp) { warp.wgmma.wait(PENDING); });
}
inline uint64_t descriptor(const void* tile) { return shared_address(tile) >> 4; }

// B is in shared memory: row n holds token n's 16 columns, 128 bytes after the row before.
template <typename T, int SIZE> void wgmma(float (&d)[SIZE], const uint32_t* a, uint64_t b) {
  constexpr int TOKENS = 2 * SIZE;
  emu::Operands operands{d, a, {}};
  emu::together(&operands, [=](emu::Warp& warp) {
    std::vector<emu::Operands> handed_in;
    for (int l = 0; l < 32; l++) handed_in.push_back(*(emu::Operands*)warp.in[l]);
    // Registers a and shared memory are read when this runs, not when it was issued.
    warp.wgmma.open.push_back([=] {
      emu::Operands lanes[32];
      std::copy(handed_in.begin(), handed_in.end(), lanes);
      float A[16][16];
      float B[16][TOKENS];
      emu::gather_a<T>(A, lanes);
      for (int n = 0; n < TOKENS; n++) {
        for (int k = 0; k < 16; k++) B[k][n] = to_float(*(const T*)emu::swizzled((b << 4) + 128 * n + 2 * k));
      }
      emu::multiply(lanes, SIZE, A, B);
    });
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Host: a GPU's attributes, and the launch of a kernel, which is the scheduler of its fibers

inline int device_attribute(cudaDeviceAttr attribute) {
  if (attribute == cudaDevAttrMultiProcessorCount) return 132;
  const char* capability = getenv("EMULATION_CC");
  return capability ? atoi(capability) : 9;
}

namespace emu {
inline void start_block(int x, int y, int shared_bytes) {
  block_x = x;
  block_y = y;
  arrived = 0;
  generation = 0;
  memory.assign(shared_bytes + 2048, (char)0xFF);  // NaN as bf16 and fp16, so that memory never written is noticed
  base = memory.data() + (1024 - (uintptr_t)memory.data() % 1024);
  warps.assign(threads / 32, {});
  tma.clear();
  for (int thread = 0; thread < threads; thread++) {
    Fiber& fiber = fibers[thread];
    fiber.thread = thread;
    fiber.done = false;
    fiber.ready = nullptr;
    fiber.copies = {};
    fiber.stack.resize(1 << 16);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, entry, 0);
  }
}

// Lets every fiber run that can: those of warp `slow`, or those of all the others. Returns how many ran.
inline int run_fibers(int slow, bool slow_only) {
  int ran = 0;
  for (Fiber& fiber : fibers) {
    const bool is_slow = fiber.thread / 32 == slow;
    if (is_slow != slow_only || fiber.done) continue;
    if (fiber.ready && !fiber.ready()) continue;
    fiber.ready = nullptr;
    current = &fiber;
    swapcontext(&scheduler, &fiber.context);
    ran++;
  }
  return ran;
}

inline int threads_left() {
  return std::count_if(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return !fiber.done; });
}
}  // namespace emu

template <typename... Parameters, typename... Values>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int smem, cudaStream_t, Values... values) {
  using namespace emu;
  const char* mode = getenv("EMULATION") ? getenv("EMULATION") : "";
  late_copies = strcmp(mode, "copies") == 0;
  late_math = strcmp(mode, "math") == 0;
  emu::threads = threads;
  body = [=] { kernel(Parameters(values)...); };
  fibers.resize(threads);
  int pass = 0;  // goes on from block to block, so that each block is disturbed at other places
  for (unsigned block = 0; block < grid.x * grid.y; block++) {
    start_block(block % grid.x, block / grid.x, smem);
    while (threads_left() > 0) {
      // A warp is held back until no other can run, to find missing barriers. Every 53 passes it is another warp.
      const int slow = (pass / 53 * 3) % (threads / 32);
      pass++;
      int ran = run_fibers(slow, false);
      if (ran == 0) ran = run_fibers(slow, true);
      if (ran > 0) continue;
      if (tma.empty()) {
        fprintf(stderr, "emulation: deadlock, %d threads left\n", threads_left());
        return cudaErrorLaunchTimeout;
      }
      tma.front()();  // nobody can run: now a late copy has to arrive
      tma.pop_front();
    }
  }
  return cudaSuccess;
}
