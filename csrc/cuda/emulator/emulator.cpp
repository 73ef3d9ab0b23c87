// SPDX-License-Identifier: Apache-2.0
#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>

#include "cpu/common/floats.h"
#include "shared_memory.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace compressed_linear::cuda::emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kSector = 32;
constexpr size_t kMaxProblems = 20;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

// Ends the kernel; thrown in a fiber and caught where the fiber began.
struct Stop {};

enum class Kind {
  shared_load,
  shared_store,
  matrix_load,
  shared_copy,
  global_load,
  global_store,
  global_copy
};

struct Access {
  const void* site;
  Kind kind;
  uint64_t address;  // in shared memory, or buffer number and offset
  int bytes;
};

struct Copy {
  uint32_t shared;
  const void* global;
  int bytes;
  bool valid;
};

enum class State { ready, warp, barrier, spinning, done };

struct Block;

struct Thread {
  ucontext_t context;  // where it begins; later on it goes from jump to jump, which takes no system
  jmp_buf jump;        // calls
  bool begun = false;
  char* stack = nullptr;
  Block* block = nullptr;
  Position at{};
  State state = State::done;
  const char* waits = "";
  std::vector<Access> log;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  // Operands of the warp instruction that it waits in.
  uint32_t in[6];
  float* sums;
  uint32_t* out;
  int lane_from;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

struct Barrier {
  int expected = 0;
  std::vector<int> threads;
};

struct Block {
  std::vector<Thread*> threads;
  std::unique_ptr<SharedMemory> shared;
  std::map<int, Barrier> barriers;
  std::vector<int> arrived;  // lanes of each warp that wait in a warp instruction
  std::vector<int> order;
  int alive = 0;
};

// Stacks are kept for the next launch.
class Stacks {
 public:
  ~Stacks() {
    for (char* stack : free_) munmap(stack, kStackBytes);
  }
  char* take() {
    if (free_.empty()) {
      void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      // A stack that is too small ends the process instead of writing elsewhere.
      mprotect(stack, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
      return static_cast<char*>(stack);
    }
    char* const stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give(char* stack) {
#if defined(__SANITIZE_ADDRESS__)
    // Its frames were left without being unwound.
    const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    __asan_unpoison_memory_region(stack + guard, kStackBytes - guard);
#endif
    free_.push_back(stack);
  }

 private:
  std::vector<char*> free_;
};

thread_local Stacks stacks;

class Machine {
 public:
  Machine(const Options& options, const std::function<void()>& kernel)
      : options_(options),
        kernel_(kernel),
        written_(options.buffers.size()),
        constant_(options.buffers.size()) {
    if (options.threads < 1 || options.threads > 1024 || options.threads % kWarp != 0 ||
        options.grid_x < 1 || options.grid_y < 1 || options.resident < 1)
      throw std::invalid_argument(
          "emulator: expected 32 to 1024 threads in whole warps, a grid of "
          "at least 1x1 and at least one resident block");
  }

  ~Machine() {
    for (const auto& thread : threads_) stacks.give(thread->stack);
  }

  Report run();

  Thread& self() { return *current_; }
  Report& report() { return report_; }
  const Options& options() const { return options_; }

  void problem(const std::string& text);
  [[noreturn]] void stop(const std::string& text) {
    problem(text);
    stopped_ = true;
    throw Stop{};
  }
  std::string where() {
    std::ostringstream text;
    text << "thread " << self().at.thread << " of block " << self().at.block_x << ","
         << self().at.block_y;
    return text.str();
  }

  void wait(State state, const char* what) {
    self().state = state;
    self().waits = what;
    leave();
    if (stopped_) throw Stop{};
  }

  // Waits for all lanes; the last of them calls `combine` on the 32 threads.
  template <class Combine>
  void meet(const char* what, const Combine& combine);

  uint64_t locate(const void* data, int bytes, bool write, bool constant, const char* what);
  void log(const void* site, Kind kind, uint64_t address, int bytes) {
    self().log.push_back({site, kind, address, bytes});
  }
  void sync_block(int id, int threads);
  void flush_warp(Block& block, int warp);
  void progress() { ++progress_; }

 private:
  static void enter();
  void leave();
  void resume(Thread& thread);
  static void make_fiber(Thread& thread);
  void start(int block_number);
  void finish(Thread& thread);
  void explain_deadlock(const std::vector<std::unique_ptr<Block>>& blocks);
  void count(const Access* const* accesses, int lanes);
  Traffic& traffic(Kind kind);

  const Options& options_;
  const std::function<void()>& kernel_;
  Report report_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Thread*> free_threads_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<char> written_, constant_;
  jmp_buf scheduler_;
  Thread* current_ = nullptr;
  int64_t progress_ = 0;
  bool stopped_ = false;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
  void* scheduler_fake_ = nullptr;
#endif
};

thread_local Machine* machine = nullptr;

void Machine::problem(const std::string& text) {
  ++report_.problem_count;
  if (report_.problems.size() < kMaxProblems) report_.problems.push_back(text);
}

void Machine::enter() {
  Machine& m = *machine;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack_, &m.scheduler_size_);
#endif
  // One thread after the other, in several blocks.
  for (;;) {
    try {
      m.kernel_();
    } catch (const Stop&) {
    }
    m.finish(m.self());
    m.leave();
  }
}

// Back to the scheduler.
void Machine::leave() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&current_->fake_stack, scheduler_stack_, scheduler_size_);
#endif
  if (_setjmp(current_->jump) == 0) _longjmp(scheduler_, 1);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(current_->fake_stack, &scheduler_stack_, &scheduler_size_);
#endif
}

