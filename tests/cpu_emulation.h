// Runs kernel.cu on a CPU: every CUDA thread of a block is a fiber, blocks run one after another, and kernel.cu's PTX
// wrappers are written out after the PTX ISA's tables. It checks indices, layouts, waits, barrier phases, tails and the
// choice of kernels. It cannot check the PTX text itself, the hardware's memory ordering, or speed.
//
// Background work is done when it is issued or, to find missing waits, as late as the waits allow: copies late with
// EMULATION=copies, wgmma late with EMULATION=math. EMULATION_CC is the compute capability to pretend (default 9).
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

// ------------------------------------------------------------------------------------- what CUDA's headers hold
#define __device__
#define __global__
#define __shared__ static  // blocks run one at a time
#define __launch_bounds__(...)
#define __grid_constant__
enum { cudaSuccess = 0, cudaErrorNoDevice = 100, cudaErrorLaunchTimeout = 702, cudaErrorNotSupported = 801 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
typedef void* cudaStream_t;
struct uint4 { uint32_t x, y, z, w; };
struct dim3 { unsigned x, y; dim3(unsigned x, unsigned y = 1) : x(x), y(y) {} };
struct __half { _Float16 v; };
struct __nv_bfloat16 { uint16_t bits; };
inline float to_float(__half v) { return v.v; }
inline float to_float(__nv_bfloat16 v) { uint32_t u = (uint32_t)v.bits << 16; float f; memcpy(&f, &u, 4); return f; }
inline void narrow(float v, __half* to) { to->v = (_Float16)v; }
inline void narrow(float v, __nv_bfloat16* to) {
  uint32_t u;
  memcpy(&u, &v, 4);
  to->bits = v != v ? 0x7FFF : (u + 0x7FFF + (u >> 16 & 1)) >> 16;  // to nearest, ties to even
}
template <typename T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<__nv_bfloat16> = true;
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= (uint32_t)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}

// ------------------------------------------------------------------------------------- fibers
namespace emu {
typedef std::vector<std::function<void()>> Group;
struct Queue {  // background work: groups committed, and the one still open
  std::deque<Group> groups; Group open;
  void commit(bool late) {
    groups.push_back(std::move(open)), open.clear();
    if (!late) { for (auto& f : groups.back()) f(); groups.back().clear(); }
  }
  void wait(size_t pending) { for (; groups.size() > pending; groups.pop_front()) for (auto& f : groups.front()) f(); }
};
struct Warp { int arrived = 0; long generation = 0; void* in[32]; Queue wgmma; };
struct Fiber { ucontext_t context; std::vector<char> stack; std::function<bool()> ready; bool done; int thread; Queue copies; };
inline ucontext_t scheduler;
inline Fiber* current;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<char> memory;
inline char* base;  // of shared memory
inline int arrived, block_x, block_y, threads;
inline long generation;
inline std::deque<std::function<void()>> tma;  // boxes on their way
inline std::function<void()> body;
inline bool late_copies, late_math;

inline void wait(std::function<bool()> ready) {
  if (ready()) return;
  current->ready = std::move(ready);
  swapcontext(&current->context, &scheduler);
}
inline void entry() { body(); current->done = true; swapcontext(&current->context, &scheduler); }
inline int lane() { return current->thread % 32; }
// The lanes of a warp hand in one pointer each; the last one does the work for all.
template <typename F> void together(void* in, F work) {
  Warp& w = warps[current->thread / 32];
  w.in[lane()] = in;
  const long before = w.generation;
  if (++w.arrived == 32) work(w), w.arrived = 0, w.generation++;
  else wait([&w, before] { return w.generation != before; });
}
template <typename T> float half_of(const uint32_t* r, int e) {  // 16-bit value number e of registers r
  T v;
  memcpy(&v, (const char*)r + 2 * e, 2);
  return to_float(v);
}
template <typename T> void gather_a(float (&A)[16][16], const uint32_t* const (&a)[32]) {
  for (int l = 0; l < 32; l++)
    for (int e = 0; e < 8; e++) A[l / 4 + 8 * (e / 2 % 2)][2 * (l % 4) + e % 2 + 8 * (e / 4)] = half_of<T>(a[l], e);
}
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
struct Barrier { int16_t count, pending; int32_t bytes : 31; uint32_t phase : 1; };  // in the 8 bytes of an mbarrier
inline void settle(void* bar, int arrivals, int bytes) {
  Barrier* b = (Barrier*)bar;
  b->pending -= arrivals, b->bytes += bytes;
  if (b->pending == 0 && b->bytes == 0) b->phase ^= 1, b->pending = b->count;
}
}  // namespace emu

