// SPDX-License-Identifier: Apache-2.0
// Every repack loop this processor can run, from random layouts of codes, against codes that are
// known beforehand, on buffers of exactly the stated size so that the address sanitizer sees every
// access outside. No torch.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/common/isa.h"
#include "cpu/repack/quads.h"
#include "cpu/repack/repack.h"

namespace cl = compressed_linear::cpu;
using cl::CodeOrder;
using cl::Kind;
using cl::PackedLayout;

namespace {

using Bytes = std::vector<uint8_t>;

std::vector<const cl::Isa*> loops() { return cl::supported_isas(cl::Kernels::floats); }

std::mt19937 generator(2);
int failures = 0;

int64_t below(int64_t bound) {
  return static_cast<int64_t>(generator() % static_cast<uint64_t>(bound));
}

// Whole of the stored codes: `rows` output channels by `stored_k` input channels, and some more
// along N that belong to others.
struct Layout {
  CodeOrder order;
  int container_bits;
  std::vector<int> widths;
  bool dense;   // fields follow each other over the borders of containers
  int64_t gap;  // containers before the first field
};

// First bit of field `i` of plane `plane` in a stream of `count` fields; planes one after another.
int64_t bit_of(const Layout& l, int64_t i, size_t plane, int64_t count) {
  int64_t first = l.gap * l.container_bits;
  const auto length = [&](int width) {
    const int64_t each = l.container_bits / width;
    const int64_t bits = l.dense ? count * width : (count + each - 1) / each * l.container_bits;
    return (bits + l.container_bits - 1) / l.container_bits * l.container_bits;
  };
  for (size_t p = 0; p < plane; ++p) first += length(l.widths[p]);
  const int width = l.widths[plane];
  const int64_t each = l.container_bits / width;
  return first + (l.dense ? i * width : i / each * l.container_bits + i % each * width);
}

int64_t stream_bytes(const Layout& l, int64_t count) {
  return bit_of(l, 0, l.widths.size() - 1, count) / 8 +
         (l.dense ? (count * l.widths.back() + l.container_bits - 1) / l.container_bits
                  : (count + l.container_bits / l.widths.back() - 1) /
                        (l.container_bits / l.widths.back())) *
             l.container_bits / 8;
}

void write_bits(uint8_t* stream, int64_t bit, int width, uint32_t value, int64_t container_bits,
                int64_t container_stride) {
  for (int i = 0; i < width; ++i, ++bit) {
    const int64_t container = bit / container_bits, inside = bit % container_bits;
    uint8_t& byte = stream[container * container_stride + inside / 8];
    byte = static_cast<uint8_t>(byte | ((value >> i & 1u) << (inside % 8)));
  }
}

void run_threads(const cl::Repack& job, cl::RepackFunction function, int64_t strips, bool& good) {
  std::vector<std::thread> threads;
  std::vector<char> results(static_cast<size_t>(strips), 1);
  for (int64_t strip = 0; strip < strips; ++strip)
    threads.emplace_back(
        [&, strip] { results[static_cast<size_t>(strip)] = function(job, strip, strip + 1); });
  for (std::thread& thread : threads) thread.join();
  good = std::all_of(results.begin(), results.end(), [](char c) { return c != 0; });
}

void fail(const std::string& what) {
  ++failures;
  std::printf("FAIL %s\n", what.c_str());
}

cl::Geometry geometry_of(PackedLayout layout, int64_t n, int64_t k, int64_t group,
                         cl::Element element) {
  return layout == PackedLayout::quads ? cl::make_quads_geometry(n, k, group, element.bits)
                                       : cl::make_geometry(n, k, group, element);
}

Bytes unpacked(const cl::Repack& job) {
  const cl::Geometry& g = job.geometry;
  Bytes rows(static_cast<size_t>(g.n * g.k));
  switch (job.layout) {
    case PackedLayout::planes:
      cl::unpack_tiles(g, job.packed, 0, g.tiles, rows.data());
      break;
    case PackedLayout::quads:
      cl::unpack_quads(g, job.packed, 0, g.tiles, rows.data());
      break;
    case PackedLayout::marlin:
      cl::unpack_marlin(g, job.packed, 0, g.tiles, rows.data());
      break;
  }
  return rows;
}

int64_t packed_bytes(const cl::Repack& job) {
  const cl::Geometry& g = job.geometry;
  return job.layout == PackedLayout::marlin ? g.n * g.k * g.element.bits / 8
                                            : g.tiles * g.tile_bytes();
}

const char* name_of(PackedLayout layout) {
  return layout == PackedLayout::planes  ? " planes on "
         : layout == PackedLayout::quads ? " quads on "
                                         : " marlin on ";
}

void test_codes(const std::string& what, const Layout& l, cl::Element element, int64_t n,
                int64_t rows, int64_t stored_k, int64_t k, int64_t group, bool reorder,
                const std::vector<PackedLayout>& layouts) {
  const int bits = element.bits;
  const int64_t n_first = l.order == CodeOrder::k_major ? 0 : below(5), others = n_first + below(3);
  const int64_t n_all = rows + others;
  const uint8_t flip = static_cast<uint8_t>(below(2) << (bits - 1));
  const bool by_n = l.order == CodeOrder::k_major;

  // The codes, and where each of the kernel's input channels has its own.
  std::vector<uint8_t> codes(static_cast<size_t>(n_all * stored_k));
  for (uint8_t& code : codes) {
    do code = static_cast<uint8_t>(below(int64_t{1} << bits));
    while (cl::is_wrong(element, code));
  }
  std::vector<int64_t> channel(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i)
    channel[static_cast<size_t>(i)] = reorder ? below(stored_k + 1) - 1 : i;

  const int64_t fields = by_n ? n_all : stored_k, lines = by_n ? stored_k : n_all;
  const int64_t length = stream_bytes(l, fields);
  Bytes stored(static_cast<size_t>(lines * length));
  const int64_t container = l.container_bits / 8;
  for (int64_t line = 0; line < lines; ++line)
    for (int64_t i = 0; i < fields; ++i) {
      const int64_t row = by_n ? i : line, column = by_n ? line : i;
      uint32_t code = codes[static_cast<size_t>(row * stored_k + column)] ^ flip;
      for (size_t plane = 0; plane < l.widths.size(); ++plane) {
        const int width = l.widths[plane];
        const bool down = l.order == CodeOrder::k_words;
        write_bits(stored.data() + line * (down ? container : length), bit_of(l, i, plane, fields),
                   width, code & ((1u << width) - 1), l.container_bits,
                   down ? lines * container : container);
        code >>= width;
      }
    }

  std::vector<int32_t> k_at, n_at;
  for (size_t plane = 0; plane < l.widths.size(); ++plane) {
    if (by_n)
      for (int64_t i = 0; i < rows; ++i)
        n_at.push_back(static_cast<int32_t>(bit_of(l, i, plane, fields)));
    if (by_n && plane > 0) continue;
    for (const int64_t from : channel)
      k_at.push_back(static_cast<int32_t>(from < 0 ? -1
                                          : by_n   ? from
                                                   : bit_of(l, from, plane, fields)));
  }

  cl::Repack job{};
  cl::CodeSource& s = job.source;
  s.order = l.order;
  s.data = stored.data();
  s.bytes = static_cast<int64_t>(stored.size());
  s.row_bytes = l.order == CodeOrder::k_words ? lines * container : length;
  s.container_bits = l.container_bits;
  for (const int width : l.widths) s.widths[s.planes++] = width;
  s.flip = flip;
  s.rows = rows;
  s.blank = n - rows;
  s.blank_code = 1;
  s.n_first = n_first;
  s.k_at = k_at.data();
  s.n_at = by_n ? n_at.data() : nullptr;
  for (const PackedLayout layout : layouts) {
    if (layout == PackedLayout::quads && element.kind != Kind::integer) continue;
    job.layout = layout;
    job.geometry = geometry_of(layout, n, k, group, element);
    cl::plan_fields(job);
    const int64_t strips = (job.geometry.tiles + cl::kStrip - 1) / cl::kStrip;
    Bytes first;
    for (const cl::Isa* row : loops()) {
      const std::string isa = row->name;
      const std::string where = what + name_of(layout) + isa;
      Bytes packed(static_cast<size_t>(packed_bytes(job)), 0xa5);
      job.packed = packed.data();
      bool good = false;
      run_threads(job, row->repack, strips, good);
      if (!good) fail(where + ": reports wrong codes");
      const Bytes back = unpacked(job);
      for (int64_t row = 0; row < n; ++row)
        for (int64_t i = 0; i < k; ++i) {
          const int64_t from = channel[static_cast<size_t>(i)];
          const uint8_t expected =
              row >= rows ? s.blank_code
              : from < 0  ? 0
                          : codes[static_cast<size_t>((row + n_first) * stored_k + from)];
          if (back[static_cast<size_t>(row * k + i)] == expected) continue;
          fail(where + ": channel " + std::to_string(row) + ", " + std::to_string(i));
          row = n;
          break;
        }
      if (first.empty()) first = packed;
      if (packed != first) fail(where + ": other bytes than on the first");
    }
  }
}

// Each wrong code is seen, wherever it lies.
void test_wrong_codes() {
  struct Wrong {
    cl::Element element;
    uint8_t code;
    PackedLayout layout;
  };
  for (const Wrong& w : {Wrong{{Kind::integer, 3}, 8, PackedLayout::planes},
                         Wrong{{Kind::integer, 3}, 8, PackedLayout::quads},
                         Wrong{{Kind::e4m3, 8}, 0x7f, PackedLayout::planes},
                         Wrong{{Kind::e4m3, 8}, 0xff, PackedLayout::planes},
                         Wrong{{Kind::e5m2, 8}, 0x7c, PackedLayout::planes},
                         Wrong{{Kind::e5m2, 8}, 0xfd, PackedLayout::planes}})
    for (const cl::Isa* row : loops()) {
      const std::string isa = row->name;
      const cl::Geometry g = geometry_of(w.layout, 37, 70, 70, w.element);
      for (int64_t at = 0; at < 37 * 70; at += 7) {
        Bytes rows(37 * 70, 3), packed(static_cast<size_t>(g.tiles * g.tile_bytes()));
        cl::Repack job = cl::from_rows(g, w.layout, rows.data(), 37, 0, packed.data());
        cl::plan_fields(job);
        if (!row->repack(job, 0, 1)) fail(isa + ": sees a wrong code where there is none");
        rows[static_cast<size_t>(at)] = w.code;
        if (row->repack(job, 0, 1)) fail(isa + ": does not see a wrong code");
      }
    }
}

// Floats are moved, not changed.
void test_floats() {
  for (const cl::Element element : {cl::Element{Kind::bfloat16, 16}, cl::Element{Kind::float16, 16},
                                    cl::Element{Kind::float32, 32}})
    for (const int64_t k : {1, 31, 64, 1100}) {
      const int64_t n = 70;
      const cl::Geometry g = cl::make_geometry(n, k, k, element);
      Bytes rows(static_cast<size_t>(n * k * cl::row_element_bytes(element)));
      for (uint8_t& byte : rows) byte = static_cast<uint8_t>(below(256));
      Bytes first;
      for (const cl::Isa* row : loops()) {
        const std::string isa = row->name;
        Bytes packed(static_cast<size_t>(g.tiles * g.tile_bytes()), 0xa5), back(rows.size());
        const cl::Repack job =
            cl::from_rows(g, PackedLayout::planes, rows.data(), n, 0, packed.data());
        row->repack(job, 0, 2);
        cl::unpack_tiles(g, packed.data(), 0, g.tiles, back.data());
        if (back != rows) fail(isa + ": floats change");
        if (first.empty()) first = packed;
        if (packed != first) fail(isa + ": other bytes of floats than on the first");
      }
    }
}

}  // namespace