void Machine::resume(Thread& thread) {
  current_ = &thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_, thread.stack, kStackBytes);
#endif
  if (_setjmp(scheduler_) == 0) {
    if (current_->begun) _longjmp(current_->jump, 1);
    current_->begun = true;
    setcontext(&current_->context);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_, nullptr, nullptr);
#endif
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

void Machine::make_fiber(Thread& thread) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, &Machine::enter, 0);
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
      threads_.push_back(std::make_unique<Thread>());
      threads_.back()->stack = stacks.take();
      make_fiber(*threads_.back());
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
        resume(thread);
        if (stopped_) break;
      }
      if (stopped_) break;
    }
    // Whoever spins needs a round to see what another has written.
    idle_rounds = ran && progress_ != before ? 0 : idle_rounds + 1;
    if (!stopped_ && (!ran || idle_rounds > 3)) {
      explain_deadlock(blocks_);
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
  for (size_t i = 0; i < written_.size(); ++i)
    if (written_[i] && constant_[i])
      problem("load_constant reads buffer " + options_.buffers[i].name +
              ", which the kernel also writes");
  return report_;
}

void Machine::explain_deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  for (const auto& block : blocks) {
    std::map<std::string, std::vector<int>> waiting;
    for (const Thread* thread : block->threads)
      waiting[thread->state == State::done ? "have ended" : "wait in " + std::string(thread->waits)]
          .push_back(thread->at.thread);
    std::ostringstream text;
    text << "block " << block->threads[0]->at.block_x << "," << block->threads[0]->at.block_y
         << " can go no further:";
    for (const auto& [what, threads] : waiting)
      text << " " << threads.size() << " threads (the first is " << threads[0] << ") " << what
           << ";";
    problem(text.str());
  }
}