inline struct { struct { operator unsigned() const { return emu::current->thread; } } x; } threadIdx;
inline struct { struct { operator unsigned() const { return emu::block_x; } } x;
                struct { operator unsigned() const { return emu::block_y; } } y; } blockIdx;
inline struct { struct { operator unsigned() const { return emu::threads; } } x; } blockDim;
#define SHARED_MEMORY(name) char* name = emu::base
inline uint32_t shared(const void* p) { return 1024 + ((const char*)p - emu::base); }
inline void __syncwarp() { emu::together(nullptr, [](emu::Warp&) {}); }
inline void __syncthreads() {
  const long before = emu::generation;
  if (++emu::arrived == emu::threads) emu::arrived = 0, emu::generation++;
  else emu::wait([before] { return emu::generation != before; });
}

// ------------------------------------------------------------------------------------- sm_80
inline void cp_async16(void* dst, const void* src, bool valid) {
  emu::current->copies.open.push_back([=] { valid ? memcpy(dst, src, 16) : memset(dst, 0, 16); });
}
inline void cp_async_commit() { emu::current->copies.commit(emu::late_copies); }
template <int PENDING> void cp_async_wait() { emu::current->copies.wait(PENDING); }
namespace emu { struct Mma { float* d; const uint32_t* a; uint32_t b[2]; }; }
template <typename T> void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  emu::Mma args{d, a, {b0, b1}};
  emu::together(&args, [](emu::Warp& w) {
    float A[16][16], B[16][8];
    const uint32_t* a[32];
    for (int l = 0; l < 32; l++) {
      a[l] = ((emu::Mma*)w.in[l])->a;
      for (int e = 0; e < 4; e++) B[2 * (l % 4) + e % 2 + 8 * (e / 2)][l / 4] = emu::half_of<T>(((emu::Mma*)w.in[l])->b, e);
    }
    emu::gather_a<T>(A, a);
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < 4; e++)
        for (int k = 0; k < 16; k++) ((emu::Mma*)w.in[l])->d[e] += A[l / 4 + 8 * (e / 2)][k] * B[k][2 * (l % 4) + e % 2];
  });
}

