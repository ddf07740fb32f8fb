// Runs kernel.cu on a CPU. Every CUDA thread of a block is a fiber, blocks run one after another, and kernel.cu's PTX
// wrappers are written out in plain C++ after the tables of the PTX manual.
//
// This checks indices, layouts, waits, barriers, remainders, and the choice of kernels. It cannot check the PTX text
// itself, the hardware's memory ordering, or speed.
//
// Environment variables:
//   EMULATION      when background work is done: at once (empty), or as late as the kernel's waits allow, which finds
//                  missing waits. "copies" makes copies late, "math" makes wgmma late.
//   EMULATION_CC   the major compute capability to pretend, default 9
#pragma once
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

enum { cudaSuccess = 0, cudaErrorNoDevice = 100, cudaErrorIllegalAddress = 700, cudaErrorLaunchTimeout = 702 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
typedef void* cudaStream_t;

struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y;
  dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};
struct __nv_bfloat16 {
  uint16_t bits;  // the upper half of a float's
};

inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t bits = (uint32_t)b.bits << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7FFF};  // NaN
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t last_kept_bit = (bits >> 16) & 1;
  return {(uint16_t)((bits + 0x7FFF + last_kept_bit) >> 16)};  // to nearest, ties to even
}

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
  std::vector<char*> landed;  // where its copies went that it has not yet shown to wgmma
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
inline std::vector<char> memory;  // shared memory is within it
inline char* base;                // address 0 of shared memory, a multiple of 1024
inline std::vector<char> shown;   // what wgmma sees from base on
constexpr int START = 48;         // address of a kernel's shared memory: no multiple of 1024, so it must align boxes
constexpr int GUARD = 1024;       // bytes after a kernel's shared memory that must stay as they were
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

#define SHARED_MEMORY(name) char* name = emu::base + emu::START
inline uint32_t shared_address(const void* p) { return (const char*)p - emu::base; }
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
inline float value_of(const uint32_t* r, int e) {
  __nv_bfloat16 value;
  memcpy(&value, (const char*)r + 2 * e, 2);
  return __bfloat162float(value);
}

// What one lane hands in to mma or wgmma.
struct Operands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

