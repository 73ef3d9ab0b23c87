// SPDX-License-Identifier: Apache-2.0
// The errors that the emulator of CUDA kernels detects: small kernels with one error each, all of
// which it must report, and none in the same kernels without it; and its counts of transactions.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "emulator_checks.h"

namespace {

// ---- memory and barriers ----

void reversal() {
  std::vector<int> in(128), out(128);
  for (int i = 0; i < 128; ++i) in[static_cast<size_t>(i)] = 7 * i;
  for (unsigned order = 0; order < 4; ++order)
    for (const bool barrier : {true, false}) {
      Options o;
      o.threads = 128;
      o.shared_bytes = 512;
      o.order = order;
      o.buffers = {buffer("in", in), buffer("out", out, true)};
      const Report report = emulator::launch(o, [&] {
        const int t = thread_index();
        store_shared(shared_base() + 4 * t, 0);
        sync_threads();
        store_shared(shared_base() + 4 * t, load_constant(&in[static_cast<size_t>(t)]));
        if (barrier) sync_threads();
        store_global(&out[static_cast<size_t>(t)], load_shared<int>(shared_base() + 4 * (127 - t)));
      });
      if (!barrier) {
        expect_problem("reversal without a barrier", report, "no barrier between");
        continue;
      }
      expect_clean("reversal", report);
      for (int i = 0; i < 128; ++i)
        check(out[static_cast<size_t>(i)] == 7 * (127 - i), "reversal gives another result");
      check(report.shared_loads.accesses == 4 && report.shared_loads.ratio() == 1 &&
                report.global_loads.transactions == 16 && report.global_stores.ratio() == 1,
            "reversal: traffic");
    }
}

// A warp's barrier orders its own lanes, and not other warps.
void warp_barrier() {
  for (const bool across : {false, true}) {
    Options o;
    o.threads = 64;
    o.shared_bytes = 256;
    const Report report = emulator::launch(o, [&] {
      const int t = thread_index();
      store_shared(shared_base() + 4 * t, t);
      sync_warp();
      load_shared<int>(shared_base() + 4 * (t ^ (across ? 32 : 1)));
    });
    if (across)
      expect_problem("sync_warp across warps", report, "no barrier between");
    else
      expect_clean("sync_warp", report);
  }
}

void named_barrier() {
  Options o;
  o.threads = 128;
  o.shared_bytes = 512;
  for (const bool third : {false, true}) {
    const Report report = emulator::launch(o, [&] {
      const int t = thread_index(), half = t / 64;
      store_shared(shared_base() + 4 * t, t);
      sync_named(1 + half, 64);
      const int other = (t ^ 32) ^ (third && t == 5 ? 64 : 0);
      check(third || load_shared<int>(shared_base() + 4 * other) == other, "named barrier");
      if (third) load_shared<int>(shared_base() + 4 * other);
    });
    if (third)
      expect_problem("reading the other half", report, "no barrier between");
    else
      expect_clean("named barriers", report);
  }
}

void write_after_read() {
  Options o;
  o.threads = 64;
  o.shared_bytes = 256;
  const Report report = emulator::launch(o, [] {
    const int t = thread_index();
    store_shared(shared_base() + 4 * t, t);
    sync_threads();
    load_shared<int>(shared_base() + 4 * (63 - t));
    store_shared(shared_base() + 4 * t, 1);
  });
  expect_problem("a write after a read", report, "read, with no barrier between");
}

// Halves of a word by two threads are no race.
void halves() {
  Options o;
  o.shared_bytes = 64;
  const Report report = emulator::launch(o, [] {
    store_shared(shared_base() + 2 * lane(), static_cast<uint16_t>(lane()));
    sync_threads();
    check(load_shared<uint32_t>(shared_base() + 4 * (lane() / 2)) ==
              static_cast<uint32_t>((lane() | 1) << 16 | (lane() & ~1)),
          "halves of a word");
  });
  expect_clean("halves of a word", report);
}

void missing_threads() {
  Options o;
  o.threads = 64;
  expect_problem("a barrier that a thread leaves out",
                 emulator::launch(o,
                                  [] {
                                    if (thread_index() != 40) sync_threads();
                                  }),
                 "63 threads (the first is 0) wait in sync_threads");
  expect_problem("a warp instruction that a lane leaves out",
                 emulator::launch(o,
                                  [] {
                                    if (thread_index() != 3) shuffle(1, 0);
                                  }),
                 "wait in shuffle");
  expect_problem("lanes at two warp instructions",
                 emulator::launch(o,
                                  [] {
                                    if (lane() < 16)
                                      shuffle(1, 0);
                                    else
                                      sync_warp();
                                  }),
                 "of its warp waits in shuffle");
  expect_problem("more threads than come",
                 emulator::launch(o,
                                  [] {
                                    if (thread_index() < 32) sync_named(2, 64);
                                  }),
                 "wait in sync_named");
}

void out_of_bounds() {
  Options o;
  o.shared_bytes = 64;
  std::vector<int> in(8), out(8);
  o.buffers = {buffer("in", in), buffer("out", out, true)};
  expect_problem("beyond shared memory",
                 emulator::launch(o, [] { store_shared(shared_base() + 64, 1); }), "there are 64");
  expect_problem("before shared memory", emulator::launch(o, [] { load_shared<int>(0); }),
                 "there are 64");
  expect_problem("misaligned", emulator::launch(o, [] { load_shared<int>(shared_base() + 2); }),
                 "not aligned");
  expect_problem("never written", emulator::launch(o, [] { load_shared<int>(shared_base()); }),
                 "reads uninitialized bytes");
  expect_problem("beyond a buffer", emulator::launch(o, [&] { load_global(in.data() + 8); }),
                 "at byte 32 of in");
  expect_problem(
      "misaligned in a buffer",
      emulator::launch(o, [&] { load_global(reinterpret_cast<Words2*>(in.data() + 1)); }),
      "not aligned");
  expect_problem("a buffer to read only", emulator::launch(o, [&] { store_global(in.data(), 1); }),
                 "read only");
  expect_problem("constant that is written",
                 emulator::launch(o,
                                  [&] {
                                    load_constant(out.data());
                                    store_global(out.data(), 1);
                                  }),
                 "load_constant reads buffer out");
}

// ---- asynchronous copies ----

void copies() {
  std::vector<uint32_t> in(256);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i) * 3 + 1;
  Options o;
  o.threads = 32;
  o.shared_bytes = 1024;
  o.buffers = {buffer("in", in)};
  enum class Mistake { none, no_wait, too_few, no_barrier, overwrite };
  for (const Mistake mistake : {Mistake::none, Mistake::no_wait, Mistake::too_few,
                                Mistake::no_barrier, Mistake::overwrite}) {
    const Report report = emulator::launch(o, [&] {
      const int t = thread_index();
      const uint32_t base = shared_base();
      copy_async<16>(base + 16 * t, in.data() + 4 * t, true);
      copy_async_commit();
      copy_async<16>(base + 512 + 16 * t, in.data() + 4 * t, t != 7);
      copy_async_commit();
      if (mistake == Mistake::overwrite) store_shared(base + 16 * t, 1u);
      if (mistake == Mistake::too_few)
        copy_async_wait<1>();
      else if (mistake != Mistake::no_wait)
        copy_async_wait<0>();
      if (mistake != Mistake::no_barrier) sync_threads();
      const uint32_t other = static_cast<uint32_t>(31 - t);
      const uint32_t second = load_shared<uint32_t>(base + 512 + 16 * other);
      if (mistake == Mistake::none) {
        check(second == (other == 7 ? 0 : in[4 * other]), "a copy brings something else");
        check(load_shared<uint32_t>(base + 16 * other + 4) == in[4 * other + 1],
              "a copy brings something else");
      } else if (mistake == Mistake::no_wait || mistake == Mistake::too_few) {
        check(second == 0xffffffffu, "a copy arrives before it is waited for");
      }
    });
    switch (mistake) {
      case Mistake::none:
        expect_clean("copies", report);
        // Lane 7's second copy reads nothing, the others 16 bytes, two in a sector.
        check(report.global_copies.transactions == 32 && report.global_copies.least == 32,
              "copies: sectors");
        check(report.shared_copies.ratio() == 1, "copies: bank conflicts");
        break;
      case Mistake::no_wait:
      case Mistake::too_few:
        expect_problem("a missing wait", report, "before waiting for it");
        break;
      case Mistake::no_barrier:
        expect_problem("copies of other threads", report, "no barrier between");
        break;
      case Mistake::overwrite:
        expect_problem("a store over a copy", report, "in flight");
        break;
    }
  }
}

