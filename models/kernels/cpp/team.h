// Threads that go through phases together, and the memory they work in.
#pragma once
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "pool.h"
#if defined(_OPENMP)
#include <omp.h>
#elif defined(FAR_THREADS)
#include <thread>
#endif

namespace {

// What members of a team share. `next` only grows: each member takes exactly one number too many a phase, so all know
// where the next phase begins.
struct Team {
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};
  alignas(64) std::atomic<int64_t> next{0};
};

class Member {
 public:
  Member(Team& team, int me, int size) : team(team), me(me), size(size) {}

  int team_size() const { return size; }

  // Waits for the whole team: awake for some microseconds, then asleep, as another program may want the core.
  void meet() {
    if (size == 1) return;
    const int round = team.round.load(std::memory_order_acquire);
    if (team.arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      team.arrived.store(0, std::memory_order_relaxed);
      team.round.store(round + 1, std::memory_order_release);
      team.round.notify_all();
      return;
    }
    for (int i = 0; i < 4000; ++i) {
      if (team.round.load(std::memory_order_acquire) != round) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    team.round.wait(round, std::memory_order_acquire);
  }

  // Calls f(i) for some of 0..tasks, first come, first served. `meet` before the next call.
  template <class F>
  void share(int64_t tasks, const F& f) {
    for (int64_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed) - taken) < tasks;) f(i);
    taken += tasks + size;
  }

  // Calls f(from, count) for this member's share of n rows, in pieces of at most `most`.
  template <class F>
  void rows(int64_t n, int64_t most, const F& f) const {
    const int64_t from = n * me / size, mine = n * (me + 1) / size - from, pieces = (mine + most - 1) / most;
    for (int64_t i = 0; i < pieces; ++i) f(from + mine * i / pieces, mine * (i + 1) / pieces - mine * i / pieces);
  }

 private:
  Team& team;
  const int me, size;
  int64_t taken = 0;
};

// f(thread, threads) on at most `threads` of OpenMP's, which are torch's; without OpenMP on threads of its own, as many
// as the system gives.
template <class F>
void in_parallel([[maybe_unused]] int threads, const F& f) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num(), omp_get_num_threads());
#elif defined(FAR_THREADS)
  std::atomic<int> count{0};
  std::vector<std::thread> others;
  try {
    others.reserve(threads);
    while (int(others.size()) + 1 < threads)
      others.emplace_back([&, me = int(others.size()) + 1] {
        count.wait(0);
        f(me, count.load());
      });
  } catch (const std::exception&) {  // fewer, then
  }
  const int size = int(others.size()) + 1;
  count = size;
  count.notify_all();
  f(0, size);
  for (std::thread& other : others) other.join();
#else
  f(0, 1);
#endif
}

// Hands out pieces of one block of memory, each on a cache line of its own with some to spare behind it (vectors may
// read past a row's end). Without a block it counts how much is needed.
struct Pieces {
  char* base = nullptr;
  uint64_t bytes = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
    bytes += (count * sizeof(T) + 63) / 64 * 64 + 256;
    return piece;
  }
};

// A block of at least so many bytes out of a pool.
class Scratch {
 public:
  Scratch(far_engine::Pool& pool, uint64_t bytes) : pool(pool), block(pool.take()) {
    if (block.bytes >= bytes) return;
    std::free(block.data);
    const bool fits = bytes <= SIZE_MAX / 2;
    block = {fits ? std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096) : nullptr, size_t(bytes)};
    if (!block.data) {
      pool.give({});
      throw std::bad_alloc();
    }
    std::memset(block.data, 0, bytes);
  }
  ~Scratch() { pool.give(block); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(block.data); }

 private:
  far_engine::Pool& pool;
  far_engine::Pool::Block block;
};

}  // namespace