inline void gather_a(float (&A)[16][16], const Operands (&lanes)[32]) {
  for (int l = 0; l < 32; l++) {
    for (int e = 0; e < 8; e++) A[a_row(l, e)][a_column(l, e)] = value_of(lanes[l].a, e);
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

inline void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  emu::Operands operands{d, a, {b0, b1}};
  emu::together(&operands, [](emu::Warp& warp) {
    emu::Operands lanes[32];
    for (int l = 0; l < 32; l++) lanes[l] = *(emu::Operands*)warp.in[l];
    float A[16][16];
    float B[16][8];
    emu::gather_a(A, lanes);
    for (int l = 0; l < 32; l++) {
      for (int e = 0; e < 4; e++) B[emu::b_row(l, e)][emu::b_column(l)] = emu::value_of(lanes[l].b, e);
    }
    emu::multiply(lanes, 4, A, B);
  });
}

inline void cp_async16(char* to, const void* from, bool valid) {
  emu::Fiber* fiber = emu::current;
  fiber->copies.open.push_back([=] {
    if (valid) {
      memcpy(to, from, 16);
    } else {
      memset(to, 0, 16);
    }
    memset(&emu::shown[to - emu::base], 0xFF, 16);  // until it is shown, wgmma may see anything
    fiber->landed.push_back(to);
  });
}
inline void cp_async_commit() { emu::current->copies.commit(emu::late_copies); }
template <int PENDING> void cp_async_wait() { emu::current->copies.wait(PENDING); }

// ---------------------------------------------------------------------------------------------------------------------
// sm_90a: wgmma

inline void show_copies_to_wgmma() {
  for (char* to : emu::current->landed) memcpy(&emu::shown[to - emu::base], to, 16);
  emu::current->landed.clear();
}
inline void set_zero(float& sum) { sum = 0; }
inline void wgmma_fence() {}
inline void wgmma_commit() {
  emu::together(nullptr, [](emu::Warp& warp) { warp.wgmma.commit(emu::late_math); });
}
template <int PENDING> void wgmma_wait() {
  emu::together(nullptr, [](emu::Warp& warp) { warp.wgmma.wait(PENDING); });
}
inline uint64_t descriptor(const void* tile) { return shared_address(tile) >> 4; }

// Column k of B for token `row` of a tile, whose rows have 128 bytes. The 128-byte swizzle: within a row, the number of
// a chunk of 16 bytes is XORed with the row's number modulo 8.
inline float value_of_b(uint64_t descriptor, int row, int k) {
  const uint32_t address = (descriptor << 4) + 128 * row + 2 * k;
  const uint32_t swizzled = address ^ (((address >> 7) & 7) << 4);
  __nv_bfloat16 value;
  memcpy(&value, &emu::shown[swizzled], 2);
  return __bfloat162float(value);
}

inline void wgmma(float (*d)[4], const uint32_t* a, uint64_t b) {
  emu::Operands operands{d[0], a, {}};
  emu::together(&operands, [=](emu::Warp& warp) {
    std::vector<emu::Operands> handed_in;
    for (int l = 0; l < 32; l++) handed_in.push_back(*(emu::Operands*)warp.in[l]);
    // Registers a and shared memory are read when this runs, not when it was issued.
    warp.wgmma.open.push_back([=] {
      emu::Operands lanes[32];
      std::copy(handed_in.begin(), handed_in.end(), lanes);
      float A[16][16];
      float B[16][64];
      emu::gather_a(A, lanes);
      for (int token = 0; token < 64; token++) {
        for (int k = 0; k < 16; k++) B[k][token] = value_of_b(b, token, k);
      }
      emu::multiply(lanes, 32, A, B);
    });
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Host: a GPU's attributes, and the launch of a kernel, which is the scheduler of its fibers

extern "C" {
int emulated_blocks;   // of the last launch,
int emulated_threads;  // and the threads of a block: tests see by them what was launched
}

inline int device_attribute(cudaDeviceAttr attribute) {
  if (attribute == cudaDevAttrMultiProcessorCount) return 4;
  const char* capability = getenv("EMULATION_CC");
  return capability ? atoi(capability) : 9;
}

namespace emu {
inline void start_block(int x, int y, int shared_bytes) {
  block_x = x;
  block_y = y;
  arrived = 0;
  generation = 0;
  // 0xFF is NaN as bf16, so that memory never written is noticed.
  memory.assign(1024 + START + shared_bytes + GUARD, (char)0xFF);
  shown = memory;
  base = memory.data() + (1024 - (uintptr_t)memory.data() % 1024);
  warps.assign(threads / 32, {});
  for (int thread = 0; thread < threads; thread++) {
    Fiber& fiber = fibers[thread];
    fiber.thread = thread;
    fiber.done = false;
    fiber.ready = nullptr;
    fiber.copies = {};
    fiber.landed.clear();
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

inline bool guard_is_intact(int shared_bytes) {
  const char* end = base + START + shared_bytes;
  return std::all_of(end, end + GUARD, [](char byte) { return byte == (char)0xFF; });
}

inline int threads_left() {
  return std::count_if(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return !fiber.done; });
}
}  // namespace emu

template <typename Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, int smem, cudaStream_t, const Args& args) {
  using namespace emu;
  const char* mode = getenv("EMULATION") ? getenv("EMULATION") : "";
  late_copies = strcmp(mode, "copies") == 0;
  late_math = strcmp(mode, "math") == 0;
  emu::threads = threads;
  emulated_threads = threads;
  emulated_blocks = grid.x * grid.y;
  body = [=] { kernel(args); };
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
      if (ran == 0) {
        fprintf(stderr, "emulation: deadlock, %d threads left\n", threads_left());
        return cudaErrorLaunchTimeout;
      }
    }
    if (!guard_is_intact(smem)) return cudaErrorIllegalAddress;
  }
  return cudaSuccess;
}