template <class Combine>
void Machine::meet(const char* what, const Combine& combine) {
  Thread& me = self();
  Block& block = *me.block;
  const int warp = me.at.thread / kWarp;
  int& arrived = block.arrived[static_cast<size_t>(warp)];
  Thread** lanes = block.threads.data() + warp * kWarp;
  for (int lane = 0; lane < kWarp; ++lane)
    if (lanes[lane]->state == State::warp && lanes[lane]->waits != what)
      stop(where() + " is at " + what + " while lane " + std::to_string(lane) +
           " of its warp waits in " + lanes[lane]->waits);
  if (++arrived < kWarp) {
    wait(State::warp, what);
    return;
  }
  arrived = 0;
  flush_warp(block, warp);
  combine(lanes);
  for (int lane = 0; lane < kWarp; ++lane)
    if (lanes[lane] != &me) lanes[lane]->state = State::ready;
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

uint64_t Machine::locate(const void* data, int bytes, bool write, bool constant, const char* what) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  for (size_t i = 0; i < options_.buffers.size(); ++i) {
    const Buffer& buffer = options_.buffers[i];
    const uintptr_t begin = reinterpret_cast<uintptr_t>(buffer.data);
    if (at < begin || at + static_cast<uintptr_t>(bytes) > begin + buffer.bytes) continue;
    const uint64_t offset = at - begin;
    if (offset % static_cast<uint64_t>(bytes) != 0)
      stop(where() + ": " + what + " of " + std::to_string(bytes) + " bytes at byte " +
           std::to_string(offset) + " of " + buffer.name + " is not aligned");
    if (write && !buffer.writable)
      stop(where() + ": " + what + " to " + buffer.name + ", which is read only");
    if (write) written_[i] = 1;
    if (constant) constant_[i] = 1;
    return static_cast<uint64_t>(i) << 48 | offset;
  }
  std::ostringstream text;
  text << where() << ": " << what << " of " << bytes << " bytes outside of every buffer";
  for (const Buffer& buffer : options_.buffers) {
    const intptr_t off = static_cast<intptr_t>(at) - reinterpret_cast<intptr_t>(buffer.data);
    if (off > -4096 && off < static_cast<intptr_t>(buffer.bytes) + 4096)
      text << ", at byte " << off << " of " << buffer.name << ", which has " << buffer.bytes;
  }
  stop(text.str());
}

Traffic& Machine::traffic(Kind kind) {
  switch (kind) {
    case Kind::shared_load:
      return report_.shared_loads;
    case Kind::shared_store:
      return report_.shared_stores;
    case Kind::matrix_load:
      return report_.matrix_loads;
    case Kind::shared_copy:
      return report_.shared_copies;
    case Kind::global_load:
      return report_.global_loads;
    case Kind::global_store:
      return report_.global_stores;
    default:
      return report_.global_copies;
  }
}

// One access of a warp by some of its lanes, in order of lanes.
void Machine::count(const Access* const* accesses, int lanes) {
  Traffic& t = traffic(accesses[0]->kind);
  ++t.accesses;
  const int bytes = accesses[0]->bytes;
  if (accesses[0]->kind >= Kind::global_load) {
    std::vector<uint64_t> sectors, units;
    for (int i = 0; i < lanes; ++i) {
      sectors.push_back(accesses[i]->address / kSector);
      units.push_back(accesses[i]->address / static_cast<uint64_t>(bytes));
    }
    const auto distinct = [](std::vector<uint64_t>& v) {
      std::sort(v.begin(), v.end());
      return static_cast<int64_t>(std::unique(v.begin(), v.end()) - v.begin());
    };
    t.transactions += distinct(sectors);
    t.least += (distinct(units) * bytes + static_cast<int64_t>(kSector) - 1) /
               static_cast<int64_t>(kSector);
    return;
  }
  // Shared memory serves 128 bytes at a time: all lanes, a half or a quarter of them.
  const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int begin = 0; begin < lanes; begin += together) {
    const int end = std::min(begin + together, lanes);
    std::vector<uint64_t> words;
    for (int i = begin; i < end; ++i)
      for (uint64_t word = accesses[i]->address / 4;
           word <= (accesses[i]->address + static_cast<uint64_t>(bytes) - 1) / 4; ++word)
        words.push_back(word);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int banks[32] = {}, most = 0;
    for (const uint64_t word : words) most = std::max(most, ++banks[word % 32]);
    t.transactions += most;
    t.least += 1;
  }
}

