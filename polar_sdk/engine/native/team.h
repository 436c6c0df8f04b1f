// Threads that share the short pieces of work which decoding consists of.
#pragma once

#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>

namespace polar {

// A token takes some 240 pieces of work of 20 to 100 µs, and OpenMP's threads wait badly between them. They spin for a
// number of turns whose length differs by processor and which cannot be set once torch is there: too few, and they
// sleep and are woken 240 times; too many, and two processes on two cores wait for threads whose core the other one
// spins on. And none spins once all pools of a process together have more threads than there are cores.
//
// Here a thread that waits looks, then gives its core to whoever wants it, then sleeps; and nobody waits for a thread
// that has not begun: whoever is awake takes what is left, in smaller and smaller parts. All engines of a process share
// one team; one that finds it busy works alone.

constexpr auto kLook = std::chrono::microseconds(20);  // then yield
constexpr auto kYield = std::chrono::milliseconds(2);  // then sleep
constexpr int kLooks = 16;                             // between two looks at the clock

// Numbers of which threads take parts, until none are left.
class Range {
 public:
  // All from `begin` to `end`; who takes a part gets one of `share` of what is left.
  void set(int64_t begin, int64_t end, int64_t share) {
    end_ = end;
    share_ = share;
    next_.store(begin, std::memory_order_relaxed);
  }
  bool take(int64_t& begin, int64_t& end) {
    begin = next_.load(std::memory_order_relaxed);
    do {
      if (begin >= end_) return false;
      end = begin + std::max<int64_t>(1, (end_ - begin) / share_);
    } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }

 private:
  std::atomic<int64_t> next_{0};
  int64_t end_ = 0, share_ = 1;
};

class Team {
 public:
  // The team of this process. It is never destroyed: its threads may still look at it when the process ends.
  static Team& get() {
    std::atomic<Team*>& team = current();
    Team* found = team.load(std::memory_order_acquire);
    if (found != nullptr) return *found;
    auto* made = new Team;
    if (team.compare_exchange_strong(found, made)) return *made;
    delete made;
    return *found;
  }

  // In a forked process, which has none of its threads: another team will be made.
  static void forget() { current().store(nullptr); }

  // Let `body(range)` run in up to `threads` threads, this one included, until each has found the range empty.
  template <class Body>
  void run(int64_t count, int64_t threads, const Body& body) {
    Range alone;
    if (threads < 2 || count < 2 || busy_.test_and_set(std::memory_order_acquire)) {
      alone.set(0, count, 1);
      body(alone);
      return;
    }
    grow(threads - 1);
    range_.set(0, count, 2 * threads);
    body_ = &body;
    call_ = [](const void* each, Range& range) { (*static_cast<const Body*>(each))(range); };
    helpers_ = threads - 1;
    state_.store((state_.load(std::memory_order_relaxed) & ~kInside) + kNext + kOpen, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst) > 0) wake();
    body(range_);
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    wait([&] { return (state_.load(std::memory_order_acquire) & kInside) == 0; }, false);
    busy_.clear(std::memory_order_release);
  }

 private:
  // One word: whether a piece of work may be joined, how many helpers are inside, and its number.
  static constexpr uint32_t kOpen = 1, kHelper = 2, kInside = 0xffe, kNext = 0x1000;

  static std::atomic<Team*>& current() {
    static std::atomic<Team*> team{nullptr};
    return team;
  }

  // If the system has no more threads to give, those that there are do the work.
  void grow(int64_t helpers) {
    const auto begin = [](void* team) -> void* {
      static_cast<Team*>(team)->help();
      return nullptr;
    };
    for (pthread_t thread; made_ < helpers && pthread_create(&thread, nullptr, begin, this) == 0; ++made_) {
      pthread_detach(thread);
    }
  }

  void help() {
    const int64_t number = begun_.fetch_add(1);
    uint32_t done = 0;
    while (true) {
      uint32_t seen = 0;
      wait(
          [&] {
            seen = state_.load(std::memory_order_seq_cst);
            return (seen & kOpen) != 0 && seen / kNext != done;
          },
          true);
      done = seen / kNext;
      while ((seen & kOpen) != 0 && seen / kNext == done) {
        if (!state_.compare_exchange_weak(seen, seen + kHelper, std::memory_order_acq_rel)) continue;
        if (number < helpers_) call_(body_, range_);
        state_.fetch_sub(kHelper, std::memory_order_acq_rel);
        break;
      }
    }
  }

