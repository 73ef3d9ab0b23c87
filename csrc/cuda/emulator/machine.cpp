// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace compressed_linear::cuda::emulator {
namespace {

constexpr size_t kMaxProblems = 20;

}  // namespace

thread_local Machine* machine = nullptr;

Report launch(const Options& options, const std::function<void()>& kernel) {
  Machine here(options, kernel);
  Machine* const outer = machine;
  machine = &here;
  Report report = here.run();
  machine = outer;
  return report;
}

const Position& position() { return machine->self().at; }

void sync_block(int id, int threads) { machine->sync_block(id, threads); }

Machine::Machine(const Options& options, const std::function<void()>& kernel)
    : options_(options), kernel_(kernel), global_(options.buffers) {
  if (options.threads < 1 || options.threads > 1024 || options.threads % kWarp != 0 ||
      options.grid_x < 1 || options.grid_y < 1 || options.resident < 1)
    throw std::invalid_argument(
        "emulator: expected 32 to 1024 threads in whole warps, a grid of "
        "at least 1x1 and at least one resident block");
}

void Machine::problem(const std::string& text) {
  ++report_.problem_count;
  if (report_.problems.size() < kMaxProblems) report_.problems.push_back(text);
}

void Machine::stop(const std::string& text) {
  problem(text);
  stopped_ = true;
  throw Stop{};
}

std::string Machine::where() const {
  std::ostringstream text;
  text << "thread " << current_->at.thread << " of block " << current_->at.block_x << ","
       << current_->at.block_y;
  return text.str();
}

uint64_t Machine::locate(const void* data, int bytes, bool write, bool constant, const char* what) {
  uint64_t address = 0;
  if (!global_.locate(data, bytes, write, constant, what, &address))
    stop(where() + ": " + global_.fatal());
  return address;
}

// The body of each fiber: one thread after the other, in several blocks.
void Machine::run_threads() {
  Machine& m = *machine;
  for (;;) {
    try {
      m.kernel_();
    } catch (const Stop&) {
    }
    m.finish(m.self());
    m.self().fiber.suspend();
  }
}

void Machine::wait(State state, const char* what) {
  self().state = state;
  self().waits = what;
  self().fiber.suspend();
  if (stopped_) throw Stop{};
}

void Machine::finish(Thread& thread) {
  Block& block = *thread.block;
  thread.state = State::done;
  --block.alive;
  ++progress_;
  const int warp = thread.at.thread / kWarp;
  for (int lane = 0; lane < kWarp; ++lane)
    if (block.threads[static_cast<size_t>(warp * kWarp + lane)]->state != State::done) return;
  flush_warp(block, warp);
}