// A ring of two stages, read and refilled: one barrier too few is a race between threads.
void pipeline() {
  std::vector<uint32_t> in(32 * 64);
  Options o;
  o.threads = 64;
  o.shared_bytes = 512;
  o.buffers = {buffer("in", in)};
  for (const bool guarded : {true, false}) {
    const Report report = emulator::launch(o, [&] {
      const int t = thread_index();
      const auto fetch = [&](int step) {
        copy_async<4>(shared_base() + 256 * (step & 1) + 4 * t, in.data() + 64 * step + t, true);
        copy_async_commit();
      };
      fetch(0);
      for (int step = 0; step < 6; ++step) {
        if (guarded) sync_threads();
        fetch(step + 1);
        copy_async_wait<1>();
        sync_threads();
        load_shared<uint32_t>(shared_base() + 256 * (step & 1) + 4 * (63 - t));
      }
    });
    if (guarded)
      expect_clean("a ring of stages", report);
    else
      expect_problem("a ring without its second barrier", report, "copies over what");
  }
}

// ---- what costs time ----

void conflicts() {
  struct Row {
    const char* what;
    int stride, bytes;
    double ratio;
  };
  for (const Row& row : {Row{"neighbouring words", 4, 4, 1}, Row{"every other word", 8, 4, 2},
                         Row{"a column of 32 words", 128, 4, 32}, Row{"a column of 33", 132, 4, 1},
                         Row{"one word", 0, 4, 1}, Row{"16 bytes each", 16, 16, 1},
                         Row{"every other 16 bytes", 32, 16, 2}, Row{"8 bytes each", 8, 8, 1}}) {
    Options o;
    o.shared_bytes = 8192;
    const Report report = emulator::launch(o, [&] {
      const uint32_t at = shared_base() + static_cast<uint32_t>(lane() * row.stride);
      if (row.bytes == 4) store_shared(at, row.stride == 0 ? 0 : lane());
      if (row.bytes == 8) store_shared(at, Words2{});
      if (row.bytes == 16) store_shared(at, Words4{});
    });
    check(report.shared_stores.ratio() == row.ratio,
          std::string("bank conflicts of ") + row.what + ": " +
              std::to_string(report.shared_stores.ratio()));
  }
  std::vector<int> in(4096);
  for (const int stride : {1, 2, 8, 64}) {
    Options o;
    o.buffers = {buffer("in", in)};
    const Report report = emulator::launch(
        o, [&] { load_constant(in.data() + static_cast<size_t>(lane() * stride)); });
    const double ratio = stride < 8 ? stride : 8;
    check(report.global_loads.ratio() == ratio,
          "sectors of every " + std::to_string(stride) +
              "th word: " + std::to_string(report.global_loads.ratio()));
  }
  // Rows of a matrix: 128 bytes apart they share their banks, unless their parts are permuted.
  for (const bool permuted : {true, false}) {
    Options o;
    o.shared_bytes = 2048;
    const Report report = emulator::launch(o, [&] {
      for (int i = 0; i < 4; ++i)
        store_shared(shared_base() + static_cast<uint32_t>(16 * (32 * i + lane())), Words4{});
      sync_threads();
      const int row = lane() % 16, part = lane() / 16;
      uint32_t r[4];
      load_matrix_x4(r, shared_base() + static_cast<uint32_t>(
                                            128 * row + 16 * (permuted ? part ^ (row % 8) : part)));
    });
    expect_clean("load_matrix", report);
    check(report.matrix_loads.ratio() == (permuted ? 1 : 8), "bank conflicts of load_matrix");
  }
}