  // Wait until `ready()`, which may be true of a moment only for helpers: they alone may sleep.
  template <class Ready>
  void wait(const Ready& ready, bool may_sleep) {
    if (ready()) return;
    const auto begin = std::chrono::steady_clock::now();
    while (true) {
      for (int look = 0; look < kLooks; ++look) {
        if (ready()) return;
        _mm_pause();
      }
      const auto waited = std::chrono::steady_clock::now() - begin;
      if (waited > kLook) sched_yield();
      if (may_sleep && waited > kYield) break;
    }
    while (!ready()) sleep(ready);
  }

  template <class Ready>
  void sleep(const Ready& ready) {
    asleep_.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = state_.load(std::memory_order_seq_cst);
    if (!ready()) syscall(SYS_futex, &state_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    asleep_.fetch_sub(1, std::memory_order_seq_cst);
  }

  void wake() { syscall(SYS_futex, &state_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }

  alignas(64) std::atomic<uint32_t> state_{0};
  alignas(64) Range range_;
  alignas(64) std::atomic<int> asleep_{0};
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  void (*call_)(const void*, Range&) = nullptr;
  const void* body_ = nullptr;
  int64_t helpers_ = 0, made_ = 0;
  std::atomic<int64_t> begun_{0};
};

// The OpenMP that torch runs on. It is looked up in the process: to link one would bring a second, whose threads would
// spin beside those of the first.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*pause)(int, int);
  int (*own_device)();
  static const OpenMp& get() {
    static const OpenMp found{find<void (*)(void (*)(void*), void*, unsigned, unsigned)>("GOMP_parallel"),
                              find<int (*)(int, int)>("omp_pause_resource"),
                              find<int (*)()>("omp_get_initial_device")};
    return found;
  }
  // Ends its threads, which may still spin; they come back when needed.
  void end_threads() const {
    constexpr int kSoft = 1;
    if (pause && own_device) pause(kSoft, own_device());
  }

 private:
  template <class Function>
  static Function find(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }
};

// Whether torch's threads may still spin, for up to 10 ms, on the cores of the team.
inline thread_local bool spinning = false;

// A forked process has none of torch's threads either; to end them there would be to join what is not.
inline const int forks = pthread_atfork(nullptr, nullptr, [] {
  Team::forget();
  spinning = false;
});

// Who shares the work of an operation.
struct Sharing {
  int64_t threads;
  bool team;  // threads of the team, or torch's own, where the operations around this one use those too
};

// In torch's own threads: each takes one part, so that what it prepares for a part serves as long as possible.
template <class Body>
void run_in_parts(int64_t count, int64_t threads, const Body& body) {
  struct Work {
    const Body& body;
    int64_t count, threads;
    std::atomic<int64_t> next;
    void take_parts() {
      for (int64_t part; (part = next.fetch_add(1)) < threads;) {
        Range own;
        own.set(part * count / threads, (part + 1) * count / threads, 1);
        body(own);
      }
    }
  } work{body, count, std::min(threads, count), {0}};
  OpenMp::get().parallel([](void* shared) { static_cast<Work*>(shared)->take_parts(); }, &work,
                         static_cast<unsigned>(work.threads), 0);
}

// Share the numbers from 0 up to `count`. `body(range)` takes parts until none is left.
template <class Body>
void share(const Sharing& sharing, int64_t count, const Body& body) {
  std::atomic<bool> failed{false};
  const auto guarded = [&](Range& range) {
    try {
      body(range);
    } catch (const std::bad_alloc&) {  // must not leave a thread
      failed.store(true);
    }
  };
  if (sharing.team || sharing.threads < 2 || count < 2 || !OpenMp::get().parallel) {
    if (spinning) OpenMp::get().end_threads();
    spinning = false;
    Team::get().run(count, sharing.threads, guarded);
  } else {
    spinning = true;
    run_in_parts(count, sharing.threads, guarded);
  }
  if (failed.load()) throw std::bad_alloc();
}

// Calls `body(number)` for each number below `count`, in several threads where there are at least `least`.
template <class Body>
void each(const Sharing& sharing, int64_t count, int64_t least, const Body& body) {
  if (count < least) {
    for (int64_t number = 0; number < count; ++number) body(number);
    return;
  }
  share(sharing, count, [&](Range& range) {
    for (int64_t begin, end; range.take(begin, end);) {
      for (int64_t number = begin; number < end; ++number) body(number);
    }
  });
}

}  // namespace polar