// ------------------------------------------------------------------------------------- sm_90a
inline void barrier_init(uint64_t* bar, int count) { *(emu::Barrier*)bar = {(int16_t)count, (int16_t)count, 0, 0}; }
inline void barriers_visible() {}
inline void barrier_expect_bytes(uint64_t* bar, int bytes) { emu::settle(bar, 1, bytes); }
inline void barrier_arrive_if(uint64_t* bar, bool really) { if (really) emu::settle(bar, 1, 0); }
inline void barrier_wait(uint64_t* bar, int parity) { emu::wait([=] { return (int)((emu::Barrier*)bar)->phase != parity; }); }
struct CUtensorMap { const char* data; int rows, columns, box_rows, size; };
inline bool box_map(CUtensorMap* map, const void* data, int rows, int columns, int box_rows, int size, bool) {
  *map = {(const char*)data, rows, columns, box_rows, size};
  return true;
}
inline void tma_load(void* dst, const CUtensorMap* map, int column, int row, uint64_t* bar) {
  const CUtensorMap m = *map;
  const uint32_t to = shared(dst);
  auto copy = [=] {
    for (int r = 0; r < m.box_rows; r++)
      for (int i = 0; i < 128; i += 16) {
        char* chunk = emu::base + emu::swizzle(to + r * 128 + i) - 1024;
        const int c = column + i / m.size;
        if (row + r < m.rows && c < m.columns) memcpy(chunk, m.data + ((size_t)(row + r) * m.columns + c) * m.size, 16);
        else memset(chunk, 0, 16);
      }
    emu::settle(bar, 0, -m.box_rows * 128);
  };
  if (emu::late_copies) emu::tma.push_back(copy); else copy();
}
template <int R> void zero(float (&d)[R]) { memset(d, 0, sizeof d); }
inline void wgmma_fence() {}
inline void wgmma_commit() { emu::together(nullptr, [](emu::Warp& w) { w.wgmma.commit(emu::late_math); }); }
template <int PENDING> void wgmma_wait() { emu::together(nullptr, [](emu::Warp& w) { w.wgmma.wait(PENDING); }); }
inline uint64_t descriptor(const void* tile) { return shared(tile) >> 4; }
template <typename T, int R> void wgmma(float (&d)[R], const uint32_t* a, uint64_t b) {
  emu::Mma args{d, a, {}};
  emu::together(&args, [=](emu::Warp& w) {
    std::vector<emu::Mma> lanes;
    for (int l = 0; l < 32; l++) lanes.push_back(*(emu::Mma*)w.in[l]);
    w.wgmma.open.push_back([=] {  // reads registers a and shared memory when it runs, not when it was issued
      float A[16][16], B[16][2 * R];
      const uint32_t* a[32];
      for (int l = 0; l < 32; l++) a[l] = lanes[l].a;
      emu::gather_a<T>(A, a);
      for (int n = 0; n < 2 * R; n++)
        for (int k = 0; k < 16; k++)
          B[k][n] = to_float(*(const T*)(emu::base + emu::swizzle((b << 4) + n / 8 * 1024 + n % 8 * 128 + k * 2) - 1024));
      for (int l = 0; l < 32; l++)
        for (int i = 0; i < R; i++)
          for (int k = 0; k < 16; k++) lanes[l].d[i] += A[l / 4 + 8 * (i / 2 % 2)][k] * B[k][i / 4 * 8 + 2 * (l % 4) + i % 2];
    });
  });
}

// ------------------------------------------------------------------------------------- host
inline int attribute(cudaDeviceAttr a) {
  const char* cc = getenv("EMULATION_CC");
  return a == cudaDevAttrMultiProcessorCount ? 132 : cc ? atoi(cc) : 9;
}
template <typename... P, typename... A>
int launch(void (*kernel)(P...), dim3 grid, int block, int smem, cudaStream_t, A... args) {
  using namespace emu;
  const char* mode = getenv("EMULATION") ? getenv("EMULATION") : "";
  late_copies = !strcmp(mode, "copies"), late_math = !strcmp(mode, "math"), threads = block;
  body = [=] { kernel(P(args)...); };
  fibers.resize(block);
  int pass = 0;  // goes on from block to block, so that each is disturbed elsewhere
  for (unsigned i = 0; i < grid.x * grid.y; i++) {
    block_x = i % grid.x, block_y = i / grid.x, arrived = 0, generation = 0;
    memory.assign(smem + 2048, (char)0xFF);  // as bf16 and fp16: NaN
    base = memory.data() + (1024 - (uintptr_t)memory.data() % 1024);
    warps.assign(block / 32, {}), tma.clear();
    for (int t = 0; t < block; t++) {
      Fiber& f = fibers[t];
      f.thread = t, f.done = false, f.ready = nullptr, f.copies = {}, f.stack.resize(1 << 16);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
      makecontext(&f.context, entry, 0);
    }
    for (int left = block; left; pass++) {  // every 53 passes another warp is held back for as long as others can run
      bool moved = false;
      const int slow = pass / 53 * 3 % (block / 32);
      for (int held = 0; held < 2 && !moved; held++)
        for (int t = 0; t < block; t++) {
          Fiber& f = fibers[t];
          if ((t / 32 == slow) != held || f.done || (f.ready && !f.ready())) continue;
          f.ready = nullptr, current = &f, moved = true;
          swapcontext(&scheduler, &f.context);
          left -= f.done;
        }
      if (!moved && !tma.empty()) tma.front()(), tma.pop_front(), moved = true;
      if (!moved) { fprintf(stderr, "emulation: deadlock, %d threads left\n", left); return cudaErrorLaunchTimeout; }
    }
  }
  return cudaSuccess;
}