// The lanes' accesses since they last met, sorted into accesses of the warp: those of one place in
// the code, the first of each lane, the second, and so on.
void Machine::flush_warp(Block& block, int warp) {
  Thread** lanes = block.threads.data() + warp * kWarp;
  const Access* group[kWarp];
  bool alike = true;
  for (int lane = 1; lane < kWarp && alike; ++lane) {
    alike = lanes[lane]->log.size() == lanes[0]->log.size();
    for (size_t i = 0; alike && i < lanes[0]->log.size(); ++i)
      alike = lanes[lane]->log[i].site == lanes[0]->log[i].site;
  }
  if (alike) {
    for (size_t i = 0; i < lanes[0]->log.size(); ++i) {
      for (int lane = 0; lane < kWarp; ++lane) group[lane] = &lanes[lane]->log[i];
      count(group, kWarp);
    }
  } else {
    std::map<std::pair<const void*, int>, std::vector<const Access*>> groups;
    for (int lane = 0; lane < kWarp; ++lane) {
      std::map<const void*, int> seen;
      for (const Access& access : lanes[lane]->log)
        groups[{access.site, seen[access.site]++}].push_back(&access);
    }
    for (const auto& entry : groups)
      count(entry.second.data(), static_cast<int>(entry.second.size()));
  }
  for (int lane = 0; lane < kWarp; ++lane) lanes[lane]->log.clear();
}

// Names of warp instructions are compared by address.
const char kMatrixLoad[] = "load_matrix", kProduct[] = "multiply_add", kShuffle[] = "shuffle",
           kSyncWarp[] = "sync_warp";

float widen(uint32_t bits, bool bfloat16) {
  const uint16_t half = static_cast<uint16_t>(bits);
  return bfloat16 ? cpu::from_bf16(half) : cpu::from_fp16(half);
}

// Fragments as PTX lays them out: of lane l, with r = l / 4 and c = l % 4 * 2,
// a: rows r and r + 8, columns c, c + 1 and 8 more; b: rows c, c + 1 and 8 more, column r.
void multiply_warp(Thread** lanes, bool bfloat16) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t* in = lanes[lane]->in;
    const int r = lane / 4, c = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        a[r + i % 2 * 8][c + i / 2 * 8 + half] = widen(in[i] >> (16 * half), bfloat16);
      for (int i = 0; i < 2; ++i)
        b[c + i * 8 + half][r] = widen(in[4 + i] >> (16 * half), bfloat16);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = lanes[lane]->sums[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lanes[lane]->sums[i] = sum;
    }
}

}  // namespace

Report launch(const Options& options, const std::function<void()>& kernel) {
  Machine here(options, kernel);
  Machine* const outer = machine;
  machine = &here;
  Report report = here.run();
  machine = outer;
  return report;
}

const Position& position() { return machine->self().at; }

__attribute__((noinline)) void read_shared(uint32_t address, void* to, int bytes) {
  Machine& m = *machine;
  Thread& me = m.self();
  if (!me.block->shared->read(me.at.thread, address, to, bytes)) m.stop(me.block->shared->fatal());
  m.log(__builtin_return_address(0), Kind::shared_load, address, bytes);
}

__attribute__((noinline)) void write_shared(uint32_t address, const void* from, int bytes) {
  Machine& m = *machine;
  Thread& me = m.self();
  if (!me.block->shared->write(me.at.thread, address, from, bytes))
    m.stop(me.block->shared->fatal());
  m.log(__builtin_return_address(0), Kind::shared_store, address, bytes);
}

__attribute__((noinline)) void read_global(const void* from, void* to, int bytes, bool constant) {
  Machine& m = *machine;
  const uint64_t address = m.locate(from, bytes, false, constant, "load");
  std::memcpy(to, from, static_cast<size_t>(bytes));
  m.log(__builtin_return_address(0), Kind::global_load, address, bytes);
}

