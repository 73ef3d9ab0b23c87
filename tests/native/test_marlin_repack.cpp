// SPDX-License-Identifier: Apache-2.0
// The CUDA repack kernels in the emulator, with all its checks, against the scalar CPU loop, bit
// for bit, for random layouts of codes; and limits on sectors of global memory. No torch, no GPU.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cpu/repack/marlin_scales.h"
#include "cpu/repack/repack.h"
#include "cuda/emulator/emulator.h"
#include "cuda/marlin/repack.h"

namespace cpu = compressed_linear::cpu;
namespace cuda = compressed_linear::cuda;
namespace emulator = compressed_linear::cuda::emulator;
namespace marlin = compressed_linear::marlin;

namespace {

using Bytes = std::vector<uint8_t>;

std::mt19937 generator(3);
int failures = 0;

int64_t below(int64_t bound) {
  return static_cast<int64_t>(generator() % static_cast<uint64_t>(bound));
}

void fail(const std::string& what) {
  ++failures;
  std::printf("FAIL %s\n", what.c_str());
}

void check(const std::string& what, const emulator::Report& report) {
  for (const std::string& problem : report.problems) fail(what + ": " + problem);
}

// A layout of codes: consecutive fields of `width` bits along K or N, in AWQ's order or the plain
// one, with or without a gather of channels.
struct Layout {
  const char* name;
  cpu::CodeOrder order;
  int container_bits;
  int width;  // 0: that of the element
  bool awq, reorder;
  double load_ratio;  // most sectors that loads take, in those that their bytes need at least
};

const Layout kLayouts[] = {
    {"gptq", cpu::CodeOrder::k_words, 32, 0, false, false, 1.0},
    {"gptq reordered", cpu::CodeOrder::k_words, 32, 0, false, true, 1.0},
    {"k_words of int16", cpu::CodeOrder::k_words, 16, 0, false, false, 1.0},
    {"k_words of bytes", cpu::CodeOrder::k_words, 8, 0, false, false, 1.0},
    {"awq", cpu::CodeOrder::k_major, 32, 0, true, false, 1.0},
    {"awq reordered", cpu::CodeOrder::k_major, 32, 0, true, true, 1.0},
    {"compressed-tensors", cpu::CodeOrder::n_major, 32, 0, false, false, 1.0},
    {"compressed-tensors reordered", cpu::CodeOrder::n_major, 32, 0, false, true, 4.0},
    {"standard layout", cpu::CodeOrder::n_major, 8, 8, false, false, 1.0},
};

// Sectors of global memory and wavefronts of shared memory, relative to the minimum for the bytes
// of each access.
void check_traffic(const std::string& what, const emulator::Report& report, double load_ratio) {
  const struct {
    const char* name;
    double ratio, most;
  } counts[] = {{"global loads", report.global_loads.ratio(), load_ratio},
                {"global stores", report.global_stores.ratio(), 1.0},
                {"shared loads", report.shared_loads.ratio(), 4.0},
                {"shared stores", report.shared_stores.ratio(), 2.0}};
  for (const auto& count : counts)
    if (count.ratio > count.most)
      fail(what + ": " + count.name + " take " + std::to_string(count.ratio) +
           " times the least transactions, expected at most " + std::to_string(count.most));
}

emulator::Options scale_options(int64_t n, int64_t groups, const void* from, size_t bytes,
                                void* out) {
  emulator::Options options;
  options.grid_x = static_cast<int>((groups + cuda::kScaleGroups - 1) / cuda::kScaleGroups);
  options.grid_y = static_cast<int>(n / marlin::kTileN);
  options.threads = cuda::kScaleThreads;
  options.shared_bytes = cuda::kScaleShared;
  options.buffers = {{from, bytes, "values"}, {out, bytes, "out", true}};
  return options;
}

void test_codes(const Layout& l, cpu::Element element, int64_t n, int64_t rows, int64_t row_begin,
                int64_t k, int64_t others) {
  const int bits = element.bits, width = l.width == 0 ? bits : l.width;
  const bool by_n = l.order == cpu::CodeOrder::k_major;
  const int64_t stored_k = k + 16 * others, stored_n = rows + 8 * others;
  const std::string what = std::string(l.name) + ", " + std::to_string(bits) + " bits, n " +
                           std::to_string(n) + " k " + std::to_string(k) + " rows " +
                           std::to_string(rows);
  // Random bytes are random codes, but those of the standard layout have their upper bits empty,
  // and those of e4m3 are finite.
  Bytes stored(static_cast<size_t>(stored_n * stored_k * width / 8));
  for (uint8_t& byte : stored) {
    byte = static_cast<uint8_t>(below(256));
    if (width > bits) byte &= static_cast<uint8_t>((1 << bits) - 1);
    if (element.kind == cpu::Kind::e4m3 && (byte & 0x7f) == 0x7f) byte = 0;
  }

  cpu::Repack job{};
  job.geometry = cpu::make_geometry(n, k, k, element);
  job.layout = cpu::PackedLayout::marlin;
  cpu::CodeSource& s = job.source;
  s.order = l.order;
  s.data = stored.data();
  s.bytes = static_cast<int64_t>(stored.size());
  s.row_bytes = by_n                                 ? stored_n * width / 8
                : l.order == cpu::CodeOrder::n_major ? stored_k * width / 8
                                                     : stored_n * l.container_bits / 8;
  s.container_bits = l.container_bits;
  s.planes = 1;
  s.widths[0] = width;
  s.flip = static_cast<uint8_t>(
      width == bits && element.kind == cpu::Kind::integer ? below(2) << (bits - 1) : 0);
  s.rows = rows;
  s.blank = n - row_begin - rows;
  s.blank_code = 1;
  s.n_first = by_n ? 0 : 8 * others;
  job.row_begin = row_begin;
  std::vector<int32_t> k_at, n_at;
  for (int64_t i = 0; i < k; ++i) {
    const int64_t channel = l.reorder ? below(stored_k + 1) - 1 : i + others;
    k_at.push_back(static_cast<int32_t>(channel < 0 || by_n ? channel : channel * width));
  }
  const int awq[] = {0, 4, 1, 5, 2, 6, 3, 7};
  if (by_n)
    for (int64_t i = 8 * others; i < 8 * others + rows; ++i)
      n_at.push_back(
          static_cast<int32_t>((i / 8 * 8 + (l.awq && bits == 4 ? awq[i % 8] : i % 8)) * width));
  s.k_at = k_at.data();
  s.n_at = by_n ? n_at.data() : nullptr;
  cpu::plan_fields(job);

  std::vector<uint32_t> expected(static_cast<size_t>(n * k * bits / 32), 0xa5a5a5a5u),
      got = expected;
  job.packed = reinterpret_cast<uint8_t*>(expected.data());
  if (!cpu::repack_plain(job, 0, n / marlin::kTileN)) fail(what + ": the CPU reports wrong codes");

  int wrong = 0;
  const cpu::WrongCodes codes = cpu::wrong_codes(element);
  cuda::RepackParams p{};
  p.source = {s.data,
              s.bytes,
              s.row_bytes,
              static_cast<cuda::CodeOrder>(s.order),
              s.container_bits,
              width,
              s.flip,
              static_cast<int>(rows),
              static_cast<int>(s.blank),
              s.blank_code,
              static_cast<int>(s.n_first),
              s.k_at,
              s.n_at};
  p.packed = got.data();
  p.wrong = &wrong;
  p.n = static_cast<int>(n);
  p.k = static_cast<int>(k);
  p.row_begin = static_cast<int>(row_begin);
  p.wrong_mask = codes.mask;
  p.wrong_add = codes.add;
  p.wrong_bits = codes.bits;
  emulator::Options options;
  options.grid_x = static_cast<int>((k + cuda::kRepackK - 1) / cuda::kRepackK);
  options.grid_y = static_cast<int>(n / marlin::kTileN);
  options.threads = cuda::kRepackThreads;
  options.shared_bytes = cuda::kRepackShared;
  options.buffers = {{stored.data(), stored.size(), "stored"},
                     {k_at.data(), k_at.size() * 4, "k_at"},
                     {got.data(), got.size() * 4, "packed", true},
                     {&wrong, sizeof wrong, "wrong", true}};
  if (by_n) options.buffers.push_back({n_at.data(), n_at.size() * 4, "n_at"});
  const auto report = emulator::launch(options, [&] {
    if (bits == 4)
      cuda::repack_codes<4>(p);
    else
      cuda::repack_codes<8>(p);
  });
  check(what, report);
  if (wrong != 0) fail(what + ": the kernel reports wrong codes");
  if (got != expected) fail(what + ": other words than on the CPU");
  // Unaligned rows need one more sector each.
  check_traffic(what, report,
                others == 0 && k % cuda::kRepackK == 0 ? l.load_ratio : 1.5 * l.load_ratio);
}

template <class Value>
void test_scales(cpu::MarlinColumns columns, int64_t n, int64_t groups, bool transposed) {
  const std::string what = "scales of " + std::to_string(sizeof(Value)) + " bytes, columns " +
                           std::to_string(static_cast<int>(columns)) + ", n " + std::to_string(n) +
                           " groups " + std::to_string(groups);
  std::vector<Value> from(static_cast<size_t>(n * groups)), expected(from.size()), got(from.size());
  for (Value& value : from) value = static_cast<Value>(generator());
  const int64_t n_stride = transposed ? 1 : groups, group_stride = transposed ? n : 1;
  cpu::marlin_scales({reinterpret_cast<const uint8_t*>(from.data()),
                      static_cast<int64_t>(sizeof(Value)), n, groups, n_stride, group_stride},
                     columns, 0, n / marlin::kTileN, reinterpret_cast<uint8_t*>(expected.data()));
  const cuda::ScaleParams p = {
      from.data(), n_stride, group_stride, static_cast<int>(n), static_cast<int>(groups),
      got.data(),  columns,  nullptr};
  const auto report = emulator::launch(
      scale_options(n, groups, from.data(), from.size() * sizeof(Value), got.data()),
      [&] { cuda::repack_scales<Value>(p); });
  check(what, report);
  if (got != expected) fail(what + ": other values than on the CPU");
  check_traffic(what, report, groups == 1 || groups % 32 == 0 ? 1.0 : 1.75);
}

template <int Bits>
void test_zeros(int64_t n, int64_t groups, bool transposed, bool wrong_one) {
  const std::string what = "zero points of " + std::to_string(Bits) + " bits, n " +
                           std::to_string(n) + " groups " + std::to_string(groups);
  Bytes from(static_cast<size_t>(n * groups));
  for (uint8_t& zero : from) zero = static_cast<uint8_t>(below(1 << Bits));
  if (wrong_one) from[static_cast<size_t>(below(n * groups))] = 0xf0;
  std::vector<uint32_t> expected(static_cast<size_t>(n * groups * Bits / 32)), got(expected.size());
  const int64_t n_stride = transposed ? 1 : groups, group_stride = transposed ? n : 1;
  const bool good = cpu::marlin_zeros({from.data(), 1, n, groups, n_stride, group_stride}, Bits, 0,
                                      n / marlin::kTileN, expected.data());
  int wrong = 0;
  const cuda::ScaleParams p = {from.data(),
                               n_stride,
                               group_stride,
                               static_cast<int>(n),
                               static_cast<int>(groups),
                               got.data(),
                               cpu::MarlinColumns::grouped,
                               &wrong};
  emulator::Options options = scale_options(n, groups, from.data(), from.size(), got.data());
  options.buffers[1].bytes = got.size() * 4;
  options.buffers.push_back({&wrong, sizeof wrong, "wrong", true});
  const auto report = emulator::launch(options, [&] { cuda::repack_zeros<Bits>(p); });
  check(what, report);
  if (good != (wrong == 0)) fail(what + ": not of one mind on wrong zero points");
  if (got != expected) fail(what + ": other words than on the CPU");
  check_traffic(what, report, groups == 1 || groups % 32 == 0 ? 1.0 : 1.75);
}

// The repack kernel reports an invalid code.
void test_wrong_codes() {
  for (const cpu::Element element :
       {cpu::Element{cpu::Kind::integer, 4}, cpu::Element{cpu::Kind::e4m3, 8}})
    for (const int64_t at : {0, 63 * 64 + 63, 1234}) {
      Bytes rows(64 * 64, 3);
      rows[static_cast<size_t>(at)] = element.bits == 4 ? 16 : 0xff;
      std::vector<uint32_t> packed(static_cast<size_t>(64 * 64 * element.bits / 32));
      alignas(16) int32_t k_at[64];
      for (int i = 0; i < 64; ++i) k_at[i] = 8 * i;
      int wrong = 0;
      const cpu::WrongCodes codes = cpu::wrong_codes(element);
      cuda::RepackParams p{};
      p.source = {rows.data(), 64 * 64, 64,     cuda::CodeOrder::n_major, 8, 8, 0, 64, 0, 0,
                  0,           k_at,    nullptr};
      p.packed = packed.data();
      p.wrong = &wrong;
      p.n = p.k = 64;
      p.wrong_mask = codes.mask;
      p.wrong_add = codes.add;
      p.wrong_bits = codes.bits;
      emulator::Options options;
      options.threads = cuda::kRepackThreads;
      options.shared_bytes = cuda::kRepackShared;
      options.buffers = {{rows.data(), rows.size(), "rows"},
                         {k_at, sizeof k_at, "k_at"},
                         {packed.data(), packed.size() * 4, "packed", true},
                         {&wrong, sizeof wrong, "wrong", true}};
      check("wrong codes", emulator::launch(options, [&] {
              if (element.bits == 4)
                cuda::repack_codes<4>(p);
              else
                cuda::repack_codes<8>(p);
            }));
      if (wrong == 0) fail("a wrong code is not seen");
    }
}

}  // namespace

int main() {
  for (const Layout& layout : kLayouts)
    for (const cpu::Element element :
         {cpu::Element{cpu::Kind::integer, 4}, cpu::Element{cpu::Kind::integer, 8},
          cpu::Element{cpu::Kind::e4m3, 8}}) {
      test_codes(layout, element, 128, 128, 0, 128, 0);
      test_codes(layout, element, 192, 104, 64, 208, below(3));
    }
  for (const auto columns : {cpu::MarlinColumns::grouped, cpu::MarlinColumns::channel})
    for (const bool transposed : {false, true})
      for (const int64_t groups : {1, 32, 50}) {
        test_scales<uint16_t>(columns, 128, groups, transposed);
        test_scales<uint32_t>(columns, 64, groups, transposed);
        test_scales<uint8_t>(cpu::MarlinColumns::byte, 192, groups, transposed);
        test_zeros<4>(128, groups, transposed, false);
        test_zeros<8>(64, groups, transposed, false);
      }
  test_zeros<4>(128, 40, false, true);
  test_wrong_codes();
  std::printf("%d failures of the repack kernels\n", failures);
  return failures == 0 ? 0 : 1;
}