void Machine::flush_warp(Block& block, int warp) {
  Thread** const threads = block.threads.data() + warp * kWarp;
  const std::vector<Access>* lanes[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = &threads[lane]->log;
  count_accesses(lanes, report_);
  for (int lane = 0; lane < kWarp; ++lane) threads[lane]->log.clear();
}

void Machine::start(int number) {
  auto block = std::make_unique<Block>();
  const int count = options_.threads;
  block->shared = std::make_unique<SharedMemory>(options_.shared_bytes, count, options_.races);
  block->arrived.assign(static_cast<size_t>(count / kWarp), 0);
  block->alive = count;
  block->order.resize(static_cast<size_t>(count));
  std::iota(block->order.begin(), block->order.end(), 0);
  if (options_.order != 0) {
    std::mt19937 random(options_.order);
    std::shuffle(block->order.begin(), block->order.end(), random);
  }
  for (int i = 0; i < count; ++i) {
    if (free_threads_.empty()) {
      threads_.push_back(std::make_unique<Thread>(&Machine::run_threads));
      free_threads_.push_back(threads_.back().get());
    }
    Thread* thread = free_threads_.back();
    free_threads_.pop_back();
    thread->block = block.get();
    thread->at = {i,
                  count,
                  number % options_.grid_x,
                  number / options_.grid_x,
                  options_.grid_x,
                  options_.grid_y};
    thread->state = State::ready;
    thread->log.clear();
    thread->open.clear();
    thread->groups.clear();
    block->threads.push_back(thread);
  }
  blocks_.push_back(std::move(block));
}

Report Machine::run() {
  const int total = options_.grid_x * options_.grid_y;
  int next = 0;
  int64_t idle_rounds = 0;
  while (!stopped_) {
    while (next < total && static_cast<int>(blocks_.size()) < options_.resident) start(next++);
    if (blocks_.empty()) break;
    const int64_t before = progress_;
    bool ran = false;
    for (const auto& block : blocks_) {
      for (const int index : block->order) {
        Thread& thread = *block->threads[static_cast<size_t>(index)];
        if (thread.state != State::ready && thread.state != State::spinning) continue;
        ran = true;
        thread.state = State::ready;
        current_ = &thread;
        thread.fiber.resume();
        if (stopped_) break;
      }
      if (stopped_) break;
    }
    // A thread that spins needs a round to see what another has written.
    idle_rounds = ran && progress_ != before ? 0 : idle_rounds + 1;
    if (!stopped_ && (!ran || idle_rounds > 3)) {
      explain_deadlock();
      break;
    }
    for (auto& block : blocks_) {
      if (block->alive != 0) continue;
      for (Thread* thread : block->threads) free_threads_.push_back(thread);
      for (const std::string& text : block->shared->problems()) problem(text);
      report_.problem_count +=
          block->shared->problem_count() - static_cast<int64_t>(block->shared->problems().size());
      block.reset();
    }
    blocks_.erase(std::remove(blocks_.begin(), blocks_.end(), nullptr), blocks_.end());
  }
  for (const auto& block : blocks_)
    for (const std::string& text : block->shared->problems()) problem(text);
  for (const std::string& text : global_.problems()) problem(text);
  return report_;
}

void Machine::explain_deadlock() {
  for (const auto& block : blocks_) {
    std::map<std::string, std::vector<int>> waiting;
    for (const Thread* thread : block->threads)
      waiting[thread->state == State::done ? "have ended" : "wait in " + std::string(thread->waits)]
          .push_back(thread->at.thread);
    std::ostringstream text;
    text << "deadlock in block " << block->threads[0]->at.block_x << ","
         << block->threads[0]->at.block_y << ":";
    for (const auto& [what, threads] : waiting)
      text << " " << threads.size() << " threads (the first is " << threads[0] << ") " << what
           << ";";
    problem(text.str());
  }
}

Thread** Machine::arrive(const char* what) {
  Thread& me = self();
  Block& block = *me.block;
  const int warp = me.at.thread / kWarp;
  int& arrived = block.arrived[static_cast<size_t>(warp)];
  Thread** const lanes = block.threads.data() + warp * kWarp;
  for (int lane = 0; lane < kWarp; ++lane)
    if (lanes[lane]->state == State::warp && lanes[lane]->waits != what)
      stop(where() + " is at " + what + " while lane " + std::to_string(lane) +
           " of its warp waits in " + lanes[lane]->waits);
  if (++arrived < kWarp) {
    wait(State::warp, what);
    return nullptr;
  }
  arrived = 0;
  flush_warp(block, warp);
  return lanes;
}

void Machine::release(Thread** lanes) {
  for (int lane = 0; lane < kWarp; ++lane)
    if (lanes[lane] != current_) lanes[lane]->state = State::ready;
  ++progress_;
}

void Machine::sync_block(int id, int threads) {
  Thread& me = self();
  Block& block = *me.block;
  if (id < 0 || id > 15 || threads % kWarp != 0 || threads < kWarp || threads > options_.threads)
    stop(where() + ": barrier " + std::to_string(id) + " of " + std::to_string(threads) +
         " threads (expected 0 to 15, whole warps of the block)");
  Barrier& barrier = block.barriers[id];
  if (barrier.threads.empty()) barrier.expected = threads;
  if (barrier.expected != threads)
    stop(where() + ": barrier " + std::to_string(id) + " of " + std::to_string(threads) +
         " threads, others wait for " + std::to_string(barrier.expected));
  barrier.threads.push_back(me.at.thread);
  if (static_cast<int>(barrier.threads.size()) < threads) {
    wait(State::barrier, id == 0 ? "sync_threads" : "sync_named");
    return;
  }
  const std::vector<int> members = std::move(barrier.threads);
  barrier.threads.clear();
  std::vector<char> warps(block.arrived.size());
  for (const int member : members) warps[static_cast<size_t>(member / kWarp)] = 1;
  for (size_t warp = 0; warp < warps.size(); ++warp)
    if (warps[warp]) flush_warp(block, static_cast<int>(warp));
  block.shared->synchronize(members);
  for (const int member : members)
    if (member != me.at.thread) block.threads[static_cast<size_t>(member)]->state = State::ready;
  ++report_.barriers;
  ++progress_;
}

}  // namespace compressed_linear::cuda::emulator
