// SPDX-License-Identifier: Apache-2.0
// The emulator of CUDA kernels: its primitives against plain arithmetic, and small kernels with one
// mistake each, all of which it must find.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/device/device.h"

using namespace compressed_linear::cuda;
using emulator::Options;
using emulator::Report;

namespace {

int failures = 0;

void check(bool good, const std::string& message) {
  if (good) return;
  ++failures;
  std::printf("FAIL %s\n", message.c_str());
}

void expect_clean(const char* what, const Report& report) {
  check(report.problem_count == 0,
        std::string(what) + ": expected no problem, got " +
            (report.problems.empty() ? "one without words" : report.problems[0]));
}

void expect_problem(const char* what, const Report& report, const char* words) {
  for (const std::string& problem : report.problems)
    if (problem.find(words) != std::string::npos) return;
  check(false, std::string(what) + ": expected a problem with '" + words + "', got " +
                   (report.problems.empty() ? "none" : report.problems[0]));
}

template <class T>
emulator::Buffer buffer(const char* name, std::vector<T>& data, bool writable = false) {
  return {data.data(), data.size() * sizeof(T), name, writable};
}

int lane() { return thread_index() & 31; }

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

// ---- arithmetic ----

void arithmetic() {
  std::mt19937 random(3);
  for (int i = 0; i < 2000; ++i) {
    const uint32_t a = random(), b = random(), c = random();
    check(lop3<0xea>(a, b, c) == ((a & b) | c), "lop3 (a & b) | c");
    check(lop3<0x96>(a, b, c) == (a ^ b ^ c), "lop3 a ^ b ^ c");
    check(lop3<0xca>(a, b, c) == ((a & b) | (~a & c)), "lop3 a ? b : c");
    check(prmt(a, b, 0x5140) ==
              ((a & 0xff) | (b & 0xff) << 8 | (a >> 8 & 0xff) << 16 | (b >> 8 & 0xff) << 24),
          "prmt");
    check(prmt(a, b, 0x7632) == (a >> 16 | (b >> 16) << 16), "prmt of upper halves");
    check((prmt(a, b, 0xb) & 0xffu) == (a >> 31 ? 0xffu : 0u), "prmt of a sign");
  }
  // Against a wider computation: 16-bit products are exact in double, and so are most sums.
  for (int i = 0; i < 5000; ++i) {
    const auto half = [&] { return static_cast<uint16_t>(random() & 0xbfff); };  // finite
    const uint16_t a = half(), b = half(), c = half();
    const double exact_half = static_cast<double>(widen<Half>(a)) * widen<Half>(b) + widen<Half>(c);
    const double exact_bf =
        static_cast<double>(widen<BFloat16>(a)) * widen<BFloat16>(b) + widen<BFloat16>(c);
    const float got_half = widen<Half>(static_cast<uint16_t>(fma_pair<Half>(a, b, c)));
    const float got_bf = widen<BFloat16>(static_cast<uint16_t>(fma_pair<BFloat16>(a, b, c)));
    const auto near = [](double exact, float got, int bits, double least, double largest) {
      if (std::fabs(exact) >= largest) return std::isinf(got) || std::fabs(got) >= largest * 0.99;
      const double unit = std::ldexp(1.0, std::ilogb(std::max(std::fabs(exact), least)) - bits + 1);
      return std::fabs(got - exact) <= unit * 0.5000001;
    };
    check(near(exact_half, got_half, 11, 0x1p-14, 65504), "fma of fp16");
    check(near(exact_bf, got_bf, 8, 0x1p-126, 3.3e38), "fma of bf16");
  }
  // Ties go to even, also where rounding to fp32 first would move the number onto a tie.
  check(fma_pair<Half>(0x3c01, 0x3c01, 0x0001) == 0x3c02, "fma of fp16 rounds once");
  check(subtract_pair<Half>(0x64076400, 0x64086408) == 0xbc00c800, "1024 + q - (1024 + z)");
  check(multiply_pair<BFloat16>(0x7e807e80, 0x00400001) == 0x3f003c00, "bf16 denormals count");
  for (int code = 0; code < 256; ++code) {
    const float got = widen_e4m3(static_cast<uint8_t>(code)),
                expected = compressed_linear::cpu::from_e4m3(static_cast<uint8_t>(code));
    check(got == expected || (std::isnan(got) && std::isnan(expected)), "e4m3");
    const float power = widen_e8m0(static_cast<uint8_t>(code));
    check(code == 255 ? std::isnan(power) : power == std::ldexp(1.0f, code - 127), "e8m0");
  }
}

template <class T>
void products() {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  uint16_t a[16][16], b[16][8];
  for (auto& row : a)
    for (uint16_t& value : row) value = narrow<T>(normal(random));
  for (auto& row : b)
    for (uint16_t& value : row) value = narrow<T>(normal(random));
  float c[16][8];
  Options o;
  o.shared_bytes = 1024;
  const Report report = emulator::launch(o, [&] {
    // A by load_matrix, B by its transpose: as kernels bring them.
    for (int i = lane(); i < 256; i += 32)
      store_shared(shared_base() + static_cast<uint32_t>(2 * i), a[i / 16][i % 16]);
    for (int i = lane(); i < 128; i += 32)
      store_shared(shared_base() + 512 + static_cast<uint32_t>(2 * i), b[i / 8][i % 8]);
    sync_threads();
    uint32_t fa[4], fb[4];
    load_matrix_x4(fa,
                   shared_base() + static_cast<uint32_t>(32 * (lane() % 16) + 16 * (lane() / 16)));
    load_matrix_x4_transposed(fb, shared_base() + 512 + static_cast<uint32_t>(16 * (lane() % 16)));
    const uint32_t b2[2] = {fb[0], fb[1]};
    float sums[4] = {1, 1, 1, 1};
    multiply_add<T>(sums, fa, b2);
    for (int i = 0; i < 4; ++i) c[lane() / 4 + i / 2 * 8][lane() % 4 * 2 + i % 2] = sums[i];
    check(shuffle_xor(lane(), 5) == (lane() ^ 5) && shuffle(lane(), 9) == 9, "shuffle");
  });
  expect_clean("mma", report);
  check(report.matrix_products == 1, "mma is counted");
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      double exact = 1;
      for (int k = 0; k < 16; ++k)
        exact += static_cast<double>(widen<T>(a[m][k])) * widen<T>(b[k][n]);
      check(std::fabs(c[m][n] - exact) < 1e-5, "mma gives another result");
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
  arithmetic();
  products<Half>();
  products<BFloat16>();
  std::printf("emulator: %d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
