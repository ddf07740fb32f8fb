// Runs kernel.cu on a CPU. Every CUDA thread of a block is a fiber, blocks run one after another,
// and kernel.cu's PTX wrappers are written out in plain C++ after the tables of the PTX manual.
//
// This checks indices, layouts, waits, barriers, remainders, and the choice of kernels. It cannot
// check the PTX text itself, the hardware's memory ordering, or speed.
//
// Compiled with -DAUDIT it also watches every access to memory: see "Audit" below. That finds
// races, bank conflicts and unused parts of sectors, and names their lines.
//
// Environment variables:
//   EMULATION      when background work is done: at once (empty), or as late as the kernel's waits
//                  allow, which finds missing waits. "copies" makes copies late, "math" makes wgmma
//                  late. "launch only" runs nothing.
//   EMULATION_CC   the major compute capability to pretend, default 9
//   EMULATION_SMS  the number of SMs to pretend, default 4
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

// -------------------------------------------------------------------------------------------------
// What kernel.cu takes from CUDA's headers: keywords, types, number formats

#define __host__
#define __device__
#define __global__
#define __shared__ static  // one copy for all threads; blocks run one at a time
#define __launch_bounds__(...)

enum {
  cudaSuccess = 0,
  cudaErrorNoDevice = 100,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchTimeout = 702
};
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

// Byte i of the result is the byte of (y, x) that digit i of the selector names; x has bytes 0 to
// 3, y has 4 to 7.
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

// -------------------------------------------------------------------------------------------------
// Fibers: the threads of a block, and how they wait for each other
//
// A fiber runs until it has to wait. Then the scheduler in `launch` goes on with the next fiber
// that can run. So no two fibers run at the same time, and none of this needs locks.

namespace emu {
typedef std::function<void()> Work;
typedef std::vector<Work> Group;

// Background work as CUDA groups it: what was issued is open until a commit makes it a group; waits
// are for groups.
struct Queue {
  std::deque<Group> groups;
  Group open;

