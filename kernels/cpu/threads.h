// Threads that share the tasks of a call, and stay awake for those of the next one.
//
// A model makes hundreds of calls per token, each of some tens of microseconds: as long as a thread
// takes to wake up. So the threads that XLA's pool lends keep looking for work for `kAwake` before
// they go back, as OpenMP's do.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

constexpr std::chrono::microseconds kAwake(100);

// Tasks 0, ..., tasks - 1 of one call. It lives as long as the call waits, which is until no helper
// is inside.
struct Job {
  void (*call)(const void* body, int64_t task);
  const void* body;
  int64_t tasks;
  std::atomic<int64_t> next{0}, done{0}, inside{0};

  void work() {
    for (int64_t i; (i = next++) < tasks; ++done) call(body, i);
  }
};

class Team {
 public:
  // Calls body(0), ..., body(tasks - 1) on this thread and others. Each task writes what is its
  // own.
  template <typename Body>
  void run(ffi::ThreadPool& pool, int64_t tasks, int64_t threads, const Body& body) {
    auto call = [](const void* b, int64_t i) { (*static_cast<const Body*>(b))(i); };
    Job job{call, &body, tasks};
    if (threads < 2 || tasks < 2) return job.work();
    offer(&job);
    const int64_t wanted = std::min(tasks, threads) - 1;
    for (int64_t awake = helpers_; awake < wanted; ++awake) {
      ++helpers_;
      pool.Schedule([this] { help(); });
    }
    job.work();
    for (int spins = 0; job.done < tasks;) wait(spins);
    withdraw(&job);
    for (int spins = 0; job.inside > 0;) wait(spins);
  }

 private:
  std::mutex guard_;  // of open_
  Job* open_ = nullptr;
  std::atomic<uint64_t> offered_{0};  // jobs so far
  std::atomic<int64_t> helpers_{0};

  void offer(Job* job) {
    const std::lock_guard<std::mutex> held(guard_);
    open_ = job;
    ++offered_;
  }

  void withdraw(Job* job) {
    const std::lock_guard<std::mutex> held(guard_);
    if (open_ == job) open_ = nullptr;
  }

  Job* enter() {
    const std::lock_guard<std::mutex> held(guard_);
    if (open_) ++open_->inside;
    return open_;
  }

  static void wait(int& spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (++spins % 256 == 0) std::this_thread::yield();  // another program may need the core
  }

  void help() {
    using Clock = std::chrono::steady_clock;
    uint64_t seen = 0;
    auto until = Clock::now() + kAwake;
    for (int spins = 0;; wait(spins)) {
      if (const uint64_t now = offered_; now != seen) {
        seen = now;
        if (Job* job = enter()) {
          job->work();
          --job->inside;
          until = Clock::now() + kAwake;
        }
      } else if (Clock::now() > until) {
        --helpers_;
        if (offered_ == seen) return;
        ++helpers_;  // a call has counted on this one meanwhile
      }
    }
  }
};

inline Team team;
