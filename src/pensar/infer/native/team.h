// Team: threads that do one job together, phase by phase. What is shared out never changes a sum: only whole outputs are.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Team {
  public:
    // With `pin` every thread but the caller stays on one core of those that the caller may use, the last ones first.
    explicit Team(int threads, bool pin = false) : size(threads < 1 ? 1 : threads), pin(pin) {}

    ~Team() {
        if (workers->empty() || owner != getpid()) {
            leave();
            return;
        }
        {
            std::lock_guard<std::mutex> hold(gate->mutex);
            gate->closing = true;
        }
        gate->bell.notify_all();
        for (auto& thread : *workers) thread.join();
        delete workers;
        delete gate;
    }

    // Every thread runs the job, with its own number; returns when all are through.
    void run(const std::function<void()>& job) {
        if (size == 1) return job();
        if (owner != getpid()) start();
        {
            std::lock_guard<std::mutex> hold(gate->mutex);
            gate->job = &job;
            gate->turn++;
        }
        gate->bell.notify_all();
        job();
        barrier();
    }

    // Within a job: f(i) for i in [0, count), shared out `step` at a time; all wait for the last.
    template <class F>
    void each(int64_t count, F f, int64_t step = 1) {
        if (size == 1) {
            for (int64_t i = 0; i < count; i++) f(i);
            return;
        }
        for (int64_t begin; (begin = next.fetch_add(step, std::memory_order_relaxed)) < count;)
            for (int64_t i = begin; i < count && i < begin + step; i++) f(i);
        barrier();
    }

    const int size;
    const bool pin;

  private:
    struct Gate {
        std::mutex mutex;
        std::condition_variable bell;
        const std::function<void()>* job = nullptr;
        uint64_t turn = 0;
        bool closing = false;
    };

    // A fork leaves the child without threads, and perhaps a locked gate: both are left behind.
    void leave() {
        new std::vector<std::thread>(std::move(*workers));
        workers->clear();
    }

    void start() {
        leave();
        gate = new Gate;
        arrived = 0;
        next = 0;
        owner = getpid();
        for (int i = 1; i < size; i++) workers->emplace_back([this] { serve(); });
        if (pin) keep_apart();
    }

    void keep_apart() {
#if defined(__linux__)
        cpu_set_t allowed;
        if (pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed) != 0) return;
        std::vector<int> cores;
        for (int core = CPU_SETSIZE - 1; core >= 0; core--)
            if (CPU_ISSET(core, &allowed)) cores.push_back(core);
        for (size_t i = 0; i < workers->size(); i++) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cores[i % cores.size()], &one);
            pthread_setaffinity_np((*workers)[i].native_handle(), sizeof one, &one);
        }
#endif
    }

    void serve() {
        for (uint64_t seen = 0;; seen++) {
            const std::function<void()>* job;
            {
                std::unique_lock<std::mutex> hold(gate->mutex);
                gate->bell.wait(hold, [&] { return gate->closing || gate->turn > seen; });
                if (gate->closing) return;
                job = gate->job;
            }
            (*job)();
            barrier();
        }
    }

    // Phases are microseconds apart: spin, and give the core away when somebody else has it.
    void barrier() {
        const uint64_t round = rounds.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            next.store(0, std::memory_order_relaxed);
            rounds.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; rounds.load(std::memory_order_acquire) == round; spins++) {
            if (spins > 2000) std::this_thread::yield();
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }

    std::vector<std::thread>* workers = new std::vector<std::thread>;
    Gate* gate = new Gate;
    pid_t owner = 0;  // the process that the threads are in; none before the first job
    std::atomic<int64_t> next{0};
    std::atomic<int> arrived{0};
    std::atomic<uint64_t> rounds{0};
};