  static void run(Group& group);
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

// What one lane hands in to mma or wgmma.
struct Operands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// Where in shared memory column k of B is, for token `row` of a tile, whose rows have 128 bytes.
// The 128-byte swizzle: the number of a chunk of 16 bytes is XORed with the row's number modulo 8.
inline uint32_t address_of_b(uint64_t descriptor, int row, int k) {
  const uint32_t address = (descriptor << 4) + 128 * row + 2 * k;
  return address ^ (((address >> 7) & 7) << 4);
}

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
constexpr int START = 48;    // address of shared memory: a kernel must align its boxes
constexpr int GUARD = 1024;  // bytes after a kernel's shared memory that must stay as they were
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
}  // namespace emu

// -------------------------------------------------------------------------------------------------
// Audit: skip on first reading
#ifdef AUDIT
// With -fsanitize=thread g++ calls __tsan_read4(address) before a read of 4 bytes, and so on. These
// functions are defined here, so each access of unchanged kernel.cu is seen, with its place in the
// program. emulated_report lists for the last launch:
//
//   complaints  Races in shared memory by cause, and misuse of a wgmma's registers. Time is the
//               number of __syncthreads that a thread has passed. What one thread does at time t,
//               others may rely on from time t + 1 on. So a race is found even if the accesses
//               happened to come in the right order.
//   traffic     One instruction of a warp is a request. In shared memory it takes as many
//               wavefronts as its most used bank has different words. In X, W, bias and Y it takes
//               sectors of 32 bytes.
//   counts      instructions of warps
//
// Limits: no barriers of parts of a block, no timing. Lanes that skip a round of a loop shift the
// others' requests, so traffic is exact only without remainders.
#include <dlfcn.h>

#include <map>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#define IF_AUDIT(...) __VA_ARGS__
#define CALLED_FROM __builtin_return_address(0)
#define NOT_INLINE __attribute__((noinline))  // so that CALLED_FROM is a place in kernel.cu
#define NO_HOOKS __attribute__((no_sanitize("thread")))

namespace emu {
constexpr long NEVER = 1l << 60;
constexpr int SEVERAL = -2;

struct Cell {            // 2 bytes of shared memory
  int writer = -1;       // the last thread that wrote it
  long written = -1;     // when; for a copy, when its thread waited for it, until then NEVER
  long shown = -1;       // when the writer showed it to wgmma
  int reader = -1;       // the last thread that read it, or SEVERAL
  long read = -1;        // when
  int wgmmas = 0;        // unfinished ones that read it
  long multiplied = -1;  // when the last of them was waited for
};
struct Multiplication {  // an unfinished wgmma
  long group;
  Operands registers;
  uint64_t b;
};
struct Access {
  const char* at;
  int bytes;
  int lane;
};
typedef std::vector<Access> Request;
enum Kind { SHARED_READ, SHARED_WRITE, GLOBAL_READ, GLOBAL_WRITE };
typedef std::pair<const void*, Kind> Site;  // the place in the program, and what it does
struct Traffic {                            // of a site, in wavefronts or sectors
  long requests = 0;
  long ideal = 0;
  long actual = 0;
};
struct Watch {                    // what is known of a thread
  long now = 0;                   // __syncthreads passed
  long epoch = 0;                 // times it has waited for other threads
  std::map<Site, long> executed;  // in this epoch
  Request* newest = nullptr;      // its last element is the thread's last access
  Kind newest_kind;
  long copy_groups = 0;
  long wgmma_groups = 0;
  std::deque<std::pair<long, const char*>> copies;  // unfinished: group, where to
  std::vector<const char*> waited;                  // finished, not yet shown
  std::deque<Multiplication> multiplications;
  std::vector<const char*> changed;  // registers, since wgmma_fence
};

inline std::unordered_map<long, Cell> cells;  // by address / 2
inline std::vector<Watch> watches;            // by thread
inline std::map<std::tuple<int, Site, long, long>, Request> open;  // warp, site, epoch, repetition
inline std::map<Site, Traffic> traffic;
inline std::map<std::pair<std::string, const void*>, long> complaints;
inline std::map<std::string, long> counts;
inline std::vector<std::pair<const char*, const char*>> matrices;  // X, W, bias, Y: from, to
inline std::map<const char*, bool> is_static;                      // addresses asked for so far
inline std::string report;
inline long dynamic_bytes;
inline int unwatched;

struct Unwatched {  // while one exists, accesses are the emulation's own
  Unwatched() { unwatched++; }
  ~Unwatched() { unwatched--; }
};

inline Watch& watch() { return watches[current->thread]; }
inline void complain(const char* what, const void* place) {
  if (what) complaints[{what, place}]++;
}
inline void count(const char* what) {
  if (lane() == 0) counts[what]++;
}
inline bool within(const char* at, const void* from, size_t bytes) {
  return at >= (const char*)from && at < (const char*)from + bytes;
}
template <typename F> void for_each_cell(const char* at, int bytes, F work) {
  for (int byte = 0; byte < bytes; byte += 2) work(cells[(long)(at + byte) / 2]);
}
template <typename F> void for_each_cell_of_b(uint64_t b, F work) {
  for (int token = 0; token < 64; token++) {
    for (int k = 0; k < 16; k++) for_each_cell(base + address_of_b(b, token, k), 2, work);
  }
}

// ---- Traffic
inline void new_epoch() {
  Unwatched here;
  watch().epoch++;
  watch().executed.clear();
  watch().newest = nullptr;
}

inline void record(const char* at, int bytes, const void* place, Kind kind) {
  Watch& w = watch();
  if (w.newest && w.newest_kind == kind) {
    // g++ may load 16 bytes in several parts. They are one access.
    Access& last = w.newest->back();
    const bool next_part = at == last.at + last.bytes && (long)at / 16 == (long)last.at / 16;
    if (last.lane == lane() && next_part) {
      last.bytes += bytes;
      return;
    }
  }
  const Site site = {place, kind};
  w.newest = &open[{current->thread / 32, site, w.epoch, w.executed[site]++}];
  w.newest->push_back({at, bytes, lane()});
  w.newest_kind = kind;
}

// 16 bytes a lane are served for 8 lanes at a time, 8 bytes for 16 lanes, less for all 32.
inline void add_wavefronts(const Request& request, Traffic& sum) {
  const int lanes_at_a_time = std::min(32, 128 / std::max(4, request[0].bytes));
  for (int first = 0; first < 32; first += lanes_at_a_time) {
    std::set<long> words;
    for (const Access& access : request) {
      if (access.lane / lanes_at_a_time != first / lanes_at_a_time) continue;
      for (int byte = 0; byte < access.bytes; byte++) words.insert((long)(access.at + byte) / 4);
    }
    long in_bank[32] = {};
    for (long word : words) in_bank[word % 32]++;
    sum.actual += *std::max_element(in_bank, in_bank + 32);
    sum.ideal += (words.size() + 31) / 32;
  }
}

inline void add_sectors(const Request& request, Traffic& sum) {
  std::set<long> bytes;
  std::set<long> sectors;
  for (const Access& access : request) {
    for (long i = 0; i < access.bytes; i++) bytes.insert((long)access.at + i);
  }
  for (long byte : bytes) sectors.insert(byte / 32);
  sum.actual += sectors.size();
  sum.ideal += (bytes.size() + 31) / 32;
}

inline void close_requests() {
  for (auto& [key, request] : open) {
    const Site site = std::get<Site>(key);
    traffic[site].requests++;
    const bool is_shared = site.second == SHARED_READ || site.second == SHARED_WRITE;
    (is_shared ? add_wavefronts : add_sectors)(request, traffic[site]);
  }
  open.clear();
}

// ---- Races: the cause, or null if there is none
inline const char* cause_of_write(const Cell& c, int thread, long now) {
  if (c.written == NEVER) return "overwrites a copy that is on its way";
  if (c.wgmmas > 0 || c.multiplied >= now) return "overwrites what a wgmma may still read";
  const bool written = c.writer != thread && c.written >= now;
  if (written) return "overwrites what another thread wrote, no barrier between";
  const bool read = c.reader != thread && c.read >= now;
  return read ? "overwrites what another thread reads, no barrier between" : nullptr;
}
inline const char* cause_of_read(const Cell& c, int thread, long now) {
  if (c.writer == -1) return "reads what nobody wrote";
  if (c.written == NEVER) return "reads a copy that was not waited for";
  const bool written = c.writer != thread && c.written >= now;
  return written ? "reads what another thread wrote, no barrier between" : nullptr;
}
inline const char* cause_of_wgmma(const Cell& c, long now) {
  if (c.writer == -1) return "wgmma reads what nobody wrote";
  if (c.written == NEVER) return "wgmma reads a copy that was not waited for";
  if (c.written >= now) return "wgmma reads a copy, no barrier after the wait for it";
  if (c.shown == -1) return "wgmma reads a copy without fence.proxy.async";
  return c.shown >= now ? "wgmma reads a copy, no barrier after fence.proxy.async" : nullptr;
}

inline void on_write(Cell& c, long finished, const void* place) {
  complain(cause_of_write(c, current->thread, watch().now), place);
  c = {};
  c.writer = current->thread;
  c.written = finished;
}
inline void on_read(Cell& c, const void* place) {
  const long now = watch().now;
  complain(cause_of_read(c, current->thread, now), place);
  const bool other_reader = c.read == now && c.reader != current->thread;
  c.reader = other_reader ? SEVERAL : current->thread;
  c.read = now;
}
inline void on_multiply(Cell& c, const void* place) {
  complain(cause_of_wgmma(c, watch().now), place);
  c.wgmmas++;
}

inline void on_barrier() {
  count("barriers");
  new_epoch();
  watch().now++;
}

inline void on_copy(const char* to, const char* from, bool valid, const void* place) {
  Unwatched here;
  count("cp.async");
  record(to, 16, place, SHARED_WRITE);
  if (valid) record(from, 16, place, GLOBAL_READ);
  if (to + 16 > base + START + dynamic_bytes) complain("copies past shared memory", place);
  for_each_cell(to, 16, [=](Cell& c) { on_write(c, NEVER, place); });
  watch().copies.push_back({watch().copy_groups, to});
}

inline void on_copy_wait(long pending) {
  Unwatched here;
  Watch& w = watch();
  while (!w.copies.empty() && w.copies.front().first < w.copy_groups - pending) {
    const char* to = w.copies.front().second;
    w.copies.pop_front();
    w.waited.push_back(to);
    for_each_cell(to, 16, [&w](Cell& c) { c.written = w.now; });
  }
}

inline void on_show() {
  Watch& w = watch();
  for (const char* to : w.waited) for_each_cell(to, 16, [&w](Cell& c) { c.shown = w.now; });
  w.waited.clear();
}

inline void on_wgmma(const Operands& registers, uint64_t b, const void* place) {
  Unwatched here;
  count("wgmma");
  Watch& w = watch();
  for (const char* at : w.changed) {
    if (within(at, registers.a, 16) || within(at, registers.d, 128)) {
      complain("wgmma uses a register that was changed after wgmma_fence", place);
    }
  }
  w.multiplications.push_back({w.wgmma_groups, registers, b});
  if (lane() == 0) for_each_cell_of_b(b, [=](Cell& c) { on_multiply(c, place); });
}

inline void on_wgmma_wait(long pending) {
  Unwatched here;
  Watch& w = watch();
  auto& unfinished = w.multiplications;
  while (!unfinished.empty() && unfinished.front().group < w.wgmma_groups - pending) {
    const uint64_t b = unfinished.front().b;
    unfinished.pop_front();
    if (lane() != 0) continue;
    for_each_cell_of_b(b, [&w](Cell& c) {
      c.wgmmas--;
      c.multiplied = std::max(c.multiplied, w.now);
    });
  }
}

inline void on_register(const char* at, bool writes, const void* place) {
  if (writes) watch().changed.push_back(at);
  for (const Multiplication& m : watch().multiplications) {
    if (writes && within(at, m.registers.a, 16)) {
      complain("overwrites a register that an unfinished wgmma reads", place);
    }
    if (within(at, m.registers.d, 128)) complain("uses the sums of an unfinished wgmma", place);
  }
}

// ---- Each access of the kernel
// A variable marked __shared__ is a function's static one: g++ begins the names of these with _ZZ.
inline bool is_shared(const char* at) {
  if (within(at, base + START, dynamic_bytes)) return true;
  if (is_static.count(at) == 0) {
    Dl_info info = {};
    dladdr(at, &info);
    is_static[at] = info.dli_sname && strncmp(info.dli_sname, "_ZZ", 3) == 0;
  }
  return is_static[at];
}

inline void on_access(const char* at, int bytes, bool writes, const void* place) {
  for (auto& [from, to] : matrices) {
    if (at >= from && at < to) return record(at, bytes, place, writes ? GLOBAL_WRITE : GLOBAL_READ);
  }
  if (!is_shared(at)) return on_register(at, writes, place);
  record(at, bytes, place, writes ? SHARED_WRITE : SHARED_READ);
  const long now = watch().now;
  for_each_cell(at, bytes, [=](Cell& c) { writes ? on_write(c, now, place) : on_read(c, place); });
}

NO_HOOKS inline void hook(void* at, int bytes, bool writes, const void* place) {
  if (unwatched || !current) return;
  unwatched++;
  on_access((const char*)at, bytes, writes, place);
  unwatched--;
}

template <typename Args> void on_launch(const Args& p) {
  traffic.clear();
  complaints.clear();
  counts.clear();
  const size_t M = p.M;
  const char* bias = (const char*)p.bias;
  matrices = {{(const char*)p.X, (const char*)(p.X + M * p.K)},
              {(const char*)p.W, (const char*)(p.W + (size_t)p.N / 4 * p.K)},
              {bias, bias ? bias + 2 * p.N : bias},
              {(const char*)p.Y, (const char*)(p.Y + M * p.N)}};
}

inline void on_block(int shared_bytes) {
  close_requests();
  cells.clear();
  watches.assign(threads, {});
  dynamic_bytes = shared_bytes;
}

inline void add_line(const char* what, const std::string& name, const void* place, Traffic t) {
  Dl_info info = {};
  dladdr(place, &info);
  const long offset = (const char*)place - (const char*)info.dli_fbase - 1;  // within the call
  char line[200];
  snprintf(line, sizeof line, "%s\t%s\t%lx\t%ld\t%ld\t%ld\n", what, name.c_str(), offset,
           t.requests, t.ideal, t.actual);
  report += line;
}
}  // namespace emu

// A line for each finding: what, name, place in the library, then numbers; separated by tabs.
extern "C" const char* emulated_report() {
  using namespace emu;
  const char* kinds[] = {"shared read", "shared write", "global read", "global write"};
  close_requests();
  report.clear();
  for (auto& [what, n] : complaints) add_line("complaint", what.first, what.second, {n});
  for (auto& [what, n] : counts) add_line("count", what, nullptr, {n});
  for (auto& [site, sum] : traffic) add_line("traffic", kinds[site.second], site.first, sum);
  return report.c_str();
}

#define HOOKS(n)                                                                              \
  NO_HOOKS void __tsan_read##n(void* at) { emu::hook(at, n, false, CALLED_FROM); }             \
  NO_HOOKS void __tsan_write##n(void* at) { emu::hook(at, n, true, CALLED_FROM); }
#pragma GCC diagnostic ignored "-Wbuiltin-declaration-mismatch"
extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
NO_HOOKS void __tsan_read_range(void* at, size_t n) { emu::hook(at, n, false, CALLED_FROM); }
NO_HOOKS void __tsan_write_range(void* at, size_t n) { emu::hook(at, n, true, CALLED_FROM); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
}
#else
#define IF_AUDIT(...)
#define NOT_INLINE
#endif
namespace emu {
inline void Queue::run(Group& group) {
  IF_AUDIT(Unwatched here;)
  for (Work& work : group) work();
  group.clear();
}

// An instruction of a whole warp: each lane hands in a pointer, and the last lane to come does the
// work for all.
template <typename F> void together(void* in, F work) {
  Warp& warp = warps[current->thread / 32];
  warp.in[lane()] = in;
  warp.arrived++;
  const long before = warp.generation;
  IF_AUDIT(new_epoch();)
  if (warp.arrived == 32) {
    IF_AUDIT(Unwatched here;)
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
  IF_AUDIT(emu::on_barrier();)
}

// -------------------------------------------------------------------------------------------------
// Which lane holds which element: the tables of the PTX manual for m16n8k16 (see kernel.cu's
// header)

namespace emu {
// The row and column of A, then of B, that the 16-bit value number e of a lane's registers belongs
// to.
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

// The row and column of D that element i of a lane belongs to; wgmma's D has four elements for each
// 8 columns.
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

inline void gather_a(float (&A)[16][16], const Operands (&lanes)[32]) {
  for (int l = 0; l < 32; l++) {
    for (int e = 0; e < 8; e++) A[a_row(l, e)][a_column(l, e)] = value_of(lanes[l].a, e);
  }
}

// D += A * B, each lane's `size` elements of D.
template <int COLUMNS>
void multiply(const Operands (&lanes)[32], int size, const float (&A)[16][16],
              const float (&B)[16][COLUMNS]) {
  for (int l = 0; l < 32; l++) {
    for (int i = 0; i < size; i++) {
      for (int k = 0; k < 16; k++) lanes[l].d[i] += A[d_row(l, i)][k] * B[k][d_column(l, i)];
    }
  }
}
}  // namespace emu

// -------------------------------------------------------------------------------------------------
// sm_80: mma and cp.async

inline void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  IF_AUDIT(emu::count("mma");)
  emu::Operands operands{d, a, {b0, b1}};
  emu::together(&operands, [](emu::Warp& warp) {
    emu::Operands lanes[32];
    for (int l = 0; l < 32; l++) lanes[l] = *(emu::Operands*)warp.in[l];
    float A[16][16];
    float B[16][8];
    emu::gather_a(A, lanes);
    for (int l = 0; l < 32; l++) {
      for (int e = 0; e < 4; e++) {
        B[emu::b_row(l, e)][emu::b_column(l)] = emu::value_of(lanes[l].b, e);
      }
    }
    emu::multiply(lanes, 4, A, B);
  });
}

NOT_INLINE inline void cp_async16(char* to, const void* from, bool valid) {
  IF_AUDIT(emu::on_copy(to, (const char*)from, valid, CALLED_FROM);)
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
inline void cp_async_commit() {
  emu::current->copies.commit(emu::late_copies);
  IF_AUDIT(emu::watch().copy_groups++;)
}
template <int PENDING> void cp_async_wait() {
  emu::current->copies.wait(PENDING);
  IF_AUDIT(emu::on_copy_wait(PENDING);)
}

// -------------------------------------------------------------------------------------------------
// sm_90a: wgmma

inline void show_copies_to_wgmma() {
  IF_AUDIT(emu::Unwatched here; emu::on_show();)
  for (char* to : emu::current->landed) memcpy(&emu::shown[to - emu::base], to, 16);
  emu::current->landed.clear();
}
inline void set_zero(float& sum) { sum = 0; }
inline void wgmma_fence() { IF_AUDIT(emu::Unwatched here; emu::watch().changed.clear();) }
inline void wgmma_commit() {
  IF_AUDIT(emu::watch().wgmma_groups++;)
  emu::together(nullptr, [](emu::Warp& warp) { warp.wgmma.commit(emu::late_math); });
}
template <int PENDING> void wgmma_wait() {
  emu::together(nullptr, [](emu::Warp& warp) { warp.wgmma.wait(PENDING); });
  IF_AUDIT(emu::on_wgmma_wait(PENDING);)
}
inline uint64_t descriptor(const void* tile) { return shared_address(tile) >> 4; }

// Column k of B for token `row` of a tile.
inline float value_of_b(uint64_t descriptor, int row, int k) {
  __nv_bfloat16 value;
  memcpy(&value, &emu::shown[emu::address_of_b(descriptor, row, k)], 2);
  return __bfloat162float(value);
}

NOT_INLINE inline void wgmma(float (*d)[4], const uint32_t* a, uint64_t b) {
  emu::Operands operands{d[0], a, {}};
  IF_AUDIT(emu::on_wgmma(operands, b, CALLED_FROM);)
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

// -------------------------------------------------------------------------------------------------
// Host: a GPU's attributes, and the launch of a kernel, which is the scheduler of its fibers

extern "C" {
int emulated_blocks;   // of the last launch,
int emulated_threads;  // and the threads of a block: tests see by them what was launched
}

inline int device_attribute(cudaDeviceAttr attribute) {
  const char* sms = getenv("EMULATION_SMS");
  const char* capability = getenv("EMULATION_CC");
  if (attribute == cudaDevAttrMultiProcessorCount) return sms ? atoi(sms) : 4;
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
  IF_AUDIT(on_block(shared_bytes);)
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

// Lets every fiber run that can: those of warp `slow`, or those of all the others. Returns how many
// ran.
inline int run_fibers(int slow, bool slow_only) {
  int ran = 0;
  for (Fiber& fiber : fibers) {
    const bool is_slow = fiber.thread / 32 == slow;
    if (is_slow != slow_only || fiber.done) continue;
    if (fiber.ready && !fiber.ready()) continue;
    fiber.ready = nullptr;
    current = &fiber;
    swapcontext(&scheduler, &fiber.context);
    current = nullptr;
    ran++;
  }
  return ran;
}

inline bool guard_is_intact(int shared_bytes) {
  const char* end = base + START + shared_bytes;
  return std::all_of(end, end + GUARD, [](char byte) { return byte == (char)0xFF; });
}

inline int threads_left() {
  const auto is_left = [](const Fiber& fiber) { return !fiber.done; };
  return std::count_if(fibers.begin(), fibers.end(), is_left);
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
  if (strcmp(mode, "launch only") == 0) return cudaSuccess;
  body = [=] { kernel(args); };
  IF_AUDIT(on_launch(args);)
  fibers.resize(threads);
  int pass = 0;  // goes on from block to block, so that each block is disturbed at other places
  for (unsigned block = 0; block < grid.x * grid.y; block++) {
    start_block(block % grid.x, block / grid.x, smem);
    while (threads_left() > 0) {
      // A warp is held back until no other can run, to find missing barriers. Every 53 passes it is
      // another warp.
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