__attribute__((noinline)) void write_global(void* to, const void* from, int bytes) {
  Machine& m = *machine;
  const uint64_t address = m.locate(to, bytes, true, false, "store");
  std::memcpy(to, from, static_cast<size_t>(bytes));
  m.log(__builtin_return_address(0), Kind::global_store, address, bytes);
  m.progress();
}

__attribute__((noinline)) void copy_async(uint32_t shared, const void* global, int bytes,
                                          bool valid) {
  Machine& m = *machine;
  Thread& me = m.self();
  const void* site = __builtin_return_address(0);
  if (valid)
    m.log(static_cast<const char*>(site) + 1, Kind::global_copy,
          m.locate(global, bytes, false, false, "copy_async"), bytes);
  if (!me.block->shared->begin_copy(me.at.thread, shared, bytes)) m.stop(me.block->shared->fatal());
  m.log(site, Kind::shared_copy, shared, bytes);
  me.open.push_back({shared, global, bytes, valid});
}

void copy_async_commit() {
  Thread& me = machine->self();
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}

void copy_async_wait(int left) {
  Thread& me = machine->self();
  while (static_cast<int>(me.groups.size()) > left) {
    for (const Copy& copy : me.groups.front())
      me.block->shared->end_copy(me.at.thread, copy.shared, copy.valid ? copy.global : nullptr,
                                 copy.bytes);
    me.groups.pop_front();
  }
}

void sync_block(int id, int threads) { machine->sync_block(id, threads); }

void sync_warp() {
  machine->meet(kSyncWarp, [](Thread** lanes) {
    std::vector<int> members;
    for (int lane = 0; lane < kWarp; ++lane) members.push_back(lanes[lane]->at.thread);
    lanes[0]->block->shared->synchronize(members);
  });
}

__attribute__((noinline)) void load_matrix(uint32_t (&r)[4], uint32_t address, bool transposed) {
  Machine& m = *machine;
  Thread& me = m.self();
  m.log(__builtin_return_address(0), Kind::matrix_load, address, 16);
  me.in[0] = address;
  me.out = r;
  m.meet(kMatrixLoad, [&m, transposed](Thread** lanes) {
    uint16_t rows[kWarp][8];
    SharedMemory& shared = *lanes[0]->block->shared;
    for (int lane = 0; lane < kWarp; ++lane)
      if (!shared.read(lanes[lane]->at.thread, lanes[lane]->in[0], rows[lane], 16))
        m.stop(shared.fatal());
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        const auto at = [&](int row, int column) -> uint32_t {
          return transposed ? rows[8 * i + column][row] : rows[8 * i + row][column];
        };
        const int row = lane / 4, column = lane % 4 * 2;
        lanes[lane]->out[i] = at(row, column) | at(row, column + 1) << 16;
      }
  });
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16) {
  Machine& m = *machine;
  Thread& me = m.self();
  std::copy(a, a + 4, me.in);
  std::copy(b, b + 2, me.in + 4);
  me.sums = c;
  m.meet(kProduct, [&m, bfloat16](Thread** lanes) {
    multiply_warp(lanes, bfloat16);
    ++m.report().matrix_products;
  });
}

uint32_t shuffle(uint32_t value, int lane) {
  Machine& m = *machine;
  Thread& me = m.self();
  uint32_t out = 0;
  me.in[0] = value;
  me.out = &out;
  me.lane_from = lane & (kWarp - 1);
  m.meet(kShuffle, [](Thread** lanes) {
    for (int i = 0; i < kWarp; ++i) *lanes[i]->out = lanes[lanes[i]->lane_from]->in[0];
  });
  return out;
}

int atomic_add(int* to, int value) {
  Machine& m = *machine;
  m.locate(to, 4, true, false, "atomic_add");
  const int old = *to;
  *to = old + value;
  m.progress();
  return old;
}

int load_acquire(const int* from) {
  Machine& m = *machine;
  m.locate(from, 4, false, false, "load_acquire");
  // Others run, also those that it waits for.
  m.wait(State::spinning, "a loop around load_acquire");
  return *from;
}

}  // namespace compressed_linear::cuda::emulator