// ---- several blocks ----

void blocks() {
  std::vector<int> lock(1), sum(1), left(1);
  const auto kernel = [&](bool forward) {
    // Each block waits for its turn and adds its number.
    const int turn = forward ? block_x() : grid_x() - 1 - block_x();
    if (thread_index() == 0) {
      while (load_acquire(lock.data()) != turn) {
      }
      store_global(sum.data(), load_global(sum.data()) * 3 + block_x());
      store_release(lock.data(), turn + 1);
    }
    sync_threads();
    if (thread_index() == 5) atomic_add(left.data(), 1);
  };
  Options o;
  o.grid_x = 4;
  o.buffers = {buffer("lock", lock, true), buffer("sum", sum, true), buffer("left", left, true)};
  expect_clean("blocks that wait for earlier ones", emulator::launch(o, [&] { kernel(true); }));
  check(sum[0] == ((0 * 3 + 1) * 3 + 2) * 3 + 3 && left[0] == 4, "blocks in turns");
  for (const int resident : {4, 2}) {
    lock[0] = sum[0] = 0;
    o.resident = resident;
    const Report report = emulator::launch(o, [&] { kernel(false); });
    if (resident == 4) {
      expect_clean("blocks that wait for later ones", report);
      check(sum[0] == ((3 * 3 + 2) * 3 + 1) * 3 + 0, "blocks in reverse");
    } else {
      expect_problem("blocks that wait for those that cannot start", report, "deadlock in block");
    }
  }
}

}  // namespace

int main() {
  reversal();
  warp_barrier();
  named_barrier();
  write_after_read();
  halves();
  missing_threads();
  out_of_bounds();
  copies();
  pipeline();
  conflicts();
  blocks();
  std::printf("emulator: %d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