// Runs each STEP-th layout, all of them by default.
int main(int argc, char** argv) {
  const int step = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::vector<std::vector<int>> planes = {{1},    {2},    {2, 1},    {4},
                                                {4, 1}, {4, 2}, {4, 2, 1}, {8}};
  int count = 0, run_count = 0;
  for (const CodeOrder order : {CodeOrder::n_major, CodeOrder::k_words, CodeOrder::k_major})
    for (int bits = 1; bits <= 8; ++bits)
      for (const int container : {8, 16, 32})
        for (int variant = 0; variant < 12; ++variant) {
          Layout l{order, container, {bits}, variant % 2 == 0, below(2)};
          if (variant % 3 == 0) l.widths = planes[static_cast<size_t>(bits - 1)];
          const bool small_float = bits == 8 && variant % 4 == 1;
          const cl::Element element = small_float
                                          ? cl::Element{variant < 6 ? Kind::e4m3 : Kind::e5m2, 8}
                                          : cl::Element{Kind::integer, bits};
          const int64_t groups[] = {1, 3, 20, 32, 128, 0}, group = groups[variant % 6];
          const int64_t k = group == 0 ? 1 + below(300) : group * (1 + below(1 + 600 / group));
          const bool reorder = variant % 4 == 3;
          const int64_t stored_k =
              reorder ? 1 + below(4000 / (count % 3 == 0 ? 1 : 20)) : k + below(9);
          const int64_t n = 1 + below(150), rows = variant % 5 == 0 ? below(n + 1) : n;
          if (count++ % step != 0) continue;
          const std::string what = "order " + std::to_string(static_cast<int>(order)) + " bits " +
                                   std::to_string(bits) + " in " + std::to_string(container) +
                                   " planes " + std::to_string(l.widths.size()) +
                                   (l.dense ? " dense" : "") + (reorder ? " reorder" : "");
          const auto sizes = [](int64_t of_n, int64_t of_k) {
            return " n " + std::to_string(of_n) + " k " + std::to_string(of_k);
          };
          test_codes(what + sizes(n, k) + " rows " + std::to_string(rows), l, element, n, rows,
                     stored_k, k, group == 0 ? k : group, reorder,
                     {PackedLayout::planes, PackedLayout::quads});
          if (bits == 4 || bits == 8) {
            const int64_t whole_n = (n + 63) / 64 * 64, whole_k = (k + 15) / 16 * 16;
            test_codes(what + sizes(whole_n, whole_k), l, element, whole_n,
                       rows == n ? whole_n : rows, std::max(stored_k, whole_k), whole_k, whole_k,
                       reorder, {PackedLayout::marlin});
          }
          ++run_count;
        }
  test_wrong_codes();
  test_floats();
  std::printf("%d layouts on", run_count);
  for (const cl::Isa* row : loops()) std::printf(" %s", row->name);
  std::printf(": %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
